"""Whether the cells of a batch lie so close together that a type may have been taken for a batch effect.

A batch of nothing but a type that the reference lacks is moved into a known type: no distance tells. What is
left to see is that it fills little of the space, as a batch of several types does not.
"""

from __future__ import annotations

import numpy as np

from streamx.errors import warn
from streamx.store.location import Location

NARROW = 0.55  # of the reference's spread: lacking types alone had .26 and .50, known ones .62 to .73
FEWEST = 200  # cells that say something
ROWS = 1 << 18


def spread_of(latents: Location, key: str) -> float:
    """Spread of a file's latents (root of the summed variances), read piece by piece; 0 without cells."""
    import zarr

    group = zarr.open_group(latents.zarr(""), mode="r", zarr_format=3, use_consolidated=False)
    array = group[f"obsm/{key}"]
    n, k = array.shape  # type: ignore[union-attr]
    sum_k, square_k = np.zeros((2, k))
    for low in range(0, n, ROWS):
        z_nk = np.asarray(array[low : low + ROWS], np.float64)  # type: ignore[index]
        sum_k += z_nk.sum(0)
        square_k += np.square(z_nk).sum(0)
    return float(np.sqrt((square_k / n - np.square(sum_k / n)).sum())) if n else 0.0


def warn_narrow(name: str, z_nk: np.ndarray, reference: float) -> None:
    """Warn if a new batch of some size fills little of the space that the reference fills."""
    if len(z_nk) < FEWEST or not reference:
        return
    share = float(np.sqrt(z_nk.var(0, dtype=np.float64).sum())) / reference
    if share < NARROW:
        warn(
            f"its {len(z_nk):,} cells lie within {share:.0%} of the reference's spread, as one kind does; "
            "if the reference lacks that, surgery took it for a batch effect, and moved them into another",
            where=name,
            fix="look at marker genes; or give these cells together with others of their experiment",
        )
