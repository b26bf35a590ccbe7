"""The part of a page about one query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamx.plots.style import NO_COLOR
from streamx.report.facts import Query
from streamx.report.parts import cell, chip, fact_list, figure, flow_of, metrics_table, table
from streamx.report.pictures import Picture, histogram_svg
from streamx.report.text import name, number, share

MOST_LABELS, MOST_GENES = 40, 60
TIMES = {"seconds": "seconds", "cpu_seconds": "CPU seconds"}  # of mapping a query


def section(query: Query, color: Mapping[str, str], picture: Picture | None, flow: str | None) -> str:
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
        parts.append(left_out("flow of labels") if flow is None else flow_of(query.given, flow))
    parts.append(metrics_table(query.metrics, "h3", "the reference and this query"))
    parts.append(_genes(query))
    about = {"source": query.source} if query.source else {}
    about |= _batches(query.batches)
    parts.append(f"<h3>Record</h3>{fact_list(about | query.about | _spent(query.spent))}")
    return "".join(parts)


def _batches(counts: Mapping[str, int]) -> dict[str, str]:
    """The largest ones, and how many there are more."""
    shown = {f"batch {label}": f"{count:,} cells" for label, count in list(counts.items())[:MOST_LABELS]}
    more = list(counts.values())[MOST_LABELS:]
    return shown | ({f"and {len(more):,} more batches": f"{sum(more):,} cells"} if more else {})


def _spent(spent: Mapping[str, Any]) -> dict[str, str]:
    found = {what: f"{spent[measured]:,.1f}" for measured, what in TIMES.items() if measured in spent}
    if "peak_rss_bytes" in spent:
        found["peak memory"] = f"{spent['peak_rss_bytes'] / 1e9:.2f} GB"
    return found


def _agreement(scores: Mapping[str, Any]) -> str:
    told = [
        f"{what.replace('_', ' ')} {number(scores[what])}"
        for what in ("accuracy", "balanced_accuracy", "macro_f1")
    ]
    n, recall = scores["n_scored"], scores["recall"]
    text = f"<h3>Given labels</h3><p>{', '.join(told)}, of {n:,} cells; those not placed count as wrong.</p>"
    least = dict(sorted(recall.items(), key=lambda pair: (pair[1], pair[0]))[:MOST_LABELS])
    summary = f"<summary>Share found of each of {len(recall):,} labels, the worst first</summary>"
    return f"{text}<details>{summary}{fact_list(least)}</details>"


def left_out(what: str) -> str:
    return f'<p class="soft">No {what} of its own: the page would be too large.</p>'


def _figures(query: Query, picture: Picture | None) -> str:
    figures = [] if picture is None else [figure(picture)]
    if query.labelling is not None:
        mean = number(query.labelling.mean)
        figures.append(
            f"<figure>{histogram_svg(query.labelling.histogram)}"
            f"<figcaption>Cells by the uncertainty of their label; mean {mean}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _composition(query: Query, color: Mapping[str, str]) -> str:
    assert query.labelling is not None
    counts, novel = query.labelling.counts, query.labelling.novel
    most = max(counts.values(), default=1)
    rows = []
    for label, count in list(counts.items())[:MOST_LABELS]:
        shade = color.get(label, NO_COLOR)
        bar = f'<span class="share" style="width:{6 * count / most:.2f}rem;background:{shade}"></span>'
        rows.append(
            f'<tr><th scope="row">{chip(shade)}{name(label, 120)}</th>{cell("cells", number(count), "n")}'
            f"{cell('share', f'{share(count, query.n_passed)} {bar}')}"
            f"{cell('uncertainty', number(query.labelling.uncertainty[label]), 'n')}"
            f"{'' if novel is None else cell('novel', share(novel[label], count), 'n')}</tr>"
        )
    columns = [("label", ""), ("cells", "n"), ("share", ""), ("uncertainty", "n")]
    shown = table(columns if novel is None else [*columns, ("novel", "n")], rows)
    rest = list(counts.values())[MOST_LABELS:]
    more = f'<p class="soft">and {sum(rest):,} cells of {len(rest):,} rarer labels</p>' if rest else ""
    return f"<h3>Transferred labels</h3>{shown}{more}" if rows else ""


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
