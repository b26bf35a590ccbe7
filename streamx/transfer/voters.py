"""The reference's half of label transfer: an index over its labelled cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from streamx.config import UNLABELED
from streamx.errors import BadValuesError, EmptyError, UsageError, warn
from streamx.labels import Labels, encode_labels
from streamx.neighbors import Index, build_index, reach_recall
from streamx.neighbors.blocks import Rows, finite_rows

N_NEIGHBORS = {"vote": 5, "weighted": 50}


@dataclass(frozen=True)
class Voters:
    """Labelled reference cells, ready to be asked: :func:`gather` makes them, :func:`.vote` asks.

    Attributes
    ----------
    latent_nk
        Theirs, as they were given: in memory or on disk.
    levels
        Their labels, coarsest first; every voter has one of the coarsest.
    parents
        For each finer level, the coarser label of each of its labels (-1: never seen with one).
    """

    index: Index
    latent_nk: Any
    levels: tuple[Labels, ...]
    parents: tuple[np.ndarray, ...]
    method: str
    n_neighbors: int
    recall: float
    recall_rows: int


def gather(
    reference_nk: Any,
    levels: Sequence[Any],
    query_nk: Any,
    *,
    method: str = "vote",
    n_neighbors: int | None = None,
    unlabeled: Sequence[str] = UNLABELED,
    index: str | Index = "auto",
    seed: int = 0,
    memory: str | int = "4GB",
    threads: int = 0,
) -> Voters:
    """The reference's half of :func:`.transfer_levels`: an index over the cells that have a label.

    `query_nk` (all cells that will ask) decides between the searches, and its sample measures the recall.
    `index` may be one that was made before, over the cells that :func:`voting_cells` names.
    """
    if method not in N_NEIGHBORS:
        raise UsageError(f"method = {method!r}", fix=f"one of {', '.join(N_NEIGHBORS)}")
    encoded = [encode_labels(labels, unlabeled) for labels in levels]
    keep = voting_cells(reference_nk, encoded)
    if not keep.all():
        rows = np.flatnonzero(keep)
        reference_nk, encoded = Rows(reference_nk, rows), [labels.take(rows) for labels in encoded]
    k = N_NEIGHBORS[method] if n_neighbors is None else n_neighbors
    if k < 1:
        raise UsageError(f"n_neighbors = {k}", fix="at least 1")
    n = reference_nk.shape[0]
    if k > n:
        warn(f"only {n} reference cells have a label, fewer than n_neighbors = {k}: all vote")
        k = n
    parents = tuple(_parents(coarse, fine) for coarse, fine in pairwise(encoded))
    if isinstance(index, str):
        index = build_index(
            reference_nk, query_nk.shape[0], method=index, seed=seed, threads=threads, memory=memory
        )
    recall, rows_asked = reach_recall(index, query_nk, k, seed=seed, memory=memory)
    return Voters(index, reference_nk, tuple(encoded), parents, method, k, recall, rows_asked)


def voting_cells(reference_nk: Any, levels: Sequence[Labels]) -> np.ndarray:
    """Which reference cells have both a latent and a label of the coarsest level.

    Raises
    ------
    EmptyError
        If none has.
    """
    for labels in levels:
        if reference_nk.shape[0] != len(labels):
            raise BadValuesError(f"{len(labels):,} labels for {reference_nk.shape[0]:,} reference cells")
    keep = levels[0].known_n & finite_rows(reference_nk)
    if not keep.any():
        raise EmptyError(
            "no reference cell has a label",
            fix="choose another label column, or change which labels mean unlabelled",
        )
    return keep


def _parents(coarse: Labels, fine: Labels) -> np.ndarray:
    """The one coarse label that each fine label is seen with.

    Raises
    ------
    BadValuesError
        If a fine label is seen with two: the columns are no hierarchy.
    """
    both = coarse.known_n & fine.known_n
    pairs = np.unique(fine.codes_n[both].astype(np.int64) * len(coarse.names) + coarse.codes_n[both])
    children, parents = np.divmod(pairs, max(1, len(coarse.names)))
    twice = np.flatnonzero(children[1:] == children[:-1])
    if len(twice):
        one, other = (coarse.names[code] for code in parents[twice[0] : twice[0] + 2])
        raise BadValuesError(
            f"label {fine.names[children[twice[0]]]!r} lies within both {one!r} and {other!r}",
            fix="give every label one coarser label, or transfer the columns one by one",
        )
    found = np.full(len(fine.names), -1, dtype=np.int32)
    found[children] = parents
    return found
