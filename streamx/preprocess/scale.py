"""The largest value per batch and gene: what SCALEX divides by."""

from __future__ import annotations

import numpy as np

from streamx.preprocess.moments import Moments, pool


def maxima(moments: Moments, *, scale: str | None, log1p: bool, n_batches: int) -> np.ndarray | None:
    """What each gene is divided by, float32 (n_batches, n_genes); None for no scaling.

    The maximum is taken in float64 on the linear scale: log1p is monotonous, so the maximum of the logarithms
    is the logarithm of the maximum. 0 becomes 1.

    Parameters
    ----------
    moments
        Of the values before log1p, over the selected genes.
    scale
        ``"batch"``, ``"global"`` or None.
    n_batches
        Rows of the table; batches without cells get ones.
    """
    if scale is None:
        return None
    table = np.zeros((n_batches, moments.n_genes))
    if scale == "global":
        table[:] = pool(moments).max_bg[0]
    else:
        table[moments.code_b] = moments.max_bg
    if log1p:
        table = np.log1p(table)
    return np.where(table > 0, table, 1.0).astype(np.float32)
