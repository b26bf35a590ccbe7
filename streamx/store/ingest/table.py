"""csv, tsv and txt (``.gz`` or not): genes in rows and cells in columns, as SCALEX reads them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from streamx.errors import BadFileError, EmptyError
from streamx.store.ingest.mtx import open_text
from streamx.store.ingest.source import Request, Source, file_checksum, in_memory, reading
from streamx.store.ingest.spill import Entries, transposed

BLANK = re.compile(rb"(?:^|,)\s*(?:,|$)")  # numpy reads some blank fields as -1


def table_source(path: Path, request: Request) -> Source:
    """A source from a text table: one pass for the names now, one for the values at the first read."""
    location = str(path)
    separator = "," if path.name.lower().removesuffix(".gz").endswith(".csv") else "\t"
    with reading(location, "table"):
        cells, genes = read_axes(path, separator)
    obs, var = (pd.DataFrame(index=pd.Index(names, dtype=object)) for names in (cells, genes))
    rows = transposed(
        lambda limit: table_entries(path, separator, cells, limit),
        len(cells) * len(genes),
        np.dtype(np.float64),
        obs.index.to_numpy(),
        var.index.to_numpy(),
        request,
        text=True,
    )
    return Source(request.key, location, in_memory(obs), var, rows, lambda: file_checksum(path))


def lines_of(path: Path, separator: str) -> Iterator[tuple[int, str, bytes]]:
    """Line number, gene, and the fields after it, of each line below the header that isn't blank."""
    with open_text(path) as stream:
        stream.readline()
        for number, raw in enumerate(stream, start=2):
            line = raw.rstrip(b"\r\n")
            if not line.strip():
                continue
            if line.startswith(b'"'):
                name = next(csv.reader([line.decode("utf-8")], delimiter=separator))[0]
                quoted = '"' + name.replace('"', '""') + '"'
                rest = line[len(quoted.encode()) :].removeprefix(separator.encode())
            else:
                start, _, rest = line.partition(separator.encode())
                name = start.decode("utf-8")
            yield number, name, rest.replace(b'"', b"")


def read_axes(path: Path, separator: str) -> tuple[list[str], list[str]]:
    """Names of cells (header) and genes (first column); every line must have a value for each cell."""
    location = str(path)
    fix = "a line is a gene and one value per cell; .csv has commas, .tsv and .txt have tabs"
    with open_text(path) as stream:
        header = stream.readline().decode("utf-8-sig").rstrip("\r\n")
    cells = next(csv.reader([header], delimiter=separator), [])
    genes: list[str] = []
    width = None
    for number, name, rest in lines_of(path, separator):
        found = rest.count(separator.encode()) + 1
        if not rest:
            what = f"line {number} ({name[:40]!r}) has no value (is it separated by something else?)"
            raise BadFileError(what, where=location, fix=fix)
        if width is None:
            width = len(cells) if found == len(cells) else len(cells) - 1  # R leaves the corner out
            cells = cells[len(cells) - width :]
        if found != width:
            what = f"line {number} (gene {name!r}) has {found} values for {width} cells"
            raise BadFileError(what, where=location, fix=fix)
        genes.append(name)
    if not genes or not cells:
        raise EmptyError(
            f"a table of {len(genes)} genes and {len(cells)} cells",
            where=location,
            fix="rows are genes and columns are cells, with names in the first column and the header",
        )
    return cells, genes


def table_entries(path: Path, separator: str, cells: list[str], limit: int) -> Iterator[Entries]:
    """Non-zero values, several genes at a time."""
    n_cells, sep = len(cells), separator.encode()
    lines = lines_of(path, separator)
    first = 0
    while block := list(islice(lines, max(1, limit // n_cells))):
        values = numbers_in(sep.join(rest for _, _, rest in block), sep)
        if len(values) != len(block) * n_cells:
            raise no_number(block, cells, sep, path)
        x_gn = values.reshape(len(block), n_cells)
        gene, cell = np.nonzero(x_gn)
        yield cell, gene + first, x_gn[gene, cell]
        first += len(block)


def no_number(block: list[tuple[int, str, bytes]], cells: list[str], sep: bytes, path: Path) -> BadFileError:
    """The error that names the first field that can't be read."""
    for number, name, rest in block:
        for column, field in enumerate(rest.split(sep)):
            if len(numbers_in(field, sep)) != 1:
                return BadFileError(
                    f"{field.decode('utf-8', 'replace')!r} is no number: gene {name!r}, "
                    f"cell {cells[column]!r} (line {number}, column {column + 2})",
                    where=str(path),
                    fix="write a count in every field (0 where there is none)",
                )
    return BadFileError("the table changed while it was read", where=str(path), fix="run again")


def numbers_in(text: bytes, sep: bytes) -> np.ndarray:
    """The numbers of a separated text, fewer or none where a field is none.

    Most fields of a count table are one digit: these need no parser.
    """
    if not text.strip():
        return np.zeros(0)
    letters = np.frombuffer(text, dtype=np.uint8)
    ends = np.append(np.flatnonzero(letters == sep[0]), len(letters))
    lengths = np.diff(ends, prepend=-1) - 1
    first = letters[np.minimum(ends - lengths, len(letters) - 1)]
    digit = (lengths == 1) & (first >= ord("0")) & (first <= ord("9"))
    values = (first - ord("0")).astype(np.float64)
    if not digit.all():
        rest = letters[np.repeat(~digit, lengths + 1)[: len(letters)]].tobytes()
        rest = rest[:-1] if digit[-1] else rest
        commas = rest.replace(sep, b",")  # numpy lets any white space pass for a tab
        if BLANK.search(commas) or commas.count(b",") + 1 != len(values) - digit.sum():
            return np.zeros(0)
        try:
            parsed = np.fromstring(commas, dtype=np.float64, sep=",")
        except (ValueError, DeprecationWarning):
            return np.zeros(0)
        if len(parsed) != len(values) - digit.sum():
            return np.zeros(0)
        values[~digit] = parsed
    return values
