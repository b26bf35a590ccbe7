"""The first half of writing: slabs of rows, read in any order, laid down where the second half can find them.

A slab knows the destination of each of its rows. Spilled, its rows are sorted by destination, so that the
rows start..stop of the result are one contiguous piece of every slab.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from streamx.cluster import run_spread
from streamx.compiled import compiled
from streamx.memory import give_back
from streamx.store import layout
from streamx.store.journal import Journal
from streamx.store.location import ObjectTable, describe
from streamx.store.scratch import new_array, pieces

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
    portable
        Whether another process can read it.
    """

    key: str
    rows: np.ndarray
    read: Callable[[], tuple[sparse.csr_matrix, Dense]]
    portable: bool = False


@dataclass(frozen=True)
class Spilled:
    """A slab on disk: rows sorted by destination, as plain arrays in files, mapped when read.

    `maximum` is the largest value (0 for none); `counts` says that all are integers and none is negative;
    `first` and `last` are the destinations that it reaches over; `arrays` has dtype and shape of each.
    """

    folder: Path
    maximum: float
    counts: bool
    first: int
    last: int
    arrays: Mapping[str, tuple[str, Sequence[int]]]

    def array(self, name: str) -> np.ndarray:
        # no .npy: threads that parse its header at once can fail (CPython 3.11, issue 106905)
        dtype, shape = self.arrays[name]
        if 0 in shape:
            return np.zeros(tuple(shape), dtype)
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=tuple(shape))

    def has(self, name: str) -> bool:
        return name in self.arrays


def spill(slabs: Sequence[Slab], journal: Journal, *, threads: int, progress: str) -> list[Spilled]:
    """Read every slab once and lay it down; what a former run laid down and is unharmed is kept."""
    tasks = [partial(_spill_one, slab, journal) for slab in slabs]
    return run_spread(tasks, [slab.portable for slab in slabs], threads, progress)


def _spill_one(slab: Slab, journal: Journal) -> Spilled:
    name, prefix = f"spill-{slab.key}", f"spill/{slab.key}"
    folder = journal.location.path(prefix)
    rows = np.ascontiguousarray(slab.rows, dtype=np.int64)
    done = journal.find(name)
    # another limit of memory cuts other slabs, possibly under the same key
    if done and done["rows"] == describe(rows.data) and _unharmed(folder, done["files"]):
        return Spilled(folder, **done["slab"])
    x_ng, dense = slab.read()
    order = np.argsort(rows, kind="stable")
    maximum = x_ng.data.max().item() if x_ng.nnz else 0
    counts = x_ng.dtype.kind in "ui" and (not x_ng.nnz or x_ng.data.min().item() >= 0)
    arrays: dict[str, np.ndarray] = {"rows": rows[order]}
    arrays |= _reordered(x_ng, order, layout.smallest_unsigned(maximum) if counts else x_ng.dtype)
    del x_ng
    arrays |= {f"obsm.{key}": values[order] for key, values in dense.items()}
    files = {}
    for part, values in arrays.items():
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        journal.location.write(f"{prefix}/{part}", data)
        files[part] = describe(data)
    first, last = (int(rows[order[0]]), int(rows[order[-1]])) if len(rows) else (0, -1)
    about: dict[str, Any] = {"maximum": maximum, "counts": counts, "first": first, "last": last}
    about["arrays"] = {part: (values.dtype.str, values.shape) for part, values in arrays.items()}
    journal.record(name, {"rows": describe(rows.data), "files": files, "slab": about})
    del arrays, values
    give_back()
    return Spilled(folder, **about)


