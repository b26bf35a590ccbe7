"""Labels that come later: obs columns joined by cell name, without touching counts."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

from streamx.errors import BadFileError, InputError, UsageError, warn
from streamx.store.amend import amend
from streamx.store.cells import NAME, as_categorical_or_number, rename_columns
from streamx.store.collection import Collection
from streamx.store.draft import Draft, draft_frame
from streamx.store.frame import column_names, obs_schema, read_column
from streamx.store.journal import Journal
from streamx.store.latents import latent_names
from streamx.store.location import Location, describe, each, local_folder, open_location
from streamx.store.manifest import MARKER, commit, read_generation, run_tag

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
        where = str(local_folder(table))
        separator = "," if ".csv" in Path(table).suffixes else "\t"
        try:
            frame = _read_text(table, separator)
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


def _read_text(table: str | Path, separator: str) -> pd.DataFrame:
    """The file, its first column as text: ``index_col`` would take the names 007 and NA for 7 and nothing."""
    head = pd.read_csv(table, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
    frame = pd.read_csv(table, sep=separator, header=None, skiprows=1, converters={0: str}).set_index(0)
    names = head.iloc[0].tolist()
    names = names[len(names) - len(frame.columns) :]  # R leaves out the name of the names
    if len(names) != len(frame.columns):
        raise ValueError(f"{len(names)} names for {len(frame.columns)} columns")
    return frame.set_axis(pd.Index(names, dtype=object), axis=1)


def join_by_name(
    table: pd.DataFrame, names: pd.Index, originals: pd.Series | None, where: str
) -> pd.DataFrame:
    """The table's rows in the order of the cells; cells that it doesn't name get NA.

    Cells are looked up by the store's names, or by those of their input files where these find more.

    Raises
    ------
    InputError
        If the table names none of the cells, or two cells by one original name.
    """
    original = pd.Index(originals.astype(str)) if originals is not None else names
    if table.index.isin(original).sum() > table.index.isin(names).sum():
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
    nullable = {"i": "Int64", "u": "Int64", "b": "boolean"}  # else a missing cell makes floats of integers
    dtypes = {name: nullable[dtype.kind] for name, dtype in table.dtypes.items() if dtype.kind in nullable}
    return table.astype(dtypes).reindex(names)


def annotate(place: str | Path | Location, table: str | Path | pd.DataFrame) -> dict[str, Any]:
    """Join the columns of a table to cells by name: of a store, of mapped queries, or of a model's reference.

    Parameters
    ----------
    place
        A store (see :func:`annotate_store`), or a folder that ``project`` or ``train`` wrote, whose
        ``*.zarr`` get the columns.
    table
        csv or tsv file with cell names in its first column, or a data frame indexed by them.

    Returns
    -------
    dict
        ``n_cells`` that the table names, and ``columns``; of a store also its new ``generation``.

    Raises
    ------
    InputError
        If the table names none of the cells.
    """
    location = open_location(place)
    names = [] if location.exists(MARKER) else latent_names(location)
    if not names:
        return annotate_store(location, table)
    return _annotate_latents([location.below(name) for name in names], table)


def _annotate_latents(files: list[Location], table: str | Path | pd.DataFrame) -> dict[str, Any]:
    """Columns for cells with latents; one table may name cells of all files."""
    frame, where = read_table(table), "table" if isinstance(table, pd.DataFrame) else str(table)
    frame = rename_columns(frame, {}, where)
    groups: list[Any] = [
        zarr.open_group(file.zarr(""), mode="r", zarr_format=3, use_consolidated=False)["obs"]
        for file in files
    ]
    for name in sorted(set(frame.columns) & {column for group in groups for column in column_names(group)}):
        warn(f"obs column {name!r} is replaced, also where the table is silent", where=where)
    names = [np.asarray(group[group.attrs["_index"]][:]).astype(object) for group in groups]
    originals = [
        read_column(group, NAME).to_numpy(dtype=object) if NAME in column_names(group) else own
        for group, own in zip(groups, names, strict=True)
    ]
    everyone = pd.Index(np.concatenate(names))
    joined = join_by_name(frame, everyone, pd.Series(np.concatenate(originals)), where)
    columns = {str(name): as_categorical_or_number(joined[name]) for name in joined.columns}
    start = 0
    for file, own in zip(files, names, strict=True):
        rows = slice(start, start + len(own))
        amend(file, {name: pd.Series(column).iloc[rows] for name, column in columns.items()})
        start += len(own)
    return {"n_cells": int(joined.notna().any(axis=1).sum()), "columns": list(columns)}


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
    frame = rename_columns(frame, {}, where)
    digest = hashlib.blake2b(frame.to_csv().encode(), digest_size=16).hexdigest()
    location = open_location(place)
    read_generation(location)  # nothing is made beside a store that isn't there
    with Journal(location) as journal:
        base = Collection(location)
        done = any(o["digest"] == digest and o["n_obs"] == base.n_obs for o in base.manifest.overlays[-1:])
        joined = _joined(base, frame, where, again=done)
        columns = {str(name): as_categorical_or_number(joined[name]) for name in joined.columns}
        journal.forget_finished()
        if not done:
            journal.begin({"annotate": digest})
            _commit_overlay(base, journal, pd.DataFrame(columns, index=base.obs_names), digest)
            journal.remove()
        number = base.generation + (not done)
    return {"n_cells": int(joined.notna().any(axis=1).sum()), "columns": list(columns), "generation": number}


def _joined(base: Collection, frame: pd.DataFrame, where: str, *, again: bool) -> pd.DataFrame:
    """The table in the order of the store's cells, if the store may take it."""
    if base.kind == "view":
        raise UsageError("is a view, which never changes", where=str(base.path), fix="annotate its store")
    if not len(frame.columns):
        raise BadFileError(
            "no column that may be joined", where=where, fix="names that begin with _streamx_ are reserved"
        )
    if base.batch_key in frame.columns:
        raise UsageError(
            f"{base.batch_key!r} names the batches; it can't change", where=where, fix="rename it"
        )
    for name in [] if again else [name for name in frame.columns if name in base.obs_columns]:
        warn(f"obs column {name!r} is replaced, also where the table is silent", where=where)
    originals = base.obs_column(NAME) if NAME in base.obs_columns else None
    return join_by_name(frame, base.obs_names, originals, where)


def _commit_overlay(base: Collection, journal: Journal, overlay: pd.DataFrame, digest: str) -> None:
    state = base.manifest
    number = state.number + 1
    draft = Draft()
    draft_frame(draft, "", overlay)
    tag = run_tag(base.location, {"annotate": digest}, state)
    path = f"obs/{number:06d}{tag}.zarr"
    staged = base.location.staged(journal.tmp)
    written = {f"{path}/{key}": data for key, data in draft.take().items()}
    staged.write_all(each(written))
    objects = state.objects | {key: describe(data) for key, data in written.items()}
    entry = {"path": path, "n_obs": base.n_obs, "columns": list(overlay.columns), "digest": digest}
    after = replace(
        state,
        number=number,
        obs_schema=state.obs_schema | obs_schema(overlay),
        overlays=(*state.overlays, entry),
        objects=objects,
        tag=tag,
    )
    commit(staged, after, state)
