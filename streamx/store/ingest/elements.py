"""AnnData on disk or in memory: h5ad, AnnData-Zarr, a modality of an h5mu, an AnnData object.

A file is walked as a group of elements (h5py and zarr groups look alike); nothing but names and obs is
loaded, `uns` is never touched, and no array is decoded with a codec that could run code.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BadFileError, UsageError
from streamx.store.ingest.frame import is_group, open_table, read_frame, safe_codecs
from streamx.store.ingest.source import (
    Names,
    Obsm,
    Request,
    Rows,
    Source,
    dense_rows,
    file_checksum,
    in_memory,
    reading,
    text_names,
)
from streamx.store.ingest.spill import compressed_rows

PROTEIN = "protein_expression"
PROTEIN_MODALITIES = ("protein", "prot", "adt")
PEEK = 4096  # stored values looked at to tell whether another layer holds counts


def anndata_source(
    root: Any,
    path: Path,
    request: Request,
    close: Callable[[], None] = lambda: None,
) -> Source:
    """A source from an open h5py or zarr group that holds an AnnData or a MuData."""
    location = request.location
    with reading(location, "structure"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata on old formats: we read what we need ourselves
        chosen, group = None, root
        if "mod" in root and "X" not in root:
            chosen = choose_modality(list(root["mod"]), request.modality, location)
            group = root["mod"][chosen]
        name, matrix, var_group = choose_matrix(group, request.layer, location)
        cells = open_table(group, "obs", location)
        var = read_frame(var_group, "var", location)
        check_shape(matrix, name, (cells.n, len(var)), location)
        rows = matrix_rows(matrix, name, Names(cells), text_names(var.index), request)
        modalities = read_obsm(group, cells.n, location)
        if chosen is not None:
            obs = read_frame(group, "obs", location)
            obs = obs.join(shared_obs(root, chosen, obs, location))
            modalities |= read_proteins(root, chosen, obs, request)
            cells = in_memory(obs)
    lock = None if hasattr(root, "store") else threading.Lock()
    return Source(
        key=request.key,
        location=location,
        cells=cells,
        var=var,
        rows=locked(rows, lock),
        digest=lambda: file_checksum(path),
        modalities={n: Obsm(m.names, locked(m.rows, lock)) for n, m in modalities.items()},
        alternatives=lambda: countlike(group, name),
        close=close,
        reopens=chosen is None and rows_lie_together(matrix),
    )


def locked(read: Callable[[int, int], Any], lock: threading.Lock | None) -> Callable[[int, int], Any]:
    if lock is None:
        return read

    def rows(start: int, stop: int) -> Any:
        with lock:
            return read(start, stop)

    return rows


def choose_modality(present: list[str], wanted: str | None, location: str) -> str:
    if wanted is None and (len(present) == 1 or "rna" in present):
        return "rna" if "rna" in present else present[0]
    if wanted not in present:
        asked = "which modality is not said" if wanted is None else f"no modality {wanted!r}"
        raise UsageError(f"{asked}; the file has {', '.join(present)}", where=location, fix="--modality NAME")
    return wanted


def choose_matrix(group: Any, layer: str | None, location: str) -> tuple[str, Any, Any]:
    """The element that holds the counts: its name, itself, and the group whose var describes its columns."""
    layers = list(group["layers"].keys()) if "layers" in group else []
    names = (["X"] if "X" in group else []) + (["raw"] if "raw" in group else []) + layers
    wanted = "X" if layer is None else layer
    if wanted not in names:
        what = "no X" if wanted == "X" else f"no layer {wanted!r}"
        have = f"the file has {', '.join(names)}" if names else "and nothing else that could hold counts"
        raise BadFileError(
            f"{what}; {have}",
            where=location,
            fix=f"--layer {names[0]}" if names else "this is no AnnData file, or one without a matrix",
        )
    if wanted == "X":
        return "X", group["X"], group
    if wanted == "raw" and "raw" in group:
        raw = group["raw"]
        if "X" not in raw or "var" not in raw:
            raise BadFileError("raw has no X or no var", where=location, fix="choose another --layer")
        return "raw/X", raw["X"], raw
    return f"layers/{wanted}", group["layers"][wanted], group


def shape_of(matrix: Any) -> tuple[int, ...]:
    if not is_group(matrix):
        return tuple(int(n) for n in matrix.shape)
    shape = matrix.attrs["shape"] if "shape" in matrix.attrs else matrix.attrs["h5sparse_shape"]
    return tuple(int(n) for n in shape)


def check_shape(matrix: Any, name: str, expected: tuple[int, int], location: str) -> None:
    shape = shape_of(matrix)
    if shape != expected:
        raise BadFileError(
            f"{name} has shape {shape}, but obs has {expected[0]} cells and var {expected[1]} genes",
            where=location,
            fix="the file is damaged or was put together by hand: write it again with anndata",
        )


def matrix_rows(
    matrix: Any, name: str, obs_names: Sequence[str], var_names: np.ndarray, request: Request
) -> Rows:
    """Reader of rows of an element: dense, CSR, or CSC (through a spill)."""
    location = request.location
    if not is_group(matrix):
        if np.dtype(matrix.dtype).kind not in "iufb":
            raise BadFileError(
                f"{name} holds {matrix.dtype}, no numbers", where=location, fix="choose another --layer"
            )
        safe_codecs([matrix], location)
        return dense_rows(matrix, request.memory)
    encoding = str(matrix.attrs.get("encoding-type") or f"{matrix.attrs.get('h5sparse_format')}_matrix")
    if encoding not in ("csr_matrix", "csc_matrix"):
        raise BadFileError(
            f"{name} is a {encoding!r}, not dense, CSR or CSC", where=location, fix="choose another --layer"
        )
    for part in ("data", "indices", "indptr"):
        if part not in matrix:
            raise BadFileError(f"{name} has no {part}", where=location, fix="write the file again")
    arrays = matrix["indptr"], matrix["indices"], matrix["data"]
    safe_codecs(arrays, location)
    return compressed_rows(encoding == "csr_matrix", arrays, name, obs_names, var_names, request)


def rows_lie_together(matrix: Any) -> bool:
    """Whether rows can be read as they are stored; those of a CSC matrix come from a spill."""
    return not is_group(matrix) or matrix.attrs.get("encoding-type") == "csr_matrix"


def read_obsm(group: Any, n_obs: int, location: str) -> dict[str, Obsm]:
    """Dense 2-d obsm elements, as readers."""
    found = {}
    for name in group["obsm"].keys() if "obsm" in group else ():
        element = group["obsm"][name]
        if not is_group(element):
            if len(element.shape) == 2 and element.dtype.kind in "iufb" and element.shape[0] == n_obs:
                safe_codecs([element], location)
                found[str(name)] = Obsm([str(i) for i in range(element.shape[1])], dense_slices(element))
        elif str(element.attrs.get("encoding-type", "")) == "dataframe":
            columns = [str(c) for c in text_names(element.attrs["column-order"])]
            arrays = [element[c] for c in columns if c in element]
            if len(arrays) == len(columns) and all(
                not is_group(a) and a.dtype.kind in "iufb" and a.shape == (n_obs,) for a in arrays
            ):
                safe_codecs(arrays, location)
                found[str(name)] = Obsm(columns, _columns(arrays))
    return found


def dense_slices(array: Any) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: np.asarray(array[start:stop])


def _columns(arrays: list[Any]) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: np.column_stack([a[start:stop] for a in arrays])


def shared_obs(root: Any, chosen: str, obs: pd.DataFrame, location: str) -> pd.DataFrame:
    """Columns of a MuData's own obs that are no copies of a modality's, on the cells of the chosen one."""
    empty = pd.DataFrame(index=obs.index)
    if "obs" not in root:
        return empty
    whole = read_frame(root, "obs", location)
    copies = tuple(f"{name}:" for name in root["mod"])
    columns = [c for c in whole.columns if not c.startswith(copies) and c not in obs.columns]
    if not columns or whole.index.has_duplicates:
        return empty
    return whole[columns].reindex(obs.index) if not obs.index.has_duplicates else empty


def read_proteins(root: Any, chosen: str, obs: pd.DataFrame, request: Request) -> dict[str, Obsm]:
    """Another modality that measured proteins, in the order of the chosen one's cells (absent cells: NaN)."""
    name = protein_modality(list(root["mod"]), chosen)
    if name is None:
        return {}
    other, location = root["mod"][name], request.location
    their_obs, their_var = read_frame(other, "obs", location), read_frame(other, "var", location)
    _, matrix, _ = choose_matrix(other, None, location)
    check_shape(matrix, f"mod/{name}/X", (len(their_obs), len(their_var)), location)
    names = their_obs.index.to_numpy(), their_var.index.to_numpy()
    theirs = replace(request, spill=request.spill.with_suffix(".protein"))
    return aligned(matrix_rows(matrix, f"mod/{name}/X", *names, theirs), *names, obs.index)


