"""The query's half of label transfer, by blocks of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from streamx.config import UNLABELED
from streamx.errors import UsageError
from streamx.labels import Labels
from streamx.neighbors.blocks import blocks
from streamx.transfer.held_out import HeldOut
from streamx.transfer.voters import Voters, gather
from streamx.transfer.winners import winners

UNKNOWN = "Unknown"
ROWS = 65_536  # query cells at a time


@dataclass(frozen=True)
class Transfer:
    """Transferred labels of one level.

    Attributes
    ----------
    codes_n
        int32 codes into ``names``; -1 = Unknown (too uncertain, or no latent).
    uncertainty_n
        1 - share of the winning label, float32 in [0, 1]; 1 without a latent.
    probabilities_nl
        (n_query, n_labels) float32, or None. Rows sum to 1 (without a latent: all equal); of a finer level,
        to the share of neighbours that have a label there.
    names
        The reference's labels, sorted.
    voters
        Who voted: method, n_neighbors, recall.
    novelty_n
        How strange the cell is to the reference, float32 in [0, 1] (:meth:`.HeldOut.novelty`), or None.
    """

    codes_n: np.ndarray
    uncertainty_n: np.ndarray
    probabilities_nl: np.ndarray | None
    names: list[str]
    voters: Voters
    novelty_n: np.ndarray | None = None

    @property
    def labels_n(self) -> np.ndarray:
        """Labels as text, ``"Unknown"`` where there is none."""
        return Labels(self.codes_n, self.names).text(UNKNOWN)

    @property
    def n_unknown(self) -> int:
        return int((self.codes_n < 0).sum())


def transfer_labels(
    reference_nk: Any,
    labels: Any,
    query_nk: Any,
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
        Latents, (cells, n_latent) float: arrays, mapped files, or (with inverted lists) anything that slices
        into arrays. A query row with NaN becomes Unknown with uncertainty 1; reference rows with NaN are
        left out.
    labels
        One per reference cell. Cells whose label is missing or in `unlabeled` neither vote nor take a place
        among the neighbours.
    method
        ``"vote"``: each neighbour counts the same, ties go to the first label in sorted order, as sklearn's
        ``KNeighborsClassifier``. ``"weighted"``: :func:`.kernel_weights`.
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
    (found,) = transfer_levels(
        reference_nk,
        [labels],
        query_nk,
        method=method,
        n_neighbors=n_neighbors,
        thresholds=None if threshold is None else [threshold],
        unlabeled=unlabeled,
        probabilities=probabilities,
        index=index,
        seed=seed,
        memory=memory,
        threads=threads,
    )
    return found


def transfer_levels(
    reference_nk: Any,
    levels: Sequence[Any],
    query_nk: Any,
    *,
    thresholds: Sequence[float] | None = None,
    probabilities: bool = False,
    **options: Any,
) -> list[Transfer]:
    """Labels of several levels, as :func:`transfer_labels`; each is chosen within the coarser one.

    Parameters
    ----------
    levels
        Columns of labels, coarsest first. Cells without a label of the coarsest have no say.
    thresholds
        Of each level; a cell that is Unknown at one is so at all finer ones.
    options
        As :func:`transfer_labels`.

    Returns
    -------
    list
        One :class:`Transfer` per level.

    Raises
    ------
    BadValuesError
        If a label lies within two coarser ones.
    """
    voters = gather(reference_nk, levels, query_nk, **options)
    return vote(voters, query_nk, thresholds=thresholds, probabilities=probabilities)


def vote(
    voters: Voters,
    query_nk: Any,
    *,
    thresholds: Sequence[float] | None = None,
    probabilities: bool = False,
    held: HeldOut | None = None,
    progress: str | None = None,
) -> list[Transfer]:
    """Labels of every level for these cells, block by block.

    Parameters
    ----------
    held
        What :func:`.hold_out` found: also say how strange each cell is.
    progress
        Title of a progress bar.
    """
    for threshold in thresholds or ():
        if not 0 <= threshold <= 1:
            raise UsageError(f"threshold = {threshold}, an uncertainty lies between 0 and 1")
    n = query_nk.shape[0]
    sizes = [len(labels.names) for labels in voters.levels]
    codes = [np.full(n, -1, dtype=np.int32) for _ in sizes]
    uncertainty = [np.ones(n, dtype=np.float32) for _ in sizes]
    shares = [np.full((n, size), 1 / max(1, size), np.float32) if probabilities else None for size in sizes]
    novelty_n = None if held is None else np.ones(n, dtype=np.float32)
    bar = tqdm(total=n, desc=progress, disable=None if progress else True, leave=False, unit=" cells")
    with bar:
        for low, some_mk in blocks(query_nk, ROWS):
            indices, distances = voters.index.search(some_mk, voters.n_neighbors)
            found = np.flatnonzero(indices[:, 0] >= 0)
            levels = winners(voters, indices[found], distances[found])
            for number, level in enumerate(levels):
                codes[number][low + found] = level.codes_m
                uncertainty[number][low + found] = level.uncertainty_m
                into = shares[number]
                if into is not None:
                    into[low + found] = level.shares_ml
            if held is not None and novelty_n is not None:
                novelty_n[low + found] = held.novelty(levels[-1].codes_m, distances[found].mean(axis=1))
            bar.update(len(some_mk))
    for number, threshold in enumerate(thresholds or ()):
        codes[number][uncertainty[number] > np.float32(threshold)] = -1
    for number in range(1, len(codes)):
        codes[number][codes[number - 1] < 0] = -1
    return [
        Transfer(code_n, unsure_n, share_nl, labels.names, voters, novelty_n)
        for code_n, unsure_n, share_nl, labels in zip(codes, uncertainty, shares, voters.levels, strict=True)
    ]
