"""Store -> view: what is in it, that it equals scanpy's way, and what is refused."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.sparse import csr_matrix
from test_hvg_parity import counts, scanpy_filtered, scanpy_normal, scanpy_variable

import streamx as sx
from streamx.errors import (
    BatchError,
    EmptyError,
    ResourceError,
    SettingsChangedError,
    StreamxWarning,
    UsageError,
)
from streamx.preprocess.run import preprocess
from streamx.preprocess.view import take
from streamx.store.collection import Collection
from streamx.store.convert import convert

RNA = {"min_features": 80, "n_top_features": 150, "threads": 1}


def with_labels(adata: anndata.AnnData) -> anndata.AnnData:
    rng = np.random.default_rng(9)
    adata.obs["study"] = np.where(adata.obs["batch"] == "b0", "old", "new")
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel().astype(int)
    adata.obs["cell type"] = rng.choice(["T", "B", "NK"], adata.n_obs)
    return adata


@pytest.fixture(scope="module")
def data() -> anndata.AnnData:
    return with_labels(counts(3, n_cells=700, n_genes=500))


@pytest.fixture(scope="module")
def store(data: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return convert([data], tmp_path_factory.mktemp("rna") / "store", batch_key="batch", threads=1)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def transformed(view: Collection) -> np.ndarray:
    """The declared transform, applied the slow way."""
    assert view.view is not None
    rule, x_ng = view.view["transform"], view.read(0, view.n_obs).toarray().astype(float)
    if rule["binarize"]:
        x_ng = (x_ng > 0).astype(float)
    if rule["target_sum"]:
        total = view.obs_column("_streamx_total").to_numpy()
        x_ng = x_ng * rule["target_sum"] / np.where(total > 0, total, 1)[:, None]
    if rule["log1p"]:
        x_ng = np.log1p(x_ng)
    if rule["scale"]:
        assert view.scale_bg is not None
        x_ng = x_ng / view.scale_bg[view.batch_codes]
    return x_ng


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_a_view_is_what_scanpy_and_maxabs_give(
    store: Collection, data: anndata.AnnData, tmp_path: Path, flavor: str
) -> None:
    view = preprocess(store, tmp_path / "view", flavor=flavor, **RNA)
    filtered = scanpy_filtered(data, 80, 3)
    normal = scanpy_normal(filtered)
    expected = scanpy_variable(filtered, normal, flavor, 150, "batch")
    names = expected.index[expected["highly_variable"]]
    assert view.shape == (filtered.n_obs, 150)
    assert set(view.var_names) == set(names)
    at = normal.obs_names.get_indexer(view.obs_column("_streamx_name").to_numpy())
    scaled = normal[at, list(view.var_names)].X.toarray().astype(float)
    batch = normal.obs["batch"].to_numpy()[at]
    for name in np.unique(batch):
        top = scaled[batch == name].max(axis=0)
        scaled[batch == name] /= np.where(top > 0, top, 1)
    np.testing.assert_allclose(transformed(view), scaled, atol=2e-6)
    assert transformed(view).max() <= 1 + 1e-6
    np.testing.assert_array_equal(
        view.read(0, view.n_obs).toarray(), filtered[at, list(view.var_names)].X.toarray()
    )


def test_what_a_view_says(store: Collection, data: anndata.AnnData, tmp_path: Path) -> None:
    view = preprocess(store, tmp_path / "view", **RNA)
    adata = anndata.read_zarr(next((tmp_path / "view/shards").iterdir()))
    assert adata.X.dtype.kind == "u"
    assert set(data.obs.columns) < set(view.obs_columns)
    rows = view.obs_column("_streamx_row").to_numpy()
    np.testing.assert_array_equal(
        store.read(0, store.n_obs).toarray()[rows][:, store.var_names.get_indexer(view.var_names)],
        view.read(0, view.n_obs).toarray(),
    )
    np.testing.assert_array_equal(view.obs_names, store.obs_names[rows])
    for column in data.obs.columns:
        assert view.obs[column].astype(str).tolist() == store.obs[column].iloc[rows].astype(str).tolist()
    for column in ("means", "dispersions", "dispersions_norm", "highly_variable_nbatches", "n_cells"):
        assert column in adata.var
    assert adata.var["highly_variable"].all()
    assert adata.uns["streamx"]["parameters"]["min_features"] == 80
    assert adata.uns["streamx"]["transform"]["target_sum"] == 10_000
    assert view.view is not None
    assert view.view["store_generation"] == 1
    assert view.scale_bg is not None
    assert view.scale_bg.dtype == np.float32
    assert view.scale_bg.shape == (3, 150)
    assert not any(str(tmp_path) in path.read_text("latin1") for path in (tmp_path / "view").rglob("*.json"))


def test_bytes_depend_on_data_and_settings_alone(store: Collection, tmp_path: Path) -> None:
    made = []
    for name, more in (
        ("a", {}),
        ("b", {"threads": 3, "memory": "90MB"}),
        ("c", {"threads": 2, "memory": "3GB"}),
    ):
        preprocess(store, tmp_path / name, **{**RNA, **more})
        made.append(digest(tmp_path / name))
    assert made[0] == made[1] == made[2]
    again = preprocess(store, tmp_path / "a", **RNA)  # finished: nothing is done
    assert again.generation == 1
    with pytest.raises(UsageError, match="exists already"):
        preprocess(store, tmp_path / "a", **{**RNA, "n_top_features": 10})


@pytest.mark.parametrize("fails_at", [2, 4, 7])
def test_interrupted_then_resumed(
    store: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    from streamx.store.folder import Folder

    preprocess(store, tmp_path / "whole", **RNA)
    done, write = [0], Folder.write

    def dies(self: Folder, key: str, *data: Any) -> None:
        done[0] += 1
        if done[0] == fails_at:
            raise KeyboardInterrupt
        write(self, key, *data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            preprocess(store, tmp_path / "killed", **RNA)
    with pytest.raises(Exception, match=r"incomplete|does not exist"):
        sx.open(tmp_path / "killed")
    with pytest.raises(SettingsChangedError, match="n_top_features"):
        preprocess(store, tmp_path / "killed", **{**RNA, "n_top_features": 10})
    preprocess(store, tmp_path / "killed", **{**RNA, "memory": "200MB", "threads": 2})
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_restricted_to_reference_cells(store: Collection, data: anndata.AnnData, tmp_path: Path) -> None:
    """--batches and --where: the same view as of a store of these cells, and recorded."""
    chosen = data[(data.obs["batch"] != "b1").to_numpy() & (data.obs["cell type"] != "NK").to_numpy()].copy()
    small = convert([chosen], tmp_path / "small", batch_key="batch", threads=1)
    expected = preprocess(small, tmp_path / "expected", **RNA)
    view = preprocess(
        store,
        tmp_path / "view",
        batches=("b0", "b2"),
        where="`cell type` in ['T', 'B'] and depth >= 0",
        **RNA,
    )
    assert view.batches == ["b0", "b2"]
    assert list(view.var_names) == list(expected.var_names)
    assert set(view.obs_column("_streamx_name")) == set(expected.obs_column("_streamx_name"))
    np.testing.assert_array_equal(view.scale_bg, expected.scale_bg)
    assert view.view is not None
    assert view.view["parameters"]["batches"] == ["b0", "b2"]
    assert "NK" not in set(view.obs["cell type"])
    assert view.view["parameters"]["where"].startswith("`cell type`")


def test_a_list_of_genes(store: Collection, tmp_path: Path) -> None:
    names = [str(store.var_names[g]) for g in (30, 5, 100)]
    listed = tmp_path / "genes.txt"
    listed.write_text("\n".join([names[0], "ABSENT", "MT-CO1", *names[1:], ""]))
    with pytest.warns(StreamxWarning, match="become zero"):
        view = preprocess(store, tmp_path / "view", genes=str(listed), min_features=80, threads=1)
    assert list(view.var_names) == [names[0], "ABSENT", "MT-CO1", *names[1:]]
    assert view.var["missing"].tolist() == [False, True, True, False, False]
    x_ng, rows = view.read(0, view.n_obs).toarray(), view.obs_column("_streamx_row").to_numpy()
    np.testing.assert_array_equal(
        x_ng[:, [0, 3, 4]], store.read(0, store.n_obs).toarray()[rows][:, [30, 5, 100]]
    )
    assert not x_ng[:, 1:3].any()
    assert view.scale_bg is not None
    np.testing.assert_array_equal(view.scale_bg[:, 1:3], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = preprocess(
            store, tmp_path / "same", genes=[names[0], "ABSENT", "MT-CO1", *names[1:]], min_features=80
        )
    np.testing.assert_array_equal(same.scale_bg, view.scale_bg)


def test_global_scale_and_no_scale(store: Collection, tmp_path: Path) -> None:
    by_batch = preprocess(store, tmp_path / "batch", **RNA)
    over_all = preprocess(store, tmp_path / "global", scale="global", **RNA)
    none = preprocess(store, tmp_path / "none", scale="none", **RNA)
    assert by_batch.scale_bg is not None
    assert over_all.scale_bg is not None
    seen = np.where(transformed(none).any(axis=0), by_batch.scale_bg.max(axis=0), 1)
    np.testing.assert_array_equal(over_all.scale_bg, np.tile(seen, (3, 1)))
    assert none.scale_bg is None


@pytest.mark.parametrize("rows", [[], [3], [0, 1, 5, 6], list(range(40))])
@pytest.mark.parametrize("chosen", [[], [7], [0, 3, 4, 29], [29, -1, 3, 0, -1]])
def test_rows_and_columns_are_taken(rows: list[int], chosen: list[int]) -> None:
    dense = np.random.default_rng(0).poisson(0.5, (40, 30)).astype(np.uint16)
    expected = dense[rows][:, chosen] * (np.array(chosen, int) >= 0)
    found = take(csr_matrix(dense), np.array(rows, np.int64), np.array(chosen, np.int64))
    assert found.dtype == np.uint16
    assert found.has_canonical_format
    np.testing.assert_array_equal(found.toarray(), expected)


def test_counts_profile_keeps_raw_counts(store: Collection, data: anndata.AnnData, tmp_path: Path) -> None:
    view = preprocess(store, tmp_path / "view", profile="counts", min_cells=0, threads=1)
    assert view.shape == data.shape
    np.testing.assert_array_equal(transformed(view), view.read(0, view.n_obs).toarray())


# -- other kinds of data ---------------------------------------------------------------------------------


def cite(n_cells: int = 260) -> anndata.AnnData:
    adata = counts(5, n_cells=n_cells, n_genes=120, n_batches=2)
    rng = np.random.default_rng(5)
    protein = rng.poisson(20, (n_cells, 4)).astype(np.float32)
    protein[(adata.obs["batch"] == "b1").to_numpy()] = 0
    adata.obsm["protein_expression"] = pd.DataFrame(
        protein, index=adata.obs_names, columns=["CD3", "CD4", "CD8", "CD19"]
    )
    return adata


def test_rna_and_protein(tmp_path: Path) -> None:
    adata = cite()
    store = convert([adata], tmp_path / "store", batch_key="batch", threads=1)
    view = preprocess(store, tmp_path / "view", min_features=5, n_top_features=40, threads=1)
    protein = view.modalities["protein_expression"]
    assert protein["names"] == ["CD3", "CD4", "CD8", "CD19"]
    assert protein["measured"] == {"b0": [True] * 4, "b1": [False] * 4}
    at = adata.obs_names.get_indexer(view.obs_column("_streamx_name").to_numpy())
    expected = adata.obsm["protein_expression"].to_numpy()[at]
    np.testing.assert_array_equal(view.read_obsm("protein_expression", 0, view.n_obs), expected)
    back = anndata.read_zarr(next((tmp_path / "view/shards").iterdir()))
    np.testing.assert_array_equal(np.asarray(back.obsm["protein_expression"]), expected)
    only = preprocess(store, tmp_path / "only", batches=("b0",), min_features=5, n_top_features=40)
    assert only.modalities["protein_expression"]["measured"] == {"b0": [True] * 4}


def test_obsm_as_features(tmp_path: Path) -> None:
    store = convert([cite()], tmp_path / "store", batch_key="batch", threads=1)
    view = preprocess(store, tmp_path / "view", obsm="protein_expression", threads=1)
    assert list(view.var_names) == ["CD3", "CD4", "CD8", "CD19"]
    assert view.n_obs == store.n_obs
    assert transformed(view).max() == 1
    np.testing.assert_array_equal(
        view.read(0, view.n_obs).toarray(), view.read_obsm("protein_expression", 0, view.n_obs)
    )
    with pytest.raises(UsageError, match="protein_expression"):
        preprocess(store, tmp_path / "no", obsm="X_pca")


def test_processed_values_are_scaled_only(tmp_path: Path) -> None:
    adata = scanpy_normal(counts(6, n_cells=200, n_genes=60))
    store = convert([adata], tmp_path / "store", batch_key="batch", allow_float=True, threads=1)
    view = preprocess(store, tmp_path / "view", processed=True, threads=1)
    assert view.shape == adata.shape
    assert view.read(0, 2, dtype="stored").dtype == np.float32
    at = adata.obs_names.get_indexer(view.obs_column("_streamx_name").to_numpy())
    expected = adata.X.toarray()[at]
    expected = expected / np.where(expected.max(axis=0) > 0, expected.max(axis=0), 1)
    np.testing.assert_allclose(transformed(view), expected, rtol=1e-6)


def test_counts_and_normalised_values_are_told_apart(store: Collection, tmp_path: Path) -> None:
    with pytest.warns(StreamxWarning, match="the values are counts"):
        preprocess(store, tmp_path / "a", processed=True, threads=1)
    adata = scanpy_normal(counts(6, n_cells=200, n_genes=60))
    floats = convert([adata], tmp_path / "floats", batch_key="batch", allow_float=True, threads=1)
    with pytest.warns(StreamxWarning, match="the values are no counts"):
        preprocess(floats, tmp_path / "b", min_features=1, n_top_features=20, threads=1)


def peaks() -> anndata.AnnData:
    rng = np.random.default_rng(8)
    openness = rng.beta(0.4, 1.2, 300)
    x_ng = csr_matrix((rng.random((240, 300)) < openness) * rng.integers(1, 4, (240, 300)), dtype=np.float32)
    batch = pd.Categorical(np.repeat(["a", "b"], 120))
    names = [f"chr1:{g}00-{g}50" for g in range(300)]
    return anndata.AnnData(
        x_ng,
        obs=pd.DataFrame({"batch": batch}, index=[f"c{i}" for i in range(240)]),
        var=pd.DataFrame(index=names),
    )


@pytest.mark.parametrize("variant", ["0.2.0", "1.0.2", "1.0.4"])
def test_atac(tmp_path: Path, variant: str) -> None:
    """Each documented recipe, step by step with scanpy and numpy."""
    adata, n_top = peaks(), 80
    store = convert([adata], tmp_path / "store", batch_key="batch", threads=1)
    view = preprocess(
        store, tmp_path / "view", profile="ATAC", atac=variant, min_features=70, n_top_features=n_top
    )
    work = adata.copy()
    if variant == "1.0.4":
        sc.pp.normalize_total(work, target_sum=1e4)
        sc.pp.log1p(work)
    else:
        work.X.data[:] = 1
    sc.pp.filter_cells(work, min_genes=70)
    sc.pp.filter_genes(work, min_cells=3)
    if variant == "1.0.2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sc.pp.highly_variable_genes(work, n_top_genes=n_top, batch_key="batch", subset=True)
    else:
        score = 1 - np.abs(np.asarray(work.X.mean(axis=0)).ravel() - 0.5)
        work = work[:, score >= np.sort(score)[::-1][n_top]].copy()
    if variant == "0.2.0":
        sc.pp.normalize_total(work, target_sum=1e4)
    assert set(view.var_names) == set(work.var_names)
    work = work[view.obs_column("_streamx_name").to_numpy(), list(view.var_names)]
    expected = work.X.toarray()
    groups = work.obs["batch"].to_numpy() if variant != "1.0.4" else np.zeros(work.n_obs)
    for group in np.unique(groups):
        expected[groups == group] /= np.maximum(expected[groups == group].max(axis=0), 1e-30)
    np.testing.assert_allclose(transformed(view), expected, rtol=2e-6, atol=1e-6)
    assert view.read(0, view.n_obs).max() == 3  # raw counts, whatever the transform


def test_outer_join_ranks_genes_that_every_batch_measured(tmp_path: Path) -> None:
    a, b = (
        counts(10, n_cells=300, n_genes=150, n_batches=1),
        counts(10, n_cells=260, n_genes=150, n_batches=1),
    )
    a, b = a[:, :130].copy(), b[:, 20:].copy()
    store = convert({"a": a, "b": b}, tmp_path / "store", join="outer", threads=1)
    shared = set(a.var_names) & set(b.var_names)
    settings = {"min_features": 20, "n_top_features": 60, "threads": 1}
    view = preprocess(store, tmp_path / "view", **settings)
    assert set(view.var_names) <= shared
    loose = preprocess(store, tmp_path / "loose", allow_unmeasured=True, **settings)
    assert not set(loose.var_names) <= shared
    # a gene that is absent from the batches asked for doesn't count against the others
    one = preprocess(store, tmp_path / "one", batches=("a",), **settings)
    assert set(one.var_names) <= set(a.var_names)
    assert not set(one.var_names) <= shared


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"min_features": 100_000}, EmptyError, "keeps nine in ten"),
        ({"min_cells": 100_000}, EmptyError, "min-cells"),
        ({"batches": ("b9",)}, BatchError, "b0, b1, b2"),
        ({"where": "study == 'nowhere'"}, EmptyError, "no cell is asked for"),
        ({"where": "nothing > 1"}, UsageError, "columns are batch"),
        ({"where": "depth.max() > 1"}, UsageError, "columns are"),
        ({"n_top_features": -5}, UsageError, "0 or more"),
        ({"flavor": "other"}, UsageError, "seurat_v3"),
        ({"memory": "1MB"}, ResourceError, "--memory"),
        ({"genes": "/nowhere/genes.txt"}, UsageError, "one feature per line"),
        ({"genes": []}, UsageError, "one feature per line"),
        ({"nonsense": 1}, UsageError, "nonsense"),
    ],
)
def test_refused(
    store: Collection, tmp_path: Path, settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        preprocess(store, tmp_path / "view", **{**RNA, **settings})
    if error is not ResourceError:  # nothing to resume where data or settings must change
        assert not (tmp_path / "view.journal").exists()


def test_a_view_of_a_view_is_refused(store: Collection, tmp_path: Path) -> None:
    view = preprocess(store, tmp_path / "view", **RNA)
    with pytest.raises(UsageError, match="is a view"):
        preprocess(view, tmp_path / "second")


def test_a_batch_that_loess_cannot_fit_is_named(tmp_path: Path) -> None:
    """Two cells of 0 and 1 counts: two points to fit a parabola to."""
    adata = counts(11, n_cells=200, n_genes=80, n_batches=1)
    poor = adata[:2].copy()
    poor.X.data[:] = 1
    poor.obs["batch"] = "tiny"
    poor.obs_names = ["x", "y"]
    store = convert([anndata.concat([adata, poor])], tmp_path / "store", batch_key="batch", threads=1)
    with pytest.raises(BatchError, match=r"tiny.*\n.*--flavor seurat"):
        preprocess(store, tmp_path / "v3", min_features=1, flavor="seurat_v3", n_top_features=20)
    view = preprocess(store, tmp_path / "view", min_features=1, flavor="seurat", n_top_features=20)
    assert view.batches == ["b0", "tiny"]


def test_degenerate_data(tmp_path: Path) -> None:
    """A batch of one cell, an empty gene, an empty cell: no crash, no NaN in the tables."""
    adata = counts(12, n_cells=150, n_genes=60, n_batches=1)
    single = adata[:1].copy()
    single.obs["batch"] = "single"
    single.obs_names = ["lonely"]
    empty = adata[1:2].copy()
    empty.X = csr_matrix(empty.shape, dtype=np.float32)
    empty.obs_names = ["empty"]
    store = convert(
        [anndata.concat([adata, single, empty])], tmp_path / "store", batch_key="batch", threads=1
    )
    settings = {"min_features": 0, "min_cells": 0, "n_top_features": 30, "threads": 1}
    view = preprocess(store, tmp_path / "view", **settings)
    assert view.shape == (152, 30)
    assert np.isfinite(transformed(view)).all()
    assert np.isfinite(view.scale_bg).all()
    with pytest.raises(BatchError, match=r"single.*bins of mean expression coincide"):
        preprocess(store, tmp_path / "cell_ranger", flavor="cell_ranger", **settings)
