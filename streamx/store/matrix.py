"""The CSR matrix of a shard, and :func:`gather`: rows of any shards, in any order, into three arrays.

Every read of counts goes through here. Rows are planned on plain arrays (which values, which chunks, which
bytes, where each row goes), and then placed by one kernel (:mod:`streamx.store.decode`), or by way of zarr
where the layout is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from streamx.errors import IntegrityError
from streamx.store.ahead import plan_ahead
from streamx.store.chunks import Chunks, Frames, open_chunks
from streamx.store.kept import Kept
from streamx.store.layout import smallest_unsigned
from streamx.store.location import RESTORE, Location, ObjectTable
from streamx.store.read import Read, integrity, open_group

Allocate = Callable[[int, Any], np.ndarray]


@dataclass(frozen=True)
class Offsets:
    """Some entries of indptr, as they are kept: the first, and how much each next one is larger."""

    first: int
    size_n: np.ndarray

    @classmethod
    def of(cls, entries: np.ndarray) -> Offsets:
        """int64 entries, at least one."""
        size_n = np.diff(entries)
        if not len(size_n) or size_n.min() >= 0:
            size_n = size_n.astype(smallest_unsigned(int(size_n.max(initial=0))))
        return cls(int(entries[0]), size_n)

    @property
    def nbytes(self) -> int:
        return self.size_n.nbytes + 200

    def __getitem__(self, part: slice) -> np.ndarray:
        """Entries start..stop, int64, at least one."""
        out = np.empty(part.stop - part.start, np.int64)
        out[0] = self.first + int(self.size_n[: part.start].sum(dtype=np.int64))
        np.cumsum(self.size_n[part.start : part.stop - 1], out=out[1:])
        out[1:] += out[0]
        return out


class Matrix:
    """The matrix at ``<path>/X`` of a location.

    Parameters
    ----------
    expected
        Objects that must exist, from the manifest.
    verify
        Check the checksum of every chunk that is read.
    kept
        What was read before, of this and other matrices.
    """

    def __init__(
        self, location: Location, path: str, expected: ObjectTable, verify: bool, kept: Kept
    ) -> None:
        self.location, self.path, self.expected, self.verify = location, path, expected, verify
        self.kept = kept

    @cached_property
    def values(self) -> tuple[Chunks, Chunks] | None:
        """indices and data on one chunk grid, or None: only zarr can read them."""
        from streamx.store import decode

        indices, data = self._chunks("indices"), self._chunks("data")
        if indices is None or data is None or not decode.available():
            return None
        return (indices, data) if (indices.n, indices.chunk) == (data.n, data.chunk) else None

    @property
    def group(self) -> Any:
        """The shard as zarr opens it."""
        return self.kept.parts.get(self.path, partial(open_group, self.location, self.path, self.expected))

    def row_offsets(self, start: int, stop: int) -> np.ndarray:
        """Entries start..stop of indptr and the one after, int64."""
        chunk = stop + 1 if self._indptr is None else self._indptr.chunk
        pieces = []
        for number in self.offset_chunks(start, stop):
            first = number * chunk
            pieces.append(self.offsets(number)[max(start - first, 0) : min(stop + 1 - first, chunk)])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def offset_chunks(self, start: int, stop: int) -> range:
        """Numbers of the chunks of indptr that hold the entries start..stop and the one after."""
        chunk = stop + 1 if self._indptr is None else self._indptr.chunk
        return range(start // chunk, stop // chunk + 1)

    def offsets(self, number: int) -> Offsets:
        """A chunk of indptr by its number; all of it as number 0 where zarr has to read it."""
        if self._indptr is None:
            make = partial(_whole_offsets, self.location, self.path, self.expected)
        else:
            make = partial(_offsets_of, self._indptr, number)
        return self.kept.parts.get((self.path, "offsets", number), make)

    def open(self) -> None:
        """Read what says where the chunks lie, but for the indexes of indices and data."""
        _ = self.values
        if self._indptr is not None:
            self._indptr.index(0)

    @cached_property
    def _indptr(self) -> Chunks | None:
        from streamx.store import decode

        chunks = self._chunks("indptr")
        return chunks if chunks is not None and chunks.dtype == np.int64 and decode.available() else None

    def _chunks(self, name: str) -> Chunks | None:
        return open_chunks(self.location, f"{self.path}/X/{name}", self.expected, self.kept)


def _whole_offsets(location: Location, path: str, expected: ObjectTable) -> Offsets:
    with integrity(f"{location}/{path}/X/indptr"):
        return Offsets.of(np.asarray(open_group(location, path, expected)["X/indptr"][:], dtype=np.int64))


def _offsets_of(chunks: Chunks, number: int) -> Offsets:
    """One chunk of row offsets."""
    from streamx.store import decode

    frames = chunks.frames(np.array([number]))
    _, first, size = frames.frame_k3[0].tolist()
    raw, values = np.empty(size, np.uint8), np.empty(chunks.chunk, chunks.dtype)
    shard = int(frames.shard_k[0])
    if size:
        chunks.location.read_ranges([(chunks.object_of(shard), first, size, 0)], raw)
    error = decode.decode_chunk(raw, *chunks.coding, True, values)
    if error:
        raise chunks.damaged(shard, decode.WHAT[error])
    return Offsets.of(values[: chunks.n - number * chunks.chunk])


@dataclass(frozen=True)
class _Task:
    """Rows of one shard (or runs of rows as one), ascending: the values of each, where these go (-1: nowhere)
    and what holds them.
    """

    matrix: Matrix
    start_n: np.ndarray
    stop_n: np.ndarray
    at_n: np.ndarray
    cuts: list[int]
    number_k: np.ndarray
    frames: tuple[Frames, Frames] | None


def gather(
    matrix_of: Callable[[int], Matrix],
    reads: Sequence[Read],
    order: np.ndarray | None,
    index_dtype: Any,
    data_dtype: Any,
    allocate: Allocate = np.empty,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of shards as one CSR matrix.

    Parameters
    ----------
    matrix_of
        Shard number -> its matrix.
    reads
        Rows to read; ascending and disjoint ones of a shard that follow each other are read together.
    order
        int64: which of the rows read come out, and in which order; none twice. None: all, as they were read.
    index_dtype, data_dtype
        Of the result; None for indices: int32, or int64 where there are too many values.
    allocate
        Makes the arrays of indices and data.

    Returns
    -------
    indptr int64, indices, data.

    Raises
    ------
    IntegrityError
        If stored bytes are missing or not those that were written.
    """
    plan_ahead(matrix_of, reads)
    offsets = [matrix_of(read.shard).row_offsets(read.start, read.stop) for read in reads]
    size_n = np.concatenate([np.zeros(0, np.int64), *map(np.diff, offsets)])
    indptr = np.zeros((len(size_n) if order is None else len(order)) + 1, np.int64)
    np.cumsum(size_n if order is None else size_n[order], out=indptr[1:])
    first_r, last_r = (np.array([part[end] for part in offsets], np.int64) for end in (0, -1))
    if order is None:  # each read as if it were one long row
        start_n, stop_n, at_n = first_r, last_r, np.cumsum(last_r - first_r) - (last_r - first_r)
        rows_r = np.ones(len(reads), np.int64)
    else:
        start_n, stop_n = (
            np.concatenate([np.zeros(0, np.int64), *(part[which] for part in offsets)])
            for which in (slice(None, -1), slice(1, None))
        )
        at_n = np.full(len(size_n), -1, np.int64)
        at_n[order] = indptr[:-1]
        rows_r = np.array([read.stop - read.start for read in reads], np.int64)
    if index_dtype is None:
        index_dtype = np.int32 if indptr[-1] <= np.iinfo(np.int32).max else np.int64
    indices, data = allocate(int(indptr[-1]), index_dtype), allocate(int(indptr[-1]), data_dtype)
    tasks = _tasks(matrix_of, reads, first_r, last_r, rows_r, start_n, stop_n, at_n)
    frames, given = _bytes_of(tasks)
    for task, (frames_i, frames_d) in zip(tasks, frames, strict=True):
        _place(task, frames_i, frames_d, given, indices, data)
    return indptr, indices, data


