"""The view: which rows and columns of the store it takes, in which order, and all it says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from streamx.errors import BadFileError, UsageError
from streamx.preprocess.features import Selection
from streamx.preprocess.kernels import pick_columns
from streamx.preprocess.recipe import Recipe
from streamx.preprocess.rows import StoreRows, rows_of
from streamx.store.collection import Collection
from streamx.store.journal import Journal
from streamx.store.location import Location, follow, relative
from streamx.store.pack import Content, start, write_part
from streamx.store.spill import Slab

TOTAL, ROW = "_streamx_total", "_streamx_row"
BYTES_PER_VALUE = 40  # of a slab while it is read, cut and sorted
MAX_SLAB_ROWS = 1 << 15


@dataclass(frozen=True)
class Layout:
    """Rows of the store in the order of the view.

    Attributes
    ----------
    row_n
        Store row of each row of the view, int64.
    code_n
        Its batch, as a position in `batches`.
    batches
        The view's batches: sorted by name; those of an update come after the ones there were.
    from_store
        Position of each batch of the store in `batches`; -1 for none.
    """

    row_n: np.ndarray
    code_n: np.ndarray
    batches: list[str]
    from_store: np.ndarray


def lay_out(
    kept_n: np.ndarray, code_n: np.ndarray, store_batches: Sequence[str], *, first: int = 0,
    known: Sequence[str] = (), shuffled: bool = True,
) -> Layout:  # fmt: skip
    """Order the kept rows by batch.

    Parameters
    ----------
    kept_n, code_n
        Rows that stay, and their batch in the store; from store row `first` on.
    store_batches
        The store's batches.
    known
        Batches that the view has already, in their order.
    shuffled
        Whether the store's rows are in random order inside each batch already, as they are in a single
        part. Rows of several parts are shuffled anew, seeded by their number alone.
    """
    rows = np.flatnonzero(kept_n)
    present = sorted({store_batches[int(code)] for code in np.unique(code_n[rows])})
    batches = [*known, *(name for name in present if name not in set(known))]
    position = {name: k for k, name in enumerate(batches)}
    from_store = np.array([position.get(name, -1) for name in store_batches], dtype=np.int64)
    mine = from_store[code_n[rows]]
    key = np.arange(len(rows)) if shuffled else np.random.default_rng(len(rows)).permutation(len(rows))
    order = np.lexsort((key, mine))
    return Layout(rows[order] + first, mine[order], batches, from_store)


def view_obs(store: Collection, layout: Layout, total_n: np.ndarray, *, first: int = 0) -> pd.DataFrame:
    """obs of the view: every column of the store, and each cell's total and store row.

    Parameters
    ----------
    total_n
        Totals of the store's rows from `first` on.
    """
    rows = layout.row_n - first
    columns: dict[str, Any] = {}
    for name in store.obs_columns:
        if name == store.batch_key:
            columns[name] = pd.Categorical.from_codes(layout.code_n, pd.Index(layout.batches))
        else:
            columns[name] = store.obs_column(name, first).iloc[rows].array
    columns[TOTAL] = total_n[rows]
    columns[ROW] = layout.row_n.astype(np.int64)
    return pd.DataFrame(columns, index=store.obs_names[layout.row_n])


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
    if not len(layout.row_n):
        return []
    order = np.argsort(layout.row_n, kind="stable")
    in_store = layout.row_n[order]
    slabs = []
    for low in range(int(in_store[0]), int(in_store[-1]) + 1, size):
        a, b = np.searchsorted(in_store, [low, low + size])
        if a == b:
            continue
        mine = in_store[a:b]
        start, stop = int(mine[0]), int(mine[-1]) + 1
        read = partial(_read_slab, store, rows, start, stop, mine - start, chosen)
        slabs.append(Slab(f"{start:012d}-{stop:012d}", order[a:b].astype(np.int64), read))
    return slabs


def _read_slab(
    store: Collection, rows: StoreRows, start: int, stop: int, wanted: np.ndarray, chosen: np.ndarray
) -> tuple[csr_matrix, dict[str, np.ndarray]]:
    block = rows.read(start, stop)
    dense = {name: store.read_obsm(name, start, stop)[wanted] for name in store.modalities}
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
    taken = csr_matrix((data[:n].copy(), indices[:n].copy(), indptr), shape=(len(wanted), len(chosen)))
    taken.sort_indices()  # a list of features may reorder them
    return taken


def write_view(
    location: Location,
    fingerprint: dict[str, Any],
    plan: Callable[[], tuple[Content, list[Slab]]],
    *,
    append: bool = False,
    memory: int,
    threads: int,
) -> Collection:
    """Plan and write a view, or one more part of it, unless just that is there already.

    Killed at any point, the same call resumes: the statistics are taken again, what was written is kept.
    """
    with Journal(location) as journal:  # first the lock: nobody changes the view while it is planned
        finished = start(journal, fingerprint, append=append)
        if finished is not None:
            return finished
        content, slabs = plan()
        return write_part(
            location, slabs, content, memory=memory, threads=threads, append=append, journal=journal
        )


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
