"""Facts and pictures -> one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import streamx
from streamx.plots.style import NO_COLOR
from streamx.report.facts import Facts, Query
from streamx.report.parts import (
    MEANINGS,
    cell,
    chip,
    fact_list,
    figure,
    flow_of,
    metrics_table,
    table,
)
from streamx.report.pictures import Picture, sankey_svg
from streamx.report.section import MOST_LABELS, TIMES, left_out, section
from streamx.report.text import NONE, escape, name, number, share, shortened

# Even if a name slipped through unescaped, a browser would load and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_NOTES, MOST_CHIPS, MOST_ROWS = 12, 60, 30
IN_A_ROW = (  # metrics with a column in the table of all queries: more would not fit
    *("batch_entropy_mixing", "ilisi", "kbet", "asw_batch"),
    *("clisi", "asw_label", "nmi", "graph_connectivity"),
)


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
        metrics_table(facts.metrics, "h2", "the reference and all queries"),
        _table(facts, color),
        _scores(facts),
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
        labellings = [q.labelling for q in mapped if q.labelling is not None]
        unknown = sum(labelling.n_unknown for labelling in labellings)
        tiles.append((share(unknown, n_passed), "of the placed stayed Unknown"))
        if any(labelling.novel is not None for labelling in labellings):
            novel = sum(labelling.n_novel or 0 for labelling in labellings)
            tiles.append((share(novel, n_passed), "of the placed are novel; 5 % by chance"))
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
    figures = "".join(figure(picture) for picture in overview)
    n = len(facts.sketch.origin_n)
    n_own = int((facts.sketch.origin_n < 0).sum())
    drawn = f"UMAP of {n_own:,} cells of the reference, {n - n_own:,} of the queries placed into it;"
    drawn = f'<p class="soft">{drawn} where there are more, drawn by label, with some of each.</p>'
    return f'<h2>Where the cells lie</h2><div class="pictures">{figures}</div>{_legend(facts, color)}{drawn}'


def _legend(facts: Facts, color: Mapping[str, str]) -> str:
    """Colours of the labels, the commonest in the reference first."""
    names = sorted(color, key=lambda label: (-facts.reference.labels.get(label, 0), label))
    names = [label for label in names if label]
    items = [f"<li>{chip(color[label])}{name(label, 60)}</li>" for label in names]
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
    return f"<h2>Given and transferred labels, all queries</h2>{flow_of(whole, sankey_svg(whole, color))}"


def _table(facts: Facts, color: Mapping[str, str]) -> str:
    """All queries in one table, folded away if there are many."""
    if len(facts.queries) < 2:
        return ""
    scored = any(query.agreement for query in facts.queries)
    labelled = facts.label_key is not None
    asked = any(query.labelling is not None and query.labelling.novel is not None for query in facts.queries)
    columns = [("query", ""), ("cells", "n"), ("placed", "n"), ("genes found", "n")]
    columns += [("Unknown", "n"), ("uncertainty", "n")] if labelled else []
    columns += [("novel", "n")] if asked else []
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
            cell("cells", number(query.n_cells), "n"),
            cell("placed", share(query.n_passed, query.n_cells), "n"),
            cell("genes found", _percent(query.gene_overlap), "n"),
        ]
        found = query.labelling
        if labelled:
            unknown = NONE if found is None else share(found.n_unknown, query.n_passed)
            cells.append(cell("Unknown", unknown, "n"))
            cells.append(cell("uncertainty", number(None if found is None else found.mean), "n"))
        if asked:
            novel = None if found is None else found.n_novel
            cells.append(cell("novel", NONE if novel is None else share(novel, query.n_passed), "n"))
        if scored:
            cells.append(cell("accuracy", number(query.agreement.get("accuracy")), "n"))
        if labelled:
            cells.append(cell("labels", _stack(query, color), "wide"))
        rows.append(f"<tr>{link}{''.join(cells)}</tr>")
    opened = " open" if len(rows) <= MOST_ROWS else ""
    summary = f"<summary>{len(rows):,} queries in a table</summary>"
    return f"<h2>Queries</h2><details{opened}>{summary}{table(columns, rows)}</details>"


def _scores(facts: Facts) -> str:
    """The metrics of each query with the reference, in one table; the others are in its own part."""
    values = {at: {metric.name: metric for metric in query.metrics} for at, query in enumerate(facts.queries)}
    values = {at: found for at, found in values.items() if found}
    names = [name for name in IN_A_ROW if any(name in found for found in values.values())]
    if len(values) < 2 or not names:
        return ""
    rows = []
    for at, found in values.items():
        cells = [f'<th scope="row"><a href="#q{at}">{name(facts.queries[at].name, 60)}</a></th>']
        for what in names:
            metric = found.get(what)
            text = number(None if metric is None else metric.value)
            if metric is not None and metric.interval is not None:
                low, high = map(number, metric.interval)
                text += f' <span class="soft">{low} to {high}</span>'
            cells.append(cell(what.replace("_", " "), text, "n"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    columns = [("query", ""), *((what.replace("_", " "), "n") for what in names)]
    meant = fact_list({what.replace("_", " "): MEANINGS[what] for what in names})
    told = '<p class="soft">Of each query with the reference; small: the 95 % interval, where sampled.</p>'
    summary = f"<summary>Metrics of {len(rows):,} queries in a table</summary>"
    return f"<details>{summary}{told}{table(columns, rows)}{meant}</details>"


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


def _queries(
    facts: Facts, color: Mapping[str, str], pictures: Mapping[int, Picture], flows: Mapping[int, str]
) -> str:
    opened = " open" if len(facts.queries) == 1 else ""
    parts = []
    for at, query in enumerate(facts.queries):
        inside = section(query, color, pictures.get(at), flows.get(at))
        if query.error is None and at not in pictures and len(facts.mapped) > 1:
            inside += left_out("picture")
        told = f"{query.n_cells:,} cells" if query.error is None else "failed"
        kind = "soft" if query.error is None else "bad"
        parts.append(
            f'<details{opened}><summary>{name(query.name, 120)} <span class="{kind}">{told}</span></summary>'
            f'<div id="q{at}">{inside}</div></details>'
        )
    heading = "The query" if len(parts) == 1 else "Query by query"
    return f"<h2>{heading}</h2>{''.join(parts)}"


def _origin(facts: Facts) -> str:
    reference = facts.reference
    about = {"reference": reference.name, "cells": reference.n_cells, "genes": reference.n_genes}
    if facts.label_key is not None:
        about["label column"] = facts.label_key
    spent = [query.spent for query in facts.queries if query.spent]
    for measured, what in TIMES.items():
        if any(measured in found for found in spent):
            about[f"{what} of all queries"] = f"{sum(found.get(measured, 0) for found in spent):,.1f}"
    text = f"<h2>Where this comes from</h2>{fact_list(about | reference.about | facts.about)}"
    for what, counts in (("batches", reference.batches), ("labels", reference.labels)):
        if counts:
            rows = fact_list({label: f"{count:,} cells" for label, count in list(counts.items())[:200]})
            text += f"<details><summary>{len(counts):,} {what} of the reference</summary>{rows}</details>"
    if facts.settings:
        text += f"<details><summary>Settings</summary>{fact_list(facts.settings)}</details>"
    return text


def _plural(n: int, one: str, many: str) -> str:
    return one if n == 1 else many
