"""How far a view's frozen choice has drifted from what a fresh run would choose.

A view keeps the statistics that its genes were ranked by, per batch and kept gene. Those of new rows merge
with them, so that the ranking can be repeated without reading the old rows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamx.errors import StreamxError
from streamx.preprocess import hvg
from streamx.preprocess.atac import variable_peaks
from streamx.preprocess.features import Selection, standardised
from streamx.preprocess.moments import Moments, merge, pool, recode, select
from streamx.preprocess.recipe import Recipe
from streamx.store.collection import Collection


@dataclass(frozen=True)
class Kept:
    """Statistics that a view keeps, over its kept genes, by its own batch codes.

    Attributes
    ----------
    keep_g
        bool, over the genes of the store.
    values
        Moments that genes were ranked by (seurat_v3: cells above the clip, and sums of the others).
    raw
        Moments of the counts (seurat_v3 only).
    clip_bg
        seurat_v3's clip per batch, frozen (one row without batches).
    """

    keep_g: np.ndarray
    values: Moments
    raw: Moments | None
    clip_bg: np.ndarray | None

    def tables(self) -> dict[str, np.ndarray]:
        """As arrays to keep with the view."""
        out = {
            "stats_keep_g": self.keep_g,
            "stats_code_b": self.values.code_b,
            "stats_n_b": self.values.n_b,
            "stats_values": self.values.table_bg4,
        }
        if self.raw is not None and self.clip_bg is not None:
            out |= {"stats_raw": self.raw.table_bg4, "stats_clip": self.clip_bg}
        return out


def statistics_to_keep(selection: Selection, recipe: Recipe, from_store: np.ndarray) -> dict[str, np.ndarray]:
    """What :func:`fresh_choice` will need, as tables of the view."""

    def mine(moments: Moments) -> Moments:
        return recode(select(moments, selection.keep_g), from_store[moments.code_b])

    v3 = recipe.search == "seurat_v3"
    clip = None
    if v3:
        clips = [selection.trends[code]["clip"][selection.keep_g] for code in sorted(selection.trends)]
        order = np.argsort(from_store[sorted(selection.trends)]) if recipe.by_batch else [0]
        clip = np.stack(clips)[order]
    raw = mine(selection.raw) if v3 else None
    # peaks are ranked by how many cells have them, before any scaling
    ranked = selection.raw if (recipe.search, recipe.peaks_on) == ("peaks", "binary") else selection.values
    return Kept(selection.keep_g, mine(ranked), raw, clip).tables()


def kept_statistics(view: Collection) -> Kept:
    """The statistics that a view keeps."""
    tables: dict[str, Any] = {
        name: view.table(f"stats_{name}") for name in ("keep_g", "code_b", "n_b", "values", "raw", "clip")
    }
    values = Moments(tables["code_b"], tables["n_b"], tables["values"])
    raw = None if tables["raw"] is None else Moments(tables["code_b"], tables["n_b"], tables["raw"])
    return Kept(tables["keep_g"], values, raw, tables["clip"])


def merged(before: Kept, values: Moments, raw: Moments | None, clip_bg: np.ndarray | None) -> Kept:
    """The statistics of old and new rows."""
    both = None if before.raw is None or raw is None else merge([before.raw, raw])
    return Kept(before.keep_g, merge([before.values, values]), both, clip_bg)


def fresh_choice(
    kept: Kept, names: Sequence[str], batches: Sequence[str], recipe: Recipe, measured_bg: np.ndarray
) -> set[str] | None:
    """Genes that a ranking over all rows would choose, with the frozen filters and totals.

    For seurat_v3 counts of old batches are clipped where they were clipped before, so the answer is close
    rather than exact.

    Parameters
    ----------
    names
        Kept genes.
    batches
        The view's batches.
    measured_bg
        bool (n_batches of `kept`, n_kept genes).

    Returns
    -------
    Names; None if genes were not ranked, or can't be any more.
    """
    found_g = np.asarray(measured_bg.all(axis=0))
    found_names = [name for name, found in zip(names, found_g, strict=True) if found]
    values = select(kept.values, found_g)
    try:
        if recipe.search in ("seurat", "cell_ranger"):
            table = hvg.rank_dispersions(
                hvg.ones_as_logarithms(values) if recipe.binarize else values,
                found_names,
                batches,
                flavor=recipe.search,
                n_top=recipe.n_top,
                by_batch=recipe.by_batch,
            )
        elif recipe.search == "seurat_v3" and kept.raw is not None and kept.clip_bg is not None:
            table = hvg.rank_variances(
                select(kept.raw, found_g),
                _variances(kept, found_g, batches, recipe),
                found_names,
                n_top=recipe.n_top,
            )
        elif recipe.search == "peaks":
            sums = pool(values).sum_bg[0] if recipe.peaks_on == "log" else pool(values).detected_bg[0]
            chosen, _ = variable_peaks(sums, int(values.n_b.sum()), n_top=recipe.n_top)
            return {name for name, one in zip(found_names, chosen, strict=True) if one}
        else:
            return None
    except StreamxError:
        return None
    return set(table.index[table["highly_variable"]])


def _variances(kept: Kept, found_g: np.ndarray, batches: Sequence[str], recipe: Recipe) -> np.ndarray:
    """seurat_v3's standardised variances: the regression of all rows, the clip of before."""
    assert kept.raw is not None
    assert kept.clip_bg is not None
    raw = kept.raw if recipe.by_batch else pool(kept.raw)
    trends = {}
    for k, code in enumerate(raw.code_b):
        name = str(batches[int(code)]) if recipe.by_batch else "all cells"
        trend = hvg.regularised_sd(
            int(raw.n_b[k]), raw.sum_bg[k, found_g], raw.squares_bg[k, found_g], batch=name
        )
        full = {key: np.zeros(len(found_g)) for key in ("mean", "sd")}
        full["mean"][found_g], full["sd"][found_g] = trend["mean"], trend["sd"]
        trends[int(code)] = {**full, "clip": kept.clip_bg[k if recipe.by_batch else 0]}
    return standardised(raw, kept.values, trends, found_g, by_batch=recipe.by_batch)
