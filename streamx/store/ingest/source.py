"""What every input becomes: names, obs, and rows on request as canonical CSR."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.errors import BadFileError, EmptyError, StorageError, StreamxError
from streamx.store.scratch import PIECE_ROWS

Rows = Callable[[int, int], sparse.csr_matrix]
DenseRows = Callable[[int, int], np.ndarray]

CHECKSUM_BLOCK = 1 << 22


@dataclass(frozen=True)
class Request:
    """How one input is to be read.

    Attributes
    ----------
    layer, modality
        What holds the counts, where the input offers a choice.
    spill
        Folder that the input may make for itself.
    memory
        Bytes that reading may use.
    """

    key: str
    location: str
    layer: str | None
    modality: str | None
    spill: Path
    memory: int


@dataclass(frozen=True)
class Table:
    """Cells of an input, read by pieces of rows.

    Attributes
    ----------
    n
        Cells.
    columns
        Names of the columns.
    rows
        (start, stop) -> the columns of these cells, indexed by row.
    names
        (start, stop) -> their names, object array of str.
    """

    n: int
    columns: list[str]
    rows: Callable[[int, int], pd.DataFrame]
    names: Callable[[int, int], np.ndarray]


def in_memory(frame: pd.DataFrame) -> Table:
    """A table that is there already, indexed by names."""
    names = frame.index.to_numpy(dtype=object)
    frame = frame.reset_index(drop=True)
    return Table(len(frame), list(frame.columns), lambda a, b: frame.iloc[a:b], lambda a, b: names[a:b])


@dataclass(frozen=True)
class Names(Sequence[str]):
    """Names of cells, read when they are asked for."""

    table: Table

    def __len__(self) -> int:
        return self.table.n

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self.table.names(start, stop)[::step]
        at = int(at) % len(self)
        return self.table.names(at, at + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for low in range(0, len(self), PIECE_ROWS):
            yield from self[low : low + PIECE_ROWS]


@dataclass(frozen=True)
class Obsm:
    """A dense modality that an input offers: its feature names and a reader of rows."""

    names: list[str]
    rows: DenseRows


@dataclass(frozen=True, eq=False)
class Source:
    """One input, read by slabs of rows; nothing but names and obs is held in memory.

    Attributes
    ----------
    key
        Short name, unique among the inputs: the file's stem, or the folder's name.
    location
        What errors call it.
    cells, obs, obs_names
        The cells: read by pieces; as one table in memory; their names, str as in the input, possibly
        duplicated.
    var, var_names
        The genes, indexed by their names, likewise.
    modalities
        Dense obsm matrices that the input offers.
    alternatives
        Names of the file's other matrices whose values look like counts (for errors; reads a little).
    reopens
        Nothing is lost when it is closed and opened again.
    opener
        How another process opens it: a function and its arguments; None where it can't.
    """

    key: str
    location: str
    cells: Table
    var: pd.DataFrame
    rows: Rows
    digest: Callable[[], str]
    modalities: dict[str, Obsm] = field(default_factory=dict)
    alternatives: Callable[[], list[str]] = list
    close: Callable[[], None] = lambda: None
    reopens: bool = False
    opener: tuple[Callable[..., Source], tuple[Any, ...]] | None = None
    obs_names: Names = field(init=False)
    var_names: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "obs_names", Names(self.cells))
        object.__setattr__(self, "var_names", self.var.index.to_numpy(dtype=object))
        for count, what in ((self.n_obs, "cells"), (self.n_vars, "genes")):
            if count == 0:
                raise EmptyError(f"no {what}", where=self.location, fix="leave this input out")

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        assert self.opener is not None, f"{self.location} can't be sent to another process"
        return self.opener

    @property
    def n_obs(self) -> int:
        return self.cells.n

    @property
    def obs(self) -> pd.DataFrame:
        """All cells, read now."""
        return self.cells.rows(0, self.n_obs).set_axis(
            pd.Index(self.cells.names(0, self.n_obs), dtype=object), axis=0
        )

    @property
    def n_vars(self) -> int:
        return len(self.var)

    @property
    def obsm(self) -> dict[str, list[str]]:
        """Dense modalities offered: name -> feature names."""
        return {name: modality.names for name, modality in self.modalities.items()}

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Rows ``start:stop`` as CSR with sorted indices, no duplicates and no explicit zeros.

        Returns
        -------
        (stop - start, n_vars) in the input's own dtype (half floats and bools are widened).

        Raises
        ------
        BadFileError
            If the stored rows can't be a matrix of this shape, naming the cell.
        """
        start, stop = max(0, start), min(stop, self.n_obs)
        with reading(self.location, f"rows {start} to {stop}"):
            x_ng = self.rows(start, stop)
            return canonical(x_ng, self.location, start, self.obs_names, self.var_names)

    def read_obsm(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` of a dense modality, (stop - start, n_features)."""
        start, stop = max(0, start), min(stop, self.n_obs)
        with reading(self.location, f"obsm[{name!r}], rows {start} to {stop}"):
            return np.ascontiguousarray(self.modalities[name].rows(start, stop))

    def checksum(self) -> str:
        """``"<bytes>-<crc>"`` of what the input holds now (a folder: of all its files)."""
        with reading(self.location, "checksum"):
            return self.digest()


@contextmanager
def reading(location: str, element: str) -> Iterator[None]:
    """Whatever a parser raises becomes a :class:`BadFileError` that says where; a full disk does not."""
    try:
        yield
    except (StreamxError, MemoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE):
            raise StorageError(
                f"{error.strerror} while reading {element}", where=location, fix="make room and run again"
            ) from error
        raise unreadable(location, element, error) from error
    except Exception as error:
        raise unreadable(location, element, error) from error


def unreadable(location: str, element: str, error: Exception) -> BadFileError:
    """The error for bytes that a parser refuses; its words are kept, shortened to one line."""
    words = " ".join((str(error) or type(error).__name__).split())
    return BadFileError(
        f"can't read {element}: {words[:300]}",
        where=location,
        fix="the file is damaged or incomplete: download or write it again, or leave it out",
    )


def canonical(
    x_ng: sparse.csr_matrix, location: str, first_row: int, obs_names: Sequence[str], var_names: np.ndarray
) -> sparse.csr_matrix:
    """Sort each row's indices, refuse entries that occur twice, drop explicit zeros."""
    if x_ng.dtype.kind not in "iufb":
        raise BadFileError(
            f"values of type {x_ng.dtype} are no numbers", where=location, fix="choose another --layer"
        )
    if len(x_ng.data) and not x_ng.data.all():
        x_ng.eliminate_zeros()
    x_ng.has_sorted_indices = False  # look: the flag is what some writer believed
    twice = _not_increasing(x_ng)
    if twice.any():
        x_ng.sort_indices()
        twice = _not_increasing(x_ng)
    if twice.any():
        at = int(np.flatnonzero(twice)[0])
        row = int(np.searchsorted(x_ng.indptr, at, side="right")) - 1
        raise BadFileError(
            f"gene {var_names[x_ng.indices[at]]!r} occurs twice in cell {obs_names[first_row + row]!r} "
            f"(row {first_row + row})",
            where=location,
            fix="merge the duplicate entries, for example with scipy's sum_duplicates",
        )
    x_ng.has_canonical_format = True
    return x_ng


def _not_increasing(x_ng: sparse.csr_matrix) -> np.ndarray:
    """For each entry but the last: is the next entry of the same row not to its right?"""
    if len(x_ng.indices) < 2:
        return np.zeros(0, dtype=bool)
    falls = x_ng.indices[1:] <= x_ng.indices[:-1]
    ends = x_ng.indptr[1:-1]
    falls[ends[(ends > 0) & (ends < len(x_ng.indices))] - 1] = False
    return falls


def owned(values: Any) -> np.ndarray:
    """An array of our own: `canonical` sorts in place, and an AnnData's slice is a window on its arrays."""
    values = np.asarray(values)
    return values if values.base is None else values.copy()


def plain_dtype(values: np.ndarray) -> np.ndarray:
    """Native byte order; bools become uint8, half floats float32, extended floats float64."""
    widened: dict[str, type] = {"?": np.uint8, "e": np.float32, "g": np.float64}
    native: np.dtype = values.dtype.newbyteorder("=")
    return values.astype(np.dtype(widened.get(values.dtype.char, native)), copy=False)


def sparse_rows(
    indptr: Any, indices: Any, data: Any, n_vars: int, location: str, obs_names: Sequence[str]
) -> Rows:
    """Reader of CSR rows; `indices` and `data` are anything that can be sliced, on disk or in memory."""

    def rows(start: int, stop: int) -> sparse.csr_matrix:
        ends = np.asarray(indptr[start : stop + 1])
        first, last = int(ends[0]), int(ends[-1])
        genes, values = owned(indices[first:last]), plain_dtype(owned(data[first:last]))
        ends = ends - first
        if len(genes) != last - first or len(values) != last - first:
            raise BadFileError(
                f"values {first} to {last} are cut short", where=location, fix="download or write it again"
            )
        if len(genes) and (genes.min() < 0 or genes.max() >= n_vars):
            at = int(np.flatnonzero((genes < 0) | (genes >= n_vars))[0])
            row = start + int(np.searchsorted(ends, at, side="right")) - 1
            raise BadFileError(
                f"gene index {genes[at]} of cell {obs_names[row]!r} (row {row}) is outside 0 to {n_vars - 1}",
                where=location,
                fix="the matrix and its list of genes don't belong together: write the file again",
            )
        return sparse.csr_matrix((values, genes, ends), shape=(stop - start, n_vars))

    return rows


def dense_rows(x: Any, memory: int) -> Rows:
    """Reader of rows of a dense matrix, by blocks of at most an eighth of the memory."""
    n_vars = int(x.shape[1])
    step = max(1, memory // 8 // max(1, n_vars * np.dtype(x.dtype).itemsize))

    def rows(start: int, stop: int) -> sparse.csr_matrix:
        blocks = [
            sparse.csr_matrix(plain_dtype(np.asarray(x[at : min(at + step, stop)])))
            for at in range(start, stop, step)
        ]
        if not blocks:
            return sparse.csr_matrix((0, n_vars), dtype=x.dtype)
        return blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")

    return rows


@dataclass(frozen=True)
class Pointers:
    """`indptr` on disk, read where it is asked for; int64."""

    stored: Any

    def __len__(self) -> int:
        return int(self.stored.shape[0])

    def __getitem__(self, at: Any) -> Any:
        return np.asarray(self.stored[at]).astype(np.int64)


def check_indptr(indptr: Any, n_rows: int, n_stored: int, location: str, element: str) -> Any:
    """`indptr` as int64, or the error that names the first row where it can't be right.

    An array in memory comes back as one, what lies on disk as :class:`Pointers`.
    """
    pointers = indptr.astype(np.int64) if isinstance(indptr, np.ndarray) else Pointers(indptr)
    fix = "the file is damaged: download or write it again"
    if len(pointers) != n_rows + 1:
        raise BadFileError(
            f"{element}/indptr has {len(pointers)} entries for {n_rows} rows or columns",
            where=location,
            fix=fix,
        )
    before = 0
    for low in range(0, n_rows + 1, PIECE_ROWS):
        piece = np.concatenate([[before], pointers[low : low + PIECE_ROWS]])
        if low == 0 and piece[1] != 0:
            raise BadFileError(
                f"{element}/indptr starts at {piece[1]}, not at 0 (row 0)", where=location, fix=fix
            )
        falls = np.flatnonzero(np.diff(piece) < 0)
        if len(falls):
            at = int(falls[0])
            raise BadFileError(
                f"{element}/indptr falls from {piece[at]} to {piece[at + 1]} at row {low + at - 1}",
                where=location,
                fix=fix,
            )
        before = int(piece[-1])
    if before != n_stored:
        raise BadFileError(
            f"{element} holds {n_stored} values, its indptr ends at {before}", where=location, fix=fix
        )
    return pointers


def file_checksum(path: Path) -> str:
    """Size and CRC-32 of a file's bytes; of a folder, of all files in sorted relative order.

    Not CRC-32C: zarr's objects end in their own, and of such the CRC-32C is always the same.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    crc = size = 0
    for file in files:
        if file != path:
            crc = zlib.crc32(file.relative_to(path).as_posix().encode() + b"\0", crc)
        with file.open("rb") as stream:
            while block := stream.read(CHECKSUM_BLOCK):
                crc = zlib.crc32(block, crc)
                size += len(block)
    return f"{size}-{crc:08x}"


def text_names(values: Any) -> np.ndarray:
    """Names as an object array of str, whatever the file stored them as."""
    names = np.asarray(values).tolist()
    texts: list[str] = []
    if names and isinstance(names[0], bytes):
        with suppress(TypeError):  # some are not bytes
            texts = b"\0".join(names).decode("utf-8").split("\0")
    if len(texts) != len(names):  # or some contain a zero
        texts = [name.decode("utf-8") if isinstance(name, bytes) else str(name) for name in names]
    out = np.empty(len(texts), dtype=object)
    out[:] = texts
    return out
