"""Variable peaks by episcanpy's rule (0.4.0): those that are open in about half of the cells."""

from __future__ import annotations

import numpy as np


def variable_peaks(sum_g: np.ndarray, n_cells: int, *, n_top: int) -> tuple[np.ndarray, np.ndarray]:
    """Peaks whose mean is nearest to one half.

    Parameters
    ----------
    sum_g
        Sum over cells of the binarised (or, in SCALEX 1.0.4, log-normalised) values, (n_peaks,).
    n_top
        Peaks wanted. episcanpy's threshold is the score at position `n_top` counted from 0, so one more than
        asked for is kept, and ties with it.

    Returns
    -------
    keep_g, score_g
        bool and float64 (n_peaks,); score = 1 - |mean - 0.5|.
    """
    score_g = 1 - np.abs(sum_g / n_cells - 0.5)
    if n_top >= len(score_g):
        return np.ones(len(score_g), dtype=bool), score_g
    threshold = np.sort(score_g)[::-1][n_top]
    return score_g >= threshold, score_g
