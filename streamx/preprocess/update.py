"""``streamx preprocess --update``: add the rows that were appended to a view's store since.

Gene mask, genes, totals and the scales of old batches stay as they are; a new batch gets its own scale. What
a fresh run would decide otherwise is measured and reported.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamx.config import PreprocessConfig, build, parse_bytes
from streamx.errors import BatchError, warn
from streamx.preprocess.cells import Cells, chosen_cells
from streamx.preprocess.drift import Kept, fresh_choice, kept_statistics, merged
from streamx.preprocess.features import values_pass
from streamx.preprocess.hvg import regularised_sd
from streamx.preprocess.moments import Moments, recode, select
from streamx.preprocess.passes import (
    Clipping,
    Counting,
    Magnitudes,
    Normalising,
    Resources,
    plan_resources,
    run_pass,
)
from streamx.preprocess.qc import cells_to_keep, names_to_use
from streamx.preprocess.recipe import Recipe, is_final
from streamx.preprocess.rows import StoreRows, rows_of
from streamx.preprocess.scale import maxima
from streamx.preprocess.view import (
    Layout,
    describe_view,
    lay_out,
    store_of,
    view_modalities,
    view_obs,
    view_slabs,
    write_view,
)
from streamx.store.collection import Collection, open_collection
from streamx.store.location import Location
from streamx.store.pack import Content
from streamx.store.spill import Slab
from streamx.threads import thread_count

log = logging.getLogger("streamx")

DRIFT_WORTH_A_WARNING = 0.2  # share of variable genes


def update_view(view: Collection | str | Path, *, memory: str = "4GB", threads: int = 0) -> Collection:
    """Add the rows that were appended to a view's store since the view was made or last updated.

    One pass over these rows takes their statistics (two with ``seurat_v3`` and a new batch), another copies
    them. Without new rows nothing changes: updating twice is updating once.

    Parameters
    ----------
    view
        A view, or its path.
    memory, threads
        What may be used; they change no result.

    Returns
    -------
    Collection
        The view's next generation (or the one it had). ``view["drift"]`` holds what a fresh
        :func:`~streamx.preprocess.run.preprocess` would decide otherwise: `replaced` (share of the variable
        genes), and `above_maximum` (genes with a value above the frozen maximum of its batch).

    Raises
    ------
    UsageError
        If the store is not where it was relative to the view, or is another one.
    EmptyError
        If none of the new cells passes the filters.
    """
    view = view if isinstance(view, Collection) else open_collection(view)
    build(PreprocessConfig, {"memory": memory, "threads": threads})
    store = store_of(view)
    assert view.view is not None
    first = int(view.view["store_rows"])
    if store.n_obs == first:
        log.info("%s holds all rows of its store already", view.path)
        return view
    frozen = _thaw(view, store, first)
    if not _any_asked_for(store, frozen.parameters, first):
        log.info("%s: none of the %d new rows is asked for", view.path, store.n_obs - first)
        return view
    fingerprint = {
        "settings": view.view["parameters"],
        "store": {
            "generation": store.generation,
            "parts": [part["crc32c"] for part in store.manifest.parts],
        },
        "update_of": view.manifest.fingerprint,
    }
    updated, _ = write_view(
        view.location,
        fingerprint,
        partial(_plan, frozen, view.location, fingerprint, parse_bytes(memory), thread_count(threads)),
        append=True,
        memory=parse_bytes(memory),
        threads=thread_count(threads),
    )
    return updated


@dataclass(frozen=True)
class _Frozen:
    """What the view has decided."""

    view: Collection
    store: Collection
    first: int
    recipe: Recipe
    parameters: dict[str, Any]
    before: Kept
    names: list[str]
    chosen: np.ndarray

    @property
    def obsm(self) -> str | None:
        return self.parameters["obsm"]

    @property
    def as_it_is(self) -> bool:
        said = {name: self.parameters[name] for name in ("profile", "processed", "obsm")}
        return is_final(PreprocessConfig(**said))


def _thaw(view: Collection, store: Collection, first: int) -> _Frozen:
    about: dict[str, Any] = view.view or {}
    recipe = Recipe(**{**about["recipe"], "drop": tuple(about["recipe"]["drop"])})
    obsm = about["parameters"]["obsm"]
    names = list(store.var_names) if obsm is None else list(store.modalities[obsm]["names"])
    place = {name: g for g, name in enumerate(names)}
    missing = view.var["missing"].to_numpy()
    chosen = np.array(
        [-1 if absent else place[name] for name, absent in zip(view.var_names, missing, strict=True)],
        np.int64,
    )
    return _Frozen(view, store, first, recipe, about["parameters"], kept_statistics(view), names, chosen)


def _plan(
    frozen: _Frozen,
    location: Location,
    fingerprint: dict[str, Any],
    memory: int,
    threads: int,
    folder: Path,
) -> tuple[Content, list[Slab]]:
    store, view, first = frozen.store, frozen.view, frozen.first
    where = frozen.parameters["where"]
    cells = chosen_cells(store, frozen.parameters["batches"], where, folder=folder, first=first)
    rows = rows_of(store, frozen.obsm)
    nnz = store.nnz / max(1, store.n_obs) if frozen.obsm is None else rows.n_vars
    resources = plan_resources(
        nnz, rows.n_vars, len(cells.batches), memory=memory, threads=threads, progress=True, scratch=folder
    )
    new = _new_rows(frozen, cells, rows, resources)
    new_parts = sum(int(start) >= first for start in store.part_starts[:-1])
    layout = lay_out(
        new.kept_n, cells.code_n, cells.batches, folder=folder, first=first, known=view.batches,
        shuffled=new_parts == 1,
    )  # fmt: skip
    raw, values = (recode(moments, layout.from_store[moments.code_b]) for moments in (new.raw, new.values))
    kept = _merge_statistics(frozen, layout, cells, rows, resources, new, raw, values)
    tables = kept.tables()
    n_above = 0
    if view.scale_bg is not None:
        tables["scale_bg"], above_g = _scales(frozen, values, new.logged, len(layout.batches))
        n_above = int(above_g.sum())
    drift = {"replaced": _replaced(frozen, kept, layout), "above_maximum": n_above}
    _report(view, drift, len(layout.row_n), len(layout.batches) - len(view.batches))
    content = Content(
        kind="view",
        obs=view_obs(store, layout, new.total_n, folder),
        var=view.var,
        batch_key=store.batch_key,
        fingerprint=fingerprint,
        obsm=view_modalities(store, layout.batches),
        uns={
            "parameters": frozen.parameters,
            "transform": frozen.recipe.transform,
            "flavor": frozen.recipe.search,
        },
        tables=tables,
        view=describe_view(store, location, frozen.recipe, frozen.parameters, drift=drift),
    )
    slabs = view_slabs(store, layout, frozen.chosen, obsm=frozen.obsm, memory=memory, threads=threads)
    return content, slabs


def _any_asked_for(store: Collection, parameters: dict[str, Any], first: int) -> bool:
    """Whether ``--batches`` and ``--where`` admit any of the new rows."""
    with tempfile.TemporaryDirectory() as folder:
        where = parameters["where"]
        cells = chosen_cells(store, parameters["batches"], where, folder=Path(folder), first=first)
        return bool(cells.admitted_n.any())


@dataclass(frozen=True)
class _New:
    """The new rows as the pass over them saw them; batches in the store's codes."""

    kept_n: np.ndarray
    total_n: np.ndarray
    raw: Moments
    values: Moments
    logged: bool  # whether `values` are logarithms


