"""From rows to selected features: the two passes of statistics and what is decided after each.

Knows no store: rows, names, batch codes in; a :class:`Selection` out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from streamx.errors import GeneError, warn
from streamx.preprocess import hvg
from streamx.preprocess.atac import variable_peaks
from streamx.preprocess.cells import Cells
from streamx.preprocess.kernels import DETECTED, SQUARES, SUM
from streamx.preprocess.moments import Moments, pool, select
from streamx.preprocess.passes import (
    Clipping,
    Counting,
    Magnitudes,
    Normalising,
    Piece,
    Resources,
    Rows,
    run_pass,
)
from streamx.preprocess.qc import cells_to_keep, genes_to_keep, names_to_use
from streamx.preprocess.recipe import Recipe
from streamx.preprocess.scale import maxima

log = logging.getLogger("streamx")


@dataclass(frozen=True)
class Selection:
    """What the passes found.

    Attributes
    ----------
    n_features_n, kept_n, total_n
        Per row: detected features (-1: not looked at), whether it stays, total over the kept features (NaN).
    keep_g
        Features that pass the filters, bool (n_genes,).
    chosen
        Position in the store of each feature of the view, int64; -1 for a listed gene that is not there.
    names
        Their names.
    table
        One row per feature of the view: scanpy's columns, cells, and whether it is missing.
    raw, values
        Moments over all features of the store: counts of kept cells; values after the scaling to a total.
    scale_bg
        float32 (n_batches, n_selected), or None.
    trends
        seurat_v3's regression of each batch (mean, sd, clip).
    """

    n_features_n: np.ndarray
    kept_n: np.ndarray
    total_n: np.ndarray
    keep_g: np.ndarray
    chosen: np.ndarray
    names: list[str]
    table: pd.DataFrame
    raw: Moments
    values: Moments
    scale_bg: np.ndarray | None
    trends: dict[int, dict[str, np.ndarray]]


def select_features(
    rows: Rows,
    names: Sequence[str],
    cells: Cells,
    recipe: Recipe,
    *,
    resources: Resources,
    measured_bg: np.ndarray | None = None,
    allow_unmeasured: bool = False,
    listed: Sequence[str] | None = None,
    as_it_is: bool = False,
) -> Selection:
    """Run the recipe over the rows.

    Parameters
    ----------
    rows
        Counts.
    names
        Features of the rows.
    measured_bg
        bool (n_batches, n_genes): features that each batch measured; None for all.
    listed
        Features to take instead of searching variable ones; missing ones become zero.
    as_it_is
        Values are final: no filter, no scaling to a total.

    Raises
    ------
    EmptyError
        If no cell or no feature is left.
    """
    names = [str(name) for name in names]
    if as_it_is:
        return _select_as_it_is(rows, names, cells, recipe, resources, listed)
    use_g = names_to_use(names, recipe.drop)
    counting = Counting(use_g, recipe.min_features)
    (first,) = run_pass(
        rows, cells.code_n, cells.admitted_n, counting, resources=resources, title="features per cell"
    )
    kept_n = cells_to_keep(
        first.cell_n,
        cells.code_n,
        cells.admitted_n,
        min_features=recipe.min_features,
        batches=cells.batches,
        path=None if resources.scratch is None else resources.scratch / "kept",
    )
    raw = first.moments
    keep_g = genes_to_keep(pool(raw).detected_bg[0], use_g, min_cells=recipe.min_cells)
    if recipe.total == "geometric" and listed is not None:  # the panel is what is listed
        keep_g &= np.isin(np.array(names, dtype=object), [str(name) for name in listed])
    log.info(
        "%d of %d cells, %d of %d features kept",
        np.count_nonzero(kept_n),
        np.count_nonzero(cells.admitted_n),
        keep_g.sum(),
        len(names),
    )
    measured = np.ones((1, len(names)), bool) if measured_bg is None else measured_bg[raw.code_b]
    found_g = (
        keep_g
        if listed is not None or recipe.search == "none"
        else (hvg.candidates(measured, keep_g, allow_unmeasured=allow_unmeasured))
    )
    known = _Known(names, cells, recipe, resources, raw, kept_n, use_g, keep_g, found_g)
    found = _SEARCH[recipe.search](rows, known)
    chosen, chosen_names, table = _choose(names, keep_g, found, listed)
    table["n_cells"] = _at(pool(raw).detected_bg[0], chosen).astype(np.int64)
    scale_bg = maxima(
        select(found.values, np.maximum(chosen, 0)),
        scale=recipe.scale,
        log1p=recipe.log1p and not found.logged,
        n_batches=len(cells.batches),
    )
    if scale_bg is not None:
        scale_bg[:, chosen < 0] = 1.0
    return Selection(
        first.cell_n,
        kept_n,
        found.total_n,
        keep_g,
        chosen,
        chosen_names,
        table,
        raw,
        found.values,
        scale_bg,
        found.trends,
    )


@dataclass(frozen=True)
class _Known:
    """What the first pass settled."""

    names: list[str]
    cells: Cells
    recipe: Recipe
    resources: Resources
    raw: Moments
    kept_n: np.ndarray
    use_g: np.ndarray
    keep_g: np.ndarray
    found_g: np.ndarray


@dataclass(frozen=True)
class _Found:
    """What the second pass adds: the table over all features, and which are chosen."""

    chosen_g: np.ndarray
    table: pd.DataFrame
    values: Moments
    total_n: np.ndarray
    logged: bool = False
    trends: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


def values_pass(
    recipe: Recipe, use_g: np.ndarray, keep_g: np.ndarray, chosen_g: np.ndarray | None = None
) -> Normalising:
    """What the second pass adds up, for every search but seurat_v3's.

    Parameters
    ----------
    use_g, keep_g, chosen_g
        Features by name; those that pass the filters; those that are selected, where that is known by then.
    """
    if recipe.search == "peaks" and recipe.peaks_on == "binary" and chosen_g is not None:
        return Normalising(chosen_g, recipe.target, recipe.binarize)
    if recipe.search == "none":
        over_g, geometric = use_g if recipe.total == "all" else keep_g, recipe.total == "geometric"
        return Normalising(over_g, recipe.target, recipe.binarize, geometric=geometric)
    # scanpy takes cell_ranger's dispersions from the logarithms, as they are
    log = recipe.search in ("cell_ranger", "peaks")
    return Normalising(use_g if recipe.total == "all" else keep_g, recipe.rank_target, recipe.binarize, log)


def _second(rows: Rows, known: _Known, chosen_g: np.ndarray | None = None) -> tuple[Piece, bool]:
    """The pass over kept cells, and whether its values are logarithms."""
    what = values_pass(known.recipe, known.use_g, known.keep_g, chosen_g)
    (piece,) = run_pass(
        rows, known.cells.code_n, known.kept_n, what, resources=known.resources, title="normalised values"
    )
    return piece, what.log


def _search_none(rows: Rows, known: _Known) -> _Found:
    piece, _ = _second(rows, known)
    table = pd.DataFrame({"highly_variable": known.keep_g}, index=pd.Index(known.names))
    return _Found(known.keep_g, table, piece.moments, piece.cell_n)


def _search_dispersions(rows: Rows, known: _Known) -> _Found:
    recipe, found_g = known.recipe, known.found_g
    piece, logged = _second(rows, known)
    searched = select(piece.moments, found_g)
    if recipe.binarize:
        searched = hvg.ones_as_logarithms(searched)
    names = [name for name, found in zip(known.names, found_g, strict=True) if found]
    table = hvg.rank_dispersions(
        searched,
        names,
        known.cells.batches,
        flavor=recipe.search,
        n_top=recipe.n_top,
        by_batch=recipe.by_batch,
    )
    table = hvg.expand(table, found_g, known.names)
    return _Found(table["highly_variable"].to_numpy(), table, piece.moments, piece.cell_n, logged)


def _search_variances(rows: Rows, known: _Known) -> _Found:
    recipe, found_g, batches = known.recipe, known.found_g, known.cells.batches
    raw = known.raw if recipe.by_batch else pool(known.raw)
    label = (lambda code: str(batches[code])) if recipe.by_batch else (lambda code: "all cells")
    trends = {}
    for k, code in enumerate(raw.code_b):
        sums, squares = raw.sum_bg[k, found_g], raw.squares_bg[k, found_g]
        trend = hvg.regularised_sd(int(raw.n_b[k]), sums, squares, batch=label(int(code)))
        trends[int(code)] = {name: _spread(values, found_g) for name, values in trend.items()}
    clips = {int(code): trends[int(code) if recipe.by_batch else 0]["clip"] for code in known.raw.code_b}
    what = Clipping(known.keep_g, recipe.rank_target, clips)
    (piece,) = run_pass(
        rows, known.cells.code_n, known.kept_n, what, resources=known.resources, title="clipped counts"
    )
    norm_bg = standardised(raw, piece.moments, trends, found_g, by_batch=recipe.by_batch)
    names = [name for name, found in zip(known.names, found_g, strict=True) if found]
    table = hvg.rank_variances(select(raw, found_g), norm_bg, names, n_top=recipe.n_top)
    table = hvg.expand(table, found_g, known.names)
    chosen_g = table["highly_variable"].to_numpy()
    return _Found(chosen_g, table, piece.moments, piece.cell_n, trends=trends)


def standardised(
    raw: Moments,
    clipped: Moments,
    trends: dict[int, dict[str, np.ndarray]],
    found_g: np.ndarray,
    *,
    by_batch: bool,
) -> np.ndarray:
    """seurat_v3's variance per batch of `raw`, (n_batches, n_found): `clipped` from the second pass."""
    second = clipped if by_batch else pool(clipped)
    rows = []
    for k, code in enumerate(raw.code_b):
        trend = {name: values[found_g] for name, values in trends[int(code)].items()}
        above, sums, squares = (second.table_bg4[k, found_g, column] for column in (DETECTED, SUM, SQUARES))
        rows.append(hvg.standardised_variance(int(raw.n_b[k]), trend, above, sums, squares))
    return np.stack(rows)