def _tasks(
    matrix_of: Callable[[int], Matrix],
    reads: Sequence[Read],
    first_r: np.ndarray,
    last_r: np.ndarray,
    rows_r: np.ndarray,
    start_n: np.ndarray,
    stop_n: np.ndarray,
    at_n: np.ndarray,
) -> list[_Task]:
    """One task for all rows that one kernel call can place. A read: its values first..last, its rows."""
    tasks = []
    rows = np.concatenate([[0], np.cumsum(rows_r)]).tolist()
    low = 0
    for high in range(1, len(reads) + 1):
        follows = (
            high < len(reads)
            and reads[high].shard == reads[high - 1].shard
            and reads[high].start >= reads[high - 1].stop
        )
        if follows:
            continue
        matrix, own = matrix_of(reads[low].shard), slice(rows[low], rows[high])
        number_k, frames = np.zeros(0, np.int64), None
        if matrix.values is not None:
            number_k = _chunk_numbers(first_r[low:high], last_r[low:high], matrix.values[0].chunk)
            frames = (matrix.values[0].frames(number_k), matrix.values[1].frames(number_k))
        cuts = [row - rows[low] for row in rows[low : high + 1]]
        tasks.append(_Task(matrix, start_n[own], stop_n[own], at_n[own], cuts, number_k, frames))
        low = high
    return tasks


