"""Which rows are read together, and in which order they become minibatches: pure functions over numpy arrays.

A plan depends on (seed, epoch) and on where each batch's rows lie; never on threads, prefetch or memory.
Rows of a collection lie in runs of one batch and were shuffled once inside each batch when it was written, so
reading blocks of contiguous rows is cheap and nearly random already. A plan

1. cuts each run into blocks and puts each batch's blocks in a random order,
2. cuts that sequence into small units and merges the batches' units in proportion to their sizes,
3. cuts the merged sequence into fetches (16,384 rows), which are read at once,
4. orders the rows of each fetch: at random, by batch, or with each group's share in every minibatch.

Only step 1 is done for the whole epoch, on arrays of n/1024 entries. Where the merged sequence of step 2 is
at a given row is computed when it is asked for (:meth:`Plan.fetch`), so a billion cells are planned in a
second, and an epoch is entered anywhere as quickly as at its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streamx.errors import UsageError

ORDERS = ("shuffled", "by_batch", "stratified", "sequential")
BLOCK_ROWS = 1024
BLOCKS_PER_FETCH = 16
UNIT_ROWS = 64  # what a store keeps in one chunk: cutting finer decodes chunks twice
LEAST_UNIT_ROWS = 16  # of a batch that is too small to reach all fetches otherwise
_SEARCHED = 4  # units per batch that are sorted to find a place in the merged sequence

Runs = tuple[np.ndarray, np.ndarray]  # bounds int64 (n_runs + 1,), batch codes (n_runs,)


@dataclass(frozen=True)
class Fetch:
    """Rows that are read together.

    Attributes
    ----------
    ranges
        int64 (n_ranges, 2): row ranges to read one after the other, ascending, disjoint.
    order
        int64: position among the rows read of each row delivered.
    cuts
        int64: minibatch i of the fetch holds the delivered rows ``cuts[i]:cuts[i + 1]``.
    first
        Number, within the epoch, of minibatch 0 of the fetch.
    """

    ranges: np.ndarray
    order: np.ndarray
    cuts: np.ndarray
    first: int


@dataclass(frozen=True)
class _Batches:
    """Every batch's blocks in the order of an epoch, one batch after the other, and how they are merged.

    Attributes
    ----------
    start_k, offset_k
        First row of each block; rows before it in this order (one more entry: all rows).
    code_b, base_b, rows_b
        Batch code; rows before the batch in this order; rows of the batch.
    unit_b, phase_b
        Rows per unit; in [0, 1), when the first unit comes.
    equal
        Units come in turns and not in proportion to the batches' sizes.
    """

    start_k: np.ndarray
    offset_k: np.ndarray
    code_b: np.ndarray
    base_b: np.ndarray
    rows_b: np.ndarray
    unit_b: np.ndarray
    phase_b: np.ndarray
    equal: bool

    @property
    def units_b(self) -> np.ndarray:
        return -(-self.rows_b // self.unit_b)

    def key(self, b: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """When unit number `unit` of batch b comes: its place in the epoch, or its turn."""
        key = unit + self.phase_b[b]
        return key if self.equal else key / self.units_b[b]

    def units_before(self, key: float) -> np.ndarray:
        """Units of each batch that come before a key, int64 (n_batches,)."""
        every = np.arange(len(self.rows_b))
        count_b = np.ceil((key if self.equal else key * self.units_b) - self.phase_b).astype(np.int64)
        # the product is rounded otherwise than the quotient that makes keys
        count_b -= self.key(every, count_b - 1) >= key
        count_b += self.key(every, count_b) < key
        return np.clip(count_b, 0, self.units_b)

    def rows_before(self, units_b: np.ndarray) -> np.ndarray:
        """Rows of each batch in its first units."""
        return np.minimum(units_b * self.unit_b, self.rows_b)

    def cut(self, offset: int, *, whole: bool) -> np.ndarray:
        """Rows of each batch among the first `offset` rows of the merged sequence, int64 (n_batches,).

        Parameters
        ----------
        whole
            Cut no unit: take each that begins before `offset` to its end.
        """
        if offset <= 0:
            return np.zeros_like(self.rows_b)
        if offset >= self.rows_b.sum():
            return self.rows_b.copy()
        low, high = self._around(offset)
        low_b, high_b = self.units_before(low), self.units_before(high)
        while (high_b - low_b).sum() > _SEARCHED * len(self.rows_b):
            middle = (low + high) / 2
            if middle in (low, high):  # that many units come at once
                break
            middle_b = self.units_before(middle)
            if self.rows_before(middle_b).sum() <= offset:
                low, low_b = middle, middle_b
            else:
                high, high_b = middle, middle_b
        count_b = high_b - low_b
        b = np.repeat(np.arange(len(count_b)), count_b)
        unit = np.arange(len(b)) - np.repeat(np.cumsum(count_b) - count_b - low_b, count_b)
        turn = np.lexsort((b, self.key(b, unit)))
        b, unit = b[turn], unit[turn]
        size = np.minimum((unit + 1) * self.unit_b[b], self.rows_b[b]) - unit * self.unit_b[b]
        rows_b = self.rows_before(low_b)
        before = rows_b.sum() + np.cumsum(size) - size
        taken = np.where(before < offset, size if whole else np.minimum(size, offset - before), 0)
        return rows_b + np.bincount(b, weights=taken, minlength=len(rows_b)).astype(np.int64)

    def _around(self, offset: int) -> tuple[float, float]:
        """Keys before and after the place of row `offset` in the merged sequence."""
        if self.equal:
            return 0.0, float(self.units_b.max() + 1)
        # batches advance together, so the place is nearly the share of the rows
        share, slack = offset / self.rows_b.sum(), 2 * self.unit_b.sum() / self.rows_b.sum()
        low, high = max(share - slack, 0.0), min(share + slack, 1.0)
        enough = self.rows_before(self.units_before(high)).sum() >= offset
        return low if self.rows_before(
            self.units_before(low)
        ).sum() <= offset else 0.0, high if enough else 1.0

    def pieces(self, low_b: np.ndarray, high_b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """start, stop, batch position of the rows low_b..high_b of each batch, cut at blocks."""
        some = np.flatnonzero(high_b > low_b)
        low, high = self.base_b[some] + low_b[some], self.base_b[some] + high_b[some]
        first = np.searchsorted(self.offset_k, low, side="right") - 1
        count = np.searchsorted(self.offset_k, high, side="left") - first
        which = np.repeat(np.arange(len(some)), count)
        block = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(which))
        begin = np.maximum(low[which], self.offset_k[block])
        end = np.minimum(high[which], self.offset_k[block + 1])
        start = self.start_k[block] + begin - self.offset_k[block]
        return start, start + end - begin, some[which]


@dataclass(frozen=True)
class Plan:
    """An epoch as a function: fetch number -> what it reads and delivers.

    Attributes
    ----------
    n_rows, n_fetches
        Of the epoch.
    fetch_rows
        Rows of a fetch (the last: fewer; ``by_batch``: within a unit per batch).
    start, rank, world
        This plan delivers every ``world``-th minibatch of the epoch, from number ``start + rank`` on.
    strata_n
        For ``stratified``: a code per row to share out instead of the batch, an array or what gives those of
        a slice; None: the batch.
    nbytes
        Memory that a loader needs to carry it out, where one made it.
    """

    n_rows: int
    fetch_rows: int
    order: str
    minibatch_size: int
    drop_last: bool
    seed: int
    epoch: int
    shares: str = "proportional"
    start: int = 0
    rank: int = 0
    world: int = 1
    strata_n: Any = field(default=None, repr=False)
    nbytes: int = 0
    batches: _Batches | None = field(default=None, repr=False)

    @property
    def n_fetches(self) -> int:
        return -(-self.n_rows // self.fetch_rows)

    @property
    def max_fetch_rows(self) -> int:
        """Rows of the largest fetch, at most."""
        more = 0
        if self.order == "by_batch" and self.batches is not None:
            more = int(self.batches.unit_b.max(initial=0))
        return min(self.n_rows, self.fetch_rows + more)

    @property
    def n_minibatches(self) -> int:
        """Of the whole epoch, over all ranks."""
        return self._before(self.n_fetches)

    @property
    def n_own(self) -> int:
        """Minibatches of this rank; with `drop_last` every rank has equally many."""
        left = max(0, self.n_minibatches - self.start)
        return left // self.world if self.drop_last else max(0, -(-(left - self.rank) // self.world))

    def fetch_of(self, minibatch: int) -> int:
        """The fetch that holds a minibatch of the epoch, by its number."""
        if self.order != "by_batch":
            return min(minibatch * self.minibatch_size // self.fetch_rows, self.n_fetches)
        low, high = 0, self.n_fetches
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._before(middle) <= minibatch else (low, middle - 1)
        return low

    def fetch(self, number: int) -> Fetch:
        """What fetch ``number`` reads and delivers."""
        low, high = number * self.fetch_rows, min((number + 1) * self.fetch_rows, self.n_rows)
        size = self.minibatch_size
        first, last = self._before(number), self._before(number + 1)
        if self.batches is None:
            cuts = np.append(np.arange(0, high - low, size), high - low)[: last - first + 1]
            return self._own(Fetch(np.array([[low, high]]), np.arange(high - low), cuts, first))
        whole = self.order == "by_batch"
        start, stop, batch = self.batches.pieces(
            self.batches.cut(low, whole=whole), self.batches.cut(high, whole=whole)
        )
        by_row = np.argsort(start)
        start, stop, batch = start[by_row], stop[by_row], batch[by_row]
        rows = stop - start
        apart = np.flatnonzero(np.append(start, 0)[1:-1] != stop[:-1]) + 1
        first_piece, last_piece = np.append(0, apart)[: len(start)], np.append(apart, len(start)) - 1
        ranges = np.stack([start[first_piece], stop[last_piece[: len(start)]]], axis=1)
        order = permutation(int(rows.sum()), self.seed, self.epoch, number + 1)
        if self.order == "shuffled":
            cuts = np.append(np.arange(0, len(order), size), len(order))[: last - first + 1]
        else:
            batch_n = np.repeat(batch, rows)[order]
            if whole:
                order, cuts = self._one_batch_each(order, batch_n, number)
            else:
                if self.strata_n is not None:
                    batch_n = np.concatenate([self.strata_n[a:b] for a, b in ranges])[order]
                order = order[spread(batch_n, self.shares)]
                cuts = np.append(np.arange(0, len(order), size), len(order))[: last - first + 1]
        return self._own(Fetch(ranges, order, cuts, first))

    def _own(self, fetch: Fetch) -> Fetch:
        """The rows of this rank's minibatches alone."""
        number = fetch.first - self.start + np.arange(len(fetch.cuts) - 1)
        own = np.flatnonzero((number >= 0) & (number % self.world == self.rank))
        own = own[number[own] // self.world < self.n_own]
        if len(own) == len(number):
            return fetch
        sizes = fetch.cuts[own + 1] - fetch.cuts[own]
        keep = np.repeat(fetch.cuts[own] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        cuts = np.concatenate([[0], np.cumsum(sizes)])
        return replace(fetch, order=fetch.order[keep], cuts=cuts)

    def _before(self, fetch: int) -> int:
        """Minibatches of the epoch before a fetch."""
        rows, size = min(fetch * self.fetch_rows, self.n_rows), self.minibatch_size
        if self.order != "by_batch" or self.batches is None:
            return rows // size if self._drops else -(-rows // size)
        rows_b = self.batches.cut(rows, whole=True)
        return int((rows_b // size if self._drops else -(-rows_b // size)).sum())

    @property
    def _drops(self) -> bool:
        """Leave minibatches out that are not full, unless none would be left."""
        rows_b = self.n_rows if self.order != "by_batch" or self.batches is None else self.batches.rows_b
        return self.drop_last and bool(np.any(rows_b >= self.minibatch_size))

    def _one_batch_each(
        self, order: np.ndarray, batch_n: np.ndarray, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Minibatches that hold one batch each, in random order."""
        grouped = np.argsort(batch_n, kind="stable")
        edges = np.flatnonzero(np.diff(batch_n[grouped])) + 1
        runs = zip(np.append(0, edges), np.append(edges, len(order)), strict=True)
        size = self.minibatch_size
        slices = [(low, min(low + size, stop)) for start, stop in runs for low in range(start, stop, size)]
        if self._drops:
            slices = [(low, high) for low, high in slices if high - low == size]
        slices = [slices[i] for i in permutation(len(slices), self.seed, self.epoch, number + 1, 1)]
        taken = [grouped[low:high] for low, high in slices]
        order = order[np.concatenate(taken)] if taken else order[:0]
        return order, np.cumsum([0, *map(len, taken)])


def make_plan(
    runs: Runs,
    *,
    order: str = "shuffled",
    minibatch_size: int = 64,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
    shares: str = "proportional",
    strata_n: Any = None,
    block_rows: int = BLOCK_ROWS,
    blocks_per_fetch: int = BLOCKS_PER_FETCH,
) -> Plan:
    """Plan one epoch.

    Parameters
    ----------
    runs
        Where each batch's rows lie: bounds of the runs, int64 (n_runs + 1,), and the batch code of each.
    order
        ``shuffled`` mixes rows of all batches; ``by_batch`` takes each minibatch from a single batch (the
        last of a batch may be smaller); ``stratified`` gives each minibatch its share of every batch;
        ``sequential`` keeps the row order. All deliver each row exactly once.
    start, rank, world
        Deliver only the minibatches m of the epoch with ``m >= start`` and ``(m - start) % world == rank``:
        the ranks' minibatches, taken in turns, are the epoch's from `start` on.
    drop_last
        Leave minibatches that are not full out, unless none would be left.
    shares
        For ``stratified``: ``proportional`` to the batches' sizes, or ``equal`` for as long as a batch lasts.
    strata_n
        For ``stratified``: a code per row (n_rows,) that minibatches hold in shares, instead of the batch; an
        array, or anything that gives the codes of a slice.

    Raises
    ------
    UsageError
        For an unknown order or a size below 1.
    """
    if order not in ORDERS or shares not in ("proportional", "equal"):
        raise UsageError(f"order {order!r}, shares {shares!r}", fix=f"order: one of {', '.join(ORDERS)}")
    if min(minibatch_size, block_rows, blocks_per_fetch) < 1:
        raise UsageError(f"minibatch_size = {minibatch_size}", fix="a positive number")
    if not 0 <= rank < world:
        raise UsageError(f"rank {rank} of {world}", fix="a rank from 0 to world - 1")
    n_rows = int(runs[0][-1])
    fetch_rows = max(block_rows * blocks_per_fetch // minibatch_size, 1) * minibatch_size
    of_epoch = (order, minibatch_size, drop_last, seed, epoch, shares)
    plan = Plan(n_rows, fetch_rows, *of_epoch, start, rank, world, strata_n)
    if order == "sequential" or n_rows == 0:
        return plan
    whole = -(-UNIT_ROWS // minibatch_size) * minibatch_size
    least, most = (whole, whole) if order == "by_batch" else (LEAST_UNIT_ROWS, UNIT_ROWS)
    start_k, rows_k, code_k = _blocks(runs, block_rows)
    shuffled = permutation(len(start_k), seed, epoch, 0)
    shuffled = shuffled[np.argsort(code_k[shuffled], kind="stable")]
    start_k, rows_k, code_k = start_k[shuffled], rows_k[shuffled], code_k[shuffled]
    offset_k = np.concatenate([[0], np.cumsum(rows_k)])
    begins = np.flatnonzero(np.diff(code_k, prepend=code_k[0] - 1))
    base_b = offset_k[begins]
    rows_b = np.diff(np.append(base_b, n_rows))
    unit_b = np.clip(-(-rows_b // plan.n_fetches), least, most)
    phase_b = np.random.PCG64(np.random.SeedSequence((seed, epoch, 0, 1))).random_raw(len(base_b)) / 2.0**64
    equal = order == "stratified" and shares == "equal"
    batches = _Batches(start_k, offset_k, code_k[begins], base_b, rows_b, unit_b, phase_b, equal)
    return replace(plan, batches=batches)


def runs_of(batch_n: np.ndarray) -> Runs:
    """Runs of equal codes in an array of one code per row."""
    batch_n = np.asarray(batch_n)
    changes = np.flatnonzero(batch_n[1:] != batch_n[:-1]) + 1
    starts = np.append(0, changes)[: len(batch_n)]
    return np.append(starts, len(batch_n)).astype(np.int64), batch_n[starts]


def runs_within(runs: Runs, start: int, stop: int) -> Runs:
    """Runs of the rows start..stop, counted from `start`."""
    bounds, code_r = runs
    inside = (bounds[1:] > start) & (bounds[:-1] < stop)
    clipped = np.clip(np.append(bounds[:-1][inside], stop), start, stop) - start
    return clipped, code_r[inside]


def permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of n that depends on the key alone, on any version of numpy.

    Random bits above, the number below: the sorted values are all different, so any sort gives the same, and
    numpy's fastest one needs no second array.
    """
    bits = max(1, int(n - 1).bit_length())
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    low = np.uint64((1 << bits) - 1)
    raw = (raw & ~low) | np.arange(n, dtype=np.uint64)
    raw.sort()
    return (raw & low).astype(np.int64)


def _blocks(runs: Runs, block_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """start, rows, batch of blocks: each run cut every ``block_rows`` rows."""
    bounds, code_r = runs
    rows_r = np.diff(bounds)
    count_r = -(-rows_r // block_rows)
    run_k = np.repeat(np.arange(len(rows_r)), count_r)
    within_k = (np.arange(len(run_k)) - np.repeat(np.cumsum(count_r) - count_r, count_r)) * block_rows
    rows_k = np.minimum(block_rows, rows_r[run_k] - within_k)
    return bounds[run_k] + within_k, rows_k, np.asarray(code_r)[run_k].astype(np.int64)


def spread(code_n: np.ndarray, shares: str) -> np.ndarray:
    """Order rows so that each stretch holds its share of every code (rows of a code keep their order)."""
    codes, code_n = np.unique(code_n, return_inverse=True)
    grouped = np.argsort(code_n, kind="stable")
    rows_b = np.bincount(code_n, minlength=len(codes))
    rank = np.empty(len(code_n))
    rank[grouped] = np.arange(len(code_n)) - np.repeat(np.cumsum(rows_b) - rows_b, rows_b)
    key = rank if shares == "equal" else (rank + 0.5) / rows_b[code_n]
    return np.argsort(key, kind="stable")
