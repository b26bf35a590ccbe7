"""The view: which rows and columns of the store it takes, in which order, and all it says about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from streamx.errors import BadFileError, UsageError
from streamx.memory import steady_memory
from streamx.preprocess.features import Selection
from streamx.preprocess.kernels import pick_columns
from streamx.preprocess.recipe import Recipe
from streamx.preprocess.rows import StoreRows, rows_of
from streamx.store.collection import Collection
from streamx.store.columns import gathered, lay_collection
from streamx.store.journal import Journal
from streamx.store.location import Location, follow, relative
from streamx.store.needs import Needs, Sample
from streamx.store.obs import Obs, Piece
from streamx.store.order import row_order
from streamx.store.pack import Content, start, write_part
from streamx.store.scratch import new_array, pieces
from streamx.store.spill import Slab

TOTAL, ROW = "_streamx_total", "_streamx_row"
BYTES_PER_VALUE = 40  # of a slab while it is read, cut and sorted
MAX_SLAB_ROWS = 1 << 13


@dataclass(frozen=True)
class Layout:
    """Rows of the store in the order of the view; arrays over cells lie in files.

    Attributes
    ----------
    stored_n
        Rows of the store that the view takes, ascending, int64.
    place_n
        Row of the view of each of them, int64.
    row_n
        Store row of each row of the view, int64.
    size_b
        Rows of each batch of the view, in order.
    batches
        The view's batches: sorted by name; those of an update come after the ones there were.
    from_store
        Position of each batch of the store in `batches`; -1 for none.
    first
        Store row that the part of the store begins with which is laid out.
    """

    stored_n: np.ndarray
    place_n: np.ndarray
    row_n: np.ndarray
    size_b: np.ndarray
    batches: list[str]
    from_store: np.ndarray
    first: int


def lay_out(
    kept_n: np.ndarray, code_n: np.ndarray, store_batches: Sequence[str], *, folder: Path, first: int = 0,
    known: Sequence[str] = (), shuffled: bool = True,
) -> Layout:  # fmt: skip
    """Order the kept rows by batch.

    Parameters
    ----------
    kept_n, code_n
        Rows that stay, and their batch in the store; from store row `first` on.
    store_batches
        The store's batches.
    folder
        For arrays over cells.
    known
        Batches that the view has already, in their order.
    shuffled
        Whether the store's rows are in random order inside each batch already, as they are in a single
        part. Rows of several parts are shuffled anew, seeded by their number alone.
    """
    in_store_b = np.zeros(len(store_batches), np.int64)
    for low, high in pieces(len(kept_n)):
        mine = code_n[low:high][kept_n[low:high]]
        in_store_b += np.bincount(mine, minlength=len(store_batches))
    present = sorted(store_batches[code] for code in np.flatnonzero(in_store_b).tolist())
    batches = [*known, *(name for name in present if name not in set(known))]
    position = {name: k for k, name in enumerate(batches)}
    from_store = np.array([position.get(name, -1) for name in store_batches], dtype=np.int64)
    size_b = np.zeros(len(batches), np.int64)
    size_b[from_store[from_store >= 0]] = in_store_b[from_store >= 0]
    n = int(size_b.sum())
    stored_n, mine_n = new_array(folder / "stored", n, np.int64), new_array(folder / "mine", n, np.int32)
    at = 0
    for low, high in pieces(len(kept_n)):
        rows = np.flatnonzero(kept_n[low:high]) + low
        stored_n[at : at + len(rows)] = rows + first
        mine_n[at : at + len(rows)] = from_store[code_n[rows]]
        at += len(rows)
    if shuffled:
        place_n = _places(mine_n, size_b, folder / "places")
    else:
        _, place_n = row_order(mine_n, [n], [""], [n], 0, folder)
    row_n = new_array(folder / "of-view", n, np.int64)
    for low, high in pieces(n):
        row_n[place_n[low:high]] = stored_n[low:high]
    return Layout(stored_n, place_n, row_n, size_b, batches, from_store, first)


def _places(mine_n: np.ndarray, size_b: np.ndarray, path: Path) -> np.ndarray:
    """Place of each row among all, by batch and, within, in the order there is."""
    place_n = new_array(path, len(mine_n), np.int64)
    cursor = np.cumsum(size_b) - size_b
    for low, high in pieces(len(mine_n)):
        code = np.asarray(mine_n[low:high])
        order = np.argsort(code, kind="stable")
        sorted_codes = code[order]
        within = np.arange(len(code)) - np.searchsorted(sorted_codes, sorted_codes)
        place_n[low + order] = cursor[sorted_codes] + within
        cursor += np.bincount(code, minlength=len(cursor))
    return place_n


def view_obs(store: Collection, layout: Layout, total_n: np.ndarray, folder: Path) -> Obs:
    """obs of the view: every column of the store, and each cell's total and store row.

    Parameters
    ----------
    total_n
        Totals of the store's rows from the layout's first on.
    folder
        Where the store's columns are laid down to be gathered in the view's order.
    """
    first = layout.first
    kept = [name for name in store.obs_columns if name != store.batch_key]
    names, laid = lay_collection(store, kept, folder, first)
    order = layout.row_n
    if first:
        order = new_array(folder / "order", len(layout.row_n), np.int64)
        for low, high in pieces(len(order)):
            order[low:high] = layout.row_n[low:high] - first
    schema = {name: store.manifest.obs_schema[name] for name in store.obs_columns}
    schema |= {TOTAL: {"dtype": "float64"}, ROW: {"dtype": "int64"}}
    columns: dict[str, Any] = laid | {TOTAL: total_n.__getitem__, ROW: lambda rows: rows + first}
    if store.batch_key is not None:
        schema[store.batch_key] = {"dtype": "category", "categories": layout.batches}
        columns[store.batch_key] = columns[ROW]  # another reader takes its place below: rows lie by batch
    view = gathered(order, names, columns, schema)
    if store.batch_key is None:
        return view
    ends = np.cumsum(layout.size_b)
    dtype = pd.Categorical.from_codes([], pd.Index(layout.batches)).codes.dtype

    def batch(start: int, stop: int) -> Piece:
        return np.searchsorted(ends, np.arange(start, stop), side="right").astype(dtype), None

    return replace(view, columns={**view.columns, store.batch_key: batch})


def view_var(store: Collection, selection: Selection, obsm: str | None) -> pd.DataFrame:
    """var of the view: the store's columns (missing for a feature that it lacks), then the table's."""
    if obsm is not None:
        return selection.table
    var = store.var[[name for name in store.var.columns if name not in selection.table.columns]]
    if (selection.chosen < 0).any():  # a feature without a value needs a dtype that has one for it
        nullable = {"b": "boolean", "i": "Int64", "u": "Int64"}
        var = var.astype({name: nullable.get(var[name].dtype.kind, var[name].dtype) for name in var.columns})
    of_store = var.reindex(selection.names)
    kept = {name: of_store[name].array for name in of_store.columns}
    found = selection.table.reset_index(drop=True)
    return pd.DataFrame({**kept, **{name: found[name].array for name in found}}, index=selection.names)


def view_modalities(store: Collection, batches: Sequence[str]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Dense matrices to carry along, with the features that each batch of the view measured."""
    return {
        name: (
            list(modality["names"]),
            {batch: mask for batch, mask in modality["measured"].items() if batch in set(batches)},
        )
        for name, modality in store.modalities.items()
    }


