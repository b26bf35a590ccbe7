"""The page: whole, valid, safe with any name, and small enough with a hundred queries."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from mapped_job import KINDS, write_job, write_query, write_reference

import streamx as sx
from streamx.config import ReportConfig
from streamx.errors import UsageError
from streamx.mapping import read_cells
from streamx.report import pictures, run
from streamx.report.collect import collect
from streamx.report.facts import Sketch
from streamx.report.query import metric_rows, without_secrets
from streamx.report.text import escape
from streamx.store.amend import amend

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"' onmouseover=alert(1) x='",
    "</style></svg></title><img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; \x00\x1b[31m",
    "\u202egnp.exe\u202d \u05d0\u05d1\u05d2",
    "\U0001f9ec T\u0301 cell",
    "long " * 400,
    "$\\frac$ a_{b}",
    "{0} %s {{x}}",
)


class Page(HTMLParser):
    """Parses strictly: every element is closed in its turn, ids are unique, links lead somewhere."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return "".join(self.texts)


def check(page: Page) -> None:
    """What holds for every page."""
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {attrs["href"] for attrs in page.all("a")} <= {f"#{name}" for name in ids}
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "a", "bdi"),
        *("ul", "li", "strong", "figure", "img", "figcaption", "details", "summary", "div", "span"),
        *("table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd"),
        *("svg", "rect", "path", "text", "tspan"),
    }
    allowed = {"id", "href", "class", "style", "title", "src", "alt", "open", "scope", "colspan", "data-name"}
    drawn = {"viewbox", "role", "aria-label", "x", "y", "width", "height", "d", "fill", "text-anchor"}
    head = {"lang", "charset", "name", "content", "http-equiv"}
    assert {name for _, attrs in page.elements for name in attrs} <= allowed | drawn | head
    for image in page.all("img"):
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        assert image["alt"]
    for _, attrs in page.elements:
        style = attrs.get("style", "")
        assert re.fullmatch(r"(width:[\d.]+(%|rem);?)?(background:#[0-9A-Fa-f]{6})?", style), style


@pytest.fixture(autouse=True)
def flat(request, monkeypatch):
    """The first two dimensions for a UMAP, but for the test that is about the real one."""
    if request.node.name != "test_folder_that_project_wrote":
        monkeypatch.setattr(run, "lay_out_cells", lambda sketch, **_: sketch.latent_nk[:, :2])


@pytest.fixture
def job(tmp_path):
    write_reference(tmp_path / "model")
    write_job(tmp_path / "model", tmp_path / "out", ["first", "second"], failed=["broken"])
    return tmp_path


def made(folder, out="out", **settings):
    found = sx.report(folder / out, folder / "page.html", progress=False, **settings)
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert found["bytes"] == len(text.encode())
    page = Page(text)
    check(page)
    return found, text, page


def test_page_of_a_job(job):
    found, text, page = made(job)
    assert (found["n_queries"], found["n_failed"]) == (3, 1)
    assert "3 queries mapped onto model" in page.text
    assert "/data/2.h5ad: no counts (--allow-float)" in page.text
    assert len(page.all("img")) == 5  # reference, queries, uncertainty; and each query
    assert len([attrs for attrs in page.all("svg") if attrs["class"] == "sankey"]) == 3  # of all, of each
    assert "0.400 to 0.450" in page.text
    assert "no labels given" in page.text
    for said in (
        "/data/0.h5ad",
        "peak memory",
        "1.00 GB",
        "matched",
        "abc",
        "g1",
        "label column",
        "transfer truth_key",
        "recall of their search",
        "Share found of each of 5 labels",
        "CPU seconds of all queries3.8",  # of 1.25 each
    ):
        assert said in page.text
    assert len([attrs for attrs in page.all("details") if "open" in attrs]) == 1  # the table; queries folded
    assert not re.search(r"url\(|@import|https?:", text)


def test_same_bytes_again(job):
    _, first, _ = made(job)
    _, second, _ = made(job)
    assert first == second


def test_facts_are_those_of_the_cells(job):
    facts = collect(job / "out", ReportConfig(), progress=False)
    query = facts.queries[0]
    cells = read_cells(sx.open_location(job / "out" / "first.zarr"), "first")
    passed = np.isfinite(cells.latent_nk).all(axis=1)
    predicted = cells.column("kind_pred").astype(str).to_numpy()[passed]
    given = cells.column("kind").to_numpy()
    uncertainty = cells.column("kind_uncertainty").to_numpy()[passed]
    assert (query.n_cells, query.n_passed) == (40, 36)
    assert query.labelling.counts == {kind: (predicted == kind).sum() for kind in query.labelling.counts}
    assert sum(query.labelling.counts.values()) == 36
    assert query.labelling.mean == pytest.approx(uncertainty.mean(), abs=1e-6)
    own = uncertainty[predicted == "T"].mean()
    assert query.labelling.uncertainty["T"] == pytest.approx(own, abs=1e-6)
    assert query.labelling.histogram.sum() == 36
    assert query.given.loc["NK", "B"] == ((given[passed] == "NK") & (predicted == "B")).sum()
    whole = cells.column("kind_pred").astype(str).to_numpy()
    assert query.agreement["accuracy"] == pytest.approx((given == whole).mean())
    assert query.batches == {"b1": 20, "b2": 20}
    assert facts.reference.batches == {"s1": 120, "s2": 120}
    assert facts.reference.labels == dict.fromkeys(sorted(KINDS), 48)
    assert (facts.sketch.origin_n == 0).sum() == 36
    assert np.isfinite(facts.sketch.latent_nk).all()


