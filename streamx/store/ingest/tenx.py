"""10x Genomics HDF5: version 3 (group ``matrix``) and version 2 (one group per genome), stored by cell."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BadFileError, UsageError
from streamx.store.ingest.elements import PROTEIN, locked
from streamx.store.ingest.source import (
    Obsm,
    Request,
    Rows,
    Source,
    file_checksum,
    in_memory,
    reading,
    text_names,
)
from streamx.store.ingest.spill import compressed_rows

RNA_TYPE, PROTEIN_TYPE = "Gene Expression", "Antibody Capture"
TYPE_OF = {
    "rna": RNA_TYPE,
    "gex": RNA_TYPE,
    "protein": PROTEIN_TYPE,
    "prot": PROTEIN_TYPE,
    "adt": PROTEIN_TYPE,
    "atac": "Peaks",
}


def is_tenx(file: Any) -> bool:
    return bool(matrix_groups(file)) and "X" not in file


def matrix_groups(file: Any) -> list[str]:
    """Groups that hold a 10x matrix: ``matrix``, or one per genome."""
    return [n for n in file if hasattr(file[n], "keys") and "barcodes" in file[n]]


def tenx_source(file: Any, path: Path, request: Request, close: Callable[[], None]) -> Source:
    """A source from an open 10x HDF5 file; the modality is a feature type, or a genome in version 2."""
    location, modality = request.location, request.modality
    groups = matrix_groups(file)
    name = modality if modality in groups else groups[0]
    if len(groups) > 1 and modality not in groups:
        raise UsageError(
            f"the file has several genomes: {', '.join(groups)}",
            where=location,
            fix=f"--modality {groups[0]}",
        )
    group = file[name]
    with reading(location, name):
        needed = ("barcodes", "data", "indices", "indptr", "shape")
        for part in (*needed, "features" if "features" in group or "gene_names" not in group else "genes"):
            if part not in group:
                raise BadFileError(f"{name} has no {part}", where=location, fix="download the file again")
        var, types = read_features(group)
        obs = pd.DataFrame(index=pd.Index(text_names(group["barcodes"][:]), dtype=object))
        shape = tuple(int(n) for n in group["shape"][:])
        if shape != (len(var), len(obs)):
            raise BadFileError(
                f"{name}/shape is {shape}, but there are {len(var)} features and {len(obs)} barcodes",
                where=location,
                fix="download the file again",
            )
        arrays = group["indptr"], group["indices"], group["data"]
        rows = compressed_rows(True, arrays, name, obs.index.to_numpy(), var.index.to_numpy(), request)
    wanted = None if modality in groups else modality
    rows, var, modalities = split_features(locked(rows, threading.Lock()), var, types, wanted, location)
    return Source(
        request.key, location, in_memory(obs), var, rows, lambda: file_checksum(path), modalities, close=close
    )


def read_features(group: Any) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Features named by symbol, with their ids; and the type of each, where the file says it."""
    if "features" not in group:
        ids, names = text_names(group["genes"][:]), text_names(group["gene_names"][:])
        return pd.DataFrame({"gene_ids": ids}, index=pd.Index(names, dtype=object)), None
    features = group["features"]
    ids, names = text_names(features["id"][:]), text_names(features["name"][:])
    types = text_names(features["feature_type"][:]) if "feature_type" in features else None
    return pd.DataFrame({"gene_ids": ids}, index=pd.Index(names, dtype=object)), types


def split_features(
    rows: Rows, var: pd.DataFrame, types: np.ndarray | None, modality: str | None, location: str
) -> tuple[Rows, pd.DataFrame, dict[str, Obsm]]:
    """Of several feature types keep one (genes unless told otherwise); proteins become a dense modality."""
    if types is None:
        return rows, var, {}
    var = var.assign(feature_types=types)
    present = list(dict.fromkeys(types.tolist()))
    wanted = TYPE_OF.get(modality.lower(), modality) if modality is not None else None
    if wanted is None:
        wanted = RNA_TYPE if RNA_TYPE in present else present[0] if len(present) == 1 else None
    if wanted not in present:
        asked = "which feature type is not said" if wanted is None else f"no feature type {wanted!r}"
        raise UsageError(f"{asked}; the file has {', '.join(present)}", where=location, fix="--modality NAME")
    if len(present) == 1:
        return rows, var, {}
    chosen = np.flatnonzero(types == wanted)
    modalities = {}
    if PROTEIN_TYPE in present and wanted != PROTEIN_TYPE:
        proteins = np.flatnonzero(types == PROTEIN_TYPE)
        names = [str(n) for n in var.index[proteins]]
        modalities[PROTEIN] = Obsm(names, lambda start, stop: rows(start, stop)[:, proteins].toarray())
    return lambda start, stop: rows(start, stop)[:, chosen], var.iloc[chosen], modalities