def view_slabs(
    store: Collection, layout: Layout, chosen: np.ndarray, *, obsm: str | None, memory: int, threads: int
) -> list[Slab]:
    """The rows to copy, in contiguous ranges of the store; a slab without a row of the view is left out.

    Parameters
    ----------
    chosen
        Column of each feature of the view; -1 for a missing one.
    """
    rows = rows_of(store, obsm)
    nnz = store.nnz / max(1, store.n_obs) if obsm is None else rows.n_vars
    per_row = nnz * BYTES_PER_VALUE + 16 * sum(len(m["names"]) for m in store.modalities.values()) + 256
    size = int(np.clip(memory / 2 / max(1, threads) / per_row, 64, MAX_SLAB_ROWS))
    stored_n = layout.stored_n
    slabs = []
    for low in range(int(stored_n[0]), int(stored_n[-1]) + 1, size) if len(stored_n) else ():
        a, b = np.searchsorted(stored_n, [low, low + size]).tolist()
        if a == b:
            continue
        start, stop = int(stored_n[a]), int(stored_n[b - 1]) + 1
        read = partial(_read_slab, rows, start, stop, stored_n[a:b], chosen)
        slabs.append(Slab(f"{start:012d}-{stop:012d}", layout.place_n[a:b], read, portable=True))
    return slabs


