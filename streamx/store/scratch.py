"""Arrays with one entry per cell, in files: the kernel keeps of them what memory allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamx.store.location import storage_error

PIECE_ROWS = 1 << 16  # rows that are worked on at a time


def new_array(path: Path | None, n: int, dtype: Any) -> np.ndarray:
    """A flat array of zeros in a file, which replaces what was there; without a path, in memory."""
    if n == 0 or path is None:
        return np.zeros(n, dtype=dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # who maps the old one keeps it
        with path.open("wb") as stream:  # a page that the disk has no room for would kill the process
            os.posix_fallocate(stream.fileno(), 0, n * np.dtype(dtype).itemsize)
    except OSError as error:
        raise storage_error(error, str(path)) from error
    return np.memmap(path, dtype=dtype, mode="r+", shape=(n,))


def pieces(n: int, rows: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive pieces."""
    rows = rows or PIECE_ROWS
    return ((low, min(low + rows, n)) for low in range(0, n, rows))
