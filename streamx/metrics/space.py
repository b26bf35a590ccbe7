"""Cells with a latent, and how to look at them: searches that reuse one index, samples, subsets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from streamx.labels import Labels
from streamx.neighbors import Index, Neighbors, build_index, nearest
from streamx.neighbors.blocks import Rows, settle

SEARCH_RECALL = 0.99
MEMORY = "2GB"  # of an index and its work
IN_MEMORY = 1 << 28  # bytes of latents that may be copied; more of them go into a file


@dataclass(frozen=True)
class Space:
    """Latents of all cells that are scored.

    Attributes
    ----------
    latent_nk
        Finite; may be memory-mapped.
    exact
        Whether every cell is looked at: there are at most `max_cells`.
    max_cells
        Cells whose neighbours are searched where there are more; other sample sizes are multiples of it.
    """

    latent_nk: np.ndarray
    exact: bool
    max_cells: int
    seed: int
    threads: int

    @property
    def n(self) -> int:
        return len(self.latent_nk)

    @cached_property
    def _index(self) -> Index:
        return build_index(
            self.latent_nk,
            self.n if self.exact else self.max_cells,
            method="exact" if self.exact else "auto",
            seed=self.seed,
            threads=self.threads,
            memory=MEMORY,
        )

    def around(self, rows: np.ndarray | None, n_neighbors: int) -> Neighbors:
        """Neighbours of `rows` (None: of all cells) among all cells, the cell itself left out."""
        query_mk = None if rows is None else self.latent_nk[rows]
        return nearest(
            self.latent_nk,
            query_mk,
            n_neighbors,
            own_m=rows,
            index=self._index,
            target_recall=SEARCH_RECALL,
            seed=self.seed,
            memory=MEMORY,
        )

    def graph(self, n_neighbors: int) -> tuple[np.ndarray, float | None]:
        """Neighbours of all cells, int32, in a file if they are many; recall of the search (None: exact)."""
        from streamx.neighbors.graph import knn_graph

        index = self._index
        indices_nj, recall = knn_graph(
            index,
            self.latent_nk,
            n_neighbors,
            target_recall=SEARCH_RECALL,
            seed=self.seed,
            memory=MEMORY,
        )
        return indices_nj, None if index.method == "exact" else recall

    def take(self, keep_n: np.ndarray) -> Space:
        """These cells alone (a mask); nothing is copied if that is all of them."""
        if keep_n.all():
            return self
        latent_nk = settle(Rows(self.latent_nk, np.flatnonzero(keep_n)), IN_MEMORY)
        return replace(self, latent_nk=latent_nk, exact=len(latent_nk) <= self.max_cells)

    def sample(self, size: int) -> np.ndarray:
        """Sorted rows, drawn without replacement; the same for the same size."""
        return np.sort(np.random.default_rng(self.seed).choice(self.n, min(size, self.n), replace=False))

    def more_of_each(self, label: Labels, rows: np.ndarray, at_least: int) -> np.ndarray:
        """Sorted further rows, so that each label has `at_least` (or all of its cells) among both."""
        rng = np.random.default_rng(self.seed + 1)
        lacking = at_least - np.bincount(label.codes_n[rows], minlength=len(label.names))
        taken = np.zeros(self.n, dtype=bool)
        taken[rows] = True
        found = [np.empty(0, dtype=np.int64)]
        for code in np.flatnonzero(lacking > 0):
            free = np.flatnonzero((label.codes_n == code) & ~taken)
            found.append(rng.choice(free, min(int(lacking[code]), len(free)), replace=False))
        return np.sort(np.concatenate(found))