def _reordered(x_ng: sparse.csr_matrix, order: np.ndarray, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The rows in another order, columns sorted inside each, in dtypes no wider than they must be."""
    if not x_ng.has_sorted_indices:
        x_ng.sort_indices()
    indptr = np.zeros(len(order) + 1, np.int64)
    np.cumsum(np.diff(x_ng.indptr)[order], out=indptr[1:])
    indices = np.empty(x_ng.nnz, layout.index_dtype(x_ng.shape[1]))
    data = np.empty(x_ng.nnz, dtype)
    places = np.arange(len(order))
    for values, out in ((x_ng.indices, indices), (x_ng.data, data)):
        _copy_rows(x_ng.indptr, values, order, indptr, places, out)
    return {"indptr": indptr, "indices": indices, "data": data}


@compiled
def _copy_rows(indptr, values, rows, begin, places, out):
    """Values of row `rows[i]` of a CSR matrix to where row `places[i]` begins in another one."""
    for i in range(rows.size):
        at = begin[places[i]]
        for j in range(indptr[rows[i]], indptr[rows[i] + 1]):
            out[at] = values[j]
            at += 1


def npy_pieces(values: np.ndarray) -> tuple[bytes, memoryview]:
    """Header and bytes of an .npy file, uncopied."""
    values = np.ascontiguousarray(values)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    return header.getvalue(), values.reshape(-1).view(np.uint8).data


def _unharmed(folder: Path, files: ObjectTable) -> bool:
    paths = {part: folder / part for part in files}
    return all(
        paths[part].is_file() and describe(np.fromfile(paths[part], dtype=np.uint8).data) == expected
        for part, expected in files.items()
    )


@dataclass(frozen=True)
class Spill:
    """All slabs as one row space, in destination order; `scratch` holds an array over it."""

    slabs: Sequence[Spilled]
    n_obs: int
    scratch: Path

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, now that `ends` lies in its file."""
        return {"slabs": self.slabs, "n_obs": self.n_obs, "scratch": self.scratch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ends = np.memmap(state["scratch"] / "ends", np.int64, "r", shape=(state["n_obs"] + 1,))
        self.__dict__.update(state, ends=ends)

    @cached_property
    def ends(self) -> np.ndarray:
        """Where the values of each destination row begin and, last, their number; int64, (n_obs + 1,)."""
        ends = new_array(self.scratch / "ends", self.n_obs + 1, np.int64)
        for slab in self.slabs:
            ends[slab.array("rows") + 1] = np.diff(slab.array("indptr"))
        total = 0
        for low, high in pieces(self.n_obs + 1):
            np.cumsum(ends[low:high], out=ends[low:high])
            ends[low:high] += total
            total = int(ends[high - 1])
        return ends

    @property
    def maximum(self) -> float:
        return max((slab.maximum for slab in self.slabs), default=0)

    @property
    def counts(self) -> bool:
        return all(slab.counts for slab in self.slabs)

    def values(self, name: str, start: int, stop: int, dtype: Any) -> np.ndarray:
        """`indices` or `data` of the destination rows start..stop, concatenated in row order."""
        return next(self.each_values(name, [(start, stop)], dtype))

    def each_values(self, name: str, ranges: Sequence[tuple[int, int]], dtype: Any) -> Iterator[np.ndarray]:
        """The same of ascending ranges, one after the other; what says where they lie is read once."""
        found = [
            (slab, rows, np.asarray(slab.array("indptr")[low : high + 1]))
            for slab, rows, low, high in self._pieces(ranges[0][0], ranges[-1][1])
        ]
        for start, stop in ranges:
            begin = np.asarray(self.ends[start : stop + 1] - self.ends[start])
            out = np.empty(int(begin[-1]), dtype=dtype)
            for slab, rows, indptr in found:
                low, high = np.searchsorted(rows, [start, stop]).tolist()
                if low < high:
                    mine = np.arange(low, high)
                    _copy_rows(indptr, slab.array(name), mine, begin, rows[mine] - start, out)
            yield out

    def dense(self, name: str, start: int, stop: int, width: int, dtype: Any) -> np.ndarray:
        """Rows start..stop of a dense matrix; zeros where a slab doesn't have it."""
        values = np.zeros((stop - start, width), dtype=dtype)
        for slab, rows, low, high in self._pieces(start, stop):
            if slab.has(f"obsm.{name}"):
                values[rows - start] = slab.array(f"obsm.{name}")[low:high]
        return values

    def dense_dtype(self, name: str) -> np.dtype:
        found = [slab.array(f"obsm.{name}").dtype for slab in self.slabs if slab.has(f"obsm.{name}")]
        return np.result_type(*found) if found else np.dtype(np.float32)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Spilled, np.ndarray, int, int]]:
        """Each slab that has some of these rows: their destinations, and which of its own they are."""
        for slab in self.slabs:
            if slab.last < start or slab.first >= stop:
                continue
            rows = slab.array("rows")
            low, high = np.searchsorted(rows, [start, stop]).tolist()
            if high > low:
                yield slab, np.asarray(rows[low:high]), low, high
