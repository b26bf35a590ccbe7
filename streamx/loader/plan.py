"""Which rows are read together, and in which order they become minibatches: pure functions over numpy arrays.

A plan depends on (seed, epoch) and on where each batch's rows lie; never on threads, prefetch or memory.
Rows of a collection are grouped by batch and were shuffled once inside each batch when it was written, so
reading blocks of contiguous rows is cheap and nearly random already. A plan

1. cuts each batch's rows into blocks and puts these in a random order,
2. cuts that sequence into small units and merges the batches' units in proportion to their sizes,
3. cuts the merged sequence into fetches (8,192 rows and more), which are read at once,
4. orders the rows of each fetch: at random, by batch, or with each batch's share in every minibatch.

Steps 1-3 happen once per epoch on arrays of about n/64 entries; step 4 when a fetch is due.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamx.errors import UsageError

ORDERS = ("shuffled", "by_batch", "stratified", "sequential")
BLOCK_ROWS = 512
BLOCKS_PER_FETCH = 32
UNIT_ROWS = 64  # what a store keeps in one chunk: cutting finer decodes chunks twice
LEAST_UNIT_ROWS = 16  # of a batch that is too small to reach all fetches otherwise


@dataclass(frozen=True)
class Fetch:
    """Rows that are read together.

    Attributes
    ----------
    ranges
        int64 (n_ranges, 2): row ranges to read one after the other, ascending, disjoint.
    order
        int64 (n_rows,): position among the rows read of each row delivered.
    cuts
        int64: minibatch i holds the delivered rows ``cuts[i]:cuts[i + 1]``.
    """

    ranges: np.ndarray
    order: np.ndarray
    cuts: np.ndarray


@dataclass(frozen=True)
class Plan:
    """An epoch: pieces of rows in reading order, grouped into fetches.

    Attributes
    ----------
    start, stop, batch
        int64 (n_pieces,): rows of each piece and their batch code.
    first
        int64 (n_fetches + 1,): the pieces of fetch f are ``first[f]:first[f + 1]``.
    """

    start: np.ndarray
    stop: np.ndarray
    batch: np.ndarray
    first: np.ndarray
    order: str
    shares: str
    minibatch_size: int
    drop_last: bool
    seed: int
    epoch: int

    @property
    def n_fetches(self) -> int:
        return len(self.first) - 1

    @property
    def n_rows(self) -> int:
        return int((self.stop - self.start).sum())

    @property
    def max_fetch_rows(self) -> int:
        """Rows of the largest fetch."""
        ends = np.concatenate([[0], np.cumsum(self.stop - self.start)])[self.first]
        return int(np.diff(ends).max(initial=0))

    @property
    def _whole(self) -> int:
        """Minibatches that are full."""
        if self.order != "by_batch":
            return self.n_rows // self.minibatch_size
        rows_b = np.bincount(self.batch, weights=self.stop - self.start).astype(np.int64)
        return int((rows_b // self.minibatch_size).sum())

    @property
    def _drops(self) -> bool:
        return self.drop_last and self._whole > 0

    @property
    def n_minibatches(self) -> int:
        if self._drops:
            return self._whole
        if self.order != "by_batch":
            return -(-self.n_rows // self.minibatch_size)
        rows_b = np.bincount(self.batch, weights=self.stop - self.start).astype(np.int64)
        return int((-(-rows_b // self.minibatch_size)).sum())

    def fetch(self, number: int) -> Fetch:
        """What fetch ``number`` reads and delivers."""
        pieces = slice(int(self.first[number]), int(self.first[number + 1]))
        start, stop, batch = self.start[pieces], self.stop[pieces], self.batch[pieces]
        by_row = np.argsort(start, kind="stable")
        start, stop, batch = start[by_row], stop[by_row], batch[by_row]
        rows = stop - start
        n = int(rows.sum())
        apart = np.concatenate([[True], start[1:] != stop[:-1]])
        ranges = np.stack([start[apart], stop[np.append(apart[1:], True)]], axis=1)
        size = self.minibatch_size
        cuts = np.append(np.arange(0, n, size), n)
        if self.order == "sequential":
            order = np.arange(n)
        else:
            order = permutation(n, self.seed, self.epoch, number + 1)
            batch_n = np.repeat(batch, rows)[order]
            if self.order == "stratified":
                order = order[_spread(batch_n, self.shares)]
            elif self.order == "by_batch":
                order, cuts = self._one_batch_each(order, batch_n, number)
        if self._drops and self.order != "by_batch":
            cuts = cuts[: n // size + 1]
        return Fetch(ranges, order, cuts.astype(np.int64))

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
    batch_n: np.ndarray,
    *,
    order: str = "shuffled",
    minibatch_size: int = 64,
    seed: int = 0,
    epoch: int = 0,
    drop_last: bool = False,
    shares: str = "proportional",
    block_rows: int = BLOCK_ROWS,
    blocks_per_fetch: int = BLOCKS_PER_FETCH,
) -> Plan:
    """Plan one epoch.

    Parameters
    ----------
    batch_n
        Batch code of each row, integer (n_rows,); equal codes lie together in long runs.
    order
        ``shuffled`` mixes rows of all batches; ``by_batch`` takes each minibatch from a single batch (the
        last of a batch may be smaller); ``stratified`` gives each minibatch its share of every batch;
        ``sequential`` keeps the row order. All deliver each row exactly once.
    drop_last
        Leave minibatches that are not full out, unless none would be left.
    shares
        For ``stratified``: ``proportional`` to the batches' sizes, or ``equal`` for as long as a batch lasts.

    Raises
    ------
    UsageError
        For an unknown order or a size below 1.
    """
    if order not in ORDERS or shares not in ("proportional", "equal"):
        raise UsageError(f"order {order!r}, shares {shares!r}", fix=f"order: one of {', '.join(ORDERS)}")
    if min(minibatch_size, block_rows, blocks_per_fetch) < 1:
        raise UsageError(f"minibatch_size = {minibatch_size}", fix="a positive number")
    batch_n = np.asarray(batch_n)
    fetch_rows = max(block_rows * blocks_per_fetch // minibatch_size, 1) * minibatch_size
    if order == "sequential":
        edges = np.append(np.arange(0, len(batch_n), fetch_rows), len(batch_n))
        start, stop = edges[:-1], edges[1:]
        batch, first = np.zeros_like(start), np.arange(len(start) + 1)
    else:
        whole = -(-UNIT_ROWS // minibatch_size) * minibatch_size
        limits = (whole, whole) if order == "by_batch" else (LEAST_UNIT_ROWS, UNIT_ROWS)
        units = _Units(*limits, -(-len(batch_n) // fetch_rows), order == "stratified" and shares == "equal")
        start, stop, batch, unit = _merge(*_blocks(batch_n, block_rows), units, seed, epoch)
        if order == "by_batch":
            first = _group_units(stop - start, unit, fetch_rows)
        else:
            start, stop, batch, first = _cut(start, stop, batch, fetch_rows)
    return Plan(start, stop, batch, first, order, shares, minibatch_size, drop_last, seed, epoch)


def permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of n that depends on the key alone, on any version of numpy."""
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")


