"""The first half of writing: slabs of rows, read in any order, laid down where the second half can find them.

A slab knows the destination of each of its rows. Spilled, its rows are sorted by destination, so that the
rows start..stop of the result are one contiguous piece of every slab.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from streamx.store.journal import Journal
from streamx.store.location import ObjectTable, describe
from streamx.threads import run_all

Dense = dict[str, np.ndarray]


@dataclass(frozen=True)
class Slab:
    """One unit of reading.

    Attributes
    ----------
    key
        Name of the slab, stable over runs (resuming looks for it).
    rows
        Destination of each of its rows, int64, any order, disjoint from all other slabs'.
    read
        Gives the rows in the order of `rows`: a CSR matrix over the result's genes, and dense matrices by
        name.
    """

    key: str
    rows: np.ndarray
    read: Callable[[], tuple[sparse.csr_matrix, Dense]]


@dataclass(frozen=True)
class Spilled:
    """A slab on disk: rows sorted by destination, as plain .npy files that are mapped when read.

    `maximum` is the largest value (0 for none); `counts` says that all are integers and none is negative.
    """

    folder: Path
    maximum: float
    counts: bool

    @cached_property
    def rows(self) -> np.ndarray:
        return np.load(self.folder / "rows.npy")

    @cached_property
    def indptr(self) -> np.ndarray:
        return np.load(self.folder / "indptr.npy")

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


def spill(slabs: Sequence[Slab], journal: Journal, *, threads: int, progress: str) -> list[Spilled]:
    """Read every slab once and lay it down; what a former run laid down and is unharmed is kept."""
    return run_all([partial(_spill_one, slab, journal) for slab in slabs], threads, progress)


def _spill_one(slab: Slab, journal: Journal) -> Spilled:
    name, prefix = f"spill-{slab.key}", f"spill/{slab.key}"
    folder = journal.location.path(prefix)
    rows = np.asarray(slab.rows, dtype=np.int64)
    done = journal.find(name)
    # another limit of memory cuts other slabs, possibly under the same key
    if done and done["rows"] == describe(rows.data) and _unharmed(folder, done["files"]):
        return Spilled(folder, done["maximum"], done["counts"])
    x_ng, dense = slab.read()
    order = np.argsort(rows, kind="stable")
    x_ng = x_ng[order]
    x_ng.sort_indices()
    arrays: dict[str, np.ndarray] = {
        "rows": rows[order],
        "indptr": x_ng.indptr.astype(np.int64),
        "indices": x_ng.indices,
        "data": x_ng.data,
    }
    arrays |= {f"obsm.{key}": values[order] for key, values in dense.items()}
    files = {}
    for part, values in arrays.items():
        pieces = npy_pieces(values)
        journal.location.write(f"{prefix}/{part}.npy", *pieces)
        files[part] = describe(*pieces)
    maximum = x_ng.data.max().item() if x_ng.nnz else 0
    counts = x_ng.dtype.kind in "ui" and (not x_ng.nnz or x_ng.data.min().item() >= 0)
    journal.record(name, {"rows": describe(rows.data), "maximum": maximum, "counts": counts, "files": files})
    return Spilled(folder, maximum, counts)


def npy_pieces(values: np.ndarray) -> tuple[bytes, memoryview]:
    """Header and bytes of an .npy file, uncopied."""
    values = np.ascontiguousarray(values)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    return header.getvalue(), values.reshape(-1).view(np.uint8).data


def _unharmed(folder: Path, files: ObjectTable) -> bool:
    paths = {part: folder / f"{part}.npy" for part in files}
    return all(
        paths[part].is_file() and describe(np.fromfile(paths[part], dtype=np.uint8).data) == expected
        for part, expected in files.items()
    )


@dataclass(frozen=True)
class Spill:
    """All slabs as one row space, in destination order."""

    slabs: Sequence[Spilled]
    n_obs: int

    @cached_property
    def row_nnz(self) -> np.ndarray:
        """Stored values per destination row, int64, (n_obs,)."""
        nnz = np.zeros(self.n_obs, dtype=np.int64)
        for slab in self.slabs:
            nnz[slab.rows] = np.diff(slab.indptr)
        return nnz

    @property
    def maximum(self) -> float:
        return max((slab.maximum for slab in self.slabs), default=0)

    @property
    def counts(self) -> bool:
        return all(slab.counts for slab in self.slabs)

    def rows(self, start: int, stop: int, data_dtype: Any, index_dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Indices and data of the destination rows start..stop, concatenated in row order."""
        nnz = self.row_nnz[start:stop]
        begin = np.concatenate([[0], np.cumsum(nnz)])
        indices = np.empty(begin[-1], dtype=index_dtype)
        data = np.empty(begin[-1], dtype=data_dtype)
        for slab, low, high in self._pieces(start, stop):
            source = slice(slab.indptr[low], slab.indptr[high])
            lengths = np.diff(slab.indptr[low : high + 1])
            offset = begin[slab.rows[low:high] - start] - (slab.indptr[low:high] - slab.indptr[low])
            target = np.arange(source.stop - source.start) + np.repeat(offset, lengths)
            indices[target] = slab.array("indices")[source]
            data[target] = slab.array("data")[source]
        return indices, data

    def dense(self, name: str, start: int, stop: int, width: int, dtype: Any) -> np.ndarray:
        """Rows start..stop of a dense matrix; zeros where a slab doesn't have it."""
        values = np.zeros((stop - start, width), dtype=dtype)
        for slab, low, high in self._pieces(start, stop):
            if (slab.folder / f"obsm.{name}.npy").exists():
                values[slab.rows[low:high] - start] = slab.array(f"obsm.{name}")[low:high]
        return values

    def dense_dtype(self, name: str) -> np.dtype:
        found = [
            slab.array(f"obsm.{name}").dtype
            for slab in self.slabs
            if (slab.folder / f"obsm.{name}.npy").exists()
        ]
        return np.result_type(*found) if found else np.dtype(np.float32)

    def _pieces(self, start: int, stop: int) -> list[tuple[Spilled, int, int]]:
        found = []
        for slab in self.slabs:
            low, high = np.searchsorted(slab.rows, [start, stop])
            if high > low:
                found.append((slab, int(low), int(high)))
        return found
