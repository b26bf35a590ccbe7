"""Columns of cells laid down in files in the order in which they were read, and gathered in another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamx.store.collection import Collection
from streamx.store.location import storage_error
from streamx.store.obs import Obs, Piece, plain
from streamx.store.scratch import PIECE_ROWS, pieces
from streamx.store.text import Text


@dataclass(frozen=True)
class Column:
    """A column in files that are mapped."""

    values: np.ndarray | Text
    missing: np.ndarray | None

    def take(self, rows: np.ndarray) -> Piece:
        values = self.values.take(rows)
        return values, None if self.missing is None else self.missing[rows]


class ColumnFile:
    """A column that grows by pieces; nothing stays open between them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dtypes: dict[str, Any] = {}
        self._text: int | None = None
        self._rows = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in ("values", "missing", "ends"):
            self._part(part).unlink(missing_ok=True)

    def append(self, piece: Piece) -> None:
        values, missing = piece
        n = len(values)
        if missing is not None and "missing" not in self._dtypes:
            self._write("missing", np.zeros(self._rows, bool))
        if "missing" in self._dtypes:
            self._write("missing", np.zeros(n, bool) if missing is None else missing)
        self._rows += n
        if isinstance(values, Text):
            first, last = int(values.ends[0]), int(values.ends[-1])
            if self._text is None:
                self._text = 0
                self._write("ends", np.zeros(1, np.int64))
            self._write("ends", values.ends[1:] - (first - self._text))
            self._text += last - first
            values = values.data[first:last]
        self._write("values", values)

    def column(self) -> Column:
        values: np.ndarray | Text = self._map("values")
        if self._text is not None:
            values = Text(self._map("ends"), self._map("values"))
        return Column(values, self._map("missing") if "missing" in self._dtypes else None)

    def _part(self, part: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{part}")

    def _write(self, part: str, values: np.ndarray) -> None:
        self._dtypes[part] = values.dtype
        try:
            with self._part(part).open("ab") as stream:
                stream.write(np.ascontiguousarray(values).data)
        except OSError as error:
            raise storage_error(error, str(self._part(part))) from error

    def _map(self, part: str) -> np.ndarray:
        path, dtype = self._part(part), self._dtypes.get(part, np.uint8)
        if not path.exists() or path.stat().st_size == 0:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r")


def lay_down(
    folder: Path, tables: Iterable[tuple[Text, Mapping[str, Piece]]]
) -> tuple[Text, dict[str, Column]]:
    """Pieces of a table (names and columns), one after the other, in files of a folder."""
    names = ColumnFile(folder / "names")
    names.append((Text(np.zeros(1, np.int64), np.zeros(0, np.uint8)), None))
    files: dict[str, ColumnFile] = {}
    for text, columns in tables:
        names.append((text, None))
        for name, piece in columns.items():
            if name not in files:
                files[name] = ColumnFile(folder / f"column{len(files)}")
            files[name].append(piece)
    laid = names.column().values
    assert isinstance(laid, Text)
    return laid, {name: file.column() for name, file in files.items()}


def lay_collection(
    collection: Collection, columns: Sequence[str], folder: Path, first: int = 0
) -> tuple[Text, dict[str, Column]]:
    """Names and columns of a collection's cells from row `first` on, in files of a folder."""
    step = max(1024, PIECE_ROWS // max(1, len(columns) // 16))

    def tables() -> Iterator[tuple[Text, dict[str, Piece]]]:
        for low, high in pieces(collection.n_obs - first, step):
            rows = first + low, first + high
            yield (
                collection.cell_names(*rows),
                {name: plain(collection.obs_column(name, *rows)) for name in columns},
            )

    return lay_down(folder, tables())


def obs_of(collection: Collection, folder: Path) -> Obs:
    """All cells of a collection, read by pieces that lie in files of a folder."""
    names, columns = lay_collection(collection, collection.obs_columns, folder)
    return gathered(collection.n_obs, names, columns, collection.manifest.obs_schema)


def gathered(
    order: np.ndarray | int,
    names: Text,
    columns: Mapping[str, Column | Callable[[np.ndarray], np.ndarray]],
    schema: Mapping[str, dict[str, Any]],
) -> Obs:
    """Cells in the order `order` of where they lie (a number: that many, as they lie).

    A function in place of a column gives its values for some of them.
    """

    def rows(a: int, b: int) -> np.ndarray:
        return np.arange(a, b) if isinstance(order, int) else np.asarray(order[a:b])

    def reader(column: Column | Callable[[np.ndarray], np.ndarray]) -> Callable[[int, int], Piece]:
        if isinstance(column, Column):
            return lambda a, b: column.take(rows(a, b))
        return lambda a, b: (column(rows(a, b)), None)

    readers = {name: reader(columns[name]) for name in schema}
    n = order if isinstance(order, int) else len(order)
    return Obs(n, schema, lambda a, b: names.take(rows(a, b)), readers)


def file_of(rows: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all files one after the other -> number of the file, and row in it; int64 each."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    file = np.searchsorted(starts, rows, side="right") - 1
    return file, rows - starts[file]