def _new_rows(frozen: _Frozen, cells: Cells, rows: StoreRows, resources: Resources) -> _New:
    """One pass: features per cell, and values under the frozen masks."""
    recipe, before = frozen.recipe, frozen.before
    walk = partial(
        run_pass,
        rows,
        cells.code_n,
        cells.admitted_n,
        resources=resources,
        first=frozen.first,
        title="new rows",
    )
    if frozen.as_it_is:
        (piece,) = walk(Magnitudes())
        return _New(cells.admitted_n, piece.cell_n, piece.moments, piece.moments, False)
    use_g = names_to_use(frozen.names, recipe.drop)
    second: Clipping | Normalising
    if recipe.search == "seurat_v3":
        second = Clipping(before.keep_g, recipe.rank_target, _clips(frozen, cells))
        logged = False
    else:
        chosen_g = np.zeros(len(use_g), dtype=bool)
        chosen_g[frozen.chosen[frozen.chosen >= 0]] = True
        second = values_pass(recipe, use_g, before.keep_g, chosen_g)
        logged = second.log
    counted, piece = walk(Counting(use_g, recipe.min_features), second)
    kept_n = cells_to_keep(
        counted.cell_n,
        cells.code_n,
        cells.admitted_n,
        min_features=recipe.min_features,
        batches=cells.batches,
    )
    return _New(kept_n, piece.cell_n, counted.moments, piece.moments, logged)


def _clips(frozen: _Frozen, cells: Cells) -> dict[int, np.ndarray]:
    """seurat_v3's frozen clip of each batch of the store, over all genes; infinite for a new batch."""
    clip_bg, keep_g = frozen.before.clip_bg, frozen.before.keep_g
    assert clip_bg is not None
    known = {name: k for k, name in enumerate(frozen.view.batches)}
    clips = {}
    for code, name in enumerate(cells.batches):
        clips[code] = np.full(len(keep_g), np.inf)
        if not frozen.recipe.by_batch or name in known:
            clips[code][keep_g] = clip_bg[known[name] if frozen.recipe.by_batch else 0]
    return clips