def protein_modality(present: list[str], chosen: str) -> str | None:
    return next((m for m in present if m.lower() in PROTEIN_MODALITIES and m != chosen), None)


def aligned(read: Rows, theirs: np.ndarray, features: np.ndarray, cells: pd.Index) -> dict[str, Obsm]:
    """A modality's rows as proteins of `cells`; nothing if names can't say which row is whose."""
    index = pd.Index(theirs)
    if index.has_duplicates:
        return {}
    rows = _gathered(read, index.get_indexer(cells), len(features))
    return {PROTEIN: Obsm([str(name) for name in features], rows)}


def _gathered(read: Rows, place: np.ndarray, width: int) -> Callable[[int, int], np.ndarray]:
    """Rows `place` of a narrow matrix, read in blocks over their range."""

    def rows(start: int, stop: int) -> np.ndarray:
        wanted = place[start:stop]
        out = np.full((len(wanted), width), np.nan, dtype=np.float32)
        there = np.flatnonzero(wanted >= 0)
        if len(there):
            low, high, step = int(wanted[there].min()), int(wanted.max()) + 1, 65536
            for at in range(low, high, step):
                end = min(at + step, high)
                inside = there[(wanted[there] >= at) & (wanted[there] < end)]
                if len(inside):
                    out[inside] = read(at, end).toarray()[wanted[inside] - at]
        return out

    return rows


def countlike(group: Any, chosen: str) -> list[str]:
    """Names of the other matrices whose first stored values are non-negative integers."""
    found = []
    candidates = [("X", "X"), ("raw", "raw/X")]
    candidates += [(str(n), f"layers/{n}") for n in (group["layers"].keys() if "layers" in group else ())]
    for name, place in candidates:
        if place == chosen or place not in group:
            continue
        element = group[place]["data"] if is_group(group[place]) else group[place]
        values = np.asarray(element[:PEEK] if element.ndim == 1 else element[:16]).ravel()
        if len(values) and values.min() >= 0 and (values == np.rint(values)).all():
            found.append(name)
    return found
