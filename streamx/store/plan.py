"""Where the rows of a part go: pure functions of where each row's values end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamx.store import layout


@dataclass(frozen=True)
class ShardPlan:
    """Geometry of one shard: rows first..first + n_obs of the part, cut into zarr shards by value.

    `ends` is where each row begins among the values of the part and, last, where the last one ends.
    """

    path: str
    first: int
    ends: np.ndarray
    chunk: int
    shard: int

    @property
    def n_obs(self) -> int:
        return len(self.ends) - 1

    @property
    def nnz(self) -> int:
        return int(self.ends[-1] - self.ends[0])

    @property
    def indptr(self) -> np.ndarray:
        """int64, (n_obs + 1,)."""
        return np.asarray(self.ends - self.ends[0])

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """Value ranges of the zarr shards."""
        return [(low, min(low + self.shard, self.nnz)) for low in range(0, self.nnz, self.shard)]

    def rows(self, low: int, high: int) -> tuple[int, int]:
        """The rows that hold the values low..high."""
        first = int(self.ends[0])
        start = int(np.searchsorted(self.ends, low + first, side="right")) - 1
        return start, int(np.searchsorted(self.ends, high + first, side="left"))


def plan_shards(ends: np.ndarray, *, first_number: int, shard_rows: int, tag: str = "") -> list[ShardPlan]:
    """Cut the rows of a part into shards. Pure: depends on where each row's values end only.

    `tag` is what the shards' names end in (:func:`streamx.store.manifest.run_tag`).
    """
    n_obs = len(ends) - 1
    chunk = layout.chunk_values(n_obs, int(ends[-1]))
    plans = []
    for number, first in enumerate(range(0, n_obs, shard_rows), start=first_number):
        mine = ends[first : first + shard_rows + 1]
        shard = layout.shard_values(chunk, int(mine[-1] - mine[0]))
        plans.append(ShardPlan(f"shards/{number:06d}{tag}.zarr", first, mine, chunk, shard))
    return plans
