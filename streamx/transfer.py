"""Labels from a reference to a query through nearest neighbours in the latent space.

Two rules: the uniform vote of the 5 nearest (SCALEX's ``label_transfer``), and scArches' distance-weighted
vote of the 50 nearest (Lotfollahi 2022, Methods, "cell-type annotation").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamx.config import UNLABELED
from streamx.errors import BadValuesError, EmptyError, UsageError, warn
from streamx.labels import Labels, encode_labels
from streamx.neighbors import Index, build_index, reach_recall

N_NEIGHBORS = {"vote": 5, "weighted": 50}
UNKNOWN = "Unknown"
ROWS = 20_000  # query cells at a time


@dataclass(frozen=True)
class Voters:
    """Labelled reference cells, ready to be asked: :func:`gather` makes them, :func:`vote` asks."""

    index: Index
    labels: Labels
    method: str
    n_neighbors: int
    recall: float
    recall_rows: int


@dataclass(frozen=True)
class Transfer:
    """Transferred labels.

    Attributes
    ----------
    codes_n
        int32 codes into ``names``; -1 = Unknown (too uncertain, or no latent).
    uncertainty_n
        1 - share of the winning label, float32 in [0, 1]; 1 without a latent.
    probabilities_nl
        (n_query, n_labels) float32, rows sum to 1 (without a latent: all equal), or None.
    names
        The reference's labels, sorted.
    voters
        Who voted: method, n_neighbors, recall.
    """

    codes_n: np.ndarray
    uncertainty_n: np.ndarray
    probabilities_nl: np.ndarray | None
    names: list[str]
    voters: Voters

    @property
    def labels_n(self) -> np.ndarray:
        """Labels as text, ``"Unknown"`` where there is none."""
        return Labels(self.codes_n, self.names).text(UNKNOWN)

    @property
    def n_unknown(self) -> int:
        return int((self.codes_n < 0).sum())


def transfer_labels(
    reference_nk: np.ndarray,
    labels: Any,
    query_nk: np.ndarray,
    *,
    method: str = "vote",
    n_neighbors: int | None = None,
    threshold: float | None = None,
    unlabeled: Sequence[str] = UNLABELED,
    probabilities: bool = False,
    index: str = "auto",
    seed: int = 0,
    memory: str | int = "4GB",
    threads: int = 0,
) -> Transfer:
    """Give every query cell a label of the reference, and say how uncertain it is.

    Parameters
    ----------
    reference_nk, query_nk
        Latents, (cells, n_latent) float. A query row with NaN becomes Unknown with uncertainty 1; reference
        rows with NaN are left out.
    labels
        One per reference cell. Cells whose label is missing or in `unlabeled` neither vote nor take a place
        among the neighbours.
    method
        ``"vote"``: each neighbour counts the same, ties go to the first label in sorted order, as sklearn's
        ``KNeighborsClassifier``. ``"weighted"``: :func:`kernel_weights`.
    n_neighbors
        5 for the vote, 50 weighted.
    threshold
        A cell whose uncertainty is above it stays Unknown. (scArches documents this and tests the opposite.)
    index
        Neighbour search, see :func:`streamx.neighbors.nearest`.

    Raises
    ------
    EmptyError
        If no reference cell has a label.
    """
    voters = gather(
        reference_nk,
        labels,
        query_nk,
        method=method,
        n_neighbors=n_neighbors,
        unlabeled=unlabeled,
        index=index,
        seed=seed,
        memory=memory,
        threads=threads,
    )
    return vote(voters, query_nk, threshold=threshold, probabilities=probabilities)


def gather(
    reference_nk: np.ndarray,
    labels: Any,
    query_nk: np.ndarray,
    *,
    method: str = "vote",
    n_neighbors: int | None = None,
    unlabeled: Sequence[str] = UNLABELED,
    index: str = "auto",
    seed: int = 0,
    memory: str | int = "4GB",
    threads: int = 0,
) -> Voters:
    """The reference's half of :func:`transfer_labels`: an index over its labelled cells.

    `query_nk` (all cells that will ask) decides between the searches, and its sample measures the recall.
    """
    if method not in N_NEIGHBORS:
        raise UsageError(f"method = {method!r}", fix=f"one of {', '.join(N_NEIGHBORS)}")
    reference_nk, voters = _voters(reference_nk, encode_labels(labels, unlabeled))
    k = N_NEIGHBORS[method] if n_neighbors is None else n_neighbors
    if k < 1:
        raise UsageError(f"n_neighbors = {k}", fix="at least 1")
    if k > len(voters):
        warn(f"only {len(voters)} reference cells have a label, fewer than n_neighbors = {k}: all vote")
        k = len(voters)
    query_nk = np.asarray(query_nk)
    searcher = build_index(
        reference_nk, len(query_nk), method=index, seed=seed, threads=threads, memory=memory
    )
    recall, rows = reach_recall(searcher, query_nk, k, seed=seed, memory=memory)
    return Voters(searcher, voters, method, k, recall, rows)


def vote(
    voters: Voters, query_nk: np.ndarray, *, threshold: float | None = None, probabilities: bool = False
) -> Transfer:
    """The query's half of :func:`transfer_labels`, by blocks of cells."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"threshold = {threshold}, an uncertainty lies between 0 and 1")
    query_nk, names = np.asarray(query_nk), voters.labels.names
    n, n_labels = len(query_nk), len(names)
    codes_n = np.full(n, -1, dtype=np.int32)
    uncertainty_n = np.ones(n, dtype=np.float32)
    shares_nl = np.full((n, n_labels), 1 / n_labels, dtype=np.float32) if probabilities else None
    for start in range(0, n, ROWS):
        indices, distances = voters.index.search(query_nk[start : start + ROWS], voters.n_neighbors)
        found = np.flatnonzero(indices[:, 0] >= 0)
        around = voters.labels.codes_n[indices[found]]
        shares_ml = _shares(around, distances[found], n_labels, voters.method)
        codes_n[start + found] = shares_ml.argmax(axis=1)
        uncertainty_n[start + found] = np.clip(1 - shares_ml.max(axis=1), 0, 1)
        if shares_nl is not None:
            shares_nl[start + found] = shares_ml
    if threshold is not None:
        codes_n[uncertainty_n > np.float32(threshold)] = -1
    return Transfer(codes_n, uncertainty_n, shares_nl, names, voters)


