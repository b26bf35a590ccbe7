"""Where peaks and genes lie: names of peaks, GTF, GFF3 and BED files, tables of peaks and their genes.

Everything comes out as half-open stretches counted from 0, as in BED; GTF and GFF3 count from 1 and include
the end.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from streamx.errors import BadFileError, GeneError, UsageError

_PEAK = re.compile(r"(.+)[:_-](\d+)[_-](\d+)")  # the chromosome may hold any of these signs too
_GZIP = b"\x1f\x8b"
_BED, _GTF = (".bed",), (".gtf", ".gff", ".gff3")
_COLUMNS = {"gene": "gene", "gene_name": "gene", "peak": "peak", "peaks": "peak"}


@dataclass(frozen=True)
class Regions:
    """Named stretches of chromosomes, one per row; a name may occur more than once.

    Attributes
    ----------
    names, chromosomes, strands
        Of each; strand ``+``, ``-`` or ``.`` (none).
    start_r, end_r
        int64, half-open, counted from 0.
    """

    names: list[str]
    chromosomes: list[str]
    start_r: np.ndarray
    end_r: np.ndarray
    strands: list[str]

    def __len__(self) -> int:
        return len(self.names)


def chromosome_key(name: str) -> str:
    """What a chromosome is known by, whether it is called ``chr1`` or ``1``, ``chrM`` or ``MT``."""
    key = name[3:] if name[:3].lower() == "chr" else name
    return "M" if key == "MT" else key


def read_peaks(names: Sequence[str]) -> Regions:
    """Peaks by their names: ``chr1:100-200``, ``chr1_100_200`` or ``chr1-100-200``, as BED counts.

    Raises
    ------
    GeneError
        If a name says no place; shows some.
    """
    found = [_PEAK.fullmatch(name) for name in names]
    bad = [name for name, match in zip(names, found, strict=True) if match is None or not _is_forward(match)]
    if bad:
        raise GeneError(
            f"{len(bad)} of {len(names)} features are not named as peaks: {', '.join(map(repr, bad[:3]))}",
            fix="names like chr1:100-200, chr1_100_200 or chr1-100-200; or --peak-genes alone, a table of "
            "the peaks of each gene",
        )
    return _regions((match[0], match[1], match[2], match[3], ".") for match in found if match is not None)


def peak_key(name: str) -> str | tuple[str, int, int]:
    """What a peak is known by, however its name is written; a name that says no place, as it is."""
    match = _PEAK.fullmatch(name)
    return name if match is None else (chromosome_key(match[1]), int(match[2]), int(match[3]))


def _is_forward(match: re.Match[str]) -> bool:
    return int(match[2]) < int(match[3])


def _regions(rows: Iterable[tuple[str, str, str | int, str | int, str]]) -> Regions:
    """(name, chromosome, start, end, strand) -> regions."""
    columns = list(zip(*rows, strict=True)) or [()] * 5
    names, chromosomes, starts, ends, strands = columns
    return Regions(
        list(names), list(chromosomes), np.array(starts, np.int64), np.array(ends, np.int64), list(strands)
    )


def read_annotation(path: str | Path, attribute: str) -> Regions:
    """Genes of a GTF, GFF3 or BED file, plain or gzipped.

    Parameters
    ----------
    attribute
        Of GTF and GFF3, which attribute names a gene; a gene without it goes by its ``gene_id``. Rows of
        type ``gene`` count, or ``transcript`` where there is none. Of BED, column 4 is the name and column 6
        the strand.

    Raises
    ------
    UsageError
        If the file's name does not say what it is.
    BadFileError
        If it can't be read, or holds no gene; names the line.
    """
    kinds = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    if kinds[-1:] and kinds[-1] in _BED:
        genes = _regions(_bed_rows(path))
    elif kinds[-1:] and kinds[-1] in _GTF:
        genes = _regions(_gtf_rows(path, attribute, "gene"))
        if not len(genes):
            genes = _regions(_gtf_rows(path, attribute, "transcript"))
    else:
        raise UsageError(
            "is neither .gtf, .gff3 nor .bed (.gz)", where=str(path), fix="name the file by its format"
        )
    if not len(genes):
        raise BadFileError("holds no gene", where=str(path), fix="an annotation with rows of type gene")
    return genes


def _bed_rows(path: str | Path) -> Iterator[tuple[str, str, int, int, str]]:
    for number, line in _lines(path):
        if line.startswith(("track ", "browser ")):
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 4:
            raise _bad_line(path, number, "a gene needs chromosome, start, end and name")
        start, end = _range(path, number, fields[1], fields[2])
        yield fields[3], fields[0], start, end, _strand(path, number, fields[5] if len(fields) > 5 else ".")


def _gtf_rows(path: str | Path, attribute: str, kind: str) -> Iterator[tuple[str, str, int, int, str]]:
    name_of, id_of = (re.compile(rf'(?:^|;)\s*{re.escape(a)}[ =]"?([^";]+)') for a in (attribute, "gene_id"))
    for number, line in _lines(path):
        fields = line.split("\t")
        if len(fields) < 9:
            raise _bad_line(path, number, f"{len(fields)} columns instead of 9")
        if fields[2] != kind:
            continue
        name = name_of.search(fields[8]) or id_of.search(fields[8])
        if name is None:
            raise _bad_line(path, number, f"a {kind} with neither {attribute} nor gene_id")
        start, end = _range(path, number, fields[3], fields[4], first=1)
        yield name[1].strip(), fields[0], start, end, _strand(path, number, fields[6])


def _range(path: str | Path, number: int, start: str, end: str, first: int = 0) -> tuple[int, int]:
    """Half-open, from 0; `first` is what the file calls the first base."""
    try:
        low, high = int(start) - first, int(end)
    except ValueError:
        raise _bad_line(path, number, f"{start!r} to {end!r} is no range") from None
    if not 0 <= low < high:
        raise _bad_line(path, number, f"{start} to {end} is no range")
    return low, high


def _strand(path: str | Path, number: int, strand: str) -> str:
    if strand not in ("+", "-", ".", "?"):
        raise _bad_line(path, number, f"{strand!r} is no strand")
    return strand.replace("?", ".")


def _bad_line(path: str | Path, number: int, what: str) -> BadFileError:
    return BadFileError(f"line {number}: {what}", where=str(path), fix="mend the line, or leave it out")


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, numbered from 1; comments left out."""
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip() and not line.startswith("#"):
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def open_text(path: str | Path) -> IO[str]:
    """A text file, gzipped or not, whatever its name says."""
    with Path(path).open("rb") as stream:
        zipped = stream.read(2) == _GZIP
    return gzip.open(path, "rt", encoding="utf-8") if zipped else Path(path).open(encoding="utf-8")


def _unreadable(path: str | Path, error: Exception) -> BadFileError:
    return BadFileError(
        f"can't be read: {error}", where=str(path), fix="a whole text file, which may be gzipped"
    )


def read_gene_peaks(path: str | Path) -> pd.DataFrame:
    """A table with the columns `gene` and `peak`, one row per pair; csv or tsv, plain or gzipped.

    Raises
    ------
    BadFileError
        If it can't be read, or lacks one of the columns.
    """
    separator = "," if ".csv" in Path(path).suffixes else "\t"
    try:
        with open_text(path) as stream:
            table = pd.read_csv(stream, sep=separator, dtype=str, keep_default_na=False, comment="#")
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from error
    table = table.rename(columns=lambda name: _COLUMNS.get(name.strip().lower(), name))
    if list(table.columns).count("gene") != 1 or list(table.columns).count("peak") != 1:
        raise BadFileError(
            f"columns {', '.join(table.columns)}, not gene and peak",
            where=str(path),
            fix="a csv or tsv file with a header and the columns gene and peak",
        )
    return table[["gene", "peak"]]
