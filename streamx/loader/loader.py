"""Minibatches from a view: a plan (``plan``) executed by one short loop, ahead of need (``prefetch``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from streamx.config import parse_bytes
from streamx.errors import ResourceError, UsageError
from streamx.loader.plan import BLOCK_ROWS, BLOCKS_PER_FETCH, UNIT_ROWS, Plan, make_plan
from streamx.loader.prefetch import prefetched
from streamx.loader.transform import Transform, apply_transform, dense, dense_tensor, tensor
from streamx.store.collection import Collection, open_collection

TOTAL = "_streamx_total"


@dataclass(frozen=True)
class Minibatch:
    """Cells for one step; numpy arrays, or tensors on the loader's device.

    Attributes
    ----------
    x_ng
        What the model sees, float32 (n, n_genes).
    batch_n
        Batch code of each cell, int64.
    row_n
        Row of the collection of each cell, int64.
    total_n
        The cell's total before features were selected, float32 (views; else None).
    obsm
        Further modalities: name -> (n, n_features) float32.
    """

    x_ng: Any
    batch_n: Any
    row_n: Any
    total_n: Any
    obsm: dict[str, Any]

    def __len__(self) -> int:
        return len(self.row_n)


@dataclass(frozen=True)
class Budget:
    """Bytes that a loader needs at once.

    Attributes
    ----------
    fetch
        One fetch as it waits for its turn.
    making
        What making a fetch takes on top.
    minibatch
        One dense minibatch.
    rows
        What is kept per row of the collection.
    waiting
        Fetches that are held at once.
    """

    fetch: int
    making: int
    minibatch: int
    rows: int
    waiting: int

    @property
    def nbytes(self) -> int:
        return self.fetch * self.waiting + self.making + 2 * self.minibatch + self.rows


class Loader:
    """Minibatches of a view or store, in an order that depends on (seed, epoch) alone.

    Iterating gives one epoch; iterating again gives the next one. ``loader.at(epoch)`` is the pure form.

    Parameters
    ----------
    view
        A :class:`Collection` or its path.
    minibatch_size
        Cells per minibatch.
    order, shares, drop_last
        See :func:`streamx.loader.plan.make_plan`.
    seed, epoch
        What the order depends on.
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
        ``"cpu"``, ``"cuda"``: give tensors there. None: numpy arrays.
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
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        shares: str = "proportional",
        transform: bool = True,
        rows: Any = None,
        prefetch: int = 2,
        threads: int = 1,
        memory: str | int = "4GB",
        device: Any = None,
        block_rows: int = BLOCK_ROWS,
        blocks_per_fetch: int = BLOCKS_PER_FETCH,
    ) -> None:
        self.view = view if isinstance(view, Collection) else open_collection(view)
        self.order, self.shares, self.drop_last = order, shares, drop_last
        self.minibatch_size, self.seed, self.epoch = minibatch_size, seed, epoch
        self.prefetch, self.threads, self.device = prefetch, threads, device
        self.block_rows, self.blocks_per_fetch = block_rows, blocks_per_fetch
        declared = self.view.view["transform"] if transform and self.view.view else None
        self.transform = Transform.of(declared)
        self._scale_bg = self.view.scale_bg if self.transform.scale else None
        self._rows = _selection(rows, self.view.n_obs)
        self._batch_n = self.view.batch_codes[self._rows]
        self._total_n = self._totals()
        self.budget = self._plan_memory(self.plan(), parse_bytes(memory))

    def plan(self, epoch: int | None = None) -> Plan:
        """The order of an epoch (default: the next one), in positions among the selected rows."""
        return make_plan(
            self._batch_n,
            order=self.order,
            minibatch_size=self.minibatch_size,
            seed=self.seed,
            epoch=self.epoch if epoch is None else epoch,
            drop_last=self.drop_last,
            shares=self.shares,
            block_rows=self.block_rows,
            blocks_per_fetch=self.blocks_per_fetch,
        )

    def at(self, epoch: int) -> Loader:
        """The same loader at the beginning of an epoch."""
        loader = copy(self)
        loader.epoch = epoch
        return loader

    @property
    def n_rows(self) -> int:
        """Selected rows."""
        return len(self._batch_n)

    def __len__(self) -> int:
        return self.plan().n_minibatches

    def __iter__(self) -> Iterator[Minibatch]:
        plan = self.plan()
        self.epoch += 1
        return self._minibatches(plan)

    def _minibatches(self, plan: Plan) -> Iterator[Minibatch]:
        tasks = [partial(self._make, plan, number) for number in range(plan.n_fetches)]
        with closing(prefetched(tasks, self.prefetch, self.threads)) as fetched:
            for block in fetched:
                for start, stop in pairwise(block.cuts.tolist()):
                    yield self._deliver(block, start, stop)
                del block  # before the next one is asked for

    def _make(self, plan: Plan, number: int) -> _Block:
        """Read a fetch, bring its rows into order, transform them (on a background thread)."""
        fetch = plan.fetch(number)
        ranges, keep = _to_read(self._rows, fetch.ranges)
        order = fetch.order if keep is None else keep[fetch.order]
        position_n = np.concatenate([np.arange(low, high) for low, high in fetch.ranges])[fetch.order]
        x_ng = self.view.fetch(ranges)[order]
        batch_n = self._batch_n[position_n].astype(np.int64)
        total_n = None if self._total_n is None else self._total_n[position_n]
        apply_transform(x_ng, self.transform, total_n=total_n, batch_n=batch_n, scale_bg=self._scale_bg)
        obsm = {
            name: np.concatenate([self.view.read_obsm(name, low, high) for low, high in ranges])[order]
            for name in self.view.modalities
        }
        chosen = self._rows
        row_n = position_n + chosen.start if isinstance(chosen, slice) else chosen[position_n]
        return _Block(x_ng, batch_n, row_n, total_n, obsm, fetch.cuts)

    def _deliver(self, block: _Block, start: int, stop: int) -> Minibatch:
        part = slice(start, stop)
        give: Callable[[np.ndarray], Any] = np.asarray
        x_ng: Any
        if self.device is None:
            x_ng = dense(block.x_ng, start, stop)
        else:
            x_ng = dense_tensor(block.x_ng, start, stop, self.device)
            give = partial(tensor, device=self.device)
        return Minibatch(
            x_ng=x_ng,
            batch_n=give(block.batch_n[part]),
            row_n=give(block.row_n[part]),
            total_n=None if block.total_n is None else give(block.total_n[part]),
            obsm={name: give(values[part]) for name, values in block.obsm.items()},
        )

    def _totals(self) -> np.ndarray | None:
        if TOTAL in self.view.obs_columns:
            return self.view.obs_column(TOTAL).to_numpy(np.float32)[self._rows]
        if self.transform.target_sum is not None:
            raise UsageError(
                f"the transform scales cells to a total, but there is no obs column {TOTAL!r}",
                where=str(self.view.path),
                fix="make the view with `streamx preprocess`",
            )
        return None

    def _plan_memory(self, plan: Plan, limit: int) -> Budget:
        per_row = -(-self.view.nnz // max(self.view.n_obs, 1))
        width = sum(len(m["names"]) for m in self.view.modalities.values())
        rows = plan.max_fetch_rows
        # As it waits: float32 values, int32 columns, per row batch, row and total. In the making: a copy.
        fetch = rows * (8 * per_row + 4 * width + 28)
        making = rows * (9 * per_row + 4 * width + 24)
        budget = Budget(
            fetch=fetch,
            making=making * max(1, min(self.threads, self.prefetch)),
            minibatch=self.minibatch_size * (self.view.n_vars * 4 + 16 * per_row + 4 * width),
            rows=self.n_rows * 8,
            waiting=min(self.prefetch + 1, plan.n_fetches),
        )
        if budget.nbytes > limit:
            spare = (limit - budget.minibatch * 2 - budget.rows) / (
                budget.nbytes - budget.minibatch * 2 - budget.rows
            )
            fewer = int(self.blocks_per_fetch * spare)
            fix = f"--memory {-(-budget.nbytes // 10**6)}MB"
            if fewer > 0:
                fix += f", or Loader(blocks_per_fetch={fewer})"
            raise ResourceError(
                f"the loader needs {budget.nbytes / 1e6:,.0f} MB ({budget.waiting} fetches of "
                f"{fetch / 1e6:,.0f} MB, each {rows:,} cells), the limit is {limit / 1e6:,.0f} MB",
                where=str(self.view.path),
                fix=fix,
            )
        return budget


@dataclass(frozen=True)
class _Block:
    """A fetch in the order of delivery."""

    x_ng: sparse.csr_matrix
    batch_n: np.ndarray
    row_n: np.ndarray
    total_n: np.ndarray | None
    obsm: dict[str, np.ndarray]
    cuts: np.ndarray


def _selection(rows: Any, n: int) -> slice | np.ndarray:
    """None, (start, stop) or a bool mask -> a slice or ascending int64 rows.

    Raises
    ------
    UsageError
        If it does not fit the collection.
    """
    if rows is None:
        return slice(0, n)
    if isinstance(rows, tuple) and len(rows) == 2:
        start, stop = int(rows[0]), int(rows[1])
        if 0 <= start <= stop <= n:
            return slice(start, stop)
    else:
        mask = np.asarray(rows)
        if mask.dtype == bool and mask.shape == (n,):
            return np.flatnonzero(mask)
    raise UsageError("rows is neither a pair (start, stop) nor a mask", fix=f"a bool array of shape ({n},)")


def _to_read(rows: slice | np.ndarray, ranges: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray | None]:
    """Ranges of selected rows -> ranges of the collection, and which of the rows read are wanted."""
    if isinstance(rows, slice):
        return [(int(low) + rows.start, int(high) + rows.start) for low, high in ranges], None
    wanted = np.concatenate([rows[low:high] for low, high in ranges])
    gaps = np.flatnonzero(np.diff(wanted) > UNIT_ROWS)  # smaller ones cost less to read than to leave out
    low, high = wanted[np.append(0, gaps + 1)], wanted[np.append(gaps, len(wanted) - 1)] + 1
    before = np.cumsum(high - low) - (high - low)
    piece = np.searchsorted(low, wanted, side="right") - 1
    return list(zip(low.tolist(), high.tolist(), strict=True)), wanted - low[piece] + before[piece]
