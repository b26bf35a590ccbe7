"""Latents by their direction, for cells that were measured in different ways."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamx.errors import UsageError
from streamx.labels import encode_labels


def directions(latent_nk: np.ndarray, batches: Any = None) -> np.ndarray:
    """Latents of length 1: the nearest cells are then those at the smallest angle.

    How far a cell lies from the middle says how much was measured of it (an ATAC cell of 80 open peaks is
    near it, whatever its type); where it lies says what it is. With `batches` each batch is moved to mean 0
    and standard deviation 1 in every dimension first, which presumes that they hold the same types in the
    same shares, as ``train --norm domain`` does: RNA and ATAC of one tissue, not a query of chosen cells.

    Parameters
    ----------
    latent_nk
        (n_cells, n_latent) float. Rows with NaN count nowhere and stay NaN.
    batches
        One per cell, such as its modality; None: directions from the origin.

    Returns
    -------
    float32 (n_cells, n_latent). A cell in the very middle has length 0.

    Raises
    ------
    UsageError
        If there are not as many batches as cells, or a cell has none.
    """
    moved_nk = np.array(latent_nk, dtype=np.float32)
    if batches is not None:
        batch = encode_labels(batches, ())
        if len(batch) != len(moved_nk) or not batch.known_n.all():
            raise UsageError(
                f"{int(batch.known_n.sum())} batches of {len(moved_nk)} cells", fix="one per cell"
            )
        finite_n = np.isfinite(moved_nk).all(axis=1)
        for code in range(len(batch.names)):
            own_n = batch.codes_n == code
            some_mk = moved_nk[own_n & finite_n].astype(np.float64)
            spread_k = some_mk.std(axis=0)
            moved_nk[own_n] = (moved_nk[own_n] - some_mk.mean(axis=0)) / np.where(spread_k > 0, spread_k, 1)
    length_n1 = np.linalg.norm(moved_nk, axis=1, keepdims=True)
    return moved_nk / np.where(length_n1 == 0, 1, length_n1)
