"""Which peaks count for which gene, at every edge; and the store of genes that their counts become."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from test_annotation import gtf

import streamx as sx
from streamx.config import ActivityConfig
from streamx.errors import GeneError, StreamxWarning, UsageError
from streamx.preprocess.activity import Links, find_links, make_links, overlaps
from streamx.preprocess.annotation import Regions
from streamx.store.collection import Collection

ANNOTATION = (
    gtf("chr1", "gene", 1001, 2000, "+", 'gene_name "Forward"')  # [1000, 2000), upstream from 500
    + gtf("chr1", "gene", 1801, 3000, "-", 'gene_name "Backward"')  # [1800, 3000), upstream to 3500
    + gtf("1", "gene", 7001, 8000, "+", 'gene_name "Lonely"')
    + gtf("chr2", "gene", 101, 200, "+", 'gene_name "Twice"')
    + gtf("chr2", "gene", 301, 400, "-", 'gene_name "Twice"')
    + gtf("MT", "gene", 1, 50, "+", 'gene_name "Mito"')
)
FORWARD, BACKWARD, TWICE, MITO = "Forward", "Backward", "Twice", "Mito"
# peak -> its genes with 500 bases upstream
PEAKS: dict[str, set[str]] = {
    "chr1:0-500": set(),  # touches the forward gene's upstream
    "chr1:499-501": {FORWARD},
    "1_1700_1800": {FORWARD},  # touches the backward gene's body, which is no upstream of it
    "chr1:1799-1801": {FORWARD, BACKWARD},
    "chr1:1999-2000": {FORWARD, BACKWARD},
    "chr1:2000-2001": {BACKWARD},
    "chr1-3499-3600": {BACKWARD},
    "chr1:3500-3600": set(),
    "chr1:400-4000": {FORWARD, BACKWARD},  # contains both
    "chr2_150_350": {TWICE},  # in both regions of the name, counts once
    "chrM:49-60": {MITO},
    "chr3:100-200": set(),  # a chromosome without a gene
}


@pytest.fixture
def annotation(tmp_path: Path) -> str:
    path = tmp_path / "genes.gtf"
    path.write_text(ANNOTATION)
    return str(path)


def genes_of(links: Links, peaks: list[str]) -> dict[str, set[str]]:
    dense = links.map_pg.toarray()
    assert set(np.unique(dense)) <= {0, 1}
    return {peak: {links.genes[g] for g in np.flatnonzero(dense[p])} for p, peak in enumerate(peaks)}


def test_every_edge(annotation: str) -> None:
    links = find_links(list(PEAKS), ActivityConfig(genes=annotation, upstream=500))
    assert genes_of(links, list(PEAKS)) == PEAKS
    assert links.genes == [FORWARD, BACKWARD, TWICE, MITO]  # as in the annotation; the lonely one is left out
    assert (links.n_without, links.n_linked) == (1, 9)


def test_body_and_upstream_apart(annotation: str) -> None:
    peaks = ["chr1:990-1001", "chr1:999-1000", "chr1:1000-1001", "chr1:2999-3001", "chr1:3000-3001"]
    body = find_links(peaks, ActivityConfig(genes=annotation, upstream=0))
    assert list(genes_of(body, peaks).values()) == [{FORWARD}, set(), {FORWARD}, {BACKWARD}, set()]
    upstream = find_links(peaks, ActivityConfig(genes=annotation, upstream=500, body=False))
    found = [{FORWARD}, {FORWARD}, set(), {BACKWARD}, {BACKWARD}]
    assert list(genes_of(upstream, peaks).values()) == found
    with pytest.raises(UsageError, match="no peak can count"):
        find_links(peaks, ActivityConfig(genes=annotation, upstream=0, body=False))


def test_upstream_ends_with_the_chromosome(tmp_path: Path) -> None:
    (tmp_path / "a.bed").write_text("chr1\t100\t200\tAa\t0\t+\n")
    links = find_links(["chr1:0-1"], ActivityConfig(genes=str(tmp_path / "a.bed")))
    assert links.n_linked == 1


def test_genes_without_a_strand_are_forward(tmp_path: Path) -> None:
    (tmp_path / "a.bed").write_text("chr1\t1000\t2000\tAa\n")
    peaks = ["chr1:900-950", "chr1:2100-2200"]
    with pytest.warns(StreamxWarning, match="1 of 1 genes have no strand"):
        links = find_links(peaks, ActivityConfig(genes=str(tmp_path / "a.bed")))
    assert genes_of(links, peaks) == {peaks[0]: {"Aa"}, peaks[1]: set()}


def test_a_table_alone_and_beside_an_annotation(annotation: str, tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    rows = ["New\tchr3_100_200", f"{FORWARD}\tchr3-100-200", f"{FORWARD}\tchr1:499-501"]
    table.write_text("\n".join(["gene\tpeak", *rows, rows[0]]) + "\n")  # one row twice: counts once
    peaks = list(PEAKS)
    alone = find_links(peaks, ActivityConfig(peak_genes=str(table)))
    assert alone.genes == ["New", FORWARD]
    assert genes_of(alone, peaks)["chr3:100-200"] == {"New", FORWARD}
    both = find_links(peaks, ActivityConfig(genes=annotation, peak_genes=str(table), upstream=500))
    assert genes_of(both, peaks) == PEAKS | {"chr3:100-200": {"New", FORWARD}}
    assert both.genes == [FORWARD, BACKWARD, TWICE, MITO, "New"]
    # a table needs no places
    table.write_text("gene\tpeak\nAa\tpeak7\nBb\tpeak9\n")
    with pytest.warns(StreamxWarning, match="1 of its 2 rows name no peak"):
        assert find_links(["peak7"], ActivityConfig(peak_genes=str(table))).genes == ["Aa"]
    with pytest.raises(GeneError, match="names none of the peaks"):
        find_links(["peak1"], ActivityConfig(peak_genes=str(table)))


def test_what_can_not_be_linked_is_refused(annotation: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which peaks belong to which gene"):
        find_links(["chr1:1-2"], ActivityConfig())
    with pytest.raises(GeneError, match="not named as peaks"):
        find_links(["Gapdh"], ActivityConfig(genes=annotation))
    with pytest.raises(GeneError, match="none of 1 peaks lies in or before any of 5 genes"):
        find_links(["chr1:50000-50001"], ActivityConfig(genes=annotation))
    (tmp_path / "other.bed").write_text("NC_000001.11\t1\t5\tAa\t0\t+\n")
    with pytest.raises(GeneError, match=r"genes lie on NC_000001.11, peaks on chr1, chrX: no chromosome"):
        find_links(["chr1:1-2", "chrX:1-2"], ActivityConfig(genes=str(tmp_path / "other.bed")))


STRETCH = st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 12))


@settings(max_examples=200, deadline=None)
@given(st.lists(STRETCH, min_size=1, max_size=25), st.lists(STRETCH, min_size=1, max_size=25))
def test_overlaps_are_those_of_brute_force(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> None:
    def regions(rows: list[tuple[int, ...]], prefix: str) -> Regions:
        low = np.array([row[1] for row in rows])
        end = low + np.array([row[2] for row in rows])
        chromosomes = [f"{prefix}{row[0]}" for row in rows]
        return Regions([str(i) for i in range(len(rows))], chromosomes, low, end, ["+"] * len(rows))

    expected = {
        (i, j)
        for (i, (c, s, n)), (j, (d, t, m)) in itertools.product(enumerate(a), enumerate(b))
        if c == d and s < t + m and t < s + n
    }
    if not {row[0] for row in a} & {row[0] for row in b}:
        with pytest.raises(GeneError):
            overlaps(regions(a, "chr"), regions(b, ""))
        return
    peak_l, region_l = overlaps(regions(a, "chr"), regions(b, ""))
    found = list(zip(peak_l.tolist(), region_l.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_regions_of_one_name_are_one_gene() -> None:
    links = make_links(3, ["a", "b", "a"], np.array([0, 0, 2]), np.array([0, 2, 2]))
    np.testing.assert_array_equal(links.map_pg.toarray(), [[1], [0], [1]])
    assert (links.genes, links.n_without) == (["a"], 1)


# -- the store -------------------------------------------------------------------------------------------


def cells(seed: int, n: int, batches: str, high: int = 4) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    x_np = rng.integers(0, high, (n, len(PEAKS))) * (rng.random((n, len(PEAKS))) < 0.6)
    obs = pd.DataFrame(
        {"batch": rng.choice(list(batches), n), "depth": x_np.sum(axis=1)},
        index=[f"c{seed}-{i}" for i in range(n)],
    )
    protein = pd.DataFrame({"CD3": x_np[:, 0] * 2.0}, index=obs.index)
    return anndata.AnnData(
        csr_matrix(x_np, dtype=np.float32), obs=obs, var=pd.DataFrame(index=list(PEAKS)),
        obsm={"protein_expression": protein},
    )  # fmt: skip


def expected_of(adata: anndata.AnnData, store: Collection) -> np.ndarray:
    """Sums by hand, cells in the store's order."""
    dense = pd.DataFrame(adata.X.toarray(), index=adata.obs_names, columns=adata.var_names)
    sums = {
        gene: dense[[peak for peak, genes in PEAKS.items() if gene in genes]].sum(axis=1)
        for gene in (FORWARD, BACKWARD, TWICE, MITO)
    }
    return pd.DataFrame(sums).loc[store.obs_names].to_numpy()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_counts_are_added_up(annotation: str, tmp_path: Path) -> None:
    adata = cells(0, 60, "ab", high=200)  # sums above 255, of values that fit one byte
    peaks = sx.convert([adata], tmp_path / "peaks", batch_key="batch", threads=1)
    genes = sx.gene_activity(peaks, tmp_path / "genes", genes=annotation, upstream=500, threads=1)
    assert (genes.kind, genes.generation, list(genes.var_names)) == (
        "store", 1, [FORWARD, BACKWARD, TWICE, MITO],
    )  # fmt: skip
    assert genes.read(0, 60, dtype="stored").dtype == np.uint16
    np.testing.assert_array_equal(genes.read(0, 60).toarray(), expected_of(adata, genes))
    pd.testing.assert_frame_equal(genes.obs, peaks.obs)
    np.testing.assert_array_equal(genes.batch_codes, peaks.batch_codes)
    np.testing.assert_array_equal(
        genes.read_obsm("protein_expression"), peaks.read_obsm("protein_expression")
    )
    assert genes.var["n_peaks"].tolist() == [5, 5, 1, 1]
    assert genes.measured_bg.all()
    assert sx.verify(genes.path)["ok"]
    with pytest.raises(UsageError, match="exists already"):
        sx.gene_activity(peaks, tmp_path / "genes", genes=annotation)


