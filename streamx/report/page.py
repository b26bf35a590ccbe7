"""Facts and pictures -> one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import streamx
from streamx.plots.style import NO_COLOR
from streamx.report.facts import Facts, Query
from streamx.report.parts import cell, chip, fact_list, figure, flow_of, metrics_table, n_unknown, table
from streamx.report.pictures import Picture, sankey_svg
from streamx.report.section import MOST_LABELS, left_out, section
from streamx.report.text import NONE, escape, name, number, share, shortened

# Even if a name slipped through unescaped, a browser would load and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_NOTES, MOST_CHIPS, MOST_ROWS = 12, 60, 30


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
        metrics_table(facts.metrics, "h2"),
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
        unknown = sum(n_unknown(q) for q in mapped)
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
    figures = "".join(figure(picture) for picture in overview)
    n = len(facts.sketch.origin_n)
    drawn = f'<p class="soft">UMAP of {n:,} cells, drawn at random where there are more.</p>'
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
            cell("cells", number(query.n_cells), "n"),
            cell("placed", share(query.n_passed, query.n_cells), "n"),
            cell("genes found", _percent(query.gene_overlap), "n"),
        ]
        if labelled:
            mean = None if query.labelling is None else query.labelling.mean
            cells.append(cell("Unknown", share(n_unknown(query), query.n_passed), "n"))
            cells.append(cell("uncertainty", number(mean), "n"))
        if scored:
            cells.append(cell("accuracy", number(query.agreement.get("accuracy")), "n"))
        if labelled:
            cells.append(cell("labels", _stack(query, color), "wide"))
        rows.append(f"<tr>{link}{''.join(cells)}</tr>")
    opened = " open" if len(rows) <= MOST_ROWS else ""
    summary = f"<summary>{len(rows):,} queries in a table</summary>"
    return f"<h2>Queries</h2><details{opened}>{summary}{table(columns, rows)}</details>"


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
