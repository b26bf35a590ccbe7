"""obs and var of an AnnData on disk, of every age; and which codecs may be decoded at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BadFileError
from streamx.store.ingest.source import reading, text_names


def is_group(element: Any) -> bool:
    return hasattr(element, "keys")


def read_frame(group: Any, name: str, location: str) -> pd.DataFrame:
    """A table column by column, so that a bad column is named; columns that aren't 1-d are left out."""
    if name not in group:
        raise BadFileError(f"no {name}", where=location, fix="this is no AnnData file, or an incomplete one")
    table = group[name]
    if not is_group(table):
        return _compound_frame(table, group, name)
    index_name = table.attrs.get("_index", "_index")
    index = text_names(_column(table, str(index_name), f"{name} names", location))
    columns = {}
    for column in text_names(table.attrs.get("column-order", [])):
        values = _column(table, column, f"{name}[{column!r}]", location)
        if getattr(values, "ndim", 1) != 1:
            continue
        if len(values) != len(index):
            raise BadFileError(
                f"{name}[{column!r}] has {len(values)} values for {len(index)} rows",
                where=location,
                fix="write the file again with anndata",
            )
        columns[column] = values
    return pd.DataFrame(columns, index=pd.Index(index, dtype=object))


def _column(table: Any, column: str, element: str, location: str) -> Any:
    from anndata.io import read_elem

    if column not in table:
        raise BadFileError(f"{element} is missing", where=location, fix="write the file again with anndata")
    element_node = table[column]
    with reading(location, element):
        safe_codecs([element_node], location)
        if not is_group(element_node) and "categories" in element_node.attrs:  # anndata < 0.8
            reference = element_node.attrs["categories"]
            place = table.file[reference] if not isinstance(reference, str) else table[Path(reference).name]
            return _categorical(element_node[:], place[:])
        values = read_elem(element_node)
        values = values if hasattr(values, "dtype") else np.asarray(values)
        return values.astype(object) if values.dtype.kind == "T" else values


def _categorical(codes: np.ndarray, categories: np.ndarray) -> pd.Categorical:
    names = pd.Index(text_names(categories) if categories.dtype.kind in "SO" else categories)
    return pd.Categorical.from_codes(np.asarray(codes).astype(np.int64), categories=names)


def _compound_frame(table: Any, group: Any, name: str) -> pd.DataFrame:
    """obs or var of anndata < 0.7: one compound array, categories apart in uns."""
    values = table[:]
    fields = list(values.dtype.names)
    index_name = next((f for f in ("index", "_index") if f in fields), fields[0])
    columns: dict[str, Any] = {}
    for column in fields:
        categories = f"uns/{column}_categories"
        plain = text_names(values[column]) if values[column].dtype.kind in "SO" else values[column]
        is_code = column != index_name and name == "obs" and categories in group
        columns[column] = _categorical(values[column], group[categories][:]) if is_code else plain
    index = pd.Index(columns.pop(index_name), dtype=object)
    return pd.DataFrame(columns, index=index)


_SAFE = """
    adler32 astype bitround bitshuffle blosc bytes bz2 categorize crc32 crc32c delta fixedscaleoffset
    fletcher32 gzip jenkins_lookup3 json2 lz4 lzma msgpack2 packbits pcodec quantize sharding_indexed
    shuffle transpose vlen-array vlen-bytes vlen-utf8 zfpy zlib zstd
"""
SAFE_CODECS = frozenset(_SAFE.split())


def safe_codecs(elements: Iterable[Any], location: str) -> None:
    """Refuse zarr arrays whose codecs could run code when decoded (pickle); HDF5 has none such."""
    for element in elements:
        if not hasattr(element, "metadata"):
            continue
        if is_group(element):
            safe_codecs((member for _, member in element.members(max_depth=None)), location)
            continue
        metadata = element.metadata.to_dict()
        codecs = [c for part in ("filters", "codecs") for c in metadata.get(part) or ()]
        codecs += [metadata["compressor"]] if metadata.get("compressor") else []
        for codec in codecs:
            codecs += codec.get("configuration", {}).get("codecs", ())  # inside a zarr shard
            name = str(codec.get("id") or codec.get("name"))
            if name.removeprefix("numcodecs.") not in SAFE_CODECS:
                raise BadFileError(
                    f"array {element.path} is encoded with {name!r}, which could run code; it was not read",
                    where=location,
                    fix="write the file again with a current anndata",
                )
