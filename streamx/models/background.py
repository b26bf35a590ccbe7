"""Where totalVI's prior of the protein background starts: mixtures fitted to a few cells of each batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

_EMPTY_CELL = (0.0, 0.05)
_NO_CELLS = (0.0, 1.0)
_FEWEST_PROTEINS = 5


def empirical_background(
    protein_by_batch: Sequence[np.ndarray],
    rng: np.random.Generator,
    measured_bp: np.ndarray | None = None,
    n_cells: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of ln(background) per protein and batch.

    In each batch ``n_cells`` cells are drawn with replacement, and two Gaussians fitted to the ln(1 + count)
    of each one's proteins; the lower of the two is background. The batch's mean is the average of these, its
    standard deviation that of the average (the root of the summed variances over ``n_cells``), alike for all
    proteins (Gayoso 2021, supplement; constants as in scvi-tools). A cell without a single count gives
    (0, 0.05), as does a batch that measured fewer than five proteins; a batch without cells gives (0, 1).

    Parameters
    ----------
    protein_by_batch
        Raw protein counts of each batch's cells (or of a sample of them), (n_cells of the batch, n_proteins).
    rng
        Draws the cells and seeds the fits.
    measured_bp
        bool (n_batches, n_proteins): which proteins a batch measured; default: all.

    Returns
    -------
    mean_pb, sd_pb
        float32 (n_proteins, n_batches).
    """
    n_proteins = protein_by_batch[0].shape[1]
    priors = []
    for b, y_np in enumerate(protein_by_batch):
        measured_p = np.ones(n_proteins, bool) if measured_bp is None else measured_bp[b]
        if len(y_np) == 0:
            priors.append(_NO_CELLS)
        elif measured_bp is not None and measured_p.sum() < _FEWEST_PROTEINS:
            priors.append(_EMPTY_CELL)
        else:
            rows_n = rng.choice(len(y_np), size=n_cells)
            cells = np.array([_lower_gaussian(y_p, rng) for y_p in y_np[rows_n][:, measured_p]])
            priors.append((cells[:, 0].mean(), np.sqrt(np.square(cells[:, 1]).sum()) / n_cells))
    table_b2 = np.array(priors, np.float32)
    mean_pb, sd_pb = np.tile(table_b2[:, 0], (n_proteins, 1)), np.tile(table_b2[:, 1], (n_proteins, 1))
    return mean_pb, sd_pb


def _lower_gaussian(y_p: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Mean and standard deviation of the lower of two Gaussians fitted to ln(1 + counts) of one cell."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(n_components=2, random_state=int(rng.integers(2**31)))
    with warnings.catch_warnings():
        # Fewer than two distinct values, or a fit that doesn't settle: no background can be told.
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            mixture.fit(np.log1p(np.asarray(y_p, np.float64)).reshape(-1, 1))
        except ConvergenceWarning:
            return _EMPTY_CELL
    lower = int(np.argmin(mixture.means_))
    return float(mixture.means_[lower, 0]), float(np.sqrt(mixture.covariances_[lower].item()))
