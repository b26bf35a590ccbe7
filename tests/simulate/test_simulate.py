"""Synthetic atlases: what they hold, that only the seed decides it, and who can read them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import streamx as sx
from streamx.cli.main import invoke, main
from streamx.config import SimulateConfig
from streamx.errors import UsageError
from streamx.simulate import kernels
from streamx.simulate.atlas import Atlas, make_atlas

SMALL: dict[str, Any] = {"n_cells": 1009, "n_genes": 211, "n_batches": 3, "n_types": 4, "depth": 150}


def atlas_of(**settings: Any) -> Atlas:
    return make_atlas(SimulateConfig(**{**SMALL, **settings}))


def matrix(atlas: Atlas, batch: int, start: int, stop: int) -> sparse.csr_matrix:
    block = atlas.block(batch, start, stop)
    x_ng = sparse.csr_matrix((block.data, block.indices, block.indptr), (stop - start, atlas.config.n_genes))
    assert x_ng.has_canonical_format
    return x_ng


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_alias_tables_draw_by_weight() -> None:
    weight_g = np.array([5.0, 0.0, 1.0, 3.0, 1.0])
    threshold_g, alias_g = np.empty(5, np.uint64), np.empty(5, np.int32)
    kernels.alias_table(weight_g, threshold_g, alias_g)
    stay = threshold_g / 2**32
    share_g = (stay + np.bincount(alias_g, 1 - stay, minlength=5)) / 5
    np.testing.assert_allclose(share_g, weight_g / weight_g.sum(), atol=1e-9)


def test_a_cell_follows_from_its_place_alone() -> None:
    atlas = atlas_of(n_proteins=3)
    whole, part = atlas.block(1, 0, 200), atlas.block(1, 70, 130)
    a, b = whole.indptr[[70, 130]]
    np.testing.assert_array_equal(part.indices, whole.indices[a:b])
    np.testing.assert_array_equal(part.data, whole.data[a:b])
    np.testing.assert_array_equal(part.type_n, whole.type_n[70:130])
    np.testing.assert_array_equal(part.protein_np, whole.protein_np[70:130])
    other = atlas_of(seed=1).block(1, 0, 200)
    assert (other.type_n != whole.type_n).any()
    assert not np.array_equal(other.data, whole.data)


def test_counts_are_those_of_the_depths() -> None:
    atlas = atlas_of(depth=400)
    block = atlas.block(0, 0, 300)
    totals = np.add.reduceat(block.data, block.indptr[:-1])
    np.testing.assert_array_equal(totals, block.depth_n)
    assert block.data.min() >= 1


def test_expression_is_the_profile_times_the_batch_factor() -> None:
    """Mean counts of a type in a batch, against what they are drawn from; 3 standard errors of a Poisson."""
    atlas = atlas_of(n_cells=60_000, n_genes=50, n_batches=2, n_types=2)
    type_n, depth_n = atlas.cells(1, 0, 20_000)
    expected_g = atlas.profile_tg[1] * atlas.factor_g(1)
    expected_g *= depth_n[type_n == 1].sum() / expected_g.sum()
    found_g = np.asarray(matrix(atlas, 1, 0, 20_000)[type_n == 1].sum(axis=0)).ravel()
    assert (np.abs(found_g - expected_g) < 4 * np.sqrt(expected_g) + 1).all()


def test_no_batch_effect_is_none() -> None:
    none, strong = atlas_of(batch_effect=0.0), atlas_of(batch_effect=1.0)
    assert (none.factor_g(0) == 1).all()
    assert none.depth(0) == none.depth(1) == 150
    spread = np.log(strong.factor_g(0)).std()
    assert 0.8 < spread < 1.2


def test_library_sizes_have_a_long_tail() -> None:
    _, depth_n = atlas_of(n_cells=60_000, n_batches=1).cells(0, 0, 60_000)
    logs = np.log(depth_n)
    assert abs(np.median(depth_n) / atlas_of(n_cells=60_000, n_batches=1).depth(0) - 1) < 0.05
    assert 0.55 < logs.std() < 0.65
    assert depth_n.max() > 6 * np.median(depth_n)


def test_composition_differs_between_batches_and_is_the_declared_one() -> None:
    atlas = atlas_of(n_cells=40_000)
    shares = []
    for batch in range(3):
        type_n, _ = atlas.cells(batch, 0, 8000)
        share_t = np.bincount(type_n, minlength=4) / 8000
        np.testing.assert_allclose(share_t, atlas.share_t(batch), atol=0.02)
        shares.append(share_t)
    assert np.abs(shares[0] - shares[1]).max() > 0.05


@pytest.mark.parametrize("n_batches", [1, 3, 1009])
def test_batches_hold_all_cells(n_batches: int) -> None:
    size_b = atlas_of(n_batches=n_batches).size_b
    assert size_b.sum() == 1009
    assert size_b.min() >= 1


def test_a_store_that_anyone_reads(tmp_path: Path) -> None:
    store = sx.simulate(tmp_path / "store", n_proteins=4, n_columns=3, shard_rows=600, **SMALL)
    assert isinstance(store, sx.store.collection.Collection)
    atlas = atlas_of(n_proteins=4, n_columns=3)
    assert store.shape == (1009, 211)
    assert store.batches == ["batch0", "batch1", "batch2"]
    assert sx.verify(tmp_path / "store")["ok"]
    sizes = np.bincount(store.batch_codes)
    np.testing.assert_array_equal(sizes, atlas.size_b)
    block = atlas.block(1, 0, int(sizes[1]))
    rows = slice(int(sizes[0]), int(sizes[0] + sizes[1]))
    x_ng = sparse.csr_matrix((block.data, block.indices, block.indptr), (int(sizes[1]), 211))
    np.testing.assert_array_equal(store.read(rows.start, rows.stop).toarray(), x_ng.toarray())
    np.testing.assert_array_equal(
        store.read_obsm("protein_expression", rows.start, rows.stop), block.protein_np
    )
    assert (store.obs_column("cell_type").cat.codes[rows] == block.type_n).all()
    assert (store.obs_column("depth")[rows] == block.depth_n).all()
    assert store.obs_names.is_unique
    plain = ad.read_zarr(tmp_path / "store" / "shards" / "000000.zarr")
    assert plain.shape == (600, 211)
    assert (
        list(plain.obs) == store.obs_columns == ["batch", "cell_type", "depth", "extra0", "extra1", "extra2"]
    )
    np.testing.assert_array_equal(plain.X.toarray(), store.read(0, 600).toarray())


def test_memory_and_threads_decide_nothing(tmp_path: Path) -> None:
    first = {"memory": "1GB", "threads": 1}
    for name, free in (("a", first), ("b", {"memory": "1MB", "threads": 3})):
        sx.simulate(tmp_path / name, n_proteins=2, n_columns=2, **SMALL, **free)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_files_hold_what_the_store_holds(tmp_path: Path) -> None:
    paths = sx.simulate(tmp_path / "files", format="h5ad", n_proteins=4, n_columns=2, memory="1MB", **SMALL)
    assert isinstance(paths, list)
    store = sx.simulate(tmp_path / "store", n_proteins=4, n_columns=2, **SMALL)
    assert isinstance(store, sx.store.collection.Collection)
    whole = store.to_anndata()
    first = 0
    for path in paths:
        adata = ad.read_h5ad(path)
        mine = whole[first : first + adata.n_obs]
        np.testing.assert_array_equal(adata.X.toarray(), mine.X.toarray())
        np.testing.assert_array_equal(adata.obsm["protein_expression"], mine.obsm["protein_expression"])
        assert list(adata.obs_names) == list(mine.obs_names)
        for column in whole.obs:
            assert list(adata.obs[column]) == list(mine.obs[column])
        first += adata.n_obs
    assert first == 1009
    converted = sx.convert(paths, tmp_path / "converted", batch_key="batch")
    assert converted.nnz == store.nnz
    assert set(converted.obs_names) == set(store.obs_names)
    with pytest.raises(UsageError, match="is there already"):
        sx.simulate(tmp_path / "files", format="h5ad", **SMALL)


def test_killed_files_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"format": "h5ad", "threads": 1, **SMALL}
    whole = sx.simulate(tmp_path / "whole", **settings)
    replace, done = os.replace, []

    def dying(source: Any, target: Any) -> None:
        if isinstance(target, Path) and target.suffix == ".h5ad":
            if done:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        sx.simulate(tmp_path / "killed", **settings)
    monkeypatch.undo()
    before = done[0].stat().st_mtime_ns
    found = sx.simulate(tmp_path / "killed", **settings)
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in whole]
    assert done[0].stat().st_mtime_ns == before
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [path.name for path in whole]


def test_peaks_are_of_the_same_cells(tmp_path: Path) -> None:
    genes = sx.simulate(tmp_path / "genes", **SMALL)
    peaks = sx.simulate(tmp_path / "peaks", features="peaks", **{**SMALL, "n_genes": 500, "depth": 90})
    assert list(genes.obs_names) == list(peaks.obs_names)
    assert list(genes.obs_column("cell_type")) == list(peaks.obs_column("cell_type"))
    assert all(name.startswith("chr") for name in peaks.var_names)
    assert peaks.var_names.is_unique


def test_more_can_be_appended(tmp_path: Path) -> None:
    sx.simulate(tmp_path / "store", **SMALL)
    sx.simulate(tmp_path / "files", format="h5ad", **{**SMALL, "seed": 5})
    grown = sx.convert(tmp_path / "files", tmp_path / "store", append=True)
    assert grown.n_obs == 2018
    assert grown.obs_names.is_unique


def test_json_is_that_of_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["simulate", "-o", str(tmp_path / "store"), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    invoke(["simulate", "-o", str(tmp_path / "files"), "--format=h5ad", *words])
    converted = invoke(["convert", str(tmp_path / "files"), "-o", str(tmp_path / "other")])
    assert set(converted) - set(told) <= {"skipped", "predicted"}
    assert told["n_cells"] == 1009


@pytest.mark.parametrize(
    "settings",
    [
        {"n_cells": 0},
        {"n_genes": -1},
        {"n_batches": 2000},
        {"batch_effect": -0.1},
        {"seed": -1},
        {"depth": 0},
        {"threads": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        sx.simulate(tmp_path / "store", **{**SMALL, **settings})
    assert not (tmp_path / "store").exists()
