"""Every figure of a reference and of what was mapped onto it, as files in a folder (``streamx plot``)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from streamx.config import PlotConfig, build
from streamx.errors import UsageError
from streamx.labels import Labels, encode_labels, unify_labels
from streamx.mapping import LATENT, Cells, batches_of, read_queries, read_reference
from streamx.mapping.cells import IN_MEMORY
from streamx.neighbors.blocks import Stacked, finite_rows, settle
from streamx.plots import confusion, embedding, history, meta, meta2, place, umap
from streamx.plots.layout import sketch_rows
from streamx.plots.style import palette
from streamx.store.location import follow, local_folder, open_location

BATCH, ORIGIN, REFERENCE = "batch", "origin", "reference"
MOST_QUERIES = 24  # that have a panel each; more are drawn as one, `report` shows each
UMAP_SETTINGS = ("n_neighbors", "min_dist", "max_cells", "seed", "label_key", "batch_key")


@dataclass
class Drawn:
    """What the functions of :mod:`streamx.plots` draw from: obs and obsm, as of an AnnData."""

    obs: pd.DataFrame
    obsm: dict[str, np.ndarray] = field(default_factory=dict)


def draw(model: str | Path, mapped: str | Path | None, output: str | Path, **settings: Any) -> list[str]:
    """Draw a reference and, if named, the queries mapped onto it.

    More than 24 queries are drawn as one.

    ============================  ======================================================================
    history                       losses over epochs
    umap_<color>                  the reference's UMAP, queries placed into it, each in its panel
    confusion                     predictions against the queries' own labels (needs `label_key`)
    meta                          correlation of the mean latents of all (batch, label) pairs
    meta2_<query>                 the same, labels of a query against those of the reference
    ============================  ======================================================================

    Parameters
    ----------
    model
        Folder that ``train`` wrote.
    mapped
        Folder that ``project`` wrote, or None.
    output
        Folder for the figures.
    settings
        Fields of :class:`~streamx.config.PlotConfig`.

    Returns
    -------
    list of str
        Paths of the figures.

    Raises
    ------
    UsageError
        If a column to colour by exists nowhere; lists those there are.
    """
    config: PlotConfig = build(PlotConfig, settings)
    reference = read_reference(model)
    queries = [] if mapped is None else read_queries(mapped, reference)
    folder = local_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[str] = []

    def path(name: str) -> Path:
        paths.append(str(folder / f"{name}.{config.format}"))
        return Path(paths[-1])

    losses = open_location(model)
    given = pd.read_csv(io.BytesIO(losses.read("history.csv"))) if losses.shared else Path(losses.root)
    history(given, path("history"), show=False)
    colors = colors_of(config, [reference, *queries])
    cells = gather(reference, queries, config, colors)
    cells.obsm["X_umap"] = coordinates(cells, reference, config, folder)
    for color in colors:
        groups = _origins_with(cells, color) if queries and color != BATCH else None
        embedding(
            cells,
            color,
            color_map=_label_colors(cells, config.label_key, color),
            groupby=ORIGIN if groups else None,
            groups=groups,
            save=path(f"umap_{color}"),
            show=False,
        )
    if config.label_key is not None:
        _draw_labels(cells, config.label_key, path)
    return paths


def coordinates(cells: Drawn, reference: Cells, config: PlotConfig, folder: Path) -> np.ndarray:
    """UMAP of cells in the order of :func:`gather`: float32, (n_cells, 2).

    Fitted on the reference, its coordinates are kept in ``umap_reference.npz`` in the folder of the figures
    (``xy``, of its cells with a latent, and ``sketch``, the rows that it was fitted on), and used again as
    long as the model, its cells and the settings are the same; so queries that come later change none.
    """
    latent_nk = cells.obsm[LATENT]
    strata = encode_labels(cells.obs[BATCH], ()).codes_n.astype(np.int64)
    if config.label_key is not None and config.label_key in cells.obs:
        label = encode_labels(cells.obs[config.label_key])
        strata = strata * (len(label.names) + 1) + label.codes_n + 1
    if config.umap == "joint":
        return _fitted(latent_nk, strata, config)[0]
    n = int((cells.obs[ORIGIN] == REFERENCE).sum())  # the first ones
    file = folder / "umap_reference.npz"
    settings = {name: getattr(config, name) for name in UMAP_SETTINGS}
    made_from = {"model": reference.model_id, "cells": _checksum(latent_nk[:n]), **settings}
    found = _read_coordinates(file, made_from)
    if found is None:
        found = _fitted(latent_nk[:n], strata[:n], config)
        partial = file.with_name(f".{file.name}")
        with partial.open("wb") as stream:
            np.savez(stream, xy=found[0], sketch=found[1], made_from=json.dumps(made_from))
        partial.replace(file)
    xy_n2, sketch = found
    fitted = latent_nk[sketch], xy_n2[sketch]
    placed = place(latent_nk[n:], *fitted, seed=config.seed, threads=config.threads)
    return np.concatenate([xy_n2, placed])


def _fitted(latent_nk: np.ndarray, strata: np.ndarray, config: PlotConfig) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of all cells, and the rows that they were fitted on."""
    xy_n2 = umap(
        latent_nk,
        strata=strata,
        n_neighbors=config.n_neighbors,
        min_dist=config.min_dist,
        sketch=config.max_cells,
        seed=config.seed,
        threads=config.threads,
    )
    return xy_n2, sketch_rows(latent_nk, config.max_cells, strata, config.seed)


