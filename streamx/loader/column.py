"""A value per row of a collection, read when it is first asked for and kept outside of memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import StorageError
from streamx.store.bucket import cache_folder
from streamx.store.collection import Collection
from streamx.store.layout import OBS_ROWS_PER_CHUNK
from streamx.store.location import storage_error

UNIT = OBS_ROWS_PER_CHUNK  # rows that are read at a time: what a column keeps in a chunk
IN_MEMORY = 1 << 21  # bytes of a column that needs no file


class Column:
    """Values of all rows, of which a file holds those that were asked for.

    A collection is opened, and entered anywhere, without reading what is not needed; memory holds one byte
    per `UNIT` rows. The file has no name and lies in the scratch folder; small columns have none.

    Parameters
    ----------
    n
        Rows.
    read
        (start, stop) -> their values.

    Notes
    -----
    Threads may ask at once: who finds a unit missing reads it, and all write the same.
    """

    def __init__(self, n: int, dtype: Any, read: Callable[[int, int], np.ndarray]) -> None:
        self.n, self.dtype, self.read = n, np.dtype(dtype), read
        self._there = np.zeros(-(-n // UNIT), bool)
        self._file: Any = (
            None if n * self.dtype.itemsize <= IN_MEMORY else scratch_file(n * self.dtype.itemsize)
        )
        self._values: np.ndarray
        if self._file is None:
            self._values = np.zeros(n, self.dtype)
        else:
            self._values = np.memmap(self._file, self.dtype, "r", shape=(n,))

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()

    def __len__(self) -> int:
        return self.n

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return self._there.nbytes + (self._values.nbytes if self._file is None else 0)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Values of some rows: a slice start..stop, or int64 rows in any order."""
        if isinstance(rows, slice):
            units = np.arange(rows.start // UNIT, -(-rows.stop // UNIT))
        else:
            units = np.unique(rows // UNIT)
        for unit in units[~self._there[units]].tolist():
            self._fill(unit * UNIT, min((unit + 1) * UNIT, self.n))
            self._there[unit] = True
        return np.asarray(self._values[rows])

    def _fill(self, low: int, high: int) -> None:
        values = np.ascontiguousarray(self.read(low, high), self.dtype)
        if self._file is None:
            self._values[low:high] = values
            return
        try:  # a store into the mapped file would kill the process where the disk is full
            os.pwrite(self._file.fileno(), values.data, low * self.dtype.itemsize)
        except OSError as error:
            raise storage_error(error, str(cache_folder())) from error


def large_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros; where they are many, in a file without a name, of which the kernel keeps what memory allows."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if nbytes <= IN_MEMORY:
        return np.zeros(shape, dtype)
    with scratch_file(nbytes) as file:  # the mapping outlives it
        try:  # a page that the disk has no room for would kill the process
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise storage_error(error, str(cache_folder())) from error
        return np.memmap(file, dtype, "r+", shape=shape)


def scratch_file(nbytes: int) -> Any:
    """A sparse file without a name; where there is no scratch folder, in the system's one."""
    for folder in (cache_folder(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it stays open
            file.truncate(nbytes)
            return file
        except OSError as error:
            failed = error
    raise StorageError(
        f"no scratch folder can be written ({failed.strerror})",
        where=str(cache_folder()),
        fix="name one by STREAMX_SCRATCH",
    )


def codes_of(view: Collection, name: str) -> Column:
    """Codes of an obs column's values, in their order; -1 where there is none.

    Of a column that is no categorical, all values are looked at first: memory holds those that differ.
    """
    schema = view.obs_column(name, 0, 0)
    if isinstance(schema.dtype, pd.CategoricalDtype):
        values = schema.dtype.categories
    else:
        found: set[Any] = set()
        for low, high in view.iter_rows(UNIT):
            found |= set(view.obs_column(name, low, high).dropna().unique())
        values = pd.Index(sorted(found), dtype=schema.dtype)
    dtype = pd.CategoricalDtype(values)

    def read(start: int, stop: int) -> np.ndarray:
        return np.asarray(view.obs_column(name, start, stop).astype(dtype).cat.codes)

    return Column(view.n_obs, pd.Categorical([], dtype=dtype).codes.dtype, read)
