"""A reference and a folder of mapped queries -> the facts of a report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import streamx
from streamx.config import UNLABELED, ReportConfig
from streamx.errors import BadFileError, UsageError
from streamx.labels import Labels, crosstab, encode_labels
from streamx.mapping import Cells, metrics, read_cells, read_queries, read_reference
from streamx.metrics import agreement
from streamx.report.facts import BINS, Facts, Labelling, Metric, Query, Reference, Sketch
from streamx.schema import WARN_BELOW
from streamx.store.location import Location, follow, open_location

PLAN, NO_LABEL = "map.json", "unknown"
MANY_LEFT_OUT, MANY_UNKNOWN, UNCERTAIN = 0.2, 0.2, 0.5  # above these a query is worth a second look
SETTINGS_SHOWN = ("norm", "scale", "batch_key", "min_features")


def collect(output: str | Path | Location, config: ReportConfig, *, progress: bool = True) -> Facts:
    """Read what ``project``, ``transfer`` and ``map`` left in a folder.

    Columns and latents are read query by query; of them only counts and the cells to draw are kept.

    Raises
    ------
    UsageError
        If nothing says which reference this was mapped onto, or there is no label column as asked for.
    """
    out = open_location(output)
    plan = json.loads(out.read(PLAN)) if out.exists(PLAN) else {}
    model = _model_of(out, plan, config)
    cells = read_reference(model)
    parts = list(_planned(out, plan)) if plan else [(q, q.name) for q in read_queries(out, cells)]
    mapped = [part for part, _ in parts if part is not None]
    key = _label_key(config.label_key or plan.get("settings", {}).get("label_key"), mapped)
    if config.truth_key is not None and not any(config.truth_key in part.columns for part in mapped):
        raise UsageError(f"no query has the obs column {config.truth_key!r}", where=str(out))
    card = json.loads(model.read("model.json"))
    rng = np.random.default_rng(config.seed)
    share = config.max_cells // 2
    sketches = [_sketch(cells, -1, key, share, rng)]
    queries = []
    for at, (part, name) in enumerate(
        tqdm(parts, desc="queries", unit="query", leave=False, disable=None if progress else True)
    ):
        known = _recorded(out, plan, name)
        if part is None:
            queries.append(replace(known, error=known.error or "is not mapped yet"))
            continue
        truth = config.truth_key or (plan.get("settings", {}).get("transfer") or {}).get("truth_key") or key
        queries.append(_query(part, known, key, truth))
        least = max(share // len(mapped), 50)
        sketches.append(_sketch(part, at, None if key is None else f"{key}_pred", least, rng))
    overall = []
    if config.metrics and mapped and not plan:
        overall = metric_rows(_overall(model, out, mapped, key, config))
    return Facts(
        reference=_reference(cells, card, key),
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
        settings=dict(_flat(plan.get("settings", {}))),
    )


def _model_of(out: Location, plan: Mapping[str, Any], config: ReportConfig) -> Location:
    if config.model is not None:
        return open_location(config.model)
    reference = plan.get("reference")
    path = reference.get("path") if isinstance(reference, dict) else reference
    if not path:
        raise UsageError(
            "does not say what it was mapped onto", where=str(out), fix="name the reference: --model MODEL"
        )
    return follow(out, path)


def _planned(out: Location, plan: Mapping[str, Any]) -> Iterator[tuple[Cells | None, str]]:
    """Cells of each query of a job, in its order; None where there are none (yet)."""
    for query in plan["queries"]:
        name = str(query["name"])
        try:
            cells = read_cells(out.below(f"{name}.zarr"), name)
        except BadFileError:
            cells = None
        yield cells, name


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


# -- one query -----------------------------------------------------------------------------------------


def _recorded(out: Location, plan: Mapping[str, Any], name: str) -> Query:
    """What a job has written down of a query."""

    def written(kind: str) -> dict[str, Any]:
        return json.loads(out.read(f"{kind}/{name}.json")) if out.exists(f"{kind}/{name}.json") else {}

    record, spent = written("records"), written("timings")
    planned: dict[str, Any] = next((query for query in plan.get("queries", ()) if query["name"] == name), {})
    sources = record.get("source") or planned.get("source") or ()
    error = record.get("error")
    if isinstance(error, dict):
        error = ": ".join(str(error[part]) for part in ("where", "what") if error.get(part))
        error += f" ({record['error']['fix']})" if record["error"].get("fix") else ""
    return Query(
        name=name,
        source=", ".join(map(without_secrets, [sources] if isinstance(sources, str) else sources)),
        error=None if error is None else without_secrets(error),
        metrics=metric_rows(record.get("metrics") or {}),
        warnings=[
            without_secrets(str(text)).replace("\n  fix: ", "; to mend: ")
            for text in record.get("warnings", ())
        ],
        about=_spent(spent) | _voted(record.get("transfer") or {}),
    )


def _spent(timings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("seconds", "cpu_seconds"):
        if name in timings:
            found[name] = f"{timings[name]:,.1f}"
    if "peak_rss_bytes" in timings:
        found["peak memory"] = f"{timings['peak_rss_bytes'] / 1e9:.2f} GB"
    return found


def _voted(transfer: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        "method": "labels by",
        "n_neighbors": "neighbours that vote",
        "knn_recall": "recall of their search",
    }
    return {words: transfer[name] for name, words in shown.items() if name in transfer}


def _query(cells: Cells, known: Query, key: str | None, truth_key: str | None) -> Query:
    """The facts of a query that was mapped."""
    uns = _uns(cells)
    passed = np.isfinite(cells.latent_nk).all(axis=1)
    fingerprint = json.loads(uns.get("fingerprint", "{}"))
    batch_key = uns.get("batch_key")
    batches = {} if batch_key not in cells.columns else _counts(encode_labels(cells.column(batch_key), ()))
    labelling, given, scores = None, None, {}
    if key is not None and f"{key}_pred" in cells.columns:
        predicted = encode_labels(cells.column(f"{key}_pred"), ())
        uncertainty = cells.column(f"{key}_uncertainty").to_numpy(dtype=float)
        labelling = _labelling(predicted.take(passed), uncertainty[passed])
        if truth_key in cells.columns:
            truth = encode_labels(cells.column(truth_key), UNLABELED)
            given = crosstab(truth.take(passed), predicted.take(passed))
            scores = agreement(truth, predicted)
            scores.pop("recall")
    query = replace(
        known,
        n_cells=cells.n_cells,
        n_passed=int(passed.sum()),
        gene_overlap=uns.get("gene_overlap"),
        n_genes_found=uns.get("n_genes_found"),
        missing_genes=uns.get("missing_genes", []),
        batches=batches,
        labelling=labelling,
        given=given if given is not None and given.size else None,
        agreement=scores if scores.get("n_scored") else {},
        about={"model": uns.get("model")}
        | {f"input {name}": without_secrets(str(of)) for name, of in fingerprint.get("inputs", {}).items()}
        | {name: uns[name] for name in SETTINGS_SHOWN if uns.get(name) is not None}
        | known.about,
    )
    return replace(query, warnings=[*query.warnings, *second_looks(query, uns)])


def second_looks(query: Query, uns: Mapping[str, Any]) -> list[str]:
    """What a reader should know of a query; what its job has warned of already is not said again."""
    found = []
    told = " ".join(query.warnings)
    if query.gene_overlap is not None and query.gene_overlap < WARN_BELOW and "genes" not in told:
        found.append(f"has {query.gene_overlap:.0%} of the reference's genes; the others count as zero")
    left_out = query.n_cells - query.n_passed
    if left_out > MANY_LEFT_OUT * query.n_cells and "without a latent" not in told:
        found.append(f"{left_out:,} of {query.n_cells:,} cells did not pass the filter")
    small = uns.get("reference_statistics") or []
    if small and "statistics" not in told:
        found.append(f"too few cells for statistics of their own: {', '.join(small[:5])}")
    if query.labelling is not None and query.n_passed:
        unknown = sum(query.labelling.counts.get(name, 0) for name in UNLABELED) / query.n_passed
        if unknown > MANY_UNKNOWN:
            found.append(f"{unknown:.0%} of the cells stayed Unknown: types that the reference lacks?")
        if query.labelling.mean > UNCERTAIN:
            found.append(f"labels are uncertain: {query.labelling.mean:.2f} on average")
    return found


def _labelling(predicted: Labels, uncertainty_n: np.ndarray) -> Labelling:
    n_l = np.bincount(predicted.codes_n[predicted.known_n], minlength=len(predicted.names))
    known = predicted.known_n & np.isfinite(uncertainty_n)
    sums = np.bincount(predicted.codes_n[known], uncertainty_n[known], minlength=len(predicted.names))
    bins = np.clip((uncertainty_n[known] * BINS).astype(int), 0, BINS - 1)
    order = sorted(range(len(n_l)), key=lambda code: (-n_l[code], predicted.names[code]))
    return Labelling(
        {predicted.names[code]: int(n_l[code]) for code in order},
        {predicted.names[code]: float(sums[code] / max(n_l[code], 1)) for code in order},
        np.bincount(bins, minlength=BINS),
        float(uncertainty_n[known].mean()) if known.any() else float("nan"),
    )


def _sketch(cells: Cells, origin: int, column: str | None, most: int, rng: np.random.Generator) -> Sketch:
    """At most so many cells with a latent, drawn at random."""
    rows = np.flatnonzero(np.isfinite(cells.latent_nk).all(axis=1))
    if len(rows) > most:
        rows = np.sort(rng.choice(rows, most, replace=False))
    labels = np.full(len(rows), NO_LABEL, dtype=object)
    if column is not None and column in cells.columns:
        labels = encode_labels(cells.column(column), ("",)).text(NO_LABEL)[rows]
    uncertainty = np.full(len(rows), np.nan)
    if column is not None and origin >= 0 and f"{column.removesuffix('_pred')}_uncertainty" in cells.columns:
        uncertainty = cells.column(f"{column.removesuffix('_pred')}_uncertainty").to_numpy(dtype=float)[rows]
    return Sketch(np.asarray(cells.latent_nk[rows]), np.full(len(rows), origin), labels, uncertainty)


def _uns(cells: Cells) -> dict[str, Any]:
    """What ``project`` wrote of a query: texts, numbers and lists."""
    try:
        group: Any = cells.group["uns/streamx"]
    except KeyError:
        return {}
    values = {str(name): np.asarray(group[name][()]) for name in group.array_keys()}
    return {name: value.item() if value.ndim == 0 else value.tolist() for name, value in values.items()}


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
        batches=_counts(encode_labels(known[batch_key], ())) if batch_key in known else {},
        labels=_counts(encode_labels(known[key])) if key in known else {},
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


def _counts(labels: Labels) -> dict[str, int]:
    n_l = np.bincount(labels.codes_n[labels.known_n], minlength=len(labels.names))
    return {labels.names[code]: int(n_l[code]) for code in np.argsort(-n_l, kind="stable")}


def _overall(
    model: Location, out: Location, parts: Sequence[Cells], key: str | None, config: ReportConfig
) -> dict[str, Any]:
    """Mixing and separation over the reference and all queries."""
    truth = config.truth_key or key
    scored = key is not None and any(
        truth in part.columns and f"{key}_pred" in part.columns for part in parts
    )
    return metrics(
        model,
        out,
        label_key=key,
        batch_key=config.batch_key,
        truth_key=truth if scored else None,
        seed=config.seed,
        threads=config.threads,
    )


def metric_rows(found: Mapping[str, Any]) -> list[Metric]:
    """Metrics as ``streamx metrics`` gives them, with what is known of each."""
    rows = []
    for name, how in found.get("details", {}).items():
        interval = how.get("ci95")
        rows.append(
            Metric(
                name,
                found.get(name),
                None if interval is None else (float(interval[0]), float(interval[1])),
                int(how.get("n", 0)),
                how.get("reason"),
            )
        )
    return rows


def without_secrets(text: str) -> str:
    """A place as one may show it: no user, password or signature in its URL (R34)."""
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
    return re.sub(r"(\w+://[^?#\s]*)[?#]\S*", r"\1", text)