def _blocks(batch_n: np.ndarray, block_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """start, stop, batch of blocks: each run of equal codes cut every ``block_rows`` rows."""
    n = len(batch_n)
    edges = np.flatnonzero(np.diff(batch_n)) + 1 if n else np.zeros(0, np.int64)
    run_start = np.concatenate([[0], edges])[: max(n, 1)]
    run_stop = np.append(edges, n)
    count = -(-(run_stop - run_start) // block_rows)
    run = np.repeat(np.arange(len(run_start)), count)
    within = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    start = run_start[run] + within * block_rows
    stop = np.minimum(start + block_rows, run_stop[run])
    return start, stop, np.asarray(batch_n)[start].astype(np.int64)


@dataclass(frozen=True)
class _Units:
    """Rows per unit: so few that a batch reaches all fetches, within limits; do batches take turns?"""

    least: int
    most: int
    n_fetches: int
    equal: bool

    def rows(self, rows_b: np.ndarray) -> np.ndarray:
        return np.clip(-(-rows_b // max(self.n_fetches, 1)), self.least, self.most)


def _merge(
    start: np.ndarray, stop: np.ndarray, batch: np.ndarray, units: _Units, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Permute each batch's blocks, cut them into units, merge all batches' units by their place in the epoch.

    Unit j of the m units of a batch comes at (j + phase) / m of the epoch; if batches take turns, in round j.
    Returns start, stop, batch, unit of the pieces: a unit that spans two blocks is two pieces.
    """
    shuffled = permutation(len(start), seed, epoch, 0)
    shuffled = shuffled[np.argsort(batch[shuffled], kind="stable")]
    start, stop, batch = start[shuffled], stop[shuffled], batch[shuffled]
    offset = np.concatenate([[0], np.cumsum(stop - start)])
    base_b = offset[:-1][np.concatenate([[True], batch[1:] != batch[:-1]])[: len(batch)]]
    rows_b = np.diff(np.append(base_b, offset[-1]))
    size_b = units.rows(rows_b)
    units_b = -(-rows_b // size_b)
    which = np.repeat(np.arange(len(base_b)), units_b)
    number = np.arange(len(which)) - np.repeat(np.cumsum(units_b) - units_b, units_b)
    unit_start = base_b[which] + number * size_b[which]
    phase_b = np.random.PCG64(np.random.SeedSequence((seed, epoch, 0, 1))).random_raw(len(base_b)) / 2.0**64
    key = number + phase_b[which]
    key = key if units.equal else key / units_b[which]
    cut = np.unique(np.concatenate([offset, unit_start]))
    low, high = cut[:-1], cut[1:]
    block = np.searchsorted(offset, low, side="right") - 1
    unit = np.searchsorted(unit_start, low, side="right") - 1
    merged = np.argsort(key[unit], kind="stable")
    low, high, block, unit = low[merged], high[merged], block[merged], unit[merged]
    piece_start = start[block] + low - offset[block]
    return piece_start, piece_start + high - low, batch[block], unit


def _cut(
    start: np.ndarray, stop: np.ndarray, batch: np.ndarray, fetch_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut the sequence of pieces every ``fetch_rows`` rows: start, stop, batch, first piece of each fetch."""
    offset = np.concatenate([[0], np.cumsum(stop - start)])
    edges = np.arange(0, offset[-1], fetch_rows)
    cut = np.unique(np.concatenate([offset, edges]))
    low, high = cut[:-1], cut[1:]
    piece = np.searchsorted(offset, low, side="right") - 1
    low_row = start[piece] + low - offset[piece]
    first = np.append(np.searchsorted(low, edges), len(low))
    return low_row, low_row + high - low, batch[piece], first


def _group_units(rows: np.ndarray, unit: np.ndarray, fetch_rows: int) -> np.ndarray:
    """First piece of each fetch, such that no unit is cut: a fetch holds the units that begin in its rows."""
    begins = np.concatenate([[True], unit[1:] != unit[:-1]])[: len(unit)]
    before = np.cumsum(rows) - rows
    fetch = np.maximum.accumulate(np.where(begins, before // fetch_rows, 0))
    return np.append(np.flatnonzero(np.diff(fetch, prepend=-1)), len(unit))


def _spread(batch_n: np.ndarray, shares: str) -> np.ndarray:
    """Order rows so that each stretch holds its share of every batch (rows of a batch keep their order)."""
    codes, code_n = np.unique(batch_n, return_inverse=True)
    grouped = np.argsort(code_n, kind="stable")
    rows_b = np.bincount(code_n, minlength=len(codes))
    rank = np.empty(len(batch_n))
    rank[grouped] = np.arange(len(batch_n)) - np.repeat(np.cumsum(rows_b) - rows_b, rows_b)
    key = rank if shares == "equal" else (rank + 0.5) / rows_b[code_n]
    return np.argsort(key, kind="stable")