def _checksum(latent_nk: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(latent_nk).data).hexdigest()


def _read_coordinates(file: Path, made_from: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """What an earlier run kept, if it was made from the same."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            same = json.loads(str(stored["made_from"])) == made_from
            return (stored["xy"], stored["sketch"]) if same else None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # none, or damaged: made again
        return None


def _origins_with(cells: Drawn, color: str) -> list[str]:
    """The reference and those queries that say anything in this column: a panel each."""
    known = encode_labels(cells.obs[color], ("",)).known_n
    return list(cells.obs.loc[known, ORIGIN].unique())


def _label_colors(cells: Drawn, key: str | None, color: str) -> dict[str, str] | None:
    """Labels have the same colours whether given or predicted; other columns have their own."""
    columns = [name for name in (key, f"{key}_pred") if name in cells.obs]
    if color not in columns:
        return None
    names = {name for column in columns for name in encode_labels(cells.obs[column], ("",)).names}
    return palette(sorted(names))


def _draw_labels(cells: Drawn, key: str, path: Any) -> None:
    """The figures that need labels, as far as there are any."""
    predicted = f"{key}_pred"
    if predicted in cells.obs:
        scored = encode_labels(cells.obs[key]).known_n & (cells.obs[ORIGIN] != REFERENCE).to_numpy()
        if scored.any():
            rows = cells.obs.loc[scored]
            confusion(rows[key], rows[predicted], path("confusion"), show=False)
    known = encode_labels(cells.obs[key]).known_n
    labelled = Drawn(cells.obs.loc[known], {LATENT: cells.obsm[LATENT][known]})
    if not known.any():
        return
    meta(labelled, LATENT, color=key, batch=BATCH, save=path("meta"), show=False)
    origins = list(labelled.obs[ORIGIN].unique())
    for name in origins[1:] if origins[0] == REFERENCE else ():
        file = path(f"meta2_{name}")
        meta2(labelled, LATENT, color=key, batch=ORIGIN, batches=[REFERENCE, name], save=file, show=False)


def colors_of(config: PlotConfig, parts: Sequence[Cells]) -> list[str]:
    """Columns to colour by: those asked for, else the batch, the labels and their predictions."""
    columns = {name for part in parts for name in part.columns} | {BATCH}
    chosen = list(config.color)
    if not chosen:
        key = config.label_key
        wanted = [] if key is None else [key, f"{key}_pred", f"{key}_uncertainty"]
        chosen = [BATCH, *(name for name in wanted if name in columns)]
    for name in [*chosen, *([config.label_key] if config.label_key else [])]:
        if name not in columns:
            shown = ", ".join(sorted(name for name in columns if not name.startswith("_streamx_")))
            raise UsageError(
                f"no obs column {name!r}", where=str(follow(parts[0].location, "..")), fix=f"one of: {shown}"
            )
    return chosen


def gather(reference: Cells, queries: Sequence[Cells], config: PlotConfig, colors: Sequence[str]) -> Drawn:
    """Cells that have a latent, with the columns that figures need; what a part lacks is missing there."""
    parts = [reference, *queries]
    latent_nk = settle(Stacked([part.latents for part in parts]), IN_MEMORY)
    obs = pd.DataFrame(index=pd.RangeIndex(len(latent_nk)))
    if len(queries) > MOST_QUERIES:
        names = [f"{len(queries)} queries"]
        together = np.full(len(latent_nk) - reference.n_cells, names[0], dtype=object)
        batches = [*batches_of(reference, [], config.batch_key), together]
    else:
        names = [f"{q.name} (query)" if q.name == REFERENCE else q.name for q in queries]
        batches = batches_of(reference, queries, config.batch_key)
    origin_n = np.repeat(np.arange(len(parts)), [part.n_cells for part in parts])
    obs[ORIGIN] = pd.Categorical.from_codes(origin_n.clip(max=len(names)), [REFERENCE, *names])
    obs[BATCH] = _categorical([encode_labels(part, ()) for part in batches])
    key = config.label_key
    for name in dict.fromkeys([*colors, *([] if key is None else [key, f"{key}_pred"])]):
        if name not in (BATCH, ORIGIN) and any(name in part.columns for part in parts):
            obs[name] = _united(
                [part.column(name) if name in part.columns else part.n_cells for part in parts]
            )
    known = finite_rows(latent_nk)
    if not known.all():
        obs, latent_nk = obs.loc[known], latent_nk[known]
    return Drawn(obs, {LATENT: latent_nk})


def _united(parts: Sequence[pd.Series | int]) -> Any:
    """One column from several: numbers where all are, else text; an int stands for so many missing values."""
    given = [part for part in parts if not isinstance(part, int)]
    numeric = all(pd.api.types.is_numeric_dtype(part) and part.dtype != bool for part in given)
    if not numeric:
        return _categorical(
            [
                Labels(np.full(part, -1, np.int32), []) if isinstance(part, int) else encode_labels(part, ())
                for part in parts
            ]
        )
    return np.concatenate(
        [
            np.full(part, np.nan) if isinstance(part, int) else part.to_numpy(dtype=float, na_value=np.nan)
            for part in parts
        ]
    )


def _categorical(parts: Sequence[Labels]) -> pd.Categorical:
    """One column of labels: four bytes a cell, however long they are."""
    united = unify_labels(*parts)
    return pd.Categorical.from_codes(np.concatenate([part.codes_n for part in united]), united[0].names)
