"""Points that memory may not hold: arrays, mapped files, or anything that slices into arrays."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from streamx.errors import ResourceError

ROWS = 131_072  # at a time


def blocks(points_nk: Any, rows: int = ROWS) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows), in order."""
    for low in range(0, points_nk.shape[0], rows):
        yield low, np.asarray(points_nk[low : low + rows])


class Stacked:
    """Points that lie in several places, one behind the other, as if they were one array."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(part.shape[0] for part in self.parts)])
        self.shape = (int(self.starts[-1]), self.parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, some: slice) -> np.ndarray:
        low, high, _ = some.indices(len(self))
        touched = [
            np.asarray(part[max(0, low - start) : max(0, high - start)])
            for part, start in zip(self.parts, self.starts[:-1], strict=True)
            if start < high and start + part.shape[0] > low
        ]
        return np.concatenate(touched) if touched else np.asarray(self.parts[0][:0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class Rows:
    """Some rows of points, where these lie: whoever slices reads those rows alone.

    Parameters
    ----------
    points_nk
        An array, a mapped file, or anything that slices into arrays.
    rows
        Ascending.
    """

    def __init__(self, points_nk: Any, rows: np.ndarray) -> None:
        self.points_nk, self.rows = points_nk, rows
        self.shape = (len(rows), points_nk.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice) -> np.ndarray:
        rows = self.rows[some]
        low, high = (rows[0], rows[-1] + 1) if len(rows) else (0, 0)
        return np.asarray(self.points_nk[low:high])[rows - low]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


def take_rows(points_nk: Any, rows: np.ndarray) -> np.ndarray:
    """These rows (ascending), in memory."""
    if isinstance(points_nk, np.ndarray):
        return np.asarray(points_nk[rows])
    return np.concatenate(
        [np.asarray(points_nk[:0])]
        + [
            some_nk[rows[slice(*np.searchsorted(rows, (low, low + len(some_nk))))] - low]
            for low, some_nk in blocks(points_nk)
        ]
    )


def finite_rows(points_nk: Any) -> np.ndarray:
    """Which rows have neither NaN nor inf."""
    parts = [np.isfinite(some_nk).all(axis=1) for _, some_nk in blocks(points_nk)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def settle(points_nk: Any, memory: int) -> np.ndarray:
    """Points that are read several times: in memory, or in a file while they take more than `memory`."""
    first = np.asarray(points_nk[:1])
    size = points_nk.shape[0] * first.nbytes
    settled_nk = scratch_array(points_nk.shape, first.dtype, on_disk=size > memory)
    for low, some_nk in blocks(points_nk):
        settled_nk[low : low + len(some_nk)] = some_nk
    return settled_nk


def scratch_array(shape: tuple[int, ...], dtype: Any, *, on_disk: bool) -> np.ndarray:
    """An array to fill: in memory, or in a file that is gone with the last who uses it."""
    if not on_disk:
        return np.empty(shape, dtype)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as stream:
        try:  # a page that the disk has no room for would kill the process
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            raise ResourceError(
                f"{size / 1e9:.2g} GB for a while: {error.strerror}",
                where=tempfile.gettempdir(),
                fix="free some space, or name another folder by TMPDIR",
            ) from error
        return np.memmap(stream, dtype=dtype, mode="r+", shape=shape)
