"""Approximate nearest neighbours by pynndescent, for references too large for an exact search.

Its compiler costs about a minute per process, its index 0.1-0.15 ms per reference cell; a query then costs
30 microseconds whatever the size of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from streamx.neighbors.exact import as_points, leave_out, rank
from streamx.threads import thread_count

EPSILONS = (0.1, 0.2, 0.3, 0.5, 0.8)  # how far a query walks beyond its k-th neighbour: recall against time
ROWS = 65_536  # queries per call


class NNDescentIndex:
    """Reference cells, ready for approximate Euclidean search; the interface of :class:`.exact.ExactIndex`.

    Parameters
    ----------
    reference_nk
        (n_reference, n_latent), float, finite. pynndescent keeps a float32 copy.
    seed
        Seed of the index.
    threads
        Threads (0: one per core).
    """

    method = "nndescent"
    efforts = EPSILONS

    def __init__(self, reference_nk: np.ndarray, *, seed: int = 0, threads: int = 0) -> None:
        self.reference_nk = as_points(reference_nk, "the reference")
        self.threads = thread_count(threads)
        self.seed = seed
        self.effort = EPSILONS[0]
        self._index: Any = None

    @property
    def n(self) -> int:
        """Cells."""
        return len(self.reference_nk)

    @property
    def d(self) -> int:
        """Dimensions."""
        return self.reference_nk.shape[1]

    def search(
        self, query_mk: np.ndarray, n_neighbors: int, own_m: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`.exact.ExactIndex.search`, but neighbours may be missed; distances are true, float64."""
        query_mk = np.asarray(query_mk)
        k = min(n_neighbors + (own_m is not None), len(self.reference_nk))
        indices = np.full((len(query_mk), k), -1, dtype=np.int64)
        distances = np.full((len(query_mk), k), np.nan)
        rows = np.flatnonzero(np.isfinite(query_mk).all(axis=1))
        index = self._built()
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            q_mk = query_mk[some].astype(np.float64)
            found, _ = index.query(q_mk.astype(np.float32), k=k, epsilon=self.effort)
            indices[some], squares = rank(q_mk, self.reference_nk, _filled(found, len(self.reference_nk)), k)
            distances[some] = np.sqrt(squares)
        if own_m is not None:
            indices, distances = leave_out(indices, distances, np.asarray(own_m))
        return indices, distances

    def append(self, points_nk: np.ndarray) -> NNDescentIndex:
        """The index with more cells, numbered on; its graph is made anew."""
        together_nk = np.concatenate([self.reference_nk, points_nk])
        return NNDescentIndex(together_nk, seed=self.seed, threads=self.threads)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As :meth:`.exact.ExactIndex.pieces`."""
        yield self.reference_nk, np.arange(self.n)

    def arrays(self) -> dict[str, np.ndarray]:
        """What to keep of the index: not its graph, which the seed gives again."""
        return {"points": self.reference_nk}

    def _built(self) -> Any:
        if self._index is None:
            from pynndescent import NNDescent

            n = len(self.reference_nk)
            self._index = NNDescent(
                self.reference_nk.astype(np.float32),
                metric="euclidean",
                n_neighbors=min(30, n - 1),
                random_state=self.seed,
                n_jobs=self.threads,
            )
            self._index.prepare()
        return self._index


def _filled(found: np.ndarray, n: int) -> np.ndarray:
    """pynndescent says -1 where it found fewer than k: put other cells there, they rank last."""
    for row in np.flatnonzero((found < 0).any(axis=1)):
        holes = found[row] < 0
        found[row, holes] = np.setdiff1d(np.arange(min(n, 2 * found.shape[1])), found[row])[: holes.sum()]
    return found