def _voters(reference_nk: np.ndarray, labels: Labels) -> tuple[np.ndarray, Labels]:
    """Reference cells that have both a latent and a label."""
    reference_nk = np.asarray(reference_nk)
    if len(reference_nk) != len(labels):
        raise BadValuesError(f"{len(labels):,} labels for {len(reference_nk):,} reference cells")
    keep = labels.known_n & np.isfinite(reference_nk).all(axis=1)
    if not keep.any():
        raise EmptyError(
            "no reference cell has a label",
            fix="choose another label column, or change which labels mean unlabelled",
        )
    return (reference_nk, labels) if keep.all() else (reference_nk[keep], labels.take(keep))


def _shares(codes_mj: np.ndarray, distances_mj: np.ndarray, n_labels: int, method: str) -> np.ndarray:
    """(m, n_labels) float64 shares of the vote; rows sum to 1."""
    m, k = codes_mj.shape
    cell = (np.arange(m)[:, None] * n_labels + codes_mj).ravel()
    if method == "vote":
        return np.bincount(cell, minlength=m * n_labels).reshape(m, n_labels) / k
    weights = kernel_weights(distances_mj).ravel()
    return np.bincount(cell, weights, minlength=m * n_labels).reshape(m, n_labels)


def kernel_weights(distances_mj: np.ndarray) -> np.ndarray:
    """scArches' weight of each neighbour: exp(-d / (2 / s)^2), s = standard deviation of the row's distances.

    The row's smallest distance is subtracted first, which changes no normalised weight and keeps far cells
    from 0/0. Equal distances weigh the same.

    Returns
    -------
    weights_mj
        float64, rows sum to 1.
    """
    spread_m = distances_mj.std(axis=1, keepdims=True)
    weights = np.exp(-(distances_mj - distances_mj.min(axis=1, keepdims=True)) * (spread_m / 2) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)