def _search_peaks(rows: Rows, known: _Known) -> _Found:
    recipe, n_cells = known.recipe, int(np.count_nonzero(known.kept_n))
    on_binary = recipe.peaks_on == "binary"
    if not on_binary:
        piece, logged = _second(rows, known)
    sum_g = pool(known.raw).detected_bg[0] if on_binary else pool(piece.moments).sum_bg[0]
    peaks, score = variable_peaks(sum_g[known.found_g], n_cells, n_top=recipe.n_top)
    table = pd.DataFrame({"highly_variable": peaks, "variability_score": score})
    table = hvg.expand(table, known.found_g, known.names)
    chosen_g = table["highly_variable"].to_numpy()
    if on_binary:
        piece, logged = _second(rows, known, chosen_g)
    return _Found(chosen_g, table, piece.moments, piece.cell_n, logged)


_SEARCH = {
    "none": _search_none,
    "seurat": _search_dispersions,
    "cell_ranger": _search_dispersions,
    "seurat_v3": _search_variances,
    "peaks": _search_peaks,
}


def _choose(
    names: list[str], keep_g: np.ndarray, found: _Found, listed: Sequence[str] | None
) -> tuple[np.ndarray, list[str], pd.DataFrame]:
    """Positions, names and table rows of the view's features: variable ones in store order, or the list."""
    if listed is None:
        chosen = np.flatnonzero(found.chosen_g).astype(np.int64)
        table = found.table.iloc[chosen].copy()
        table["missing"] = False
        return chosen, [names[g] for g in chosen], table
    chosen = positions(names, keep_g, listed)
    table = pd.DataFrame({"missing": chosen < 0}, index=pd.Index([str(name) for name in listed]))
    return chosen, [str(name) for name in listed], table


