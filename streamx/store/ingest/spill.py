"""The one transposing spill: entries arrive by gene and leave by cell, through disk, in bounded memory."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from streamx.errors import BadFileError
from streamx.store.ingest.source import Request, Rows, check_indptr, plain_dtype, sparse_rows

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # cells, genes, values of the same length

MAX_BUCKETS = 256
# Bytes of working memory per entry while a bucket is sorted: the record, COO, CSR and scipy's copies.
SORT_BYTES = 96


@dataclass(frozen=True)
class FileArray:
    """A flat array in a file, read by slices with plain reads (no map, so that memory stays counted)."""

    path: Path
    dtype: np.dtype

    def __getitem__(self, at: slice) -> np.ndarray:
        return np.fromfile(
            self.path, dtype=self.dtype, count=at.stop - at.start, offset=at.start * self.dtype.itemsize
        )


def transposed(
    entries: Callable[[int], Iterator[Entries]],
    n_stored: int,
    dtype: np.dtype,
    obs_names: Sequence[str],
    var_names: np.ndarray,
    request: Request,
    *,
    text: bool = False,
) -> Rows:
    """Rows of a matrix that is stored by gene; the spill is made at the first call and then reused.

    Parameters
    ----------
    entries
        Given a number of entries, yields (cells, genes, values) of at most about that many, in any order.
    n_stored
        Number of entries, or an upper bound.
    dtype
        Type of the values.
    text
        The values come from text: where all are integral, rows have an integer dtype.
    """
    lock = threading.Lock()
    made: list[Rows] = []

    def rows(start: int, stop: int) -> sparse.csr_matrix:
        with lock:
            if not made:
                made.append(Spill(n_stored, dtype, obs_names, var_names, request).make(entries, text))
        return made[0](start, stop)

    return rows


@dataclass
class Spill:
    """Bucket the entries by ranges of cells, then sort bucket after bucket into one CSR on disk."""

    n_stored: int
    dtype: np.dtype
    obs_names: Sequence[str]
    var_names: np.ndarray
    request: Request

    def __post_init__(self) -> None:
        self.shape = (len(self.obs_names), len(self.var_names))
        self.folder = self.request.spill
        self.limit = max(4096, self.request.memory // 2 // SORT_BYTES)  # entries in memory at once
        n_buckets = min(MAX_BUCKETS, self.shape[0], max(1, -(-self.n_stored // self.limit)))
        self.width = -(-self.shape[0] // n_buckets)  # cells per bucket

    def make(self, entries: Callable[[int], Iterator[Entries]], text: bool) -> Rows:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        n_cells, n_genes = self.shape
        counts = np.zeros(n_cells, dtype=np.int64)
        integral = text
        for cells, genes, values in entries(self.limit // 2):
            integral = integral and text and bool(((values == np.rint(values)) & (abs(values) < 2**53)).all())
            counts += np.bincount(cells, minlength=n_cells)
            self._scatter(cells, genes, values)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        value_dtype = np.dtype(np.int64) if integral else self.dtype
        with (self.folder / "indices").open("wb") as indices, (self.folder / "data").open("wb") as data:
            for bucket in range(-(-n_cells // self.width)):
                for block in self._sorted(bucket, indptr):
                    block.indices.astype(np.int32, copy=False).tofile(indices)
                    block.data.astype(value_dtype, copy=False).tofile(data)
                (self.folder / f"bucket{bucket:03d}").unlink(missing_ok=True)
        columns = FileArray(self.folder / "indices", np.dtype(np.int32))
        stored_values = FileArray(self.folder / "data", value_dtype)
        return sparse_rows(indptr, columns, stored_values, n_genes, self.request.location, self.obs_names)

    def _scatter(self, cells: np.ndarray, genes: np.ndarray, values: np.ndarray) -> None:
        record = _record(self.dtype)
        bucket = cells // self.width
        order = np.argsort(bucket, kind="stable")
        records = np.empty(len(cells), dtype=record)
        records["cell"], records["gene"], records["value"] = cells[order], genes[order], values[order]
        numbers, starts = np.unique(bucket[order], return_index=True)
        for number, part in zip(numbers, np.split(records, starts[1:]), strict=False):
            with (self.folder / f"bucket{number:03d}").open("ab") as stream:
                part.tofile(stream)

    def _sorted(self, bucket: int, indptr: np.ndarray) -> Iterator[sparse.csr_matrix]:
        """The bucket's rows in order; a bucket above the limit is read once per group of rows that fits."""
        path, record = self.folder / f"bucket{bucket:03d}", _record(self.dtype)
        first, end = bucket * self.width, min((bucket + 1) * self.width, self.shape[0])
        while path.exists() and first < end:
            last = int(np.searchsorted(indptr, indptr[first] + self.limit, side="right")) - 1
            last = min(max(last, first + 1), end)
            kept = []
            for at in range(0, path.stat().st_size // record.itemsize, self.limit):
                part = np.fromfile(path, dtype=record, count=self.limit, offset=at * record.itemsize)
                inside = (part["cell"] >= first) & (part["cell"] < last)
                kept.append(part if inside.all() else part[inside])
            group = np.concatenate(kept)
            where = (group["cell"] - first, group["gene"])
            block = sparse.coo_matrix((group["value"], where), shape=(last - first, self.shape[1])).tocsr()
            if block.nnz != len(group):
                self._name_duplicate(group)
            yield block
            first = last

    def _name_duplicate(self, group: np.ndarray) -> None:
        keys = group["cell"].astype(np.int64) * self.shape[1] + group["gene"]
        keys, times = np.unique(keys, return_counts=True)
        cell, gene = divmod(int(keys[np.argmax(times > 1)]), self.shape[1])
        raise BadFileError(
            f"gene {self.var_names[gene]!r} occurs twice in cell {self.obs_names[cell]!r} (row {cell})",
            where=self.request.location,
            fix="merge the duplicate entries",
        )


def _record(dtype: np.dtype) -> np.dtype:
    return np.dtype([("cell", np.int32), ("gene", np.int32), ("value", dtype)])


def compressed_rows(
    by_row: bool,
    arrays: tuple[Any, Any, Any],
    name: str,
    obs_names: Sequence[str],
    var_names: np.ndarray,
    request: Request,
) -> Rows:
    """Rows of a CSR (`by_row`) or CSC matrix given as (indptr, indices, data), on disk or in memory."""
    indptr, indices, data = arrays
    n_stored, location = int(data.shape[0]), request.location
    if indices.shape[0] != n_stored:
        raise BadFileError(
            f"{name} has {n_stored} values and {indices.shape[0]} indices",
            where=location,
            fix="the file is damaged: download or write it again",
        )
    absent = getattr(data, "nchunks", 0) - getattr(data, "nchunks_initialized", 0)
    if absent:  # zarr would read zeros
        raise BadFileError(
            f"{absent} of {data.nchunks} chunks of {name}/data are missing",
            where=location,
            fix="copy it again",
        )
    n_lines = len(obs_names if by_row else var_names)
    if not by_row:
        indptr = np.asarray(indptr[:])
    indptr = check_indptr(indptr, n_lines, n_stored, location, name)
    if by_row:
        return sparse_rows(indptr, indices, data, len(var_names), location, obs_names)
    entries = column_entries(indptr, indices, data, len(obs_names), location, var_names)
    dtype = plain_dtype(np.empty(0, dtype=data.dtype)).dtype
    return transposed(entries, n_stored, dtype, obs_names, var_names, request)


def column_entries(
    indptr: np.ndarray, indices: Any, data: Any, n_cells: int, location: str, var_names: np.ndarray
) -> Callable[[int], Iterator[Entries]]:
    """Entries of a CSC matrix, in pieces that need not end where a column ends."""

    def entries(limit: int) -> Iterator[Entries]:
        for at in range(0, int(indptr[-1]), limit):
            end = min(at + limit, int(indptr[-1]))
            first = int(np.searchsorted(indptr, at, side="right")) - 1
            last = int(np.searchsorted(indptr, end, side="left"))
            genes = np.repeat(np.arange(first, last), np.diff(np.clip(indptr[first : last + 1], at, end)))
            cells, values = np.asarray(indices[at:end]), plain_dtype(np.asarray(data[at:end]))
            wrong = np.flatnonzero((cells < 0) | (cells >= n_cells))
            if len(wrong):
                raise BadFileError(
                    f"cell index {cells[wrong[0]]} of gene {var_names[genes[wrong[0]]]!r} is outside 0 to "
                    f"{n_cells - 1}",
                    where=location,
                    fix="the matrix and its list of cells don't belong together: write the file again",
                )
            yield cells, genes, values

    return entries