def _chunk_numbers(first: np.ndarray, last: np.ndarray, chunk: int) -> np.ndarray:
    """Chunks that hold the values first..last of ascending ranges, each once."""
    low, high = first // chunk, -(-last // chunk)
    high = np.maximum(high, low)
    low[1:] = np.maximum(low[1:], np.maximum.accumulate(high)[:-1])
    count = np.where(last > first, np.maximum(high - low, 0), 0)
    return np.repeat(low - (np.cumsum(count) - count), count) + np.arange(count.sum())


def _bytes_of(tasks: list[_Task]) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Frames of both arrays of each task; those without a descriptor are read now, all at once."""
    ranges: list[tuple[str, int, int, int]] = []
    end = 0
    found = []
    for task in tasks:
        both = [np.zeros((0, 3), np.int64)] * 2
        for which, frames in enumerate(task.frames or ()):
            both[which] = frames.frame_k3
            if any(file.descriptor < 0 for file in frames.files):
                assert task.matrix.values is not None
                more, both[which], end = task.matrix.values[which].ranges(frames, end)
                ranges += more
        found.append(both)
    given = np.empty(end, np.uint8)
    if ranges:
        tasks[0].matrix.location.read_ranges(ranges, given)
    return found, given


def _place(
    task: _Task,
    frames_i: np.ndarray,
    frames_d: np.ndarray,
    given: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
) -> None:
    from streamx.store import decode

    matrix = task.matrix
    if task.frames is None:
        _place_by_zarr(task, indices, data)
        return
    assert matrix.values is not None
    columns, values = matrix.values
    largest = max(int(frames[:, 2].max(initial=0)) for frames in (frames_i, frames_d))
    answer = decode.place_chunks(
        task.number_k, frames_i, frames_d, given, max(largest, decode.READ_AHEAD), columns.chunk,
        columns.coding, values.coding, matrix.verify, task.start_n, task.stop_n, task.at_n,
        np.empty(columns.chunk, columns.dtype), np.empty(values.chunk, values.dtype), indices, data,
        (indices.dtype == columns.dtype, data.dtype == values.dtype),
    )  # fmt: skip
    if answer:
        which, error = divmod(answer, decode.N_ERRORS)
        k, of_data = divmod(which, 2)
        assert task.frames is not None
        raise matrix.values[of_data].damaged(int(task.frames[of_data].shard_k[k]), decode.WHAT[error])


def _place_by_zarr(task: _Task, indices: np.ndarray, data: np.ndarray) -> None:
    from streamx.store import decode

    for low, high in pairwise(task.cuts):
        if low == high:
            continue
        first, last = int(task.start_n[low]), int(task.stop_n[high - 1])
        where = f"{task.matrix.location}/{task.matrix.path}"
        with integrity(where):
            columns, values = (
                np.asarray(task.matrix.group[f"X/{name}"][first:last]) for name in ("indices", "data")
            )
        if len(columns) != last - first or len(values) != last - first:
            raise IntegrityError("values are missing", where=where, fix=RESTORE)
        rows = slice(low, high)
        decode.place(
            0, high - low, columns, values, first,
            task.start_n[rows], task.stop_n[rows], task.at_n[rows], indices, data,
        )  # fmt: skip