def test_folder_that_project_wrote(job):
    plain = job / "plain"
    write_query(plain, "one")
    with pytest.raises(UsageError, match="--model MODEL"):
        sx.report(plain, job / "page.html")
    found, _, page = made(job, "plain", model=job / "model")
    assert found["n_queries"] == 1
    assert "1 query mapped onto model" in page.text
    assert "ilisi" in page.text
    assert [attrs for attrs in page.all("details") if "open" in attrs]
    _, _, page = made(job, "plain", model=job / "model", metrics=False)
    assert "ilisi" not in page.text
    with pytest.raises(UsageError, match="no query has the obs column 'type'"):
        made(job, "plain", model=job / "model", truth_key="type")
    with pytest.raises(UsageError, match="one of: kind"):
        made(job, "plain", model=job / "model", label_key="type")
    with pytest.raises(UsageError, match=r"end the name in \.html"):
        sx.report(plain, job / "page.pdf")


def test_queries_change_nothing_of_the_reference(job):
    facts = collect(job / "out", ReportConfig(), progress=False)
    reference = facts.sketch.origin_n < 0
    whole = pictures.lay_out_cells(facts.sketch)
    alone = pictures.lay_out_cells(
        Sketch(*(getattr(facts.sketch, name)[reference] for name in Sketch.__dataclass_fields__))
    )
    np.testing.assert_array_equal(whole[reference], alone)
    assert np.isfinite(whole).all()


def test_query_that_is_not_mapped_yet(job):
    (job / "out" / "records" / "second.json").unlink()  # its cells are there, somebody labels them just now
    found, _, page = made(job)
    assert found["n_failed"] == 2
    assert "second: is not mapped yet" in page.text
    assert len(page.all("img")) == 3  # nothing of it is drawn
    shutil.rmtree(job / "out" / "first.zarr")
    found, _, page = made(job)
    assert found["n_failed"] == 3
    assert "first: was mapped, and first.zarr is gone" in page.text


def test_metrics_of_the_reference_and_all_queries(job):
    settings = {"label_key": "kind", "truth_key": "kind", "max_cells": 200, "resolution": "1"}
    whole = metric_rows(sx.metrics(job / "model", job / "out", **settings))
    facts = collect(job / "out", ReportConfig(), progress=False)
    assert facts.metrics == whole
    assert [metric.n for metric in whole if metric.name == "ilisi"] == [200]
    heading = "Metrics in the latent space: the reference and all queries"
    _, _, page = made(job)
    assert heading in page.text
    assert page.text.count("Metrics in the latent space: the reference and this query") == 2
    assert "Metrics of 2 queries in a table" in page.text
    _, _, page = made(job, metrics=False)
    assert heading not in page.text
    write_job(job / "model", job / "single", ["alone"])  # whose metrics are those of the whole
    _, _, page = made(job, "single")
    assert heading not in page.text
    assert "0.400 to 0.450" in page.text


def test_novel_cells(job):
    write_job(job / "model", job / "strange", ["first", "second"], novelty=True)
    labelling = collect(job / "strange", ReportConfig(metrics=False), progress=False).queries[0].labelling
    assert labelling.novel == {kind: n if kind == "pDC" else 0 for kind, n in labelling.counts.items()}
    assert labelling.n_novel > 0
    _, _, page = made(job, "strange", metrics=False)
    assert "of the placed are novel" in page.text
    names = [attrs["data-name"] for attrs in page.all("td") if "data-name" in attrs]
    assert names.count("novel") == 2 + sum(
        len(query.labelling.counts)
        for query in collect(job / "strange", ReportConfig(metrics=False), progress=False).queries
    )
    _, _, page = made(job, metrics=False)
    assert "novel" not in [attrs.get("data-name") for attrs in page.all("td")]


def test_many_novel_cells_deserve_a_look(job):
    write_query(job / "plain", "one", kinds=["pDC"], novelty=True)
    _, _, page = made(job, "plain", model=job / "model", metrics=False)
    assert "100% of the cells lie farther from the reference than 95 % of its own do" in page.text


def test_rare_labels_are_drawn(job):
    facts = collect(job / "out", ReportConfig(max_cells=100, metrics=False), progress=False)
    assert (facts.sketch.origin_n < 0).sum() == 50
    kinds = (*["T"] * 299, "rare")
    write_reference(job / "large", n=2_000, kinds=kinds)
    facts = collect(
        job / "out", ReportConfig(model=str(job / "large"), max_cells=100, metrics=False), progress=False
    )
    assert "rare" in facts.sketch.label_n[facts.sketch.origin_n < 0]


