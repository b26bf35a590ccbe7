"""Minibatches from a view: a plan (``plan``) executed by one short loop, ahead of need (``prefetch``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamx.config import parse_bytes
from streamx.errors import ResourceError, UsageError
from streamx.loader.column import Column, codes_of
from streamx.loader.deliver import OUTPUTS, Block, Delivery, Minibatch, made_dtypes
from streamx.loader.plan import BLOCK_ROWS, BLOCKS_PER_FETCH, Plan, make_plan
from streamx.loader.prefetch import Pool, prefetched
from streamx.loader.rows import Rows, selection, to_read
from streamx.loader.transform import Transform
from streamx.store.collection import Collection, open_collection
from streamx.store.kept import NBYTES_OF_LOADER
from streamx.store.layout import index_dtype

TOTAL = "_streamx_total"
# of minibatches that are made at once: they stay in the processor's cache; on a GPU few large calls count
GROUP_BYTES, GROUP_BYTES_ON_DEVICE = 4_000_000, 64_000_000
CACHED_BYTES = 32_000_000  # of a fetch that a cache may hold


@dataclass(frozen=True)
class Budget:
    """Bytes that a loader needs at once.

    Attributes
    ----------
    fetch, fetches
        One fetch as it waits for its turn; how many are held.
    making
        What making fetches takes on top.
    group, groups
        Minibatches that are made at once; how many such groups are held.
    rows
        What is kept per row of the collection.
    """

    fetch: int
    fetches: int
    making: int
    group: int
    groups: int
    rows: int

    @property
    def nbytes(self) -> int:
        return self.fetch * self.fetches + self.group * self.groups + self.making + self.rows


class Loader:
    """Minibatches of a view or store, in an order that depends on (seed, epoch) alone.

    Iterating gives one epoch, or what is left of it after :meth:`load_state_dict`; iterating again gives the
    next one. ``loader.at(epoch, minibatch)`` is the pure form.

    Parameters
    ----------
    view
        A :class:`Collection` or its path.
    minibatch_size
        Cells per minibatch.
    order, shares, drop_last
        See :func:`streamx.loader.plan.make_plan`.
    stratify
        With ``order="stratified"`` (or ``weights="balanced"``): obs column that takes the batch's place.
    weights
        Draw rows with replacement: float (n_obs,), how often each is drawn, relative to others; or
        ``"balanced"``, so that every batch (or value of `stratify`) is drawn equally often. Draws of an epoch
        are made once, sorted, and read in blocks.
    n_samples
        With `weights`: draws per epoch (default: one per selected row).
    seed, epoch
        What the order depends on.
    rank, world
        Of `world` processes, this is number `rank`: it gets every `world`-th minibatch of the epoch.
    output
        ``dense``, ``scipy``, ``csr`` or ``compact``: see :class:`streamx.loader.deliver.Delivery`.
    transform
        Apply the view's declared transform; False gives the stored values.
    rows
        Only these: a bool mask (n_obs,) or a pair (start, stop).
    prefetch
        Fetches made ahead on background threads; 0 for none. No effect on the minibatches.
    threads
        Threads that make fetches. No effect on the minibatches.
    memory
        Bytes that the loader may use.
    device
        ``"cpu"``, ``"cuda"``: give tensors there (``dense``). None: numpy arrays.
    block_rows, blocks_per_fetch
        Contiguous rows that are shuffled as a unit, and blocks read together: the order depends on them.

    Raises
    ------
    ResourceError
        If it can't work within ``memory``; says what it needs.
    """

    def __init__(
        self,
        view: Collection | str | Path,
        minibatch_size: int = 64,
        *,
        order: str = "shuffled",
        stratify: str | None = None,
        weights: Any = None,
        n_samples: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        shares: str = "proportional",
        output: str = "dense",
        transform: bool = True,
        rows: Any = None,
        prefetch: int = 2,
        threads: int = 1,
        memory: str | int = "4GB",
        device: Any = None,
        block_rows: int = BLOCK_ROWS,
        blocks_per_fetch: int = BLOCKS_PER_FETCH,
    ) -> None:
        if output not in OUTPUTS:
            raise UsageError(f"output {output!r}", fix=f"one of {', '.join(OUTPUTS)}")
        self.view = view if isinstance(view, Collection) else open_collection(view)
        self.order, self.shares, self.drop_last = order, shares, drop_last
        self.minibatch_size, self.seed, self.epoch, self.start = minibatch_size, seed, epoch, 0
        self.rank, self.world = rank, world
        self.output, self.prefetch, self.threads, self.device = output, prefetch, threads, device
        self.block_rows, self.blocks_per_fetch = block_rows, blocks_per_fetch
        declared = self.view.view["transform"] if transform and self.view.view else None
        self.transform = Transform.of(declared)
        scale_bg = self.view.scale_bg if self.transform.scale else None
        chosen = selection(rows, self.view.n_obs)
        named = stratify if stratify != self.view.batch_key else None  # else plans share out the batches
        self._strata_n = None if named is None else codes_of(self.view, named)
        self._rows = Rows(self.view.batch_runs, chosen, self._weights(weights, chosen), n_samples, seed)
        self._total_n = self._totals()
        self.budget = self._plan_memory(parse_bytes(memory))
        self._pool = Pool(2 * (self.budget.fetches + max(1, threads)))
        made = [Pool(n * (self.budget.groups + 2)) for n in (2, 1)]  # indices and data; dense rows
        self._delivery = Delivery(output, self.view.n_vars, self.transform, scale_bg, device, *made)
        self._cursor = (epoch, 0)
        if order != "sequential":
            self.view.keep(NBYTES_OF_LOADER)

    def plan(self, epoch: int | None = None) -> Plan:
        """The order of an epoch (default: the next one), in positions among the selected rows.

        ``plan().nbytes`` is the memory that the loader needs.
        """
        return replace(self._make_plan(self.epoch if epoch is None else epoch), nbytes=self.budget.nbytes)

    def at(self, epoch: int, minibatch: int = 0) -> Loader:
        """The same loader in an epoch, before the minibatch of this number (counted over all ranks)."""
        loader = copy(self)
        loader.epoch, loader.start = epoch, minibatch
        loader._cursor = (epoch, minibatch)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: after the last minibatch given, and as many on every other rank."""
        epoch, minibatch = self._cursor
        return {"epoch": epoch, "minibatch": minibatch, "order": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there, on any number of ranks; nothing is read for it.

        Raises
        ------
        UsageError
            If the state is that of a loader with another order of minibatches.
        """
        own, theirs = self._identity(), dict(state["order"])
        other = [name for name in own if own[name] != theirs.get(name)]
        if other:
            raise UsageError(
                f"the state is of a loader with another {other[0]} ({theirs.get(other[0])!r}, here "
                f"{own[other[0]]!r})",
                fix="make the loader with the same view and settings",
            )
        self.epoch, self.start = int(state["epoch"]), int(state["minibatch"])
        self._cursor = (self.epoch, self.start)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return self._rows.n

    def __len__(self) -> int:
        return self.plan().n_own

    def __iter__(self) -> Iterator[Minibatch]:
        plan = self.plan()
        self._cursor = (self.epoch, self.start)
        self.epoch, self.start = self.epoch + 1, 0
        return self._minibatches(plan)

    def _minibatches(self, plan: Plan) -> Iterator[Minibatch]:
        n_own, given = plan.n_own, 0
        rows = self._rows.of_epoch(plan.epoch)
        numbers = range(plan.fetch_of(plan.start), plan.n_fetches)
        blocks = prefetched(
            (partial(self._read, plan, rows, number) for number in numbers), self.prefetch, self.threads
        )
        groups = prefetched(self._groups(blocks), self.prefetch)
        with closing(blocks), closing(groups):
            for minibatches, arrive in groups:
                if arrive is not None:
                    arrive()
                for minibatch in minibatches:
                    given += 1
                    done = given == n_own
                    self._cursor = (
                        (plan.epoch + 1, 0) if done else (plan.epoch, plan.start + given * plan.world)
                    )
                    yield minibatch
                del minibatches, minibatch  # before the next ones are asked for

    def _groups(self, blocks: Iterator[Block]) -> Iterator[Callable[[], Any]]:
        """What makes each few minibatches of the blocks."""
        for block in blocks:
            for low, high in block.groups(self._group_rows):
                yield partial(self._delivery.make, block, low, high)
            del block  # before the next one is asked for

    def _read(self, plan: Plan, rows: slice | np.ndarray, number: int) -> Block:
        """Read a fetch, its rows in their order (on a background thread)."""
        fetch = plan.fetch(number)
        positions = [np.arange(low, high) for low, high in fetch.ranges]
        position_n = np.concatenate([*positions, np.zeros(0, np.int64)])[fetch.order]
        ranges, keep = to_read(rows, fetch.ranges) if len(position_n) else ([], None)
        order = fetch.order if keep is None else keep[fetch.order]
        row_n = position_n + rows.start if isinstance(rows, slice) else rows[position_n]
        wanted, position = None, order
        if self._scattered:
            wanted, position = order, None
        elif keep is not None:  # what lies between them is left out, and what comes twice is read once
            wanted, position = np.unique(order, return_inverse=True)
        indptr, indices, data = self.view.gather(ranges, wanted, *self._read_dtypes, self._pool)
        bounds, code_r = self.view.batch_runs
        return Block(
            indptr,
            indices,
            data,
            position,
            batch_n=code_r[np.searchsorted(bounds, row_n, side="right") - 1].astype(np.int64),
            row_n=row_n,
            total_n=None if self._total_n is None else self._total_n[row_n],
            obsm={name: self._read_obsm(name, ranges)[order] for name in self.view.modalities},
            cuts=fetch.cuts,
        )

    def _read_obsm(self, name: str, ranges: list[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([self.view.read_obsm(name, low, high) for low, high in [(0, 0), *ranges]])

    # -- settings --------------------------------------------------------------------------------------

    def _make_plan(self, epoch: int) -> Plan:
        return make_plan(
            self._rows.runs(epoch),
            order=self.order,
            minibatch_size=self.minibatch_size,
            seed=self.seed,
            epoch=epoch,
            start=self.start,
            rank=self.rank,
            world=self.world,
            drop_last=self.drop_last,
            shares=self.shares,
            strata_n=None if self._strata_n is None else self._rows.pick(self._strata_n, epoch),
            block_rows=self.block_rows,
            blocks_per_fetch=self.blocks_per_fetch,
        )

    def _identity(self) -> dict[str, Any]:
        """What the order of minibatches depends on, but for epoch and ranks."""
        names = ("order", "shares", "minibatch_size", "seed", "drop_last", "block_rows", "blocks_per_fetch")
        return {"n_rows": self.n_rows} | {name: getattr(self, name) for name in names}

    def _weights(self, weights: Any, chosen: slice | np.ndarray) -> np.ndarray | None:
        if weights is None:
            return None
        if isinstance(weights, str):
            if weights != "balanced":
                raise UsageError(f"weights {weights!r}", fix="'balanced', or one number per cell")
            code_n = self._strata_n if self._strata_n is not None else self.view.batch_codes
            code_n = np.asarray(code_n[chosen], np.int64)
            size = np.bincount(code_n[code_n >= 0])
            return np.where(code_n >= 0, 1 / np.maximum(size, 1)[np.maximum(code_n, 0)], 0.0)
        weight_n = np.asarray(weights, dtype=np.float64)
        n = self.view.n_obs
        if weight_n.shape != (n,) or not (np.isfinite(weight_n).all() and (weight_n >= 0).all()):
            raise UsageError(
                "weights are not one number, 0 or more, per cell", fix=f"an array of shape ({n},)"
            )
        return weight_n[chosen]

    def _totals(self) -> Column | None:
        if TOTAL in self.view.obs_columns:
            return Column(self.view.n_obs, np.float32, partial(_totals_of, self.view))
        if self.transform.target_sum is not None:
            raise UsageError(
                f"the transform scales cells to a total, but there is no obs column {TOTAL!r}",
                where=str(self.view.path),
                fix="make the view with `streamx preprocess`",
            )
        return None

    @property
    def _stored(self) -> tuple[np.dtype, np.dtype]:
        """Dtypes of indices and data in the store."""
        return np.dtype(index_dtype(self.view.n_vars)), self.view.value_dtype

    @property
    def _scattered(self) -> bool:
        """Whether rows are put in the order of delivery as soon as they are decoded.

        Where a cache holds a fetch as it is stored, sparse rows are taken from there instead: reading here
        and there is cheaper than writing.
        """
        if self._rows.repeats:
            return False
        if self.output == "dense" or self.order == "sequential":
            return True
        return self.block_rows * self.blocks_per_fetch * self._nnz * _itemsize(self._stored) > CACHED_BYTES

    @property
    def _read_dtypes(self) -> tuple[Any, Any]:
        straight = self._scattered and self.output != "dense"
        return made_dtypes(self.output, self.device, self._stored) if straight else self._stored

    @property
    def _nnz(self) -> int:
        """Values of a row, on average."""
        return -(-self.view.nnz // max(self.view.n_obs, 1))

    @property
    def _per_row(self) -> tuple[int, int]:
        """Bytes of a row as it is read, and as it is made from that; on average."""
        width = 4 * sum(len(m["names"]) for m in self.view.modalities.values()) + 28
        read, made = self._read_dtypes, made_dtypes(self.output, self.device, self._stored)
        values = 0 if self._scattered and read == made else self._nnz * _itemsize(made)
        dense = 4 * self.view.n_vars if self.output == "dense" else 0
        return self._nnz * _itemsize(read) + 16 + width, values + dense + width

    @property
    def _group_rows(self) -> int:
        on_device = self.device is not None and str(self.device) != "cpu"
        return max(1, (GROUP_BYTES_ON_DEVICE if on_device else GROUP_BYTES) // self._per_row[1])

    def _needed(self, blocks_per_fetch: int) -> Budget:
        """Memory with fetches of so many blocks."""
        plan = replace(self._make_plan(self.epoch), fetch_rows=self.block_rows * blocks_per_fetch)
        read, made = self._per_row
        rows, ahead = plan.max_fetch_rows, self.prefetch + 1
        group_rows = min(max(self.minibatch_size, self._group_rows), rows)
        kept = 0 if isinstance(self._rows.chosen, slice) and self._rows.weight_n is None else 16 * self.n_rows
        kept += sum(0 if a is None else a.nbytes for a in (self._total_n, self._strata_n))
        return Budget(
            fetch=rows * read,
            fetches=min(ahead + 1, plan.n_fetches),  # one more is being taken apart
            making=rows * (read + 48) * max(1, min(self.threads, self.prefetch)),
            group=group_rows * made,
            groups=min(ahead, plan.n_fetches * -(-rows // max(group_rows, 1))),
            rows=kept,
        )

    def _plan_memory(self, limit: int) -> Budget:
        budget = self._needed(self.blocks_per_fetch)
        if budget.nbytes > limit:
            fix = f"--memory {-(-budget.nbytes // 10**6)}MB"
            fewer = next(
                (n for n in range(self.blocks_per_fetch - 1, 0, -1) if self._needed(n).nbytes <= limit), None
            )
            if fewer:
                fix += f", or Loader(blocks_per_fetch={fewer})"
            raise ResourceError(
                f"the loader needs {budget.nbytes / 1e6:,.1f} MB ({budget.fetches} fetches of "
                f"{budget.fetch / 1e6:,.1f} MB), the limit is {limit / 1e6:,.1f} MB",
                where=str(self.view.path),
                fix=fix,
            )
        return budget


def _totals_of(view: Collection, start: int, stop: int) -> np.ndarray:
    return view.obs_column(TOTAL, start, stop).to_numpy(np.float32)


def _itemsize(dtypes: tuple[Any, Any]) -> int:
    return sum(np.dtype(dtype).itemsize for dtype in dtypes)
