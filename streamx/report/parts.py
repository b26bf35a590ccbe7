"""Pieces that the parts of a page share: tables that fold on a phone, lists of facts, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamx.report.facts import Metric
from streamx.report.pictures import Picture
from streamx.report.text import escape, name, number

MEANINGS = {
    "batch_entropy_mixing": "batches mixed around each cell (SCALEX); 0 apart, ln 2 = 0.693 mixed",
    "ebm": "batches mixed around each cell (scArches); 0 apart, 1 mixed",
    "kbet": "share of cells whose neighbours have the batches of the whole; 1 mixed",
    "ilisi": "effective number of batches around a cell, scaled; 1 mixed",
    "clisi": "effective number of labels around a cell, scaled; 1 kept apart",
    "same_batch": "share of neighbours from the own batch; low is mixed",
    "knn_purity": "share of neighbours with the own label",
    "silhouette": "labels kept apart; -1 to 1",
    "asw_label": "labels kept apart; 0 to 1",
    "asw_batch": "batches mixed within labels; 0 to 1",
    "graph_connectivity": "labels in one piece; 0 to 1",
    "nmi": "clusters against labels; 0 to 1",
    "ari": "clusters against labels, chance is 0; up to 1",
}


def figure(picture: Picture) -> str:
    caption = escape(picture.caption)
    return f'<figure><img src="{picture.uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def flow_of(counts: Any, svg: str) -> str:
    n = int(counts.to_numpy().sum())
    return f'<p class="soft">Left: given, right: transferred; {n:,} cells that have both.</p>{svg}'


def metrics_table(metrics: Sequence[Metric], heading: str, of: str) -> str:
    """A row per metric: value, interval, cells, meaning."""
    if not metrics:
        return ""
    rows = []
    for metric in metrics:
        certain = metric.reason or "exact"
        if metric.interval is not None:
            certain = f"{number(metric.interval[0])} to {number(metric.interval[1])}"
        elif metric.value is None:
            certain = metric.reason or "not defined here"
        cells = [
            f'<th scope="row">{name(metric.name.replace("_", " "))}</th>',
            cell("value", number(metric.value), "n"),
            cell("exact, or 95 % interval", name(certain)),
            cell("cells or draws", number(metric.n), "n"),
            cell("meaning", escape(MEANINGS.get(metric.name, "")), "wide soft"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    columns = ("metric", ""), ("value", "n"), ("exact, or 95 % interval", ""), ("cells or draws", "n")
    shown = table([*columns, ("meaning", "")], rows)
    return f"<{heading}>Metrics in the latent space: {of}</{heading}>{shown}"


def table(columns: Sequence[tuple[str, str]], rows: Sequence[str]) -> str:
    """Rows under the names of their columns, each with its class; on a phone every row is a card."""
    cells = (f'<th scope="col"{_class(kind)}>{escape(what)}</th>' for what, kind in columns)
    names = f"<thead><tr>{''.join(cells)}</tr></thead>"
    return f'<table class="folds">{names}<tbody>{"".join(rows)}</tbody></table>'


def cell(what: str, inside: str, kind: str = "") -> str:
    """A cell that knows its column's name, for where names are not above it."""
    return f'<td data-name="{escape(what)}"{_class(kind)}>{inside}</td>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def chip(color: str) -> str:
    return f'<span class="chip" style="background:{color}"></span>'


def fact_list(about: Mapping[str, Any]) -> str:
    """Names and values; what is None is left out."""
    rows = [
        f"<dt>{name(what, 80)}</dt><dd>{number(value)}</dd>"
        for what, value in about.items()
        if value is not None
    ]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""
