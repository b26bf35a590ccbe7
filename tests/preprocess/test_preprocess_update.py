"""--update: new rows under frozen decisions, measured drift, twice is once; fresh after append is fresh."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from test_hvg_parity import counts
from test_preprocess_view import digest, transformed

import streamx as sx
from streamx.errors import StreamxWarning, UsageError
from streamx.preprocess.drift import kept_statistics
from streamx.preprocess.moments import Moments
from streamx.preprocess.run import preprocess, update_view
from streamx.store.collection import Collection
from streamx.store.convert import convert

pytestmark = pytest.mark.filterwarnings(
    "ignore::streamx.errors.StreamxWarning"
)  # of drift, where it is large
SETTINGS: dict[str, Any] = {"min_features": 40, "n_top_features": 80, "threads": 1}


def pieces() -> dict[str, anndata.AnnData]:
    """Four batches; b1 is cut in two, so that an append brings rows of an old batch and a new batch."""
    adata = counts(21, n_cells=900, n_genes=300, n_batches=4)
    batch = adata.obs["batch"].astype(str).to_numpy()
    adata.obs["batch"] = batch
    row = np.arange(adata.n_obs)
    first = (batch == "b0") | ((batch == "b1") & (row % 2 == 0)) | (batch == "b3")
    return {"first": adata[first].copy(), "second": adata[~first].copy()}


def two_parts(folder: Path) -> Collection:
    data = pieces()
    convert({"first": data["first"]}, folder / "store", threads=1, batch_key="batch")
    return sx.open(folder / "store")


def append(folder: Path) -> Collection:
    return convert({"second": pieces()["second"]}, folder / "store", append=True, threads=1)


def same_moments(a: Moments, b: Moments, rtol: float) -> None:
    np.testing.assert_array_equal(a.code_b, b.code_b)
    np.testing.assert_array_equal(a.n_b, b.n_b)
    np.testing.assert_allclose(a.table_bg4, b.table_bg4, rtol=rtol)


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_update_freezes_what_was_decided(tmp_path: Path, flavor: str) -> None:
    before = preprocess(two_parts(tmp_path), tmp_path / "view", flavor=flavor, **SETTINGS)
    store = append(tmp_path)
    view = update_view(tmp_path / "view", threads=1)
    assert before.view is not None
    assert view.view is not None
    assert (before.view["store_generation"], view.view["store_generation"]) == (1, 2)
    assert before.batches == ["b0", "b1", "b3"]
    assert view.batches == ["b0", "b1", "b3", "b2"]  # codes that were written keep their meaning
    assert list(view.var_names) == list(before.var_names)
    assert before.scale_bg is not None
    assert view.scale_bg is not None
    np.testing.assert_array_equal(view.scale_bg[:3], before.scale_bg)
    # rows: the old ones first and unchanged, then the new ones by batch
    np.testing.assert_array_equal(
        view.read(0, before.n_obs).toarray(), before.read(0, before.n_obs).toarray()
    )
    rows = view.obs_column("_streamx_row").to_numpy()
    assert len(set(rows)) == len(rows)
    assert (rows[: before.n_obs] < before.view["store_rows"]).all()
    assert (rows[before.n_obs :] >= before.view["store_rows"]).all()
    assert view.n_obs > before.n_obs
    np.testing.assert_array_equal(
        view.read(0, view.n_obs).toarray(),
        store.read(0, store.n_obs).toarray()[rows][:, store.var_names.get_indexer(view.var_names)],
    )
    # totals over the frozen genes
    keep_g = kept_statistics(view).keep_g
    totals = store.read(0, store.n_obs).toarray()[rows][:, keep_g].sum(axis=1)
    np.testing.assert_array_equal(view.obs_column("_streamx_total"), totals)
    # the new batch has its own scale: exactly its maximum
    new = transformed(view)[view.batch_codes == 3]
    np.testing.assert_allclose(new.max(axis=0)[new.max(axis=0) > 0], 1, rtol=1e-6)
    drift = view.view["drift"]
    assert 0 <= drift["replaced"] < 0.5
    assert drift["above_maximum"] == int((transformed(view).max(axis=0) > 1 + 1e-6).sum())


def test_updating_twice_is_updating_once(tmp_path: Path) -> None:
    preprocess(two_parts(tmp_path), tmp_path / "view", **SETTINGS)
    unchanged = digest(tmp_path / "view")
    update_view(tmp_path / "view")
    assert digest(tmp_path / "view") == unchanged  # nothing new in the store
    append(tmp_path)
    update_view(tmp_path / "view")
    once = digest(tmp_path / "view")
    update_view(tmp_path / "view", threads=2, memory="1GB")
    assert digest(tmp_path / "view") == once


@pytest.mark.parametrize("fails_at", [3, 6, 12])
def test_interrupted_update_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    from streamx.store.folder import Folder

    before = preprocess(two_parts(tmp_path), tmp_path / "view", **SETTINGS)
    shutil.copytree(tmp_path / "view", tmp_path / "whole")
    append(tmp_path)
    update_view(tmp_path / "whole")
    done, write = [0], Folder.write

    def dies(self: Folder, key: str, *data: Any) -> None:
        done[0] += 1
        if done[0] == fails_at:
            raise KeyboardInterrupt
        write(self, key, *data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            update_view(tmp_path / "view")
    assert sx.open(tmp_path / "view").n_obs == before.n_obs  # readers see the former generation
    update_view(tmp_path / "view")
    assert digest(tmp_path / "view") == digest(tmp_path / "whole")


def test_update_does_not_depend_on_memory_or_threads(tmp_path: Path) -> None:
    preprocess(two_parts(tmp_path), tmp_path / "a", **SETTINGS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    append(tmp_path)
    update_view(tmp_path / "a", threads=1)
    update_view(tmp_path / "b", threads=3, memory="90MB")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
@pytest.mark.parametrize("by_batch", [True, False])
def test_fresh_after_append_is_fresh_on_all_files(tmp_path: Path, flavor: str, by_batch: bool) -> None:
    two_parts(tmp_path)
    store = append(tmp_path)
    settings = {**SETTINGS, "flavor": flavor, "hvg_batch": by_batch}
    grown = preprocess(store, tmp_path / "grown", **settings)
    whole = preprocess(
        convert(pieces(), tmp_path / "whole", threads=1, batch_key="batch"), tmp_path / "fresh", **settings
    )
    assert grown.batches == whole.batches == ["b0", "b1", "b2", "b3"]
    assert list(grown.var_names) == list(whole.var_names)
    np.testing.assert_array_equal(grown.scale_bg, whole.scale_bg)
    for name in grown.var.columns:
        np.testing.assert_allclose(grown.var[name], whole.var[name], rtol=1e-12, err_msg=name)
    a, b = (view.obs.set_index("_streamx_name") for view in (grown, whole))
    assert set(a.index) == set(b.index)
    np.testing.assert_array_equal(a["_streamx_total"], b.loc[a.index, "_streamx_total"])
    # batches are contiguous, and rows of both parts mixed inside the batch that has both
    assert (np.diff(grown.batch_codes) >= 0).all()
    part = (grown.obs_column("_streamx_file") == "second").to_numpy()[grown.batch_codes == 1]
    assert 0.2 < np.mean(part[1:] != part[:-1]) < 0.8


def test_kept_statistics_merge_to_those_of_a_fresh_run(tmp_path: Path) -> None:
    """min_cells 0 and the same cells: frozen masks are the fresh ones, so the drift must be exact."""
    settings = {**SETTINGS, "min_cells": 0}
    preprocess(two_parts(tmp_path), tmp_path / "view", **settings)
    store = append(tmp_path)
    view = update_view(tmp_path / "view")
    fresh = preprocess(store, tmp_path / "fresh", **settings)
    a, b = kept_statistics(view), kept_statistics(fresh)
    np.testing.assert_array_equal(a.keep_g, b.keep_g)
    order = [fresh.batches.index(name) for name in view.batches]
    reordered = Moments(b.values.code_b, b.values.n_b[order], b.values.table_bg4[order])
    same_moments(a.values, reordered, rtol=1e-12)
    assert view.view is not None
    replaced = 1 - len(set(view.var_names) & set(fresh.var_names)) / view.n_vars
    assert view.view["drift"]["replaced"] == pytest.approx(replaced, abs=1e-6)


def test_a_large_drift_is_said_aloud(tmp_path: Path) -> None:
    """The new batches have programmes of their own."""
    first, second, third = (counts(seed, n_cells=300, n_genes=200, n_batches=1) for seed in (30, 31, 32))
    second.var_names = third.var_names = first.var_names
    convert({"a": first, "b": first[:100].copy()}, tmp_path / "store", threads=1)
    preprocess(sx.open(tmp_path / "store"), tmp_path / "view", min_features=10, n_top_features=40)
    convert({"c": second, "d": third}, tmp_path / "store", append=True, threads=1)
    with pytest.warns(StreamxWarning, match="a fresh selection would replace"):
        view = update_view(tmp_path / "view")
    assert view.view is not None
    assert view.view["drift"]["replaced"] > 0.2


def test_restrictions_hold_for_new_rows(tmp_path: Path) -> None:
    view = preprocess(two_parts(tmp_path), tmp_path / "view", batches=("b0", "b1"), **SETTINGS)
    append(tmp_path)
    updated = update_view(tmp_path / "view")
    assert updated.batches == ["b0", "b1"]
    assert updated.n_obs > view.n_obs
    only = preprocess(sx.open(tmp_path / "store"), tmp_path / "b0", batches=("b0",), **SETTINGS)
    convert({"third": counts(40, n_cells=60, n_genes=300, n_batches=1)}, tmp_path / "store", append=True)
    assert update_view(tmp_path / "b0").n_obs >= only.n_obs


def test_no_new_row_is_asked_for(tmp_path: Path) -> None:
    preprocess(two_parts(tmp_path), tmp_path / "view", batches=("b3",), **SETTINGS)
    append(tmp_path)
    unchanged = digest(tmp_path / "view")
    assert update_view(tmp_path / "view").generation == 1
    assert digest(tmp_path / "view") == unchanged


@pytest.mark.parametrize(
    "settings",
    [
        {"genes": ["Gene1", "Gene2", "ABSENT", "Gene3"]},
        {"scale": "global"},
        {"scale": "none"},
        {"profile": "counts", "flavor": "seurat_v3", "n_top_features": 50, "hvg_batch": False},
        {"profile": "ATAC", "atac": "0.2.0", "n_top_features": 50},
        {"profile": "ATAC", "atac": "1.0.2", "n_top_features": 50},
        {"profile": "ATAC", "atac": "1.0.4", "n_top_features": 50},
        {"processed": True},
    ],
)
def test_every_kind_of_view_can_be_updated(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Without a filter on genes the updated view holds what its transform gives on all rows."""
    common = {"min_cells": 0, **settings}
    if "processed" not in settings:
        common["min_features"] = 10
    before = preprocess(two_parts(tmp_path), tmp_path / "view", threads=1, **common)
    store = append(tmp_path)
    view = update_view(tmp_path / "view", threads=1)
    assert view.n_obs == store.n_obs > before.n_obs
    rows = view.obs_column("_streamx_row").to_numpy()
    there = store.var_names.get_indexer(view.var_names)
    expected = store.read(0, store.n_obs).toarray()[rows][:, there]
    expected[:, there < 0] = 0
    np.testing.assert_array_equal(view.read(0, view.n_obs).toarray(), expected)
    assert np.isfinite(view.obs_column("_streamx_total")).all()
    if before.scale_bg is not None and settings.get("scale") != "global" and view.scale_bg is not None:
        np.testing.assert_array_equal(view.scale_bg[: len(before.batches)], before.scale_bg)


