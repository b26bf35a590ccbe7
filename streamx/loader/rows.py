"""Which rows an epoch is made of: all, some, or a weighted draw; ascending, so that blocks are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from streamx.errors import UsageError
from streamx.loader.plan import UNIT_ROWS, Runs, runs_of, runs_within


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of every epoch.

    Attributes
    ----------
    all_runs
        Of the collection.
    chosen
        A slice, or ascending int64 rows.
    weight_n
        How often each chosen row is drawn, relative to the others; None: each once.
    n_samples
        Draws per epoch; None: as many as there are chosen rows.
    """

    all_runs: Runs
    chosen: slice | np.ndarray
    weight_n: np.ndarray | None
    n_samples: int | None
    seed: int

    @property
    def repeats(self) -> bool:
        return self.weight_n is not None

    @property
    def n(self) -> int:
        if self.repeats and self.n_samples is not None:
            return self.n_samples
        return self.chosen.stop - self.chosen.start if isinstance(self.chosen, slice) else len(self.chosen)

    def of_epoch(self, epoch: int) -> slice | np.ndarray:
        """The rows of an epoch, ascending; with weights, int64 with repetitions."""
        if self.weight_n is None:
            return self.chosen
        return _drawn(self, epoch)

    def runs(self, epoch: int) -> Runs:
        """Runs of one batch among the rows of an epoch."""
        rows = self.of_epoch(epoch)
        if isinstance(rows, slice):
            return runs_within(self.all_runs, rows.start, rows.stop)
        bounds, code_r = self.all_runs
        return runs_of(code_r[np.searchsorted(bounds, rows, side="right") - 1])

    def pick(self, value_n: Any, epoch: int) -> Picked:
        """Values of the collection's rows, for the rows of an epoch."""
        return Picked(value_n, self.of_epoch(epoch))


@dataclass(frozen=True, eq=False)
class Picked:
    """Values of some rows of a collection, looked up when a stretch of these rows is asked for."""

    value_n: Any
    rows: slice | np.ndarray

    def __getitem__(self, part: slice) -> np.ndarray:
        if isinstance(self.rows, slice):
            return self.value_n[slice(self.rows.start + part.start, self.rows.start + part.stop)]
        return self.value_n[self.rows[part]]


@lru_cache(1)
def _drawn(rows: Rows, epoch: int) -> np.ndarray:
    """A weighted draw with replacement, sorted; depends on (seed, epoch) and the weights alone."""
    assert rows.weight_n is not None
    ends = np.cumsum(rows.weight_n)
    if not len(ends) or ends[-1] <= 0:
        raise UsageError("no row has a weight above 0", fix="give other weights, or rows")
    raw = np.random.PCG64(np.random.SeedSequence((rows.seed, epoch, 2))).random_raw(rows.n)
    raw.sort()
    drawn = np.searchsorted(ends, raw / 2.0**64 * ends[-1], side="right")
    drawn = np.minimum(drawn, np.flatnonzero(rows.weight_n)[-1])
    return drawn + rows.chosen.start if isinstance(rows.chosen, slice) else rows.chosen[drawn]


def selection(rows: Any, n: int) -> slice | np.ndarray:
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


def to_read(rows: slice | np.ndarray, ranges: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray | None]:
    """Ranges of selected rows -> ranges of the collection, and which of the rows read are wanted."""
    if isinstance(rows, slice):
        return [(low + rows.start, high + rows.start) for low, high in ranges.tolist()], None
    wanted = np.concatenate([rows[low:high] for low, high in ranges])
    gaps = np.flatnonzero(np.diff(wanted) > UNIT_ROWS)  # smaller ones cost less to read than to leave out
    low, high = wanted[np.append(0, gaps + 1)], wanted[np.append(gaps, len(wanted) - 1)] + 1
    before = np.cumsum(high - low) - (high - low)
    piece = np.searchsorted(low, wanted, side="right") - 1
    return list(zip(low.tolist(), high.tolist(), strict=True)), wanted - low[piece] + before[piece]


def split(
    n: int, fractions: dict[str, float], *, seed: int = 0, code_n: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Masks that share rows out, such as ``{"train": .8, "validation": .1, "test": .1}``.

    Parameters
    ----------
    n
        Rows.
    fractions
        Name -> share; they add up to 1.
    seed
        What the split depends on, with n and the codes.
    code_n
        Share every code's rows out so, (n,): a stratified split. None: all rows together.

    Returns
    -------
    name -> bool (n,); every row is in one; sizes differ from the shares by less than a row (per code).

    Raises
    ------
    UsageError
        If the shares do not add up to 1.
    """
    from streamx.loader.plan import permutation

    if not fractions or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UsageError(f"shares {fractions} do not add up to 1", fix="such as {'train': 0.9, 'test': 0.1}")
    order = permutation(n, seed, 3)
    if code_n is not None:
        order = order[np.argsort(np.asarray(code_n)[order], kind="stable")]
        sizes = np.unique(np.asarray(code_n), return_counts=True)[1]
    else:
        sizes = np.array([n])
    share = np.cumsum([0.0, *fractions.values()])
    part_n = np.empty(n, np.int64)
    low = 0
    for size in sizes.tolist():
        cuts = np.rint(share * size).astype(np.int64)
        part_n[order[low : low + size]] = np.repeat(np.arange(len(fractions)), np.diff(cuts))
        low += size
    return {name: part_n == k for k, name in enumerate(fractions)}
