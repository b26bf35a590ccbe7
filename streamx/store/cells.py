"""Cells of several files become one table: columns, dtypes, batches, names, and the order of rows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BatchError, UsageError
from streamx.store.frame import as_text, safe_name

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
    kept = [name for name in obs.columns if not str(name).startswith(_PREFIX)]
    renamed = obs[kept].rename(columns=dict(names))
    renamed.columns = pd.Index([safe_name(name) for name in renamed.columns], dtype=object)
    if renamed.columns.has_duplicates:
        twice = sorted(set(renamed.columns[renamed.columns.duplicated()]))
        raise UsageError(
            f"several obs columns are named {twice}", where=where, fix="rename one with --obs-map"
        )
    return renamed


def add_batch(obs: pd.DataFrame, key: str, batch_key: str | None, *, per_file: bool) -> str:
    """Give a file's obs its batch column, in place.

    Parameters
    ----------
    obs, key
        Cells of one file, and its key.
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
        If the file has no such column, or a cell no batch; lists columns that could name it.
    """
    if per_file:
        _set_batch(obs, key, "batch", pd.Series(key, index=obs.index, dtype=object))
        return "batch"
    columns = [safe_name(name.strip()) for name in (batch_key or "batch").split(",")]
    absent = [column for column in columns if column not in obs.columns]
    if absent:
        raise BatchError(
            f"no obs column {', '.join(absent)} says which batch a cell is from",
            where=key,
            fix=f"--batch-key with one of: {_candidates(obs)}; or rename one with --obs-map",
        )
    values = [as_text(obs[column]) for column in columns]
    missing = np.logical_or.reduce([value.isna().to_numpy() for value in values])
    if missing.any():
        cell = obs.index[int(np.argmax(missing))]
        raise BatchError(
            f"{int(missing.sum())} cells have no batch in {', '.join(columns)}, the first is {cell!r}",
            where=key,
            fix="name their batch, or leave these cells out",
        )
    if len(columns) == 1:
        obs[columns[0]] = values[0]
        return columns[0]
    _set_batch(obs, key, "_".join(columns), values[0].str.cat([v.to_numpy() for v in values[1:]], sep="_"))
    return "_".join(columns)


def _set_batch(obs: pd.DataFrame, key: str, name: str, values: pd.Series) -> None:
    """Set the batch column; a column that has its name already is kept under another."""
    if name in obs.columns:
        kept = f"{name}_original"
        while kept in obs.columns:
            kept += "_"
        log.warning("%s: its column %r is kept as %r; %r names the batches", key, name, kept, name)
        obs[kept] = obs[name]
    obs[name] = values


def _candidates(obs: pd.DataFrame) -> str:
    """Columns with few distinct values, likeliest first."""
    few = [
        str(name) for name in obs.columns if obs[name].dtype.kind != "f" and 1 <= obs[name].nunique() <= 200
    ]
    likely = ("batch", "sample", "donor", "study", "library", "plate", "dataset")
    few.sort(key=lambda name: not any(word in name.lower() for word in likely))
    return ", ".join(few[:12]) or "none; add a column that names the batch"


def unite(
    frames: Sequence[pd.DataFrame],
    batch_key: str,
    schema: Mapping[str, dict[str, Any]] | None = None,
    stored: Callable[[str], pd.Series] | None = None,
) -> pd.DataFrame:
    """One table of all cells: the union of columns, missing values NA, one dtype per column.

    Integers with missing values become nullable; text becomes categorical, its categories sorted by name;
    columns whose dtypes conflict become text and are reported. With the `schema` of an existing store its
    categories come first, in their order, so that no code that was ever written changes; `stored` reads one
    of its columns, whose values become categories where its numbers now have to be text.
    """
    schema = schema or {}
    names = list(dict.fromkeys([*schema, *(name for frame in frames for name in frame.columns)]))
    index = pd.Index(np.concatenate([frame.index.to_numpy(dtype=object) for frame in frames]), dtype=object)
    columns = {}
    for name in names:
        if not name.startswith(_PREFIX):
            columns[name] = _unite_column(name, frames, schema, stored, always=name == batch_key)
    return pd.DataFrame(columns, index=index)


def _unite_column(
    name: str,
    frames: Sequence[pd.DataFrame],
    schema: Mapping[str, dict[str, Any]],
    stored: Callable[[str], pd.Series] | None,
    *,
    always: bool,
) -> Any:
    before = schema.get(name)
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
            as_text(piece).to_numpy() if piece is not None else np.full(n, None, dtype=object)
            for piece, n in zip(pieces, lengths, strict=True)
        ]
        if before and _schema_kind(before) != "text" and stored is not None:
            before = {"dtype": "category", "categories": sorted(set(as_text(stored(name)).dropna()))}
        return _categorical(np.concatenate(texts), before, always)
    dtype: Any = {"int": "Int64", "float": "float64", "bool": "boolean"}[kind]
    missing = np.nan if kind == "float" else pd.NA
    parts = [
        piece.astype(dtype)
        if piece is not None and _kind(piece) != "none"
        else pd.Series(pd.array([missing], dtype=dtype)).repeat(n)
        for piece, n in zip(pieces, lengths, strict=True)
    ]
    column = pd.concat(parts, ignore_index=True)
    # cells that are in the store already may lack it
    nullable = schema and (before is None or before["dtype"] in ("Int64", "boolean"))
    if kind != "float" and not nullable and not column.isna().any():
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
        return "int" if dtype.kind == "i" or column.max() <= np.iinfo(np.int64).max else "text"
    return "float" if dtype.kind == "f" else "text"


def _schema_kind(schema: dict[str, Any]) -> str:
    dtype = schema["dtype"].lower()
    return {"i": "int", "u": "int", "f": "float", "b": "bool"}.get(dtype[0], "text")


def _categorical(values: np.ndarray, before: dict[str, Any] | None, always: bool) -> Any:
    codes, found = pd.factorize(values, use_na_sentinel=True)
    known = [str(name) for name in (before or {}).get("categories", [])]
    new = sorted(set(found) - set(known))
    many = len(known) + len(new) > MAX_CATEGORIES and len(new) * 10 > len(values) and not always
    if many or (before or {}).get("dtype") == "string":
        return pd.Series(values, dtype=object).where(codes >= 0, None).array
    return pd.Categorical(values, categories=[*known, *new])


def as_categorical_or_number(column: pd.Series) -> Any:
    """A single column in the dtype that :func:`unite` would give it."""
    return _unite_column(
        str(column.name), [column.rename(str(column.name)).to_frame()], {}, None, always=False
    )


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
    key = _mix(_mix(rows + _mix(salt)) + np.uint64(seed % 2**64))
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
