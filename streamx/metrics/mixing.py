"""How well batches mix, and labels stay apart, among each cell's nearest neighbours.

All functions take codes of the neighbours, (n_cells, n_neighbors), so that one search serves them all.
"""

from __future__ import annotations

import numpy as np

from streamx.metrics.measure import Measure, mean_of, mean_of_means

BEM_NEIGHBORS, BEM_POOLS, EBM_NEIGHBORS, EBM_POOLS, DRAWS = 100, 100, 50, 50, 100
PURITY_NEIGHBORS, SAME_NEIGHBORS = 50, 30


def draw_cells(n_cells: int, n_pools: int, n_samples_per_pool: int = DRAWS, seed: int = 0) -> np.ndarray:
    """The cells that both entropy scores draw, with replacement: (n_pools, n_samples_per_pool).

    The legacy generator, because published values were made with it (``numpy.random.seed``, then ``choice``).
    Fewer pools draw the first of the same cells.
    """
    legacy = np.random.RandomState(seed)
    return np.stack([legacy.choice(n_cells, size=n_samples_per_pool) for _ in range(n_pools)])


def code_counts(codes_mj: np.ndarray, n_codes: int) -> np.ndarray:
    """(m, n_codes): how many of each cell's neighbours carry each code."""
    m = len(codes_mj)
    cell = np.arange(m)[:, None] * n_codes + codes_mj
    return np.bincount(cell.ravel(), minlength=m * n_codes).reshape(m, n_codes)


def mixing_entropies(codes_mj: np.ndarray, share_b: np.ndarray) -> np.ndarray:
    """SCALEX's entropy of each cell, natural logarithm: in [0, ln n_batches].

    Shares of the batches among the neighbours are divided by their shares of all cells and normalised, then
    -sum q ln(q + 1e-8).
    """
    weight_mb = code_counts(codes_mj, len(share_b)) / codes_mj.shape[1] / share_b
    q_mb = weight_mb / weight_mb.sum(axis=1, keepdims=True)
    return -(q_mb * np.log(q_mb + 1e-8)).sum(axis=1)


def batch_entropies(codes_mj: np.ndarray, n_batches: int) -> np.ndarray:
    """scArches' entropy of each cell: of the neighbours' batches as they are, base n_batches, in [0, 1]."""
    p_mb = code_counts(codes_mj, n_batches) / codes_mj.shape[1]
    logs = np.log(p_mb, out=np.zeros_like(p_mb), where=p_mb > 0)
    return -(p_mb * logs).sum(axis=1) / np.log(n_batches)


def batch_entropy_mixing(entropies_n: np.ndarray, draws: np.ndarray, n_batches: int, seed: int) -> Measure:
    """SCALEX's batch entropy mixing score (Xiong 2022): mean over draws / log2(n_batches), at most ln 2."""
    return mean_of(entropies_n[draws.ravel()] / np.log2(n_batches), False, seed, perfect=float(np.log(2)))


def entropy_batch_mixing(entropies_n: np.ndarray, draws: np.ndarray, seed: int) -> Measure:
    """scArches' EBM: mean over draws."""
    return mean_of(entropies_n[draws.ravel()], False, seed)


def same_batch(
    codes_mj: np.ndarray, own_m: np.ndarray, share_b: np.ndarray, exact: bool, seed: int
) -> Measure:
    """Share of neighbours from the cell's own batch; perfectly mixed: the sum of squared batch shares."""
    share_m = (codes_mj == own_m[:, None]).mean(axis=1)
    return mean_of(share_m, exact, seed, perfectly_mixed=float((share_b**2).sum()))


def knn_purity(codes_mj: np.ndarray, own_m: np.ndarray, exact: bool, seed: int) -> Measure:
    """scArches' k-NN purity: share of neighbours with the cell's label, mean per label, mean over labels."""
    return mean_of_means((codes_mj == own_m[:, None]).mean(axis=1), own_m, exact, seed)
