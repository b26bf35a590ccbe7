"""Cells of several files become one table: columns, dtypes, batches, names, and the order of rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BatchError, UsageError
from streamx.store.frame import as_text, safe_name
from streamx.store.obs import Piece, plain, to_pandas
from streamx.store.text import text_of

log = logging.getLogger("streamx")

FILE, FILE_ROW, NAME = "_streamx_file", "_streamx_file_row", "_streamx_name"
_PREFIX = "_streamx_"
# Text with more distinct values than this, and than a tenth of the cells, is kept as text.
MAX_CATEGORIES = 1000
MOST_CATEGORIES = 1 << 16  # of any column but the batch: they lie in the manifest


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


def add_batch(
    obs: pd.DataFrame, key: str, batch_key: str | None, *, per_file: bool, name_of: Callable[[int], str]
) -> str:
    """Give consecutive cells of a file their batch column, in place.

    Parameters
    ----------
    obs, key
        Cells of one file, indexed by their row in it, and the file's key.
    batch_key
        An obs column, or several joined by commas (their values are joined by ``_``); None: ``batch``.
    per_file
        Each file is one batch; no column is asked.
    name_of
        Row of the file -> the cell's name.

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
        whole = pd.Categorical.from_codes(np.zeros(len(obs), np.int8), [key])
        _set_batch(obs, key, "batch", pd.Series(whole, index=obs.index))
        return "batch"
    columns = [safe_name(name.strip()) for name in (batch_key or "batch").split(",")]
    absent = [column for column in columns if column not in obs.columns]
    if absent:
        raise BatchError(
            f"no obs column {', '.join(absent)} says which batch a cell is from",
            where=key,
            fix=f"--batch-key with one of: {_candidates(obs)}; or {FILE}, if each file is one batch; or "
            "rename one with --obs-map",
        )
    if len(columns) == 1 and isinstance(obs[columns[0]].dtype, pd.CategoricalDtype):
        values = [obs[columns[0]]]
    else:
        values = [as_text(obs[column]) for column in columns]
    missing = np.logical_or.reduce([value.isna().to_numpy() for value in values])
    if missing.any():
        cell = name_of(int(obs.index[int(np.argmax(missing))]))
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
        if not len(obs) or obs.index[0] == 0:  # once per file
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


Pieces = Callable[[], Iterator[pd.DataFrame]]  # a table, read by pieces of rows


@dataclass
class Seen:
    """What a column of one file holds: kinds of values, whether some are missing, texts (None: too many)."""

    kinds: set[str] = field(default_factory=set)
    missing: bool = False
    texts: set[str] | None = field(default_factory=set)

    def look(self, column: pd.Series, limit: int, kind: str | None = None) -> None:
        kind = kind or _kind(column)
        self.missing |= kind == "none" or bool(column.isna().any())
        if kind == "none":
            return
        self.kinds.add(kind)
        if kind == "text" and self.texts is not None:
            if isinstance(column.dtype, pd.CategoricalDtype):
                column = pd.Series(column.cat.categories[np.unique(column.cat.codes[column.notna()])])
            self.texts |= set(as_text(pd.Series(column.dropna().unique())))
            if len(self.texts) > limit:
                self.texts = None


