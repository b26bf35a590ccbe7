"""What is known of one query: its record in a job, and the columns of its cells."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from streamx.config import UNLABELED
from streamx.labels import Labels, crosstab, encode_labels
from streamx.mapping import Cells
from streamx.mapping.labels import NOVEL
from streamx.metrics import agreement
from streamx.neighbors.blocks import finite_rows
from streamx.report.facts import BINS, Labelling, Metric, Query
from streamx.schema import WARN_BELOW
from streamx.store.location import Location

NOT_YET = "is not mapped yet"
# Above these a query is worth a second look; of cells as the reference has them, .05 are novel.
MANY_LEFT_OUT, MANY_UNKNOWN, UNCERTAIN, MANY_NOVEL = 0.2, 0.2, 0.5, 0.2
SETTINGS_SHOWN = ("norm", "scale", "batch_key", "min_features")


def recorded(out: Location, planned: Mapping[str, Any]) -> Query:
    """What a job has written down of a query; one without a record is not mapped yet."""
    name = str(planned["name"])

    def written(kind: str) -> dict[str, Any]:
        return json.loads(out.read(f"{kind}/{name}.json")) if out.exists(f"{kind}/{name}.json") else {}

    record = written("records")
    error = record.get("error") if record else NOT_YET
    if isinstance(error, dict):
        fix = error.get("fix")
        error = ": ".join(str(error[part]) for part in ("where", "what") if error.get(part))
        error += f" ({fix})" if fix else ""
    sources = planned.get("source") or ()
    return Query(
        name=name,
        source=", ".join(map(without_secrets, [sources] if isinstance(sources, str) else sources)),
        error=None if error is None else without_secrets(error),
        metrics=metric_rows(record.get("metrics") or {}),
        warnings=[
            without_secrets(str(text)).replace("\n  fix: ", "; to mend: ")
            for text in record.get("warnings", ())
        ],
        about=_learnt(record.get("surgery") or {}) | _voted(record.get("transfer") or {}),
        spent=written("timings"),
    )


def _learnt(surgery: Mapping[str, Any]) -> dict[str, str]:
    """Batches that surgery added to the reference for this query, and those that it knew."""
    found = {
        f"surgery, batch {name}": f"learnt from {how['cells']:,} cells in {how['epochs']:,} epochs"
        for name, how in surgery.get("learnt", {}).items()
    }
    return found | {
        f"surgery, batch {name}": "known to the reference" for name in surgery.get("projected", ())
    }


def _voted(transfer: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        "method": "labels by",
        "n_neighbors": "neighbours that vote",
        "knn_recall": "recall of their search",
    }
    found = {words: transfer[name] for name, words in shown.items() if name in transfer}
    for key, of in transfer.get("thresholds", {}).items():
        said = f"{of['value']:.3f}"
        if of["kept"] is not None:
            said += f", which leaves {of['kept']:.1%} of {of['n_cells']:,} held-out reference cells a label"
        if of["error"] is not None:
            said += f", {of['error']:.1%} of these a wrong one"
        found[f"{key} stays Unknown above"] = said
    return found


def described(cells: Cells, known: Query, key: str | None, truth_key: str | None) -> Query:
    """A query that was mapped, with what its cells say.

    Parameters
    ----------
    known
        What is known of it already (:func:`recorded`).
    key, truth_key
        Columns of the labels that were transferred, and of the given ones.
    """
    uns = _uns(cells)
    passed_n = finite_rows(cells.latents)
    fingerprint = json.loads(uns.get("fingerprint", "{}"))
    batch_key = uns.get("batch_key")
    batches = {} if batch_key not in cells.columns else counts(encode_labels(cells.column(batch_key), ()))
    labelling, given, scores = None, None, {}
    if key is not None and f"{key}_pred" in cells.columns:
        predicted = encode_labels(cells.column(f"{key}_pred"), ())
        labelling = _labelling(cells, key, predicted, passed_n)
        if truth_key in cells.columns:
            truth = encode_labels(cells.column(truth_key), UNLABELED)
            given = crosstab(truth.take(passed_n), predicted.take(passed_n))
            scores = agreement(truth, predicted)
    query = replace(
        known,
        n_cells=cells.n_cells,
        n_passed=int(passed_n.sum()),
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
        if query.labelling.n_unknown > MANY_UNKNOWN * query.n_passed:
            unknown = query.labelling.n_unknown / query.n_passed
            found.append(f"{unknown:.0%} of the cells stayed Unknown: types that the reference lacks?")
        if query.labelling.mean > UNCERTAIN:
            found.append(f"labels are uncertain: {query.labelling.mean:.2f} on average")
        if (query.labelling.n_novel or 0) > MANY_NOVEL * query.n_passed:
            novel = (query.labelling.n_novel or 0) / query.n_passed
            found.append(
                f"{novel:.0%} of the cells lie farther from the reference than 95 % of its own do: "
                "types or states that it lacks?"
            )
    return found


def _labelling(cells: Cells, key: str, predicted: Labels, passed_n: np.ndarray) -> Labelling:
    """Of the cells that have a latent."""
    predicted = predicted.take(passed_n)
    uncertainty_n = cells.column(f"{key}_uncertainty").to_numpy(dtype=float)[passed_n]
    size = len(predicted.names)
    n_l = np.bincount(predicted.codes_n[predicted.known_n], minlength=size)
    known_n = predicted.known_n & np.isfinite(uncertainty_n)
    sum_l = np.bincount(predicted.codes_n[known_n], uncertainty_n[known_n], minlength=size)
    bins = np.clip((uncertainty_n[known_n] * BINS).astype(int), 0, BINS - 1)
    novel_l = None
    if f"{key}_novelty" in cells.columns:
        novel_n = cells.column(f"{key}_novelty").to_numpy(dtype=float)[passed_n] > NOVEL
        novel_l = np.bincount(predicted.codes_n[predicted.known_n & novel_n], minlength=size)
    order = sorted(range(size), key=lambda code: (-n_l[code], predicted.names[code]))
    return Labelling(
        {predicted.names[code]: int(n_l[code]) for code in order},
        {predicted.names[code]: float(sum_l[code] / max(n_l[code], 1)) for code in order},
        np.bincount(bins, minlength=BINS),
        float(uncertainty_n[known_n].mean()) if known_n.any() else float("nan"),
        None if novel_l is None else {predicted.names[code]: int(novel_l[code]) for code in order},
    )


def _uns(cells: Cells) -> dict[str, Any]:
    """What ``project`` wrote of a query: texts, numbers and lists."""
    try:
        group: Any = cells.group["uns/streamx"]
    except KeyError:
        return {}
    values = {str(name): np.asarray(group[name][()]) for name in group.array_keys()}
    return {name: value.item() if value.ndim == 0 else value.tolist() for name, value in values.items()}


def counts(labels: Labels) -> dict[str, int]:
    """Cells per label, the commonest first."""
    n_l = np.bincount(labels.codes_n[labels.known_n], minlength=len(labels.names))
    return {labels.names[code]: int(n_l[code]) for code in np.argsort(-n_l, kind="stable")}


def metric_rows(found: Mapping[str, Any]) -> list[Metric]:
    """Metrics as ``streamx metrics`` gives them, with what is known of each."""
    rows = []
    for name, how in found.get("details", {}).items():
        interval, reason = how.get("ci95"), how.get("reason")
        if reason is None and interval is None and "knn_recall" in how:
            reason = f"by a search that found {how['knn_recall']:.1%} of the neighbours"
        rows.append(
            Metric(
                name,
                found.get(name),
                None if interval is None else (float(interval[0]), float(interval[1])),
                int(how.get("n", 0)),
                reason,
            )
        )
    return rows


def without_secrets(text: str) -> str:
    """A place as one may show it: no user, password or signature in its URL (R34)."""
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
    return re.sub(r"(\w+://[^?#\s]*)[?#]\S*", r"\1", text)