def positions(names: Sequence[str], keep_g: np.ndarray, listed: Sequence[str]) -> np.ndarray:
    """Position of each listed feature among the kept ones, int64; -1 where it is not.

    Raises
    ------
    GeneError
        If a name is listed twice, or none is found.
    """
    if len(set(listed)) < len(listed):
        twice = next(name for name in listed if list(listed).count(name) > 1)
        raise GeneError(f"{twice!r} is listed twice", fix="list every feature once")
    place = {name: g for g, name in enumerate(names)}
    everywhere = np.array([place.get(str(name), -1) for name in listed], dtype=np.int64)
    found = np.where((everywhere >= 0) & keep_g[everywhere], everywhere, -1)
    if (found < 0).all():
        raise GeneError(
            f"none of {len(listed)} listed features is among the {int(keep_g.sum())} that are kept "
            f"(listed: {', '.join(list(map(str, listed))[:3])}; kept: "
            f"{', '.join([names[g] for g in np.flatnonzero(keep_g)[:3]])})",
            fix="a list that names features as the data do",
        )
    absent = [str(name) for name, g in zip(listed, everywhere, strict=True) if g < 0]
    filtered = [str(name) for name, g, e in zip(listed, found, everywhere, strict=True) if g < 0 <= e]
    for what, missing in (("are not in the data", absent), ("were filtered out", filtered)):
        if missing:
            warn(
                f"{len(missing)} of {len(listed)} listed features {what} and become zero: "
                + ", ".join(missing[:5])
                + (", ..." if len(missing) > 5 else "")
            )
    return found


def _select_as_it_is(
    rows: Rows,
    names: list[str],
    cells: Cells,
    recipe: Recipe,
    resources: Resources,
    listed: Sequence[str] | None,
) -> Selection:
    """Values that stay as they are: one pass for the maxima."""
    (piece,) = run_pass(
        rows, cells.code_n, cells.admitted_n, Magnitudes(), resources=resources, title="maxima"
    )
    keep_g = np.ones(len(names), dtype=bool)
    found = _Found(keep_g, pd.DataFrame(index=pd.Index(names)), piece.moments, piece.cell_n)
    chosen, chosen_names, table = _choose(names, keep_g, found, listed)
    table["n_cells"] = _at(pool(piece.moments).detected_bg[0], chosen).astype(np.int64)
    scale_bg = maxima(
        select(piece.moments, np.maximum(chosen, 0)),
        scale=recipe.scale,
        log1p=False,
        n_batches=len(cells.batches),
    )
    if scale_bg is not None:
        scale_bg[:, chosen < 0] = 1.0
    n_features_n = np.where(cells.admitted_n, 0, -1).astype(np.int32)
    return Selection(
        n_features_n,
        cells.admitted_n,
        piece.cell_n,
        keep_g,
        chosen,
        chosen_names,
        table,
        piece.moments,
        piece.moments,
        scale_bg,
        {},
    )


def _at(values_g: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Values of the chosen features, 0 for missing ones."""
    return np.where(chosen >= 0, values_g[np.maximum(chosen, 0)], 0)


def _spread(values: np.ndarray, found_g: np.ndarray) -> np.ndarray:
    """Values of the candidates -> of all features; infinite elsewhere, where nothing is clipped."""
    full = np.full(len(found_g), np.inf)
    full[found_g] = values
    return full
