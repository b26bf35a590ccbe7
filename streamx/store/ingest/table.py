"""csv, tsv and txt (``.gz`` or not): genes in rows and cells in columns, as SCALEX reads them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from streamx.errors import BadFileError, EmptyError
from streamx.store.ingest.mtx import open_text
from streamx.store.ingest.source import Request, Source, file_checksum, reading
from streamx.store.ingest.spill import Entries, transposed


def table_source(path: Path, request: Request) -> Source:
    """A source from a text table: one pass for the names now, one for the values at the first read."""
    location = str(path)
    separator = "," if path.name.lower().removesuffix(".gz").endswith(".csv") else "\t"
    with reading(location, "table"):
        cells, genes = read_axes(path, separator)
    obs, var = (pd.DataFrame(index=pd.Index(names, dtype=object)) for names in (cells, genes))
    rows = transposed(
        lambda limit: table_entries(path, separator, cells, genes, limit),
        len(cells) * len(genes),
        np.dtype(np.float64),
        obs.index.to_numpy(),
        var.index.to_numpy(),
        request,
        text=True,
    )
    return Source(request.key, location, obs, var, rows, lambda: file_checksum(path))


def lines_of(path: Path, separator: str) -> Iterator[tuple[int, str, str]]:
    """Line number, gene, and the rest of each line below the header that isn't blank."""
    with open_text(path) as stream:
        stream.readline()
        for number, raw in enumerate(stream, start=2):
            line = raw.decode("utf-8").rstrip("\r\n")
            if not line.strip():
                continue
            if line.startswith('"'):
                name = next(csv.reader([line], delimiter=separator))[0]
                rest = line[len(name) + name.count('"') + 2 :].removeprefix(separator)
            else:
                name, _, rest = line.partition(separator)
            yield number, name, rest


def read_axes(path: Path, separator: str) -> tuple[list[str], list[str]]:
    """Names of cells (header) and genes (first column); every line must have a value for each cell."""
    location = str(path)
    with open_text(path) as stream:
        header = stream.readline().decode("utf-8-sig").rstrip("\r\n")
    cells = next(csv.reader([header], delimiter=separator), [])
    genes: list[str] = []
    width = None
    for number, name, rest in lines_of(path, separator):
        if not rest:
            raise BadFileError(
                f"line {number} ({name[:40]!r}) has no value (is it separated by something else?)",
                where=location,
                fix="a line is a gene and one value per cell; .csv has commas, .tsv and .txt have tabs",
            )
        found = rest.count(separator) + 1
        if width is None:
            width = len(cells) if found == len(cells) else len(cells) - 1  # R leaves the corner out
            cells = cells[len(cells) - width :]
        if found != width:
            raise BadFileError(
                f"line {number} (gene {name!r}) has {found} values for {width} cells",
                where=location,
                fix="a line is a gene and one value per cell; .csv has commas, .tsv and .txt have tabs",
            )
        genes.append(name)
    if not genes or not cells:
        raise EmptyError(
            f"a table of {len(genes)} genes and {len(cells)} cells",
            where=location,
            fix="rows are genes and columns are cells, with names in the first column and the header",
        )
    return cells, genes


def table_entries(
    path: Path, separator: str, cells: list[str], genes: list[str], limit: int
) -> Iterator[Entries]:
    """Non-zero values, gene by gene, several genes at a time."""
    per_block = max(1, limit // len(cells))
    block: list[str] = []
    first = 0
    numbers: list[int] = []
    for number, _, rest in lines_of(path, separator):
        block.append(rest)
        numbers.append(number)
        if len(block) == per_block:
            yield parse(block, first, numbers, separator, cells, genes, path)
            first, block, numbers = first + len(block), [], []
    if block:
        yield parse(block, first, numbers, separator, cells, genes, path)


def parse(
    block: list[str],
    first: int,
    numbers: list[int],
    separator: str,
    cells: list[str],
    genes: list[str],
    path: Path,
) -> Entries:
    expected = len(block) * len(cells)
    values = numbers_in(separator.join(block), separator)
    if len(values) != expected:
        at = next((i for i, t in enumerate(block) if len(numbers_in(t, separator)) != len(cells)), 0)
        fields = next(csv.reader([block[at]], delimiter=separator))
        column = next((i for i, field in enumerate(fields) if len(numbers_in(field, separator)) != 1), 0)
        if all(len(numbers_in(field, separator)) == 1 for field in fields):  # quoted numbers
            clean = [separator.join(next(csv.reader([t], delimiter=separator))) for t in block]
            values = numbers_in(separator.join(clean), separator)
        if len(values) != expected:
            raise BadFileError(
                f"{fields[column]!r} is no number: gene {genes[first + at]!r}, cell {cells[column]!r} "
                f"(line {numbers[at]}, column {column + 2})",
                where=str(path),
                fix="write counts in every field (0 where there are none)",
            )
    x_gn = values.reshape(len(block), len(cells))
    gene, cell = np.nonzero(x_gn)
    return cell, gene + first, x_gn[gene, cell]


def numbers_in(text: str, separator: str) -> np.ndarray:
    """The numbers of a separated text, fewer or none where a field is none."""
    if not text.strip() or (separator != "," and "," in text):
        return np.zeros(0)
    try:  # numpy lets any white space pass for a tab, so that commas take its place
        return np.fromstring(text.replace(separator, ","), dtype=np.float64, sep=",")
    except (ValueError, DeprecationWarning):
        return np.zeros(0)
