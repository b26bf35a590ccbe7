"""How well batches mix, and labels stay apart, among each cell's nearest neighbours.

All functions take codes of the neighbours, (n_cells, n_neighbors), so that one search serves them all.
"""

from __future__ import annotations

import numpy as np

from streamx.metrics.measure import Measure, mean_of, mean_of_means, share_of

BEM_NEIGHBORS, BEM_POOLS, EBM_NEIGHBORS, EBM_POOLS, DRAWS = 100, 100, 50, 50, 100
PURITY_NEIGHBORS, SAME_NEIGHBORS = 50, 30
KBET_NEIGHBORS, KBET_ALPHA = 50, 0.05  # counting the cell itself, as scib-metrics


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


def batch_tests(codes_mj: np.ndarray, share_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kBET's test of each cell (Büttner 2019): do its neighbours' batches occur as often as everywhere?

    Pearson's chi-squared of the counts against `share_b`, with one degree of freedom less than batches.

    Parameters
    ----------
    codes_mj
        Batches of the neighbours, the cell itself among them.

    Returns
    -------
    statistics, p_values
        float64, one per cell.
    """
    from scipy.special import chdtrc

    expected_b = share_b * codes_mj.shape[1]
    observed_mb = code_counts(codes_mj, len(share_b))
    statistics = ((observed_mb - expected_b) ** 2 / expected_b).sum(axis=1)
    return statistics, chdtrc(len(share_b) - 1, statistics)


def kbet(codes_mj: np.ndarray, own_m: np.ndarray, share_b: np.ndarray, exact: bool, seed: int) -> Measure:
    """Share of cells whose test does not reject mixing at 5 %, as ``scib_metrics.kbet``: 0 to about .95.

    Unlike the R package's, one number of neighbours (50) whatever the sizes of the batches, and all cells at
    once, not by label. In perfect mixing a little less than .95, because each cell counts itself.
    """
    statistics, p_values = batch_tests(np.column_stack([own_m, codes_mj]), share_b)
    return share_of(
        p_values >= KBET_ALPHA,
        exact,
        seed,
        perfectly_mixed=1 - KBET_ALPHA,
        mean_statistic=float(statistics.mean()),
        mean_p_value=float(p_values.mean()),
    )


def batch_entropy_mixing(
    entropies_n: np.ndarray, draws: np.ndarray | None, n_batches: int, seed: int
) -> Measure:
    """SCALEX's batch entropy mixing score (Xiong 2022): mean over draws / log2(n_batches), at most ln 2.

    Without draws, over the cells given: a sample of all.
    """
    drawn = entropies_n if draws is None else entropies_n[draws.ravel()]
    return mean_of(drawn / np.log2(n_batches), False, seed, perfect=float(np.log(2)))


def entropy_batch_mixing(entropies_n: np.ndarray, draws: np.ndarray | None, seed: int) -> Measure:
    """scArches' EBM: mean over draws; without them, over the cells given."""
    return mean_of(entropies_n if draws is None else entropies_n[draws.ravel()], False, seed)


def same_batch(
    codes_mj: np.ndarray, own_m: np.ndarray, share_b: np.ndarray, exact: bool, seed: int
) -> Measure:
    """Share of neighbours from the cell's own batch; perfectly mixed: the sum of squared batch shares."""
    share_m = (codes_mj == own_m[:, None]).mean(axis=1)
    return mean_of(share_m, exact, seed, perfectly_mixed=float((share_b**2).sum()))


def knn_purity(
    codes_mj: np.ndarray, own_m: np.ndarray, exact: bool, seed: int, size_l: np.ndarray
) -> Measure:
    """scArches' k-NN purity: share of neighbours with the cell's label, mean per label, mean over labels.

    Parameters
    ----------
    size_l
        Cells that have each label: one scored whole adds nothing to the interval.
    """
    return mean_of_means((codes_mj == own_m[:, None]).mean(axis=1), own_m, exact, seed, size_l)
