"""Local inverse Simpson index (Korsunsky 2019): how many batches, or labels, live around each cell."""

from __future__ import annotations

import numpy as np

LISI_NEIGHBORS = 90  # counting the cell itself, so 89 others: three times the perplexity of 30


def perplexity_weights(
    distances_mj: np.ndarray, perplexity: float, tolerance: float = 1e-5, max_steps: int = 50
) -> np.ndarray:
    """exp(-beta d) of each row, normalised, with the beta that makes its entropy log(perplexity).

    Distances enter unsquared, as in the reference implementation. Rows that can't reach it (fewer neighbours
    than the perplexity, or equal distances) keep the beta of the last step.

    Returns
    -------
    weights_mj
        float64, rows sum to 1.
    """
    d_mj = distances_mj - distances_mj.min(axis=1, keepdims=True)  # the entropy doesn't change, nor underflow
    target = np.log(perplexity)
    beta = np.ones(len(d_mj))
    low, high = np.full(len(d_mj), -np.inf), np.full(len(d_mj), np.inf)
    weights = np.empty_like(d_mj)
    todo = np.arange(len(d_mj))
    for _ in range(max_steps + 1):
        rows = d_mj[todo]
        kernel = np.exp(-rows * beta[todo, None])
        total = kernel.sum(axis=1)
        excess = np.log(total) + beta[todo] * (rows * kernel).sum(axis=1) / total - target
        weights[todo] = kernel / total[:, None]
        open_rows = np.abs(excess) >= tolerance
        todo, excess = todo[open_rows], excess[open_rows]
        if not len(todo):
            break
        above, below = todo[excess > 0], todo[excess <= 0]
        low[above], high[below] = beta[above], beta[below]
        with np.errstate(invalid="ignore"):
            beta[above] = np.where(np.isinf(high[above]), beta[above] * 2, (beta[above] + high[above]) / 2)
            beta[below] = np.where(np.isinf(low[below]), beta[below] / 2, (beta[below] + low[below]) / 2)
    return weights


def lisi(
    distances_mj: np.ndarray, codes_mj: np.ndarray, n_codes: int, perplexity: float | None = None
) -> np.ndarray:
    """LISI of each cell, 1 (one code around it) to n_codes (all in equal shares).

    Parameters
    ----------
    distances_mj, codes_mj
        (cells, neighbours): distances to the neighbours, without the cell itself, and their codes.
    perplexity
        Effective number of neighbours; default a third of them, counting the cell (30 for 89).
    """
    m, k = distances_mj.shape
    if perplexity is None:
        perplexity = max((k + 1) // 3, 1)
    found = np.empty(m)
    for start in range(0, m, 8192):
        rows = slice(start, start + 8192)
        weights = perplexity_weights(distances_mj[rows], perplexity)
        cell = np.arange(len(weights))[:, None] * n_codes + codes_mj[rows]
        p = np.bincount(cell.ravel(), weights.ravel(), minlength=len(weights) * n_codes)
        found[rows] = 1 / (p.reshape(-1, n_codes) ** 2).sum(axis=1)
    return found
