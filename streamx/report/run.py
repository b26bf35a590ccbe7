"""``streamx report`` and ``sx.report``: collect, draw, write one page."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from streamx.config import ReportConfig, build
from streamx.errors import UsageError
from streamx.report.collect import collect
from streamx.report.facts import Facts
from streamx.report.page import make_page
from streamx.report.pictures import Picture, draw_cells, label_colors, lay_out_cells, sankey_svg
from streamx.store.location import Location, open_location

log = logging.getLogger("streamx")

MOST_BYTES = 7_000_000  # of pictures; with the text a page stays below 10 MB


def report(
    output: str | Path | Location, page: str | Path, *, progress: bool = True, **settings: Any
) -> dict[str, Any]:
    """Write what was mapped onto what, and how well, as one HTML page that needs no network.

    Parameters
    ----------
    output
        Folder (or ``s3://bucket/prefix``) that ``map`` wrote; or ``project``, and then ``transfer``.
    page
        Path or URL of the page.
    settings
        Fields of :class:`~streamx.config.ReportConfig`.

    Returns
    -------
    dict
        ``page``, ``bytes``, ``n_queries``, ``n_failed``, ``n_warnings``.

    Raises
    ------
    UsageError
        If nothing says what was mapped onto: the folder holds no ``map.json``, and no `model` is named.
    """
    config: ReportConfig = build(ReportConfig, settings)
    folder, _, file = str(page).rpartition("/")
    if not file.lower().endswith((".html", ".htm")):
        raise UsageError(f"{file or page} is no page", fix="end the name in .html")
    facts = collect(output, config, progress=progress)
    names = set(facts.sketch.label_n) | set(facts.reference.labels)
    for query in facts.mapped:
        names |= set() if query.labelling is None else set(query.labelling.counts)
        names |= set() if query.given is None else set(query.given.index)
    color = label_colors({str(label) for label in names})
    overview, pictures = _draw(facts, color, config, progress)
    flows = _flows(facts, color, MOST_BYTES - sum(p.size for p in (*overview, *pictures.values())))
    text = make_page(facts, color, overview, pictures, flows).encode("utf-8")
    open_location(folder or ("/" if str(page).startswith("/") else ".")).write(file, text)
    log.info("%s: %.1f MB", page, len(text) / 1e6)
    return {
        "page": str(page),
        "bytes": len(text),
        "n_queries": len(facts.queries),
        "n_failed": len(facts.failed),
        "n_warnings": sum(len(query.warnings) for query in facts.queries),
    }


def _draw(
    facts: Facts, color: Mapping[str, str], config: ReportConfig, progress: bool
) -> tuple[list[Picture], dict[int, Picture]]:
    """Pictures of all cells, and of each query as long as they fit."""
    sketch = facts.sketch
    xy_n2 = lay_out_cells(sketch, seed=config.seed, threads=config.threads)
    reference, queries = sketch.origin_n < 0, sketch.origin_n >= 0
    of = "" if facts.label_key is None else f", by {facts.label_key}"
    overview = [Picture(draw_cells(sketch, xy_n2, reference, color), f"Reference{of}")]
    if queries.any():
        overview.append(Picture(draw_cells(sketch, xy_n2, queries, color), f"Queries{of} (transferred)"))
    if np.isfinite(sketch.uncertainty_n).any():
        overview.append(Picture(draw_cells(sketch, xy_n2, queries, None), "Queries, by uncertainty"))
    pictures: dict[int, Picture] = {}
    room = MOST_BYTES - sum(picture.size for picture in overview)
    drawn = np.unique(sketch.origin_n[queries]).tolist() if len(facts.mapped) > 1 else []
    for at in tqdm(drawn, desc="pictures", leave=False, disable=None if progress else True):
        name = facts.queries[at].name
        picture = Picture(draw_cells(sketch, xy_n2, sketch.origin_n == at, color), f"{name}{of}")
        room -= picture.size
        if room < 0:
            break
        pictures[at] = picture
    return overview, pictures


def _flows(facts: Facts, color: Mapping[str, str], room: int) -> dict[int, str]:
    """The flow of labels of each query, as long as they fit."""
    flows = {}
    for at, query in enumerate(facts.queries):
        if query.given is not None and query.agreement:
            flow = sankey_svg(query.given, color)
            room -= len(flow)
            if room < 0:
                break
            flows[at] = flow
    return flows
