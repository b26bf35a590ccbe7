"""Facts and pictures -> one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import streamx
from streamx.config import UNLABELED
from streamx.plots.style import NO_COLOR
from streamx.report.facts import Facts, Metric, Query
from streamx.report.pictures import Picture, histogram_svg, sankey_svg
from streamx.report.text import NONE, escape, name, number, share, shortened

# Even if a name slipped through unescaped, a browser would load and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_LABELS, MOST_GENES, MOST_NOTES, MOST_CHIPS, MOST_ROWS = 40, 60, 12, 60, 30
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


def make_page(
    facts: Facts,
    color: Mapping[str, str],
    overview: Sequence[Picture],
    pictures: Mapping[int, Picture],
    flows: Mapping[int, str],
) -> str:
    """The page.

    Parameters
    ----------
    color
        Colour per label.
    overview
        Pictures of all cells.
    pictures, flows
        By the query's position: its picture, and its labels' flow as SVG. What is left out, for the page's
        size, is said.
    """
    title = f"{len(facts.queries)} {_plural(len(facts.queries), 'query', 'queries')} mapped onto "
    title += shortened(Path(facts.reference.name).name or facts.reference.name, 60)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = [
        f"<h1>{name(title)}</h1>",
        _tiles(facts),
        _notes(facts),
        _overview(facts, color, overview),
        _flows(facts, color),
        _metrics(facts.metrics, "h2"),
        _table(facts, color),
        _queries(facts, color, pictures, flows),
        _origin(facts),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="streamx {escape(streamx.__version__)}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


# -- the whole -----------------------------------------------------------------------------------------


def _tiles(facts: Facts) -> str:
    mapped = facts.mapped
    n_cells, n_passed = sum(q.n_cells for q in mapped), sum(q.n_passed for q in mapped)
    overlaps = [q.gene_overlap for q in mapped if q.gene_overlap is not None]
    scored = [q for q in mapped if q.agreement]
    tiles = [
        (f"{facts.reference.n_cells:,}", "reference cells"),
        (f"{n_cells:,}", "query cells"),
        (share(n_passed, n_cells), "of them placed"),
    ]
    if facts.failed:
        tiles.append((f"{len(facts.failed):,}", "queries failed"))
    if overlaps:
        tiles.append((f"{min(overlaps):.1%}", "least gene overlap"))
    if facts.label_key is not None and n_passed:
        unknown = sum(_unknown(q) for q in mapped)
        tiles.append((share(unknown, n_passed), "of the placed stayed Unknown"))
    if scored:
        n = sum(q.agreement["n_scored"] for q in scored)
        right = sum(q.agreement["accuracy"] * q.agreement["n_scored"] for q in scored) / n
        tiles.append((f"{right:.1%}", f"of {n:,} given labels found"))
    items = "".join(f"<li><strong>{escape(value)}</strong>{escape(what)}</li>" for value, what in tiles)
    return f'<ul class="tiles">{items}</ul>'


def _notes(facts: Facts) -> str:
    """Errors first, then what deserves a second look."""
    notes = [("bad", at, query.error) for at, query in enumerate(facts.queries) if query.error is not None]
    notes += [("warn", at, text) for at, query in enumerate(facts.queries) for text in query.warnings]
    if not notes:
        return "<p>No warnings.</p>"
    items = [
        f'<li class="{kind}"><a href="#q{at}">{name(facts.queries[at].name, 60)}</a>: {name(text, 600)}</li>'
        for kind, at, text in notes
    ]
    text = f'<h2>Look at these first</h2><ul class="notes">{"".join(items[:MOST_NOTES])}</ul>'
    if len(items) > MOST_NOTES:
        rest = f'<ul class="notes">{"".join(items[MOST_NOTES:])}</ul>'
        text += f"<details><summary>{len(items) - MOST_NOTES:,} more</summary>{rest}</details>"
    return text


def _overview(facts: Facts, color: Mapping[str, str], overview: Sequence[Picture]) -> str:
    if not overview:
        return ""
    figures = "".join(_figure(picture) for picture in overview)
    n = len(facts.sketch.origin_n)
    drawn = f'<p class="soft">UMAP of {n:,} cells, drawn at random where there are more.</p>'
    return f'<h2>Where the cells lie</h2><div class="pictures">{figures}</div>{_legend(facts, color)}{drawn}'


def _figure(picture: Picture) -> str:
    caption = escape(picture.caption)
    return f'<figure><img src="{picture.uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _legend(facts: Facts, color: Mapping[str, str]) -> str:
    """Colours of the labels, the commonest in the reference first."""
    names = sorted(color, key=lambda label: (-facts.reference.labels.get(label, 0), label))
    names = [label for label in names if label]
    items = [f"<li>{_chip(color[label])}{name(label, 60)}</li>" for label in names]
    text = f'<ul class="legend">{"".join(items[:MOST_CHIPS])}</ul>'
    if len(items) > MOST_CHIPS:
        rest = f'<ul class="legend">{"".join(items[MOST_CHIPS:])}</ul>'
        text += f"<details><summary>{len(items) - MOST_CHIPS:,} more labels</summary>{rest}</details>"
    return text if items else ""


def _flows(facts: Facts, color: Mapping[str, str]) -> str:
    """Given against transferred labels of all queries together."""
    tables = [query.given for query in facts.mapped if query.given is not None]
    if len(tables) < 2:
        return ""
    whole = reduce(lambda sums, table: sums.add(table, fill_value=0), tables).fillna(0).astype(int)
    return f"<h2>Given and transferred labels, all queries</h2>{_flow(whole, sankey_svg(whole, color))}"


def _flow(counts: Any, svg: str) -> str:
    n = int(counts.to_numpy().sum())
    return f'<p class="soft">Left: given, right: transferred; {n:,} cells that have both.</p>{svg}'


def _metrics(metrics: Sequence[Metric], heading: str) -> str:
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
            _cell("value", number(metric.value), "n"),
            _cell("exact, or 95 % interval", name(certain)),
            _cell("cells or draws", number(metric.n), "n"),
            _cell("meaning", escape(MEANINGS.get(metric.name, "")), "wide soft"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = _head(
        ("metric", ""),
        ("value", "n"),
        ("exact, or 95 % interval", ""),
        ("cells or draws", "n"),
        ("meaning", ""),
    )
    return (
        f"<{heading}>Metrics in the latent space</{heading}>"
        f'<table class="folds">{head}<tbody>{"".join(rows)}</tbody></table>'
    )


def _head(*columns: tuple[str, str]) -> str:
    cells = (f'<th scope="col"{_class(kind)}>{escape(what)}</th>' for what, kind in columns)
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _cell(what: str, inside: str, kind: str = "") -> str:
    return f'<td data-name="{escape(what)}"{_class(kind)}>{inside}</td>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _table(facts: Facts, color: Mapping[str, str]) -> str:
    """All queries in one table, folded away if there are many."""
    if len(facts.queries) < 2:
        return ""
    scored = any(query.agreement for query in facts.queries)
    labelled = facts.label_key is not None
    columns = [("query", ""), ("cells", "n"), ("placed", "n"), ("genes found", "n")]
    columns += [("Unknown", "n"), ("uncertainty", "n")] if labelled else []
    columns += [("accuracy", "n")] if scored else []
    columns += [("labels", "")] if labelled else []
    rows = []
    for at, query in enumerate(facts.queries):
        link = f'<th scope="row"><a href="#q{at}">{name(query.name, 60)}</a></th>'
        if query.error is not None:
            failed = f'<td class="bad wide" colspan="{len(columns) - 1}">{name(query.error, 200)}</td>'
            rows.append(f"<tr>{link}{failed}</tr>")
            continue
        cells = [
            _cell("cells", number(query.n_cells), "n"),
            _cell("placed", share(query.n_passed, query.n_cells), "n"),
            _cell("genes found", _percent(query.gene_overlap), "n"),
        ]
        if labelled:
            mean = None if query.labelling is None else query.labelling.mean
            cells.append(_cell("Unknown", share(_unknown(query), query.n_passed), "n"))
            cells.append(_cell("uncertainty", number(mean), "n"))
        if scored:
            cells.append(_cell("accuracy", number(query.agreement.get("accuracy")), "n"))
        if labelled:
            cells.append(_cell("labels", _stack(query, color), "wide"))
        rows.append(f"<tr>{link}{''.join(cells)}</tr>")
    table = f'<table class="folds">{_head(*columns)}<tbody>{"".join(rows)}</tbody></table>'
    opened = " open" if len(rows) <= MOST_ROWS else ""
    summary = f"<summary>{len(rows):,} queries in a table</summary>"
    return f"<h2>Queries</h2><details{opened}>{summary}{table}</details>"


def _percent(part: float | None) -> str:
    return NONE if part is None else f"{part:.1%}"


def _stack(query: Query, color: Mapping[str, str]) -> str:
    """The shares of the labels, side by side."""
    if query.labelling is None or not query.n_passed:
        return ""
    parts = [
        f'<span style="width:{100 * count / query.n_passed:.2f}%;background:{color.get(label, NO_COLOR)}" '
        f'title="{escape(shortened(label, 60))}: {count:,}"></span>'
        for label, count in list(query.labelling.counts.items())[:MOST_LABELS]
    ]
    return f'<span class="stack">{"".join(parts)}</span>'


def _unknown(query: Query) -> int:
    counts = {} if query.labelling is None else query.labelling.counts
    return sum(counts.get(label, 0) for label in UNLABELED)


# -- one query -----------------------------------------------------------------------------------------


def _queries(
    facts: Facts, color: Mapping[str, str], pictures: Mapping[int, Picture], flows: Mapping[int, str]
) -> str:
    opened = " open" if len(facts.queries) == 1 else ""
    parts = []
    for at, query in enumerate(facts.queries):
        inside = _query(query, color, pictures.get(at), flows.get(at))
        if query.error is None and at not in pictures and len(facts.mapped) > 1:
            inside += _left_out("picture")
        told = f"{query.n_cells:,} cells" if query.error is None else "failed"
        kind = "soft" if query.error is None else "bad"
        parts.append(
            f'<details{opened}><summary>{name(query.name, 120)} <span class="{kind}">{told}</span></summary>'
            f'<div id="q{at}">{inside}</div></details>'
        )
    heading = "The query" if len(parts) == 1 else "Query by query"
    return f"<h2>{heading}</h2>{''.join(parts)}"


def _query(query: Query, color: Mapping[str, str], picture: Picture | None, flow: str | None) -> str:
    parts = []
    if query.error is not None:
        parts.append(f'<p class="bad">{name(query.error, 2_000)}</p>')
    if query.warnings:
        items = "".join(f"<li>{name(text, 2_000)}</li>" for text in query.warnings)
        parts.append(f'<ul class="notes warn">{items}</ul>')
    parts.append(_figures(query, picture))
    if query.labelling is not None:
        parts.append(_composition(query, color))
    if query.agreement:
        parts.append(_agreement(query.agreement))
        parts.append(_left_out("flow of labels") if flow is None else _flow(query.given, flow))
    parts.append(_metrics(query.metrics, "h3"))
    parts.append(_genes(query))
    about = {"source": query.source} if query.source else {}
    about |= {
        f"batch {label}": f"{count:,} cells" for label, count in list(query.batches.items())[:MOST_LABELS]
    }
    parts.append(f"<h3>Record</h3>{_facts(about | query.about)}")
    return "".join(parts)


def _agreement(scores: Mapping[str, Any]) -> str:
    told = [
        f"{what.replace('_', ' ')} {number(value)}" for what, value in scores.items() if what != "n_scored"
    ]
    n = scores["n_scored"]
    return f"<h3>Given labels</h3><p>{', '.join(told)}, of {n:,} cells; those not placed count as wrong.</p>"


def _left_out(what: str) -> str:
    return f'<p class="soft">No {what} of its own: the page would be too large.</p>'


def _figures(query: Query, picture: Picture | None) -> str:
    figures = [] if picture is None else [_figure(picture)]
    if query.labelling is not None:
        mean = number(query.labelling.mean)
        figures.append(
            f"<figure>{histogram_svg(query.labelling.histogram)}"
            f"<figcaption>Cells by the uncertainty of their label; mean {mean}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _composition(query: Query, color: Mapping[str, str]) -> str:
    assert query.labelling is not None
    counts = query.labelling.counts
    most = max(counts.values(), default=1)
    rows = []
    for label, count in list(counts.items())[:MOST_LABELS]:
        shade = color.get(label, NO_COLOR)
        bar = f'<span class="share" style="width:{6 * count / most:.2f}rem;background:{shade}"></span>'
        rows.append(
            f'<tr><th scope="row">{_chip(shade)}{name(label, 120)}</th>{_cell("cells", number(count), "n")}'
            f"{_cell('share', f'{share(count, query.n_passed)} {bar}')}"
            f"{_cell('mean uncertainty', number(query.labelling.uncertainty[label]), 'n')}</tr>"
        )
    head = _head(("label", ""), ("cells", "n"), ("share", ""), ("uncertainty", "n"))
    table = f'<table class="folds">{head}<tbody>{"".join(rows)}</tbody></table>'
    rest = list(counts.values())[MOST_LABELS:]
    more = f'<p class="soft">and {sum(rest):,} cells of {len(rest):,} rarer labels</p>' if rest else ""
    return f"<h3>Transferred labels</h3>{table}{more}" if rows else ""


def _chip(color: str) -> str:
    return f'<span class="chip" style="background:{color}"></span>'


def _genes(query: Query) -> str:
    if query.gene_overlap is None:
        return ""
    found = "" if query.n_genes_found is None else f"{query.n_genes_found:,} genes, "
    text = f"<h3>Genes</h3><p>{found}{query.gene_overlap:.1%} of the reference's, were found.</p>"
    if query.missing_genes:
        shown = ", ".join(name(gene, 40) for gene in query.missing_genes[:MOST_GENES])
        more = len(query.missing_genes) - MOST_GENES
        shown += f" and {more:,} more" if more > 0 else ""
        text += f"<details><summary>{len(query.missing_genes):,} missing</summary><p>{shown}</p></details>"
    return text


# -- where it comes from -------------------------------------------------------------------------------


def _origin(facts: Facts) -> str:
    reference = facts.reference
    about = {"reference": reference.name, "cells": reference.n_cells, "genes": reference.n_genes}
    if facts.label_key is not None:
        about["label column"] = facts.label_key
    text = f"<h2>Where this comes from</h2>{_facts(about | reference.about | facts.about)}"
    for what, counts in (("batches", reference.batches), ("labels", reference.labels)):
        if counts:
            rows = _facts({label: f"{count:,} cells" for label, count in list(counts.items())[:200]})
            text += f"<details><summary>{len(counts):,} {what} of the reference</summary>{rows}</details>"
    if facts.settings:
        text += f"<details><summary>Settings</summary>{_facts(facts.settings)}</details>"
    return text


def _facts(about: Mapping[str, Any]) -> str:
    """Names and values; what is None is left out."""
    rows = [
        f"<dt>{name(what.replace('_', ' '), 80)}</dt><dd>{number(value)}</dd>"
        for what, value in about.items()
        if value is not None
    ]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _plural(n: int, one: str, many: str) -> str:
    return one if n == 1 else many