@pytest.mark.parametrize("n", [1, 2])
def test_hardly_any_cells(job, n):
    """Of the two, one has a latent; the single one has none."""
    write_query(job / "plain", "one", n=n)
    found, _, page = made(job, "plain", model=job / "model")
    assert found["n_queries"] == 1
    assert f"{n} cell" in page.text


def test_nothing_in_common(job):
    """Given labels that the reference lacks, none given at all, and a hundred batches."""
    write_query(job / "plain", "foreign", n=200, batches=[f"b{at:02}" for at in range(100)])
    amend(job / "plain" / "foreign.zarr", {"kind": pd.Series(["Elf"] * 200)})
    write_query(job / "plain", "bare")
    amend(job / "plain" / "bare.zarr", {"kind": pd.Series(["Unknown"] * 40)})
    _, _, page = made(job, "plain", model=job / "model")
    assert "0.0%of 200 given labels found" in page.text
    assert page.text.count("batch b") == 40 + 2
    assert "and 60 more batches" in page.text


def test_no_such_folder(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        sx.report(tmp_path / "nowhere", tmp_path / "page.html")


def test_hostile_names_stay_text(job):
    out = job / "hostile"
    shutil.rmtree(job / "model")
    write_reference(job / "model", kinds=HOSTILE)
    names = ["<img src=x onerror=alert(1)>", "quote\"'><b>", "\u202eevil", "ok"]
    write_job(
        job / "model",
        out,
        names,
        failed=["<details><script>x"],
        kinds=HOSTILE,
        batches=HOSTILE[:3],
        missing_genes=list(HOSTILE),
    )
    for path in (out / "records").iterdir():
        record = json.loads(path.read_text())
        record["source"] = ["s3://me:secret@bucket/<script>.h5ad?X-Amz-Signature=secret"]
        record["warnings"] = [*HOSTILE, "https://host/x?token=secret fails"]
        path.write_text(json.dumps(record))
    _, text, page = made(job, "hostile")
    assert "secret" not in text
    for label in HOSTILE[:6]:
        assert escape(label) in text
        assert label.replace("\x00", "\ufffd").replace("\x1b", "\ufffd") in page.text
    assert not set(text) & {"\x00", "\x1b"}
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert len(text) < 1_000_000


def test_hundred_queries_fit(job, monkeypatch):
    names = [f"study {i}" for i in range(100)]
    write_job(job / "model", job / "hundred", names)
    drawn = []

    def quick(sketch, xy_n2, shown_n, color):  # the picture of a real query is 20 kB
        drawn.append(int(shown_n.sum()))
        return "data:image/png;base64," + base64.b64encode(b"\x89PNG" + bytes(20_000)).decode()

    monkeypatch.setattr(run, "draw_cells", quick)
    found, _, page = made(job, "hundred")
    assert found["bytes"] < 10e6
    assert len(drawn) == 103
    assert len([attrs for attrs in page.all("details") if "open" in attrs]) == 0


def test_what_would_make_the_page_too_large_is_left_out(job, monkeypatch):
    monkeypatch.setattr(run, "draw_cells", lambda *_: "data:image/png;base64,iVBORw0K")
    monkeypatch.setattr(run, "MOST_BYTES", 4 * len("data:image/png;base64,iVBORw0K"))
    _, _, page = made(job)
    assert len(page.all("img")) == 4  # three of all, one of two queries
    assert page.text.count("No picture of its own") == 1
    assert page.text.count("No flow of labels of its own") == 2


def test_flow_has_same_names_side_by_side_and_folds_rare_ones():
    names = [f"t{i:02}" for i in range(30)]
    counts = pd.DataFrame(np.diag(np.arange(1, 31)), index=names, columns=names)
    svg = pictures.sankey_svg(counts, {})
    assert svg.count("<rect") == 2 * pictures.MOST_NAMES
    assert "11 more names" in svg
    order = re.findall(r"<tspan>(t\d+)</tspan>", svg)
    assert order == 2 * sorted(order[: len(order) // 2], reverse=True)


def test_secrets_of_urls_are_left_out():
    assert without_secrets("s3://key:pass@bucket/a.h5ad?sig=x") == "s3://bucket/a.h5ad"
    assert without_secrets("failed: https://h/x?token=t; again") == "failed: https://h/x again"
    assert without_secrets("/data/what?.h5ad") == "/data/what?.h5ad"


def test_cells_without_labels(job):
    write_query(job / "plain", "one")
    amend(job / "plain" / "one.zarr", {"kind_pred": None, "kind_uncertainty": None})
    found, _, page = made(job, "plain", model=job / "model")
    assert (found["n_queries"], found["n_failed"]) == (1, 0)
    assert len(page.all("img")) == 2  # reference, queries
    assert "Transferred labels" not in page.text


def test_job_of_which_all_failed(job):
    shutil.rmtree(job / "out")
    write_job(job / "model", job / "out", [], failed=["one", "two"])
    found, _, page = made(job)
    assert (found["n_queries"], found["n_failed"]) == (2, 2)
    assert len(page.all("img")) == 1
