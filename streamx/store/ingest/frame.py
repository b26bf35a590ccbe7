"""obs and var of an AnnData on disk, of every age; and which codecs may be decoded at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BadFileError
from streamx.store.ingest.source import Table, in_memory, reading, text_names


def is_group(element: Any) -> bool:
    return hasattr(element, "keys")


def read_frame(group: Any, name: str, location: str) -> pd.DataFrame:
    """A whole table, indexed by names."""
    table = open_table(group, name, location)
    frame = table.rows(0, table.n)
    return frame.set_axis(pd.Index(table.names(0, table.n), dtype=object), axis=0)


def open_table(group: Any, name: str, location: str) -> Table:
    """A table column by column, so that a bad column is named; columns that aren't 1-d are left out.

    Every column is looked at now; its values are read when they are asked for.
    """
    if name not in group:
        raise BadFileError(f"no {name}", where=location, fix="this is no AnnData file, or an incomplete one")
    table = group[name]
    if not is_group(table):
        return in_memory(_compound_frame(table, group, name))
    index = open_column(table, str(table.attrs.get("_index", "_index")), f"{name} names", location)
    assert index is not None, "names are one-dimensional"
    columns = {}
    for column in text_names(table.attrs.get("column-order", [])).tolist():
        element = f"{name}[{column!r}]"
        found = open_column(table, column, element, location)
        if found is None:
            continue
        if found.n != index.n:
            raise BadFileError(
                f"{element} has {found.n} values for {index.n} rows",
                where=location,
                fix="write the file again with anndata",
            )
        columns[column] = found

    def rows(start: int, stop: int) -> pd.DataFrame:
        values = {column: found.read(start, stop) for column, found in columns.items()}
        return pd.DataFrame(values, index=pd.RangeIndex(start, stop))

    return Table(index.n, list(columns), rows, lambda start, stop: text_names(index.read(start, stop)))


@dataclass(frozen=True)
class Column:
    """A column of a table: how many values, and a reader of some of them."""

    n: int
    read: Callable[[int, int], Any]


def open_column(table: Any, column: str, element: str, location: str) -> Column | None:
    """A column on disk; None if it is not 1-d. Encodings that are not known here are read whole now."""
    if column not in table:
        raise BadFileError(f"{element} is missing", where=location, fix="write the file again with anndata")
    node = table[column]
    with reading(location, element):
        safe_codecs([node], location)
        encoding = node.attrs.get("encoding-type", "")
        parts = _sliceable(node, encoding)
        if parts is None:
            values = _whole(table, column)
            return Column(len(values), lambda a, b: values[a:b]) if getattr(values, "ndim", 1) == 1 else None

    def read(start: int, stop: int) -> Any:
        with reading(location, element):
            return parts(start, stop)

    length = node if not is_group(node) else node["codes" if encoding == "categorical" else "values"]
    return Column(int(length.shape[0]), read)


def _sliceable(node: Any, encoding: str) -> Callable[[int, int], Any] | None:
    """A reader of some rows of what anndata writes most: arrays, texts, categoricals, nullable values."""
    if encoding == "categorical":
        return _categorical_rows(node)
    if encoding in ("nullable-integer", "nullable-boolean"):
        array: Any = pd.arrays.IntegerArray if encoding.endswith("integer") else pd.arrays.BooleanArray
        return lambda a, b: array(np.asarray(node["values"][a:b]), np.asarray(node["mask"][a:b], dtype=bool))
    if encoding == "string-array" and not is_group(node) and node.ndim == 1:
        return lambda a, b: text_names(node[a:b])
    plain = encoding == "array" and not is_group(node) and "categories" not in node.attrs
    if plain and node.ndim == 1 and node.dtype.kind in "iufb":
        return lambda a, b: np.asarray(node[a:b])
    return None


def _categorical_rows(node: Any) -> Callable[[int, int], Any]:
    from anndata.io import read_elem

    categories = pd.Index(np.asarray(read_elem(node["categories"])))
    if categories.dtype.kind == "T":
        categories = categories.astype(object)
    ordered = bool(node.attrs.get("ordered", False))
    return lambda a, b: pd.Categorical.from_codes(
        np.asarray(node["codes"][a:b]).astype(np.int64), categories=categories, ordered=ordered
    )


def _whole(table: Any, column: str) -> Any:
    from anndata.io import read_elem

    node = table[column]
    if not is_group(node) and "categories" in node.attrs:  # anndata < 0.8
        reference = node.attrs["categories"]
        place = table.file[reference] if not isinstance(reference, str) else table[Path(reference).name]
        return _categorical(node[:], place[:])
    values = read_elem(node)
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
