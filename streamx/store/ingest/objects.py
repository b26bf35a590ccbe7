"""AnnData and MuData objects as inputs: in memory, backed, or with dask matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
from scipy import sparse

from streamx.errors import BadFileError
from streamx.store.ingest.elements import (
    aligned,
    choose_modality,
    dense_slices,
    matrix_rows,
    protein_modality,
)
from streamx.store.ingest.source import Obsm, Request, Rows, Source, dense_rows, in_memory, text_names
from streamx.store.ingest.spill import compressed_rows


def memory_source(item: Any, request: Request) -> Source:
    """A source from an AnnData (in memory or backed) or MuData object."""
    location, adata = request.location, item
    if hasattr(item, "mod"):
        chosen = choose_modality(list(item.mod), request.modality, location)
        adata = item.mod[chosen]
    names = [n for n, held in (("X", adata.X), ("raw", adata.raw)) if held is not None]
    names += adata.layers.keys()
    wanted = request.layer or "X"
    matrix = adata.X if wanted == "X" else adata.raw.X if wanted == "raw" and adata.raw is not None else None
    if matrix is None and wanted in adata.layers:
        matrix = adata.layers[wanted]
    if matrix is None:
        raise BadFileError(
            f"no {wanted}; it has {', '.join(names) or 'no matrix at all'}",
            where=location,
            fix="name one as layer=" if names else "give the cells with their counts",
        )
    var = adata.raw.var if wanted == "raw" and adata.raw is not None else adata.var
    obs, var = adata.obs.copy(deep=False), var.copy(deep=False)
    obs.index, var.index = (pd.Index(text_names(t.index), dtype=object) for t in (obs, var))
    rows = object_rows(matrix, obs.index.to_numpy(), var.index.to_numpy(), request)
    modalities = {}
    for name, values in adata.obsm.items():
        if isinstance(values, pd.DataFrame) and all(pd.api.types.is_numeric_dtype(t) for t in values.dtypes):
            modalities[name] = Obsm([str(c) for c in values.columns], dense_slices(values.to_numpy()))
        elif isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype.kind in "iufb":
            modalities[name] = Obsm([str(i) for i in range(values.shape[1])], dense_slices(values))
    protein = protein_modality(list(item.mod), chosen) if adata is not item else None
    if protein is not None:
        other = item.mod[protein]
        theirs = text_names(other.obs_names).tolist(), text_names(other.var_names)
        modalities |= aligned(object_rows(other.X, *theirs, request), *theirs, obs.index)

    def others() -> list[str]:
        held = {"X": adata.X, "raw": getattr(adata.raw, "X", None), **dict(adata.layers.items())}
        first = {n: m[:16] for n, m in held.items() if m is not None and n != wanted}
        dense = {n: m.toarray() if sparse.issparse(m) else np.asarray(m) for n, m in first.items()}
        return [n for n, m in dense.items() if m.size and m.min() >= 0 and (m == np.rint(m)).all()]

    def digest() -> str:
        crc = google_crc32c.Checksum()
        step = max(1, request.memory // 16 // (8 * max(1, len(var))))
        for at in range(0, len(obs), step):
            block = rows(at, min(at + step, len(obs)))
            for part in (block.indptr.astype(np.int64), block.indices.astype(np.int64), block.data):
                crc.update(np.ascontiguousarray(part).tobytes())
        for table in (obs, var):
            crc.update(pd.util.hash_pandas_object(table.astype(str)).to_numpy().tobytes())
            crc.update("\0".join(map(str, table.columns)).encode())
        return f"{len(obs)}x{len(var)}-{crc.hexdigest().decode()}"

    return Source(request.key, location, in_memory(obs), var, rows, digest, modalities, others)


def object_rows(matrix: Any, obs_names: Sequence[str], var_names: np.ndarray, request: Request) -> Rows:
    """Reader of rows of what an AnnData object holds: numpy, scipy, backed or dask."""
    if hasattr(matrix, "group"):  # a backed sparse matrix: read its file
        return matrix_rows(matrix.group, "X", obs_names, var_names, request)
    if hasattr(matrix, "compute"):
        return lambda start, stop: sparse.csr_matrix(matrix[start:stop].compute())
    if not sparse.issparse(matrix):
        return dense_rows(matrix, request.memory)
    if matrix.format not in ("csr", "csc"):
        matrix = matrix.tocsr()
    arrays = matrix.indptr, matrix.indices, matrix.data
    return compressed_rows(matrix.format == "csr", arrays, "X", obs_names, var_names, request)
