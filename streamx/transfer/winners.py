"""From neighbours to labels: shares of the vote, and who wins, level by level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamx.transfer.voters import Voters


@dataclass(frozen=True)
class Winners:
    """Of one level: the winning label of some cells (-1: no neighbour has one there), and all shares."""

    codes_m: np.ndarray
    uncertainty_m: np.ndarray
    shares_ml: np.ndarray


def winners(voters: Voters, indices_mj: np.ndarray, distances_mj: np.ndarray) -> list[Winners]:
    """The winning label of each level, within that of the coarser level, for cells with these neighbours.

    A share is that of all votes, so uncertainty never falls from a level to a finer one, and shares of a
    finer level sum to the share of votes that have a label there. Ties go to the first label in sorted order.
    """
    m, k = indices_mj.shape
    weights_mj = kernel_weights(distances_mj) if voters.method == "weighted" else None
    found: list[Winners] = []
    for number, labels in enumerate(voters.levels):
        codes_mj, n_labels = labels.codes_n[indices_mj], len(labels.names)
        size = n_labels + 1  # the last for votes without a label
        cell = (np.arange(m)[:, None] * size + np.where(codes_mj < 0, n_labels, codes_mj)).ravel()
        if weights_mj is None:
            shares_ml = np.bincount(cell, minlength=m * size).reshape(m, size)[:, :-1] / k
        else:
            shares_ml = np.bincount(cell, weights_mj.ravel(), minlength=m * size).reshape(m, size)[:, :-1]
        allowed_ml = shares_ml
        if number:
            inside = voters.parents[number - 1][None] == found[-1].codes_m[:, None]
            allowed_ml = np.where(inside & (found[-1].codes_m >= 0)[:, None], shares_ml, 0)
        codes_m = allowed_ml.argmax(axis=1).astype(np.int32) if n_labels else np.full(m, -1, np.int32)
        best_m = allowed_ml.max(axis=1, initial=0)
        codes_m[best_m <= 0] = -1
        found.append(Winners(codes_m, np.clip(1 - best_m, 0, 1).astype(np.float32), shares_ml))
    return found


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
