"""One interface to both searches, the choice between them, and the recall that a search reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from streamx.errors import UsageError, warn
from streamx.neighbors.exact import ExactIndex
from streamx.neighbors.nndescent import EPSILONS, NNDescentIndex

Method = Literal["auto", "exact", "nndescent"]
TARGET_RECALL = 0.95
RECALL_ROWS = 1000

# Seconds, one thread of the build machine, 10 dimensions: what `auto` weighs. Thread counts must not change
# results, so they don't enter.
_EXACT_PAIR = 1.4e-9
_DESCENT_START, _DESCENT_BUILD, _DESCENT_QUERY = 60.0, 1.3e-4, 3e-5

Index = ExactIndex | NNDescentIndex


@dataclass(frozen=True)
class Neighbors:
    """Nearest neighbours, ordered by (distance, index).

    Attributes
    ----------
    indices_nm
        (n_query, n_neighbors) int64, rows of the reference; -1 where a query has no latent.
    distances_nm
        Euclidean, float64; NaN there.
    method
        ``"exact"`` or ``"nndescent"``.
    recall
        Share of the true neighbours that were found: 1 by construction if exact, else measured.
    recall_rows
        Query cells that it was measured on (0: exact).
    """

    indices_nm: np.ndarray
    distances_nm: np.ndarray
    method: str
    recall: float
    recall_rows: int

    def first(self, n_neighbors: int) -> Neighbors:
        """The nearest `n_neighbors` of them."""
        return Neighbors(
            self.indices_nm[:, :n_neighbors],
            self.distances_nm[:, :n_neighbors],
            self.method,
            self.recall,
            self.recall_rows,
        )

    def take(self, rows: np.ndarray) -> Neighbors:
        """Only these query cells."""
        return Neighbors(
            self.indices_nm[rows], self.distances_nm[rows], self.method, self.recall, self.recall_rows
        )


def choose_method(n_reference: int, n_query: int, method: str = "auto") -> str:
    """``"exact"`` while that is expected to be faster than compiling, building and asking pynndescent.

    At 1 M reference cells exact search wins up to about 140 k queries; a graph of a set with itself, up to
    about 270 k cells.
    """
    if method not in ("auto", "exact", "nndescent"):
        raise UsageError(f"index = {method!r}", fix="one of auto, exact, nndescent")
    if method != "auto":
        return method
    exact = _EXACT_PAIR * n_reference * n_query
    descent = _DESCENT_START + _DESCENT_BUILD * n_reference + _DESCENT_QUERY * n_query
    return "exact" if exact <= descent else "nndescent"


def build_index(
    reference_nk: np.ndarray,
    n_query: int,
    *,
    method: str = "auto",
    seed: int = 0,
    threads: int = 0,
    memory: str | int = "4GB",
) -> Index:
    """The index for `n_query` queries against these reference cells.

    Parameters
    ----------
    reference_nk
        (n_reference, n_latent) float, finite.
    n_query
        Queries to expect, for ``method="auto"`` (:func:`choose_method`).
    """
    if choose_method(len(reference_nk), n_query, method) == "exact" or len(reference_nk) < 64:
        return ExactIndex(reference_nk, threads=threads, memory=memory)
    return NNDescentIndex(reference_nk, seed=seed, threads=threads)


def reach_recall(
    index: Index,
    query_mk: np.ndarray,
    n_neighbors: int,
    own_m: np.ndarray | None = None,
    *,
    target: float = TARGET_RECALL,
    seed: int = 0,
    memory: str | int = "4GB",
) -> tuple[float, int]:
    """Measure the recall on a seeded sample of the queries, and search harder until it reaches `target`.

    A neighbour counts as found if its true distance is at most the true k-th (so equal distances are no
    misses). Changes ``index.epsilon``; warns if even the widest search stays below.

    Returns
    -------
    recall, rows
        What the index reaches now, and on how many cells that was measured (exact: 1.0, 0).
    """
    if isinstance(index, ExactIndex):
        return 1.0, 0
    rows = np.flatnonzero(np.isfinite(query_mk).all(axis=1))
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:RECALL_ROWS])
    if not len(rows):
        return 1.0, 0
    own = None if own_m is None else np.asarray(own_m)[rows]
    truth = ExactIndex(index.reference_nk, threads=index.threads, memory=memory)
    _, true_distances = truth.search(query_mk[rows], n_neighbors, own)
    recall = 0.0
    for epsilon in EPSILONS:
        if epsilon < index.epsilon:
            continue
        index.epsilon = epsilon
        _, distances = index.search(query_mk[rows], n_neighbors, own)
        recall = float(np.mean(distances <= true_distances[:, -1:]))
        if recall >= target:
            return recall, len(rows)
    warn(
        f"the neighbour search reached a recall of {recall:.3f}, below {target}",
        fix="search exactly (index exact)",
    )
    return recall, len(rows)


def nearest(
    reference_nk: np.ndarray,
    query_mk: np.ndarray | None = None,
    n_neighbors: int = 15,
    *,
    own_m: np.ndarray | None = None,
    method: str = "auto",
    target_recall: float = TARGET_RECALL,
    seed: int = 0,
    threads: int = 0,
    memory: str | int = "4GB",
) -> Neighbors:
    """Nearest reference cells of every query cell, or (no query) of every reference cell among the others.

    Parameters
    ----------
    reference_nk, query_mk
        (cells, n_latent) float. Reference rows must be finite; a query row that isn't has no neighbours.
    n_neighbors
        Fewer where the reference has fewer cells.
    own_m
        For queries that are reference cells: their row there, which is left out (-1: none).
    method
        ``exact``, ``nndescent`` or ``auto`` (:func:`choose_method`).
    target_recall
        What an approximate search must reach, measured on 1,000 queries.
    """
    if query_mk is None:
        query_mk, own_m = reference_nk, np.arange(len(reference_nk))
    index = build_index(reference_nk, len(query_mk), method=method, seed=seed, threads=threads, memory=memory)
    recall, rows = reach_recall(
        index, query_mk, n_neighbors, own_m, target=target_recall, seed=seed, memory=memory
    )
    indices, distances = index.search(query_mk, n_neighbors, own_m)
    return Neighbors(indices, distances, index.method, recall, rows)
