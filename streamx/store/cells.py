"""Cells of several files become one table: columns, dtypes, batches, names, and the order of rows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BatchError, UsageError

log = logging.getLogger("streamx")

FILE, FILE_ROW, NAME = "_streamx_file", "_streamx_file_row", "_streamx_name"
_PREFIX = "_streamx_"
# Text with more distinct values than this, and than a tenth of the cells, is kept as text.
MAX_CATEGORIES = 1000


def rename_columns(obs: pd.DataFrame, names: Mapping[str, str], where: str) -> pd.DataFrame:
    """A file's obs with its columns renamed; streamx's own columns of an earlier store are dropped.

    Raises
    ------
    UsageError
        If a column to rename does not exist, or two would have the same name.
    """
    absent = [name for name in names if name not in obs.columns]
    if absent:
        raise UsageError(
            f"--obs-map names the columns {absent}", where=where, fix=f"its columns are {list(obs.columns)}"
        )
    renamed = obs.rename(columns=dict(names))
    # "/" would make a column a folder of the store
    renamed.columns = pd.Index([str(name).replace("/", "|") for name in renamed.columns], dtype=object)
    if renamed.columns.has_duplicates:
        twice = sorted(set(renamed.columns[renamed.columns.duplicated()]))
        raise UsageError(
            f"several obs columns are named {twice}", where=where, fix="rename one with --obs-map"
        )
    return renamed[[name for name in renamed.columns if not name.startswith(_PREFIX) and name != "_index"]]


def add_batches(frames: dict[str, pd.DataFrame], batch_key: str | None, *, per_file: bool) -> str:
    """Give every file's obs its batch column, in place.

    Parameters
    ----------
    frames
        File key -> obs.
    batch_key
        An obs column, or several joined by commas (their values are joined by ``_``); None: ``batch``.
    per_file
        Each file is one batch; no column is asked.

    Returns
    -------
    str
        Name of the batch column.

    Raises
    ------
    BatchError
        If a file has no such column, or a cell no batch; lists columns that could name it.
    """
    if per_file:
        for key, obs in frames.items():
            if "batch" in obs.columns:
                log.info("%s: its column 'batch' is kept as 'batch_original'; batches are files", key)
                obs["batch_original"] = obs["batch"]
            obs["batch"] = key
        return "batch"
    columns = [name.strip() for name in (batch_key or "batch").split(",")]
    name = "_".join(columns)
    for key, obs in frames.items():
        absent = [column for column in columns if column not in obs.columns]
        if absent:
            raise BatchError(
                f"no obs column {', '.join(absent)} says which batch a cell is from",
                where=key,
                fix=f"--batch-key with one of: {_candidates(obs)}; or rename one with --obs-map",
            )
        values = [_as_text(obs[column]) for column in columns]
        missing = np.logical_or.reduce([value.isna().to_numpy() for value in values])
        if missing.any():
            cell = obs.index[int(np.argmax(missing))]
            raise BatchError(
                f"{int(missing.sum())} cells have no batch in {', '.join(columns)}, the first is {cell!r}",
                where=key,
                fix="name their batch, or leave these cells out",
            )
        obs[name] = values[0] if len(values) == 1 else values[0].str.cat(values[1:], sep="_")
    return name


def _candidates(obs: pd.DataFrame) -> str:
    """Columns with few distinct values, likeliest first."""
    few = [
        str(name) for name in obs.columns if obs[name].dtype.kind != "f" and 1 <= obs[name].nunique() <= 200
    ]
    likely = ("batch", "sample", "donor", "study", "library", "plate", "dataset")
    few.sort(key=lambda name: not any(word in name.lower() for word in likely))
    return ", ".join(few[:12]) or "none; add a column that names the batch"


def unite(
    frames: Sequence[pd.DataFrame], batch_key: str, schema: Mapping[str, dict[str, Any]] | None = None
) -> pd.DataFrame:
    """One table of all cells: the union of columns, missing values NA, one dtype per column.

    Integers with missing values become nullable; text becomes categorical, its categories sorted by name;
    columns whose dtypes conflict become text and are reported. With the `schema` of an existing store its
    categories come first, in their order, so that no code that was ever written changes.
    """
    schema = schema or {}
    names = list(dict.fromkeys([*schema, *(name for frame in frames for name in frame.columns)]))
    index = pd.Index(np.concatenate([frame.index.to_numpy(dtype=object) for frame in frames]), dtype=object)
    columns = {}
    for name in names:
        if not name.startswith(_PREFIX):
            columns[name] = _unite_column(name, frames, schema.get(name), always=name == batch_key)
    return pd.DataFrame(columns, index=index)


def _unite_column(
    name: str, frames: Sequence[pd.DataFrame], before: dict[str, Any] | None, *, always: bool
) -> Any:
    pieces = [frame[name] if name in frame.columns else None for frame in frames]
    kinds = {_kind(piece) for piece in pieces if piece is not None} - {"none"}
    if before:
        kinds.add(_schema_kind(before))
    if len(kinds) > 1 and kinds != {"int", "float"}:
        log.warning(
            "obs column %r holds %s in different files: kept as text", name, " and ".join(sorted(kinds))
        )
        kinds = {"text"}
    kind = "float" if kinds == {"int", "float"} else next(iter(kinds), "text")
    lengths = [len(frame) for frame in frames]
    if kind == "text":
        texts = [
            _as_text(piece).to_numpy() if piece is not None else np.full(n, None, dtype=object)
            for piece, n in zip(pieces, lengths, strict=True)
        ]
        return _categorical(np.concatenate(texts), before, always)
    dtype: Any = {"int": "Int64", "float": "float64", "bool": "boolean"}[kind]
    parts = [
        (piece.astype(dtype) if _kind(piece) != "none" else pd.Series([pd.NA] * n)).astype(dtype)
        if piece is not None
        else pd.Series(pd.array([np.nan if kind == "float" else pd.NA] * n, dtype=dtype))
        for piece, n in zip(pieces, lengths, strict=True)
    ]
    column = pd.concat(parts, ignore_index=True)
    was_nullable = before is not None and before["dtype"] in ("Int64", "boolean")
    if kind != "float" and not was_nullable and not column.isna().any():
        column = column.astype({"int": "int64", "bool": "bool"}[kind])
    return column.array


def _kind(column: pd.Series) -> str:
    if column.isna().all():
        return "none"
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return "text"
    if dtype.kind == "b":
        return "bool"
    if dtype.kind in "iu":
        return "int"
    return "float" if dtype.kind == "f" else "text"


def _schema_kind(schema: dict[str, Any]) -> str:
    dtype = schema["dtype"].lower()
    return {"i": "int", "u": "int", "f": "float", "b": "bool"}.get(dtype[0], "text")


def _as_text(column: pd.Series) -> pd.Series:
    """Text with None for missing values; 1, 1.0 and "1" are the same text."""

    def text(value: Any) -> Any:
        if isinstance(value, (float, np.floating)) and float(value).is_integer():
            return str(int(value))
        return str(value)

    if isinstance(column.dtype, pd.CategoricalDtype):
        names = np.array([text(value) for value in column.cat.categories] + [None], dtype=object)
        return pd.Series(names[column.cat.codes.to_numpy()], index=column.index, dtype=object)
    values = column.astype(object)
    return values.map(text, na_action="ignore").where(values.notna(), None)


def _categorical(values: np.ndarray, before: dict[str, Any] | None, always: bool) -> Any:
    codes, found = pd.factorize(values, use_na_sentinel=True)
    if before:
        text = before["dtype"] == "string"
    else:
        text = len(found) > MAX_CATEGORIES and len(found) * 10 > len(values) and not always
    if text:
        return pd.Series(values, dtype=object).where(codes >= 0, "").array
    known = [str(name) for name in (before or {}).get("categories", [])]
    categories = known + sorted(set(found) - set(known))
    return pd.Categorical(values, categories=categories)


def as_categorical_or_number(column: pd.Series) -> Any:
    """A single column in the dtype that :func:`unite` would give it."""
    return _unite_column(str(column.name), [column.rename(str(column.name)).to_frame()], None, always=False)


def unique_names(frames: dict[str, pd.DataFrame], taken: pd.Index | None = None) -> np.ndarray:
    """Cell names that occur once: one that several cells share gets its file's key, and a number if needed.

    Parameters
    ----------
    frames
        File key -> obs, indexed by the original names.
    taken
        Names of cells that are in the store already; those stay as they are.
    """
    names = pd.Index(
        np.concatenate([obs.index.to_numpy(dtype=object) for obs in frames.values()]), dtype=object
    )
    keys = np.repeat(np.array(list(frames), dtype=object), [len(obs) for obs in frames.values()])
    shared = names.duplicated(keep=False)
    if taken is not None:
        shared |= names.isin(taken)
    result = names.to_numpy(dtype=object).copy()
    result[shared] = names[shared].to_numpy(dtype=object) + "-" + keys[shared]
    while True:
        again = pd.Index(result)
        clash = again.duplicated(keep="first")
        if taken is not None:
            clash |= again.isin(taken)
        if not clash.any():
            return result
        number = pd.Series(result[clash]).groupby(result[clash]).cumcount().to_numpy() + 1
        result[clash] = [f"{name}-{i}" for name, i in zip(result[clash], number, strict=True)]


def row_order(
    batch_codes: np.ndarray,
    digests: Sequence[int],
    checksums: Sequence[str],
    lengths: Sequence[int],
    seed: int,
) -> np.ndarray:
    """Destination of every row, int64: batches in the order of their codes, rows shuffled inside each.

    The key of a row mixes the seed, a digest of its file's cell and gene names, and its number in the file,
    so that neither the order of files, nor their format, nor their names decide anything.
    """
    rows = np.concatenate([np.arange(n, dtype=np.uint64) for n in lengths])
    salt = np.repeat(np.array(digests, dtype=np.uint64), lengths)
    key = _mix(_mix(rows + _mix(salt)) + np.uint64(seed))
    rank = np.argsort(np.argsort(checksums, kind="stable"), kind="stable")
    order = np.lexsort((rows, np.repeat(rank, lengths), key, batch_codes))
    destination = np.empty(len(order), dtype=np.int64)
    destination[order] = np.arange(len(order))
    return destination


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele 2014): every input bit changes half of the output bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def names_digest(obs_names: np.ndarray, var_names: np.ndarray) -> int:
    """64 bits that stand for a file's cell and gene names."""
    digest = hashlib.blake2b(digest_size=8)
    for names in (obs_names, var_names):
        digest.update("\0".join(str(name) for name in names).encode())
        digest.update(b"\1")
    return int.from_bytes(digest.digest(), "little")
