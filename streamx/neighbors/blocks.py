"""Points that memory may not hold: arrays, mapped files, or anything that slices into arrays."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

ROWS = 131_072  # at a time


def blocks(points_nk: Any, rows: int = ROWS) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows), in order."""
    for low in range(0, len(points_nk), rows):
        yield low, np.asarray(points_nk[low : low + rows])


def take_rows(points_nk: Any, rows: np.ndarray) -> np.ndarray:
    """These rows (ascending), in memory."""
    if isinstance(points_nk, np.ndarray):
        return np.asarray(points_nk[rows])
    return np.concatenate(
        [
            some_nk[rows[slice(*np.searchsorted(rows, (low, low + len(some_nk))))] - low]
            for low, some_nk in blocks(points_nk)
        ]
    )


def finite_rows(points_nk: Any) -> np.ndarray:
    """Which rows have neither NaN nor inf."""
    parts = [np.isfinite(some_nk).all(axis=1) for _, some_nk in blocks(points_nk)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def scratch_array(shape: tuple[int, ...], dtype: Any, *, on_disk: bool) -> np.ndarray:
    """An array to fill: in memory, or in a file that is gone with the last who uses it."""
    if not on_disk:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as stream:
        stream.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(stream, dtype=dtype, mode="r+", shape=shape)