def test_proteins_are_updated_too(tmp_path: Path) -> None:
    first, second = counts(50, 120, 60, 1), counts(51, 100, 60, 1)
    second.var_names = first.var_names
    for adata, batch in ((first, "a"), (second, "b")):
        adata.obs["batch"] = batch
        adata.obsm["protein_expression"] = np.arange(adata.n_obs * 2, dtype=np.float32).reshape(-1, 2)
    convert({"first": first}, tmp_path / "store", batch_key="batch", threads=1)
    preprocess(sx.open(tmp_path / "store"), tmp_path / "view", min_features=1, n_top_features=20)
    convert({"second": second}, tmp_path / "store", append=True, threads=1)
    view = update_view(tmp_path / "view")
    protein = view.read_obsm("protein_expression", 0, view.n_obs)
    rows = view.obs_column("_streamx_file_row").to_numpy()
    np.testing.assert_array_equal(protein, np.stack([2 * rows, 2 * rows + 1], axis=1))
    assert set(view.modalities["protein_expression"]["measured"]) == {"a", "b"}


def test_the_store_must_be_there_and_be_the_same(tmp_path: Path) -> None:
    preprocess(two_parts(tmp_path), tmp_path / "view", **SETTINGS)
    with pytest.raises(UsageError, match="is a store"):
        update_view(tmp_path / "store")
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="store is not at"):
        update_view(tmp_path / "view")
    other = anndata.AnnData(
        csr_matrix(np.ones((4, 3), np.float32)), obs={"batch": ["a"] * 4}, var={"x": [1, 2, 3]}
    )
    convert([other], tmp_path / "store", batch_key="batch", threads=1)
    with pytest.raises(UsageError, match="not the store that this view was made from"):
        update_view(tmp_path / "view")
    # a view moves together with its store
    (tmp_path / "new").mkdir()
    shutil.rmtree(tmp_path / "store")
    shutil.move(tmp_path / "elsewhere", tmp_path / "new/store")
    shutil.move(tmp_path / "view", tmp_path / "new/view")
    assert update_view(tmp_path / "new/view").generation == 1