def view_sample(
    rows: StoreRows, layout: Layout, selection: Selection, obsm: Mapping[str, tuple[Any, Any]]
) -> Sample:
    """Some rows as they will be in the view, and how many values all have."""
    n = len(layout.stored_n)
    found = []
    for at in np.linspace(0, max(n - 64, 0), 8).astype(int).tolist() if n else ():
        mine = layout.stored_n[at : at + 64]
        block = rows.read(int(mine[0]), int(mine[-1]) + 1) if mine[-1] - mine[0] < MAX_SLAB_ROWS else None
        if block is not None:
            found.append(take(block, np.asarray(mine) - int(mine[0]), selection.chosen))
    some = vstack(found, format="csr") if found else csr_matrix((0, len(selection.names)), dtype=np.uint8)
    nnz = some.nnz / max(1, some.shape[0]) * n
    return Sample(some, int(nnz), 4 * sum(len(names) for names, _ in obsm.values()))


def _read_slab(
    rows: StoreRows, start: int, stop: int, stored_n: np.ndarray, chosen: np.ndarray
) -> tuple[csr_matrix, dict[str, np.ndarray]]:
    wanted = np.asarray(stored_n) - start
    block = rows.read(start, stop)
    dense = {name: rows.store.read_obsm(name, start, stop)[wanted] for name in rows.store.modalities}
    return take(block, wanted, chosen), dense


def take(block: csr_matrix, wanted: np.ndarray, chosen: np.ndarray) -> csr_matrix:
    """Some rows of a block, and its columns in the order of `chosen`; -1 gives an empty one.

    A feature is chosen once at most. Twice as fast as scipy's indexing.
    """
    there = np.flatnonzero(chosen >= 0)
    position_g = np.full(block.shape[1], -1, dtype=np.int32)
    position_g[chosen[there]] = there
    room = int((block.indptr[wanted + 1] - block.indptr[wanted]).sum()) + 1
    indptr = np.zeros(len(wanted) + 1, dtype=np.int64)
    indices, data = np.empty(room, dtype=np.int32), np.empty(room, dtype=block.dtype)
    n = pick_columns(block.indptr, block.indices, block.data, wanted, position_g, indptr, indices, data)
    data, indices = data[:n], indices[:n]
    if 2 * n < room:  # else what is left over costs less than a copy
        data, indices = data.copy(), indices.copy()
    taken = csr_matrix((data, indices, indptr), shape=(len(wanted), len(chosen)))
    taken.sort_indices()  # a list of features may reorder them
    return taken


def write_view(
    location: Location,
    fingerprint: dict[str, Any],
    plan: Callable[[Path], tuple[Content, list[Slab]]],
    *,
    append: bool = False,
    memory: int,
    threads: int,
) -> tuple[Collection, Needs | None]:
    """Plan and write a view, or one more part of it, unless just that is there already.

    The plan gets a folder for arrays over cells. Returns the view, and what it was predicted to take.

    Killed at any point, the same call resumes: the statistics are taken again, what was written is kept.
    """
    steady_memory()
    with Journal(location) as journal:  # first the lock: nobody changes the view while it is planned
        finished = start(journal, fingerprint, append=append)
        if finished is not None:
            return finished, None
        content, slabs = plan(journal.rows)
        written = write_part(
            location, slabs, content, memory=memory, threads=threads, append=append, journal=journal
        )
        return written, content.needs


def describe_view(
    store: Collection, location: Location, recipe: Recipe, parameters: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """What the manifest says of a view: where it is from, what was decided, what loaders apply."""
    return {
        "store": relative(store.location, location),
        "store_parts": [part["crc32c"] for part in store.manifest.parts],
        "store_generation": store.generation,
        "store_rows": store.n_obs,
        "transform": recipe.transform,
        "recipe": {**asdict(recipe), "drop": list(recipe.drop)},
        "parameters": parameters,
        **more,
    }


def store_of(view: Collection) -> Collection:
    """The store that a view was made from.

    Raises
    ------
    UsageError
        If this is no view, or its store is not where it was relative to it, or is another one.
    """
    if view.view is None:
        raise UsageError(
            "is a store, not a view", where=str(view.path), fix="streamx preprocess STORE -o VIEW"
        )
    place = follow(view.location, view.view["store"])
    fix = "move it back to where it was relative to the view, or run `streamx preprocess` anew"
    try:
        store = Collection(place)
    except (BadFileError, OSError) as error:
        raise UsageError(
            f"the view's store is not at {place} ({error})", where=str(view.path), fix=fix
        ) from error
    before = view.view["store_parts"]
    if [part["crc32c"] for part in store.manifest.parts][: len(before)] != before:
        raise UsageError(
            f"{place} is not the store that this view was made from", where=str(view.path), fix=fix
        )
    return store