def _merge_statistics(
    frozen: _Frozen,
    layout: Layout,
    cells: Cells,
    rows: StoreRows,
    resources: Resources,
    new: _New,
    raw: Moments,
    values: Moments,
) -> Kept:
    """Statistics of old and new rows together."""
    before, recipe = frozen.before, frozen.recipe
    keep_g = before.keep_g
    if recipe.search != "seurat_v3":
        counts = (recipe.search, recipe.peaks_on) == ("peaks", "binary")
        return merged(before, select(raw if counts else values, keep_g), None, None)
    clip_bg = before.clip_bg
    if recipe.by_batch and len(layout.batches) > len(frozen.view.batches):
        clip_bg, values = _clip_new_batches(frozen, layout, cells, rows, resources, new, raw, values)
    return merged(before, select(values, keep_g), select(raw, keep_g), clip_bg)


def _clip_new_batches(
    frozen: _Frozen,
    layout: Layout,
    cells: Cells,
    rows: StoreRows,
    resources: Resources,
    new: _New,
    raw: Moments,
    values: Moments,
) -> tuple[np.ndarray, Moments]:
    """seurat_v3: a new batch's own regression and clip, and its clipped sums (one more pass over it)."""
    keep_g, before = frozen.before.keep_g, frozen.before.clip_bg
    assert before is not None
    n_old, n_all = len(frozen.view.batches), len(layout.batches)
    clip_bg = np.full((n_all, int(keep_g.sum())), np.inf)
    clip_bg[:n_old] = before
    for k in range(n_old, n_all):
        at = int(np.searchsorted(raw.code_b, k))
        try:
            trend = regularised_sd(
                int(raw.n_b[at]), raw.sum_bg[at, keep_g], raw.squares_bg[at, keep_g], batch=layout.batches[k]
            )
        except BatchError as error:
            warn(f"its variable genes can't be ranked, so drift is unknown: {error.what}", where=error.where)
        else:
            clip_bg[k] = trend["clip"]
    clips = {}
    for code, k in enumerate(layout.from_store):
        clips[code] = np.full(len(keep_g), np.inf)
        if k >= 0:
            clips[code][keep_g] = clip_bg[k]
    mine_n = new.kept_n & (layout.from_store[cells.code_n] >= n_old)
    what = Clipping(keep_g, frozen.recipe.rank_target, clips)
    (piece,) = run_pass(
        rows, cells.code_n, mine_n, what, resources=resources, first=frozen.first, title="new batches"
    )
    again = recode(piece.moments, layout.from_store[piece.moments.code_b])
    table = values.table_bg4.copy()
    table[np.searchsorted(values.code_b, again.code_b)] = again.table_bg4
    return clip_bg, Moments(values.code_b, values.n_b, table)


def _scales(frozen: _Frozen, values: Moments, logged: bool, n_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """The table with a row for each new batch, and genes whose new maximum exceeds a frozen one."""
    old_bg = frozen.view.scale_bg
    assert old_bg is not None
    n_old = len(old_bg)
    here = select(values, np.maximum(frozen.chosen, 0))
    new_bg = maxima(here, scale="batch", log1p=frozen.recipe.log1p and not logged, n_batches=n_batches)
    assert new_bg is not None
    new_bg[:, frozen.chosen < 0] = 1.0
    if frozen.recipe.scale == "global":
        table = np.repeat(old_bg[:1], n_batches, axis=0)
    else:
        table = np.concatenate([old_bg, new_bg[n_old:]])
    seen_b = np.zeros(n_batches, dtype=bool)
    seen_b[here.code_b] = True
    return table, np.asarray((new_bg[seen_b] > table[seen_b]).any(axis=0))


def _replaced(frozen: _Frozen, kept: Kept, layout: Layout) -> float | None:
    """Share of the view's variable genes that a ranking over all rows would replace; None if not ranked."""
    if frozen.as_it_is or frozen.recipe.search == "none":
        return None
    names = [name for name, keep in zip(frozen.names, kept.keep_g, strict=True) if keep]
    measured = np.ones((1, len(names)), dtype=bool)
    if not frozen.parameters["allow_unmeasured"]:
        of_view = layout.from_store >= 0
        measured = frozen.store.measured_bg[of_view][:, kept.keep_g]
    fresh = fresh_choice(kept, names, layout.batches, frozen.recipe, measured)
    if fresh is None:
        return None
    frozen_names = {str(name) for name in frozen.view.var_names}
    return round(1 - len(frozen_names & fresh) / len(frozen_names), 6)


def _report(view: Collection, drift: dict[str, Any], n_cells: int, n_batches: int) -> None:
    replaced = drift["replaced"]
    share = "unknown (genes were not ranked)" if replaced is None else f"{100 * replaced:.1f} %"
    log.info(
        "%s: %d cells and %d batches added; a fresh selection would replace %s of the genes; "
        "%d genes exceed their frozen maximum",
        view.path, n_cells, n_batches, share, drift["above_maximum"],
    )  # fmt: skip
    if replaced is not None and replaced > DRIFT_WORTH_A_WARNING:
        warn(
            f"a fresh selection would replace {100 * replaced:.0f} % of the {view.n_vars} variable genes",
            where=str(view.path),
            fix="`streamx preprocess STORE -o NEW_VIEW`, and train anew, when the new data matter that much",
        )
