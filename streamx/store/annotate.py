"""Labels that come later: obs columns joined by cell name, without touching counts."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from streamx.errors import BadFileError, InputError, UsageError, warn
from streamx.store.cells import NAME, as_categorical_or_number
from streamx.store.collection import Collection
from streamx.store.draft import Draft, draft_frame
from streamx.store.frame import obs_schema
from streamx.store.journal import Journal
from streamx.store.location import Location, open_location
from streamx.store.manifest import ObjectTable, commit, describe

log = logging.getLogger("streamx")


def read_table(table: str | Path | pd.DataFrame) -> pd.DataFrame:
    """A csv or tsv file (cell names in the first column), or a data frame indexed by cell names.

    Raises
    ------
    BadFileError
        If it can't be read, or names a cell twice.
    """
    if isinstance(table, pd.DataFrame):
        frame, where = table, "table"
    else:
        where = str(table)
        separator = "," if ".csv" in Path(table).suffixes else "\t"
        try:
            frame = pd.read_csv(table, sep=separator, index_col=0, dtype={0: str})
        except (OSError, ValueError) as error:
            raise BadFileError(
                f"can't be read: {error}",
                where=where,
                fix="a csv or tsv file, cell names in the first column",
            ) from error
    frame = frame.set_axis(frame.index.astype(str), axis=0)
    if frame.index.has_duplicates:
        name = frame.index[frame.index.duplicated()][0]
        raise BadFileError(f"cell {name!r} occurs twice", where=where, fix="keep one row per cell")
    if not len(frame.columns):
        raise BadFileError(
            "no column besides the cell names", where=where, fix="add a column, or name the separator"
        )
    return frame


def join_by_name(
    table: pd.DataFrame, names: pd.Index, originals: pd.Series | None, where: str
) -> pd.DataFrame:
    """The table's rows in the order of the cells; cells that it doesn't name get NA.

    Cells are looked up by the store's names; if none is found, by those of their input files.

    Raises
    ------
    InputError
        If the table names none of the cells, or two cells by one original name.
    """
    if not names.isin(table.index).any() and originals is not None:
        original = pd.Index(originals.astype(str))
        shared = original.isin(table.index) & original.duplicated(keep=False)
        if shared.any():
            raise InputError(
                f"the cell name {original[shared][0]!r} occurs in several files",
                where=where,
                fix="use the store's own names (obs_names), which are unique",
            )
        names = original
    found = int(names.isin(table.index).sum())
    if not found:
        raise InputError(
            "names none of the cells",
            where=where,
            fix=f"the cells are called like {', '.join(map(str, names[:3]))}",
        )
    if found < len(table):
        warn(f"{len(table) - found} of its {len(table)} rows name no cell of the store", where=where)
    log.info("%d of %d cells found in %s", found, len(names), where)
    return table.reindex(names)


def annotate_store(place: str | Path | Location, table: str | Path | pd.DataFrame) -> dict[str, Any]:
    """Join the columns of a table to a store: its next generation, with no count touched.

    Parameters
    ----------
    place
        A store.
    table
        csv or tsv file with cell names in its first column, or a data frame indexed by them.

    Returns
    -------
    dict
        ``n_cells`` annotated, ``columns``, and the store's new ``generation``.

    Raises
    ------
    InputError
        If the table names none of the cells.
    """
    frame, where = read_table(table), "table" if isinstance(table, pd.DataFrame) else str(table)
    location = open_location(place)
    base = Collection(location)
    if base.kind == "view":
        raise UsageError("is a view, which never changes", where=str(location), fix="annotate its store")
    if base.batch_key in frame.columns:
        raise UsageError(
            f"{base.batch_key!r} names the batches; it can't change", where=where, fix="rename it"
        )
    originals = base.obs_column(NAME) if NAME in base.obs_columns else None
    joined = join_by_name(frame, base.obs_names, originals, where)
    columns = {str(name): as_categorical_or_number(joined[name]) for name in joined.columns}
    overlay = pd.DataFrame(columns, index=base.obs_names)
    state = base.manifest
    number = state.number + 1
    digest = hashlib.blake2b(frame.to_csv().encode(), digest_size=16).hexdigest()
    journal = Journal(location, {"annotate": digest})
    try:
        draft = Draft()
        draft_frame(draft, "", overlay)
        path = f"obs/{number:06d}.zarr"
        staged = type(location)(location.root, tmp=journal.tmp)
        objects: ObjectTable = {}
        for key, data in draft.take().items():
            staged.write(f"{path}/{key}", data)
            objects[f"{path}/{key}"] = describe(data)
        entry = {"path": path, "n_obs": base.n_obs, "columns": list(columns)}
        commit(
            staged,
            replace(
                state,
                number=number,
                obs_schema=state.obs_schema | obs_schema(overlay),
                overlays=(*state.overlays, entry),
                objects=state.objects | objects,
            ),
        )
        journal.remove()
    finally:
        journal.release()
    return {"n_cells": int(joined.notna().any(axis=1).sum()), "columns": list(columns), "generation": number}
