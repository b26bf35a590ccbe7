"""MatrixMarket folders, 10x and plain: a features x cells matrix beside its names (``.gz`` or not)."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import pandas as pd

from streamx.errors import BadFileError, EmptyError
from streamx.store.ingest.source import Request, Source, file_checksum, in_memory, reading
from streamx.store.ingest.spill import Entries, transposed
from streamx.store.ingest.tenx import split_features

BARCODES, GENES, FEATURES = ("barcode",), ("gene", "peaks"), ("feature",)


def is_companion(path: Path) -> bool:
    """A file of names that belongs to a matrix beside it."""
    return any(word in path.name.lower() for word in (*BARCODES, *GENES, *FEATURES))


def prefix_of(path: Path) -> str:
    """What several matrices in one folder differ by: ``GSM1_a`` of ``GSM1_a_matrix.mtx.gz``."""
    name = re.sub(r"\.mtx(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    return re.sub(r"[._-]*(matrix|counts?|data)$", "", name, flags=re.IGNORECASE)


def open_text(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def mtx_source(matrix: Path, request: Request) -> Source:
    """A source from a matrix file and the files of names beside it, found by what their names contain."""
    location = str(matrix)
    names_of = {words: companion(matrix, words) for words in (BARCODES, FEATURES, GENES)}
    barcodes = read_names(names_of[BARCODES] or missing(matrix, "barcodes.tsv"))
    file_of_genes = names_of[FEATURES] or names_of[GENES] or missing(matrix, "features.tsv or genes.tsv")
    features = read_names(file_of_genes)
    header = read_header(matrix)
    n_genes, n_cells, n_stored = header["shape"]
    for found, expected, what, file in (
        (len(barcodes), n_cells, "cells", names_of[BARCODES]),
        (len(features), n_genes, "features", file_of_genes),
    ):
        if found != expected:
            header_line = " (its first line looks like a header: remove it)" if found == expected + 1 else ""
            raise BadFileError(
                f"{found} names for a matrix of {expected} {what}{header_line}",
                where=str(file),
                fix=f"{matrix.name} is features x cells: put the names that belong to it beside it",
            )
    if min(n_cells, n_genes) == 0:
        raise EmptyError(
            f"a matrix of {n_genes} features x {n_cells} cells", where=location, fix="leave it out"
        )
    obs = pd.DataFrame(index=pd.Index([row[-1] for row in barcodes], dtype=object))
    column = 1 if names_of[FEATURES] and len(features[0]) > 1 else -1
    index = [row[column] for row in features]
    if ".bed" in file_of_genes.name and len(features[0]) >= 3:
        index = [f"{row[0]}:{row[1]}-{row[2]}" for row in features]
    var = pd.DataFrame(index=pd.Index(index, dtype=object))
    if len(features[0]) > 1:
        var["gene_ids"] = [row[0] for row in features]
    has_types = names_of[FEATURES] is not None and len(features[0]) > 2
    types = np.array([row[2] for row in features], dtype=object) if has_types else None
    rows = transposed(
        lambda limit: mtx_entries(matrix, header, limit),
        n_stored,
        np.dtype(np.float64 if header["kind"] == "real" else np.int64),
        obs.index.to_numpy(),
        var.index.to_numpy(),
        request,
    )
    rows, var, modalities = split_features(rows, var, types, request.modality, location)
    files = sorted(p for p in (matrix, names_of[BARCODES], file_of_genes) if p is not None)
    return Source(request.key, location, in_memory(obs), var, rows, lambda: checksum_of(files), modalities)


def checksum_of(files: list[Path]) -> str:
    parts = [file_checksum(file) for file in files]
    crc = google_crc32c.Checksum("\n".join(parts).encode()).hexdigest().decode()
    return f"{sum(int(part.split('-')[0]) for part in parts)}-{crc}"


def missing(matrix: Path, what: str) -> Path:
    raise BadFileError(
        f"no {what} beside it", where=str(matrix), fix=f"put {what} (or .gz) into {matrix.parent}"
    )


def companion(matrix: Path, words: tuple[str, ...]) -> Path | None:
    """The file beside the matrix whose name contains one of `words`; of several, the one with its prefix."""
    found = sorted(
        p
        for p in matrix.parent.iterdir()
        if p.is_file()
        and p != matrix
        and ".mtx" not in p.name.lower()
        and any(w in p.name.lower() for w in words)
    )
    own = [p for p in found if p.name.startswith(prefix_of(matrix))] if prefix_of(matrix) else found
    if len(own or found) > 1:
        names = ", ".join(p.name for p in own or found)
        raise BadFileError(f"several files of names: {names}", where=str(matrix), fix="leave one per matrix")
    return next(iter(own or found), None)


def read_names(path: Path) -> list[list[str]]:
    """Fields of each line, tab separated, no header; every line with as many as the first."""
    with reading(str(path), "names"), open_text(path) as stream:
        rows = [line.rstrip("\r\n").split("\t") for line in stream.read().decode("utf-8").splitlines()]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]) or not row[-1]:
            raise BadFileError(
                f"line {number + 1} has {len(row)} fields ({row[-1]!r} last), line 1 has {len(rows[0])}",
                where=str(path),
                fix="names are tab separated, one line each, without a header",
            )
    return rows


def read_header(path: Path) -> dict[str, Any]:
    """Kind of values, shape (features, cells, entries), and the number of lines before the entries."""
    location = str(path)
    with reading(location, "header"), open_text(path) as stream:
        first = stream.readline().decode("ascii", "replace").split()
        lines = 1
        while (line := stream.readline()).startswith(b"%") or (line and not line.strip()):
            lines += 1
    fix = "the first line must be '%%MatrixMarket matrix coordinate integer|real general'"
    if len(first) < 5 or first[0] != "%%MatrixMarket" or first[2].lower() != "coordinate":
        raise BadFileError(f"header is {' '.join(first)[:80]!r}", where=location, fix=fix)
    kind, symmetry = first[3].lower(), first[4].lower()
    if kind not in ("integer", "real", "pattern") or symmetry != "general":
        raise BadFileError(f"{kind} {symmetry} matrices are no counts", where=location, fix=fix)
    try:
        n_genes, n_cells, n_stored = (int(word) for word in line.split())
    except ValueError:
        raise BadFileError(
            f"line {lines + 1} is {line[:80]!r}, not features, cells and entries", where=location, fix=fix
        ) from None
    return {"kind": kind, "shape": (n_genes, n_cells, n_stored), "lines": lines + 1}


def mtx_entries(path: Path, header: dict[str, Any], limit: int) -> Iterator[Entries]:
    """Entries in file order, checked against the header."""
    n_genes, n_cells, n_stored = header["shape"]
    values_type = {"integer": np.int64, "real": np.float64}.get(header["kind"])
    types: dict[str, Any] = {"gene": np.int64, "cell": np.int64}
    types |= {"value": values_type} if values_type else {}
    seen, location = 0, str(path)
    with open_text(path) as stream:
        for _ in range(header["lines"]):
            stream.readline()
        if n_stored == 0 and not stream.read(1 << 10).strip():
            return
    chunks = pd.read_csv(
        path,
        sep=r"\s+",
        header=None,
        names=list(types),
        index_col=False,
        dtype=types,
        skiprows=header["lines"],
        chunksize=max(1024, limit // 2),
        compression="gzip" if path.name.lower().endswith(".gz") else None,
    )
    with chunks:
        for chunk in chunks:
            genes, cells = chunk["gene"].to_numpy() - 1, chunk["cell"].to_numpy() - 1
            wrong = np.flatnonzero((genes < 0) | (genes >= n_genes) | (cells < 0) | (cells >= n_cells))
            if len(wrong):
                at, gene, cell = seen + wrong[0] + 1, genes[wrong[0]] + 1, cells[wrong[0]] + 1
                raise BadFileError(
                    f"entry {at} (line {header['lines'] + at}) is feature {gene}, cell {cell}; "
                    f"the matrix is {n_genes} x {n_cells}, counted from 1",
                    where=location,
                    fix="the file is damaged: download or write it again",
                )
            values = chunk["value"].to_numpy() if values_type else np.ones(len(chunk), dtype=np.int64)
            seen += len(chunk)
            yield cells, genes, values
    if seen != n_stored:
        raise BadFileError(
            f"{seen} entries, the header says {n_stored}",
            where=location,
            fix="the file is cut short: download it again",
        )