def plan_columns(
    files: Sequence[Pieces],
    lengths: Sequence[int],
    batch_key: str,
    schema: Mapping[str, dict[str, Any]] | None = None,
    stored: Callable[[str], pd.Series] | None = None,
) -> tuple[dict[str, dict[str, Any]], list[set[str]]]:
    """dtype and categories of every column of the cells of all files, as in the manifest.

    The union of columns. Integers with missing values become nullable; text becomes categorical, its
    categories sorted by name; columns whose dtypes conflict become text and are reported. With the `schema`
    of an existing store its categories come first, in their order, so that no code that was ever written
    changes; `stored` reads one of its columns, whose values become categories where its numbers now have to
    be text.

    Returns
    -------
    schema, batches
        Of the columns; and the batches of each file.
    """
    schema, n = schema or {}, sum(lengths)
    limit = min(max(MAX_CATEGORIES, n // 10), MOST_CATEGORIES)
    seen: list[dict[str, Seen]] = []
    for pieces in files:
        mine: dict[str, Seen] = {}
        for frame in pieces():
            for name in frame.columns:
                most = n if name == batch_key else limit
                mine.setdefault(name, Seen()).look(frame[name], most, "text" if name == batch_key else None)
        seen.append(mine)
    names = list(dict.fromkeys([*schema, *(name for mine in seen for name in mine)]))

    def texts(name: str) -> Seen:
        """All values of a column as texts, numbers among them."""
        found = Seen()
        for pieces in files:
            for frame in pieces():
                if name in frame.columns:
                    found.look(as_text(frame[name]), limit)
        return found

    plan = {}
    for name in names:
        if not name.startswith(_PREFIX):
            columns = [mine.get(name) for mine in seen]
            plan[name] = _decide(name, columns, n, schema, stored, texts, always=name == batch_key)
    return plan, [(mine[batch_key].texts or set()) if batch_key in mine else set() for mine in seen]


def _decide(
    name: str,
    seen: Sequence[Seen | None],
    n: int,
    schema: Mapping[str, dict[str, Any]],
    stored: Callable[[str], pd.Series] | None,
    texts: Callable[[str], Seen],
    *,
    always: bool,
) -> dict[str, Any]:
    before = schema.get(name)
    kinds = {kind for column in seen if column is not None for kind in column.kinds}
    if before:
        kinds.add(_schema_kind(before))
    if len(kinds) > 1 and kinds != {"int", "float"}:
        log.warning(
            "obs column %r holds %s in different files: kept as text", name, " and ".join(sorted(kinds))
        )
        seen = [texts(name)]
        kinds = {"text"}
    kind = "float" if kinds == {"int", "float"} else next(iter(kinds), "text")
    if kind == "text":
        if before and _schema_kind(before) != "text" and stored is not None:
            before = {"dtype": "category", "categories": sorted(set(as_text(stored(name)).dropna()))}
        return _text_schema([column for column in seen if column is not None], n, before, always)
    if kind == "float":
        return {"dtype": "float64"}
    # cells that are in the store already may lack it
    nullable = schema and (before is None or before["dtype"] in ("Int64", "boolean"))
    nullable = nullable or any(column is None or column.missing for column in seen)
    dtypes = {"int": ("int64", "Int64"), "bool": ("bool", "boolean")}[kind]
    return {"dtype": dtypes[bool(nullable)]}


def _text_schema(seen: Sequence[Seen], n: int, before: dict[str, Any] | None, always: bool) -> dict[str, Any]:
    known = [str(name) for name in (before or {}).get("categories", [])]
    if (before or {}).get("dtype") == "string":
        return {"dtype": "string"}
    found: set[str] = set()
    for column in seen:
        if column.texts is None:
            return {"dtype": "string"}
        found |= column.texts
    new = sorted(found - set(known))
    total = len(known) + len(new)
    if not always and total > MAX_CATEGORIES and (len(new) * 10 > n or total > MOST_CATEGORIES):
        return {"dtype": "string"}
    return {"dtype": "category", "categories": [*known, *new]}


def caster(schema: Mapping[str, Any]) -> Callable[[pd.Series | None, int], Piece]:
    """What brings n values of a column (None: the file lacks it) into the form of its schema."""
    dtype = schema["dtype"]
    if dtype == "category":
        categories = pd.Index(schema["categories"], dtype=object)
        codes_of = np.dtype(
            np.int8 if len(categories) < 128 else np.int16 if len(categories) < 32768 else np.int32
        )

        def codes(column: pd.Series | None, n: int) -> Piece:
            if column is None:
                return np.full(n, -1, codes_of), None
            if isinstance(column.dtype, pd.CategoricalDtype):
                place = categories.get_indexer(as_text(pd.Series(column.cat.categories)))
                return np.append(place, -1)[column.cat.codes.to_numpy()].astype(codes_of), None
            return categories.get_indexer(as_text(column)).astype(codes_of), None

        return codes
    if dtype == "string":

        def texts(column: pd.Series | None, n: int) -> Piece:
            if column is None:
                return text_of([""] * n), np.ones(n, bool)
            values = as_text(column)
            missing = values.isna().to_numpy()
            text = text_of(values.where(~missing, "").to_numpy())
            return text, missing if missing.any() else None

        return texts
    if dtype == "float64":
        return lambda column, n: (
            np.full(n, np.nan) if column is None or _kind(column) == "none" else _as_float(column),
            None,
        )
    nullable = {"int64": "Int64", "bool": "boolean"}.get(dtype, dtype)

    def numbers(column: pd.Series | None, n: int) -> Piece:
        if column is None or _kind(column) == "none":
            column = pd.Series(pd.array([pd.NA], dtype=nullable)).repeat(n)
        values, missing = plain(column.astype(nullable))
        return values, missing if dtype == nullable else None

    return numbers


def _as_float(column: pd.Series) -> np.ndarray:
    return column.astype("Float64" if hasattr(column.dtype, "numpy_dtype") else "float64").to_numpy(
        dtype=np.float64, na_value=np.nan
    )


def unite(
    frames: Sequence[pd.DataFrame],
    batch_key: str,
    schema: Mapping[str, dict[str, Any]] | None = None,
    stored: Callable[[str], pd.Series] | None = None,
) -> pd.DataFrame:
    """One table of all cells, in memory: see :func:`plan_columns`."""
    files = [lambda frame=frame: iter([frame]) for frame in frames]
    lengths = [len(frame) for frame in frames]
    plan, _ = plan_columns(files, lengths, batch_key, schema, stored)
    index = pd.Index(np.concatenate([frame.index.to_numpy(dtype=object) for frame in frames]), dtype=object)
    columns = {}
    for name, about in plan.items():
        cast = caster(about)
        parts = [
            cast(f[name] if name in f.columns else None, n) for f, n in zip(frames, lengths, strict=True)
        ]
        columns[name] = pd.concat([to_pandas(part, about) for part in parts], ignore_index=True).array
    return pd.DataFrame(columns, index=index)


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


def as_categorical_or_number(column: pd.Series) -> Any:
    """A single column in the dtype that :func:`unite` would give it."""
    name = str(column.name)
    return unite([column.rename(name).to_frame()], "")[name].array