def test_a_view_and_normalised_values(annotation: str, tmp_path: Path) -> None:
    adata = cells(0, 60, "ab")
    adata.X = csr_matrix(np.sqrt(adata.X.toarray()))
    peaks = sx.convert([adata], tmp_path / "peaks", batch_key="batch", allow_float=True, threads=1)
    genes = sx.gene_activity(peaks, tmp_path / "genes", genes=annotation, upstream=500, threads=1)
    np.testing.assert_allclose(genes.read(0, 60).toarray(), expected_of(adata, genes), rtol=1e-6)
    with pytest.warns(StreamxWarning):
        view = sx.preprocess(peaks, tmp_path / "view", profile="counts", threads=1)
    with pytest.raises(UsageError, match="is a view"):
        sx.gene_activity(view, tmp_path / "no", genes=annotation)


def test_the_bytes_depend_on_neither_memory_nor_threads(
    annotation: str, tmp_path: Path, tiny_geometry: None
) -> None:
    peaks = sx.convert([cells(0, 300, "abc")], tmp_path / "peaks", batch_key="batch", threads=1)
    made = []
    for name, more in (("a", {"threads": 1}), ("b", {"threads": 2, "memory": "200kB"})):
        sx.gene_activity(peaks, tmp_path / name, genes=annotation, **more)
        made.append(tree(tmp_path / name))
    assert made[0] == made[1]


