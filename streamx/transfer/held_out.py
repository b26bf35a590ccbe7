"""What the reference says of itself: its cells are asked as if they were a query, each without itself.

This sets thresholds of the uncertainty, and says which distances are usual. A held-out cell has neighbours of
its own batch; cells of a new batch are more uncertain, and farther away, as far as its effect is not removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamx.errors import UsageError, warn
from streamx.neighbors.blocks import take_rows
from streamx.transfer.voters import Voters
from streamx.transfer.winners import winners

SIZE = 10_000  # cells that are held out
FEW = 100  # held-out cells of a label, below which its distances are compared with those of all


@dataclass(frozen=True)
class HeldOut:
    """Reference cells that were asked: one array per level of labels, coarsest first.

    Attributes
    ----------
    true, codes
        Codes of their labels (-1: none), given and found.
    uncertainty
        As a query's.
    distance_n
        Mean distance to the neighbours.
    """

    true: tuple[np.ndarray, ...]
    codes: tuple[np.ndarray, ...]
    uncertainty: tuple[np.ndarray, ...]
    distance_n: np.ndarray

    def novelty(self, codes_n: np.ndarray, distance_n: np.ndarray) -> np.ndarray:
        """Share of the held-out cells of the same (finest) label that lie nearer to their neighbours.

        Of all held-out cells where fewer than 100 got that label. 0: as near as the nearest; 1: farther than
        any; a cell of a type that the reference holds is above .95 with probability .05.

        Parameters
        ----------
        codes_n, distance_n
            Label found (-1: none) and mean distance to the neighbours, of the cells that are judged.

        Returns
        -------
        novelty_n
            float32 in [0, 1]; 1 where the distance is NaN.
        """
        everyone = np.sort(self.distance_n)
        found_n = np.searchsorted(everyone, distance_n) / max(1, len(everyone))
        for code, count in zip(*np.unique(self.codes[-1], return_counts=True), strict=True):
            if code >= 0 and count >= FEW:
                own = np.sort(self.distance_n[self.codes[-1] == code])
                rows = np.flatnonzero(codes_n == code)
                found_n[rows] = np.searchsorted(own, distance_n[rows]) / len(own)
        found_n[np.isnan(distance_n)] = 1
        return found_n.astype(np.float32)


@dataclass(frozen=True)
class Threshold:
    """An uncertainty above which cells stay Unknown, and what it does to held-out reference cells.

    Attributes
    ----------
    kept, error, n_cells
        Share of them that keep a label, share of wrong ones among these, and how many were asked; None and 0
        if the threshold was given.
    """

    value: float
    kept: float | None = None
    error: float | None = None
    n_cells: int = 0


def hold_out(voters: Voters, *, seed: int = 0) -> HeldOut:
    """Ask a seeded sample of 10,000 of the voters, each without itself."""
    n = voters.latent_nk.shape[0]
    size = min(n, SIZE)
    rows = np.sort(np.random.default_rng(seed).choice(n, size, replace=False))
    indices, distances = voters.index.search(
        take_rows(voters.latent_nk, rows), min(voters.n_neighbors, n - 1), own_m=rows
    )
    if not indices.shape[1]:
        raise UsageError("one labelled reference cell is too few to hold any out", fix="give a threshold")
    found = winners(voters, indices, distances)
    return HeldOut(
        tuple(labels.codes_n[rows] for labels in voters.levels),
        tuple(level.codes_m for level in found),
        tuple(level.uncertainty_m for level in found),
        distances.mean(axis=1),
    )


def threshold_for(
    held: HeldOut, level: int = -1, *, keep: float | None = None, max_error: float | None = None
) -> Threshold:
    """The threshold of a level of labels that does to held-out reference cells what is asked.

    Parameters
    ----------
    keep
        The least threshold at which this share of them keeps a label.
    max_error
        The largest threshold at which no more than this share of the labels that are kept is wrong; with a
        warning, the strictest one, if even that is wrong more often.
    """
    goal = keep if max_error is None else max_error
    if (keep is None) == (max_error is None) or goal is None or not 0 <= goal <= 1:
        raise UsageError(f"keep = {keep}, max_error = {max_error}", fix="one of them, between 0 and 1")
    known = held.true[level] >= 0
    order = np.argsort(held.uncertainty[level][known], kind="stable")
    uncertainty_n = held.uncertainty[level][known][order]
    wrong_n = (held.codes[level] != held.true[level])[known][order]
    last = np.flatnonzero(np.append(uncertainty_n[1:] > uncertainty_n[:-1], True))  # of equal ones
    if not len(uncertainty_n):
        raise UsageError("no held-out reference cell has a label", fix="give a threshold")
    kept = (last + 1) / len(uncertainty_n)
    error = np.cumsum(wrong_n)[last] / (last + 1)
    if keep is not None:
        at = int(np.argmax(kept >= keep))
    else:
        right = np.flatnonzero(error <= goal)
        at = int(right[-1]) if len(right) else 0
        if not len(right):
            warn(
                f"{error[0]:.3f} of the most certain labels of held-out cells are wrong, more than {goal}",
                fix="look whether the latent space keeps these labels apart",
            )
    return Threshold(float(uncertainty_n[last[at]]), float(kept[at]), float(error[at]), len(uncertainty_n))
