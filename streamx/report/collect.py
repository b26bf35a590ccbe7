"""A reference and a folder of mapped queries -> the facts of a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import streamx
from streamx.config import ReportConfig
from streamx.errors import BadFileError, UsageError
from streamx.labels import Labels, encode_labels
from streamx.mapping import Cells, metrics, read_cells, read_queries, read_reference
from streamx.neighbors.blocks import take_rows
from streamx.plots.layout import sketch_rows
from streamx.report.facts import Facts, Metric, Query, Reference, Sketch
from streamx.report.query import counts, described, metric_rows, recorded
from streamx.store.location import Location, follow, is_there, open_location

PLAN, NO_LABEL = "map.json", "unknown"
METRICS_AS_MAPPED = ("unlabeled", "max_cells", "resolution")  # settings of a job that hold for all of it too


def collect(output: str | Path | Location, config: ReportConfig, *, progress: bool = True) -> Facts:
    """Read what ``project``, ``transfer`` and ``map`` left in a folder.

    Columns and latents are read query by query; of them only counts and the cells to draw are kept. Of a job
    those queries count that have a record.

    Raises
    ------
    UsageError
        If nothing says which reference this was mapped onto, or there is no label column as asked for.
    """
    out = open_location(output)
    plan = json.loads(out.read(PLAN)) if out.exists(PLAN) else {}
    model = _model_of(out, plan, config)
    reference = read_reference(model)
    parts = list(_planned(out, plan) if plan else _found(out, reference))
    mapped = [cells for cells, _ in parts if cells is not None]
    settings = plan.get("settings", {})
    key = _label_key(config.label_key or settings.get("label_key"), mapped)
    if config.truth_key is not None and not any(config.truth_key in cells.columns for cells in mapped):
        raise UsageError(f"no query has the obs column {config.truth_key!r}", where=str(out))
    truth_key = config.truth_key or (settings.get("transfer") or {}).get("truth_key") or key
    share = config.max_cells // 2
    least = max(share // max(len(mapped), 1), 50)
    sketches = [_sketch(reference, -1, key, share, config.seed)]
    queries = []
    bar = tqdm(parts, desc="queries", unit="query", leave=False, disable=None if progress else True)
    for at, (cells, known) in enumerate(bar):
        if cells is None:
            queries.append(known)
            continue
        queries.append(described(cells, known, key, truth_key))
        sketches.append(_sketch(cells, at, None if key is None else f"{key}_pred", least, config.seed))
    overall = []
    if config.metrics and (len(mapped) > 1 or (mapped and not any(query.metrics for query in queries))):
        how = settings.get("metrics") or {}
        same = {name: how[name] for name in METRICS_AS_MAPPED if name in how}
        overall = _overall(reference, mapped, key, truth_key, config, same)
    card = json.loads(model.read("model.json"))
    return Facts(
        reference=_reference(reference, card, key),
        queries=queries,
        label_key=key,
        sketch=Sketch(
            np.concatenate([part.latent_nk for part in sketches]),
            np.concatenate([part.origin_n for part in sketches]),
            np.concatenate([part.label_n for part in sketches]),
            np.concatenate([part.uncertainty_n for part in sketches]),
        ),
        metrics=overall,
        about=_about(plan, card, config),
        settings=dict(_flat(settings)),
    )


def _model_of(out: Location, plan: Mapping[str, Any], config: ReportConfig) -> Location:
    if config.model is not None:
        return open_location(config.model)
    reference = plan.get("reference")
    path = reference.get("path") if isinstance(reference, dict) else reference
    if not path:
        if not is_there(out):
            raise UsageError("no such folder", where=str(out), fix="streamx map REFERENCE QUERY... -o OUT")
        raise UsageError(
            "does not say what it was mapped onto", where=str(out), fix="name the reference: --model MODEL"
        )
    return follow(out, path)


def _planned(out: Location, plan: Mapping[str, Any]) -> Iterator[tuple[Cells | None, Query]]:
    """Each query of a job, in its order: its cells, if it is mapped, and what is recorded of it."""
    for planned in plan["queries"]:
        known, cells = recorded(out, planned), None
        if known.error is None:
            try:
                cells = read_cells(out.below(f"{known.name}.zarr"), known.name)
            except BadFileError:
                known = replace(known, error=f"was mapped, and {known.name}.zarr is gone")
        yield cells, known


def _found(out: Location, reference: Cells) -> Iterator[tuple[Cells, Query]]:
    """Each query that lies in a folder."""
    for cells in read_queries(out, reference):
        yield cells, Query(cells.name)


def _label_key(asked: str | None, parts: Sequence[Cells]) -> str | None:
    """The column whose labels were transferred: the one asked for, or the only one that there is."""
    found = {
        name.removesuffix("_pred")
        for part in parts
        for name in part.columns
        if name.endswith("_pred") and name.removesuffix("_pred") + "_uncertainty" in part.columns
    }
    if asked is not None and found and asked not in found:
        raise UsageError(f"no labels {asked!r} were transferred", fix=f"one of: {', '.join(sorted(found))}")
    if asked is None and len(found) > 1:
        raise UsageError(
            "labels of several columns were transferred", fix=f"--label-key {' or '.join(sorted(found))}"
        )
    return asked or next(iter(found), None)


def _sketch(cells: Cells, origin: int, column: str | None, most: int, seed: int) -> Sketch:
    """At most so many cells with a latent, drawn by their labels: of rare ones some are seen too."""
    label = None
    if column is not None and column in cells.columns:
        label = encode_labels(cells.column(column), ("",))
    rows = sketch_rows(cells.latents, most, None if label is None else label.codes_n, seed)
    names = np.full(len(rows), NO_LABEL, dtype=object)
    if label is not None:
        names = Labels(label.codes_n[rows], label.names).text(NO_LABEL)
    uncertainty = np.full(len(rows), np.nan)
    beside = None if column is None else f"{column.removesuffix('_pred')}_uncertainty"
    if origin >= 0 and beside in cells.columns:
        uncertainty = cells.column(str(beside)).to_numpy(dtype=float)[rows]
    return Sketch(take_rows(cells.latents, rows), np.full(len(rows), origin), names, uncertainty)


# -- the whole -----------------------------------------------------------------------------------------


def _reference(cells: Cells, card: Mapping[str, Any], key: str | None) -> Reference:
    batch_key = cells.batch_key or card.get("batch_key")
    known = {name: cells.column(name) for name in (batch_key, key) if name in cells.columns}
    train = card.get("settings", {}).get("train", {})
    about = {"model": card.get("model"), "id": card.get("id"), "seed": train.get("seed")}
    about |= card.get("training", {})
    about |= {f"trained with {tool}": version for tool, version in card.get("versions", {}).items()}
    return Reference(
        name=str(follow(cells.location, "..")),
        n_cells=cells.n_cells,
        n_genes=len(card["genes"]) if "genes" in card else None,
        batches=counts(encode_labels(known[batch_key], ())) if batch_key in known else {},
        labels=counts(encode_labels(known[key])) if key in known else {},
        about={name: value for name, value in about.items() if value is not None},
    )


def _about(plan: Mapping[str, Any], card: Mapping[str, Any], config: ReportConfig) -> dict[str, Any]:
    about = {"report made by": f"streamx {streamx.__version__}", "seed of the pictures": config.seed}
    about |= {f"mapped by {tool}": version for tool, version in plan.get("versions", {}).items()}
    planned = (plan.get("reference") or {}).get("id")
    if planned not in (None, card.get("id"), *card.get("earlier", ())):
        about["id of the model that was mapped onto"] = f"{planned}, which is another than the one here"
    return about


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of all steps, one name each."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} ")
        elif value is not None:
            yield before + name, ", ".join(map(str, value)) if isinstance(value, list) else value


def _overall(
    reference: Cells,
    mapped: list[Cells],
    key: str | None,
    truth_key: str | None,
    config: ReportConfig,
    settings: Mapping[str, Any],
) -> list[Metric]:
    """Mixing and separation over the reference and all queries."""
    given = [cells for cells in mapped if truth_key in cells.columns]
    scored = bool(given) and all(f"{key}_pred" in cells.columns for cells in given)
    found = metrics(
        reference,
        mapped,
        label_key=key,
        batch_key=config.batch_key,
        truth_key=truth_key if scored else None,
        seed=config.seed,
        threads=config.threads,
        **settings,
    )
    return metric_rows(found)