def test_killed_and_run_again(
    annotation: str, tmp_path: Path, tiny_geometry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamx.store.folder import Folder

    monkeypatch.setattr(os, "sync", lambda: None)
    peaks = sx.convert([cells(0, 80, "ab")], tmp_path / "peaks", batch_key="batch", threads=1)
    settings: dict[str, Any] = {"genes": annotation, "threads": 1, "memory": "100kB"}
    sx.gene_activity(peaks, tmp_path / "whole", **settings)
    whole, write = tree(tmp_path / "whole"), Folder.write
    for fails_at in itertools.count(2, 9):
        place, done = tmp_path / f"killed{fails_at}", itertools.count(1)

        def dies(self: Folder, key: str, *data: Any, done: Any = done, fails_at: int = fails_at) -> None:
            if next(done) == fails_at:
                raise KeyboardInterrupt
            write(self, key, *data)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write", dies)
            try:
                sx.gene_activity(peaks, place, **settings)
            except KeyboardInterrupt:
                died = True
            else:
                died = False
        sx.gene_activity(peaks, place, **settings)
        assert tree(place) == whole
        assert not place.with_name(f"{place.name}.journal").exists()
        if not died:
            break
    assert fails_at > 20


def test_of_an_appended_store_batches_lie_together(annotation: str, tmp_path: Path) -> None:
    first, later = cells(0, 50, "ab"), cells(1, 40, "ac")
    sx.convert([first], tmp_path / "peaks", batch_key="batch", threads=1)
    peaks = sx.convert([later], tmp_path / "peaks", append=True, threads=1)
    genes = sx.gene_activity(peaks, tmp_path / "genes", genes=annotation, upstream=500, threads=1)
    assert (np.diff(genes.batch_codes) >= 0).all()
    assert (np.diff(peaks.batch_codes) < 0).any()
    both = anndata.concat([first, later])
    np.testing.assert_array_equal(genes.read(0, 90).toarray(), expected_of(both, genes))
    pd.testing.assert_frame_equal(genes.obs, peaks.obs.loc[genes.obs_names])


def test_genes_of_unmeasured_peaks_are_unmeasured(annotation: str, tmp_path: Path) -> None:
    a, b = cells(0, 30, "a"), cells(1, 30, "b")
    b = b[:, [peak for peak in PEAKS if TWICE not in PEAKS[peak]]].copy()
    peaks = sx.convert({"a": a, "b": b}, tmp_path / "peaks", batch_key="batch", join="outer", threads=1)
    genes = sx.gene_activity(peaks, tmp_path / "genes", genes=annotation, upstream=500, threads=1)
    measured = dict(zip(genes.var_names, genes.measured_bg.T.tolist(), strict=True))
    assert measured == {
        FORWARD: [True, True],
        BACKWARD: [True, True],
        TWICE: [True, False],
        MITO: [True, True],
    }


def test_rna_is_appended_as_another_batch(annotation: str, tmp_path: Path) -> None:
    """SCALEX's recipe for two modalities: batches of one feature space, nothing filtered."""
    peaks = sx.convert([cells(0, 40, "a")], tmp_path / "peaks", batch_key="batch", threads=1)
    sx.gene_activity(peaks, tmp_path / "genes", genes=annotation, upstream=500, threads=1)
    rng = np.random.default_rng(3)
    names = [MITO, "Other", FORWARD, BACKWARD, TWICE]
    rna = anndata.AnnData(
        csr_matrix(rng.integers(0, 5, (30, 5)), dtype=np.float32),
        obs=pd.DataFrame({"batch": ["rna"] * 30}, index=[f"r{i}" for i in range(30)]),
        var=pd.DataFrame(index=names),
    )
    both = sx.convert([rna], tmp_path / "genes", append=True, threads=1)
    assert both.shape == (70, 4)
    assert dict(zip(both.batches, both.batch_sizes.tolist(), strict=True)) == {"a": 40, "rna": 30}
    view = sx.preprocess(both, tmp_path / "view", min_features=0, min_cells=0, threads=1)
    assert view.shape == (70, 4)
