"""Cells of the input files: read by pieces, laid down in columns of one form, and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.store import cells
from streamx.store.collection import Collection
from streamx.store.columns import Column, file_of, gathered, lay_down
from streamx.store.ingest import Source
from streamx.store.obs import Obs, Piece
from streamx.store.order import unique_names
from streamx.store.scratch import PIECE_ROWS, pieces
from streamx.store.slabs import blame
from streamx.store.text import Text, text_of

log = logging.getLogger("streamx")

VALUES_AT_ONCE = 1 << 21  # of all columns of a piece


def cells_of(
    sources: Sequence[Source], keys: Sequence[str], settings: Mapping[str, Any]
) -> tuple[list[cells.Pieces], str]:
    """The cells of each file by pieces of rows, with their batch; and the name of the batch column."""
    named: list[str] = []

    def frames(source: Source, key: str) -> Iterator[pd.DataFrame]:
        renamed = settings["obs_map"].get(source.key, {})
        for low, high in piece_rows(source):
            with blame(source):
                frame = source.cells.rows(low, high)
                frame = cells.rename_columns(frame, renamed, source.location)
                name = cells.add_batch(
                    frame,
                    key,
                    settings["batch_key"],
                    per_file=settings["batches_are_files"],
                    name_of=source.obs_names.__getitem__,
                )
            if not named:
                named.append(name)
            yield frame

    files: list[cells.Pieces] = [partial(frames, s, key) for s, key in zip(sources, keys, strict=True)]
    next(files[0]())
    return files, named[0]


def piece_rows(source: Source) -> Iterator[tuple[int, int]]:
    """Pieces of a file's cells of bounded size."""
    step = max(1024, min(PIECE_ROWS, VALUES_AT_ONCE // (1 + len(source.cells.columns))))
    return ((low, min(low + step, source.n_obs)) for low in range(0, source.n_obs, step))


@dataclass(frozen=True)
class Laid:
    """Cells of all files, one file after the other, in files of their own."""

    names: Text
    columns: Mapping[str, Column | Callable[[np.ndarray], np.ndarray]]
    schema: Mapping[str, dict[str, Any]]
    originals: Text

    def names_of(self, first: int, stop: int) -> Iterator[Text]:
        """What the cells first..stop were called in their file, by pieces."""
        return (self.originals[first + low : first + high] for low, high in pieces(stop - first))

    def column(self, name: str) -> np.ndarray:
        column = self.columns[name]
        assert isinstance(column, Column)
        assert isinstance(column.values, np.ndarray)
        return column.values

    def in_order(self, order: np.ndarray) -> Obs:
        return gathered(order, self.names, self.columns, self.schema)


def lay_cells(
    sources: Sequence[Source],
    files: Sequence[cells.Pieces],
    keys: Sequence[str],
    schema: dict[str, dict[str, Any]],
    base: Collection | None,
    folder: Path,
) -> Laid:
    """Lay all cells down in the form of the schema, and say of each where it is from and its former name."""
    originals, columns = lay_files(sources, files, schema, folder)
    lengths = [source.n_obs for source in sources]
    taken = None if base is None else base_hashes(base)
    known = base.manifest.obs_schema.get(cells.FILE, {}).get("categories", []) if base is not None else []
    held = [*known, *sorted(keys)]
    code_f = np.array([held.index(key) for key in keys], np.int32)
    about = {cells.FILE: {"dtype": "category", "categories": held}}
    about |= {cells.FILE_ROW: {"dtype": "int64"}, cells.NAME: {"dtype": "string"}}
    return Laid(
        unique_names(originals, keys, lengths, folder, taken),
        {
            **columns,
            cells.FILE: lambda rows: code_f[file_of(rows, lengths)[0]],
            cells.FILE_ROW: lambda rows: file_of(rows, lengths)[1],
            cells.NAME: Column(originals, None),
        },
        schema | about,
        originals,
    )


def lay_files(
    sources: Sequence[Source],
    files: Sequence[cells.Pieces],
    schema: Mapping[str, dict[str, Any]],
    folder: Path,
) -> tuple[Text, dict[str, Column]]:
    """Names and columns of all cells, in the form of the schema, one file after the other."""
    casts = {name: cells.caster(about) for name, about in schema.items()}

    def tables() -> Iterator[tuple[Text, dict[str, Piece]]]:
        for source, frames in zip(sources, files, strict=True):
            for frame in frames():
                low, high = int(frame.index[0]), int(frame.index[-1]) + 1
                with blame(source):
                    names = text_of(source.cells.names(low, high))
                yield names, {name: cast(frame.get(name), high - low) for name, cast in casts.items()}

    return lay_down(folder, tables())


def base_hashes(base: Collection) -> np.ndarray:
    """Hashes of the names that cells of a store have."""
    pieces = (base.cell_names(low, high).hashes() for low, high in base.iter_rows(PIECE_ROWS))
    return np.concatenate([np.zeros(0, np.uint64), *pieces])
