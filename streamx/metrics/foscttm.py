"""FOSCTTM: how far a cell lies from its other half, where all cells were measured in two modalities."""

from __future__ import annotations

import numpy as np

from streamx.errors import BadValuesError

BLOCK_VALUES = 1 << 24  # distances held at a time
ROUNDING = 1e-9  # of the squared norms: two distances that differ by less are equal


def foscttm(a_nk: np.ndarray, b_nk: np.ndarray) -> float:
    """Fraction of samples closer than the true match (Liu 2019; Singh 2020): 0 is perfect, chance is a half.

    The mean of :func:`closer_shares` over the cells of both modalities.

    Parameters
    ----------
    a_nk, b_nk
        Latents of the same cells in both modalities, (n_cells, n_latent), row i of one the match of row i of
        the other.

    Raises
    ------
    BadValuesError
        If they have no equal shape, fewer than two cells, or values that are not finite.
    """
    share_an, share_bn = closer_shares(a_nk, b_nk)
    return float((share_an.mean() + share_bn.mean()) / 2)


def closer_shares(a_nk: np.ndarray, b_nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each cell, the share of the other modality's n - 1 other cells that are closer than its match.

    Euclidean distance, by blocks of rows; what is as far as the match is not closer.

    Returns
    -------
    share_an, share_bn
        float64 (n_cells,), of the cells of `a_nk` and of `b_nk`.
    """
    a_nk, b_nk = (np.asarray(latent, dtype=np.float64) for latent in (a_nk, b_nk))
    if a_nk.ndim != 2 or a_nk.shape != b_nk.shape or len(a_nk) < 2:
        raise BadValuesError(
            f"latents of shape {a_nk.shape} and {b_nk.shape}",
            fix="(n_cells, n_latent) of the same two or more cells, in the same order",
        )
    if not (np.isfinite(a_nk).all() and np.isfinite(b_nk).all()):
        raise BadValuesError("latents that are not finite", fix="leave cells without a latent out of both")
    middle_k = (a_nk.mean(axis=0) + b_nk.mean(axis=0)) / 2  # norms lose fewer digits near the middle
    a_nk, b_nk = a_nk - middle_k, b_nk - middle_k
    n = len(a_nk)
    norm_an, norm_bn = (a_nk**2).sum(axis=1), (b_nk**2).sum(axis=1)
    match_n = ((a_nk - b_nk) ** 2).sum(axis=1)
    closer_an, closer_bn = np.zeros(n, np.int64), np.zeros(n, np.int64)
    step = max(1, BLOCK_VALUES // n)
    for low in range(0, n, step):
        rows = slice(low, low + step)
        norms_mn = norm_an[rows, None] + norm_bn
        distance_mn = norms_mn - 2 * a_nk[rows] @ b_nk.T + ROUNDING * norms_mn
        closer_an[rows] = (distance_mn < match_n[rows, None]).sum(axis=1)
        closer_bn += (distance_mn < match_n).sum(axis=0)
    return closer_an / (n - 1), closer_bn / (n - 1)
