"""Data frames of AnnData-Zarr, read column by column, and the schema that unites their dtypes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd

RESERVED = ("_index", "zarr.json")
MAX_NAME_BYTES = 128

Group = Any  # a zarr.Group; zarr's own types say `Array | Group` of every member


def read_column(group: Group, name: str, start: int = 0, stop: int | None = None) -> pd.Series:
    """Rows start..stop of one column, in its pandas dtype."""
    node = group[name]
    rows = slice(start, stop)
    encoding = node.attrs.get("encoding-type")
    if encoding == "categorical":
        categories = pd.Index(_plain(node["categories"], slice(None)))
        codes = np.asarray(node["codes"][rows])
        values: Any = pd.Categorical.from_codes(
            codes, categories, ordered=bool(node.attrs.get("ordered", False))
        )
    elif encoding in ("nullable-integer", "nullable-boolean"):
        stored, mask = np.asarray(node["values"][rows]), np.asarray(node["mask"][rows], dtype=bool)
        integer = encoding == "nullable-integer"
        values = (
            pd.arrays.IntegerArray(stored, mask)
            if integer
            else pd.arrays.BooleanArray(stored.astype(bool), mask)
        )
    elif encoding == "nullable-string-array":
        values = _plain(node["values"], rows)
        values[np.asarray(node["mask"][rows], dtype=bool)] = None
    else:
        values = _plain(node, rows)
    return pd.Series(values, name=name)


def _plain(array: Any, rows: slice) -> np.ndarray:
    values = np.asarray(array[rows])
    return values.astype(object) if values.dtype.kind in "TUO" else values


def column_names(group: Group) -> list[str]:
    return [str(name) for name in group.attrs["column-order"]]


def read_frame(group: Group, start: int = 0, stop: int | None = None) -> pd.DataFrame:
    """All columns of rows start..stop."""
    index = pd.Index(_plain(group["_index"], slice(start, stop)), dtype=object)
    columns = {name: read_column(group, name, start, stop).array for name in column_names(group)}
    return pd.DataFrame(columns, index=index)


def as_text(column: pd.Series) -> pd.Series:
    """Text with None for missing values; 1, 1.0 and "1" are the same text."""

    def text(value: Any) -> Any:
        if isinstance(value, (float, np.floating)) and float(value).is_integer():
            return str(int(value))
        return str(value)

    if isinstance(column.dtype, pd.CategoricalDtype):
        names = np.array([text(value) for value in column.cat.categories] + [None], dtype=object)
        return pd.Series(
            names[column.cat.codes.to_numpy()], index=column.index, name=column.name, dtype=object
        )
    values = column.astype(object)
    return values.map(text, na_action="ignore").astype(object).where(values.notna(), None)


def safe_name(name: Any) -> str:
    """A column's name as that of a folder of the store: it can't leave it, nor hide another (R35)."""
    safe = "".join("|" if c in "/\\" else c if c.isprintable() else "_" for c in str(name))
    if safe.strip(".") == "" or safe in RESERVED:
        safe += "_"
    if len(safe.encode()) > MAX_NAME_BYTES:
        digest = hashlib.blake2b(safe.encode(), digest_size=4).hexdigest()
        safe = f"{safe.encode()[: MAX_NAME_BYTES - 9].decode(errors='ignore')}~{digest}"
    return safe


def obs_schema(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """column -> dtype and, for a categorical, its categories in the order of their codes."""
    schema: dict[str, dict[str, Any]] = {}
    for name in frame.columns:
        dtype = frame[name].dtype
        if isinstance(dtype, pd.CategoricalDtype):
            categories = [item.item() if isinstance(item, np.generic) else item for item in dtype.categories]
            schema[str(name)] = {"dtype": "category", "categories": categories}
        else:
            # object to pandas 2, str to pandas 3: the manifest has one word for it
            is_text = dtype == np.dtype(object) or isinstance(dtype, pd.StringDtype)
            schema[str(name)] = {"dtype": "string" if is_text else str(dtype)}
    return schema


def cast(column: pd.Series, schema: dict[str, Any]) -> pd.Series:
    """A part's column in the dtype of the whole: codes stay, since categories only grow; numbers widen."""
    dtype = schema["dtype"]
    if dtype == "category":
        whole = pd.Index(schema["categories"])
        if isinstance(column.dtype, pd.CategoricalDtype):
            if len(whole) >= len(column.cat.categories) and list(column.cat.categories) == list(
                whole[: len(column.cat.categories)]
            ):
                return pd.Series(pd.Categorical.from_codes(column.cat.codes, whole), name=column.name)
            return column.astype(pd.CategoricalDtype(whole))
        return pd.Series(pd.Categorical(as_text(column), categories=whole), name=column.name)
    if dtype == "string":
        return as_text(column)
    return column if str(column.dtype) == dtype else column.astype(dtype)


def missing(n: int, schema: dict[str, Any], name: str) -> pd.Series:
    """A column of n missing values."""
    dtype = schema["dtype"]
    if dtype == "category":
        return pd.Series(pd.Categorical.from_codes(np.full(n, -1), pd.Index(schema["categories"])), name=name)
    if dtype == "string":
        return pd.Series([None] * n, dtype=object, name=name)
    if dtype.startswith("float"):
        return pd.Series(np.full(n, np.nan, dtype=dtype), name=name)
    nullable = {"bool": "boolean"}.get(dtype, dtype[0].upper() + dtype[1:] if dtype[0] in "iu" else dtype)
    return pd.Series(pd.array([pd.NA] * n, dtype=nullable.replace("Uint", "UInt")), name=name)
