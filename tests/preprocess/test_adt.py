"""Proteins alone as features: each cell's centred log ratio, from X or from obsm; and mapping onto it."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from test_preprocess_view import transformed

import streamx as sx
from streamx.errors import BatchError, GeneError, UsageError
from streamx.preprocess.run import update_view
from streamx.store.collection import Collection

PROTEINS = ["CD3", "CD4", "CD8", "CD19", "CD56", "IgG1"]


def panel(seed: int = 0, n: int = 120, batches: str = "ab") -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    x_np = rng.poisson(rng.lognormal(2, 1, (n, len(PROTEINS))))
    x_np[0] = 0
    obs = pd.DataFrame({"batch": rng.choice(list(batches), n)}, index=[f"c{seed}-{i}" for i in range(n)])
    return anndata.AnnData(csr_matrix(x_np, dtype=np.float32), obs=obs, var=pd.DataFrame(index=PROTEINS))


def beside_genes(adata: anndata.AnnData) -> anndata.AnnData:
    """The proteins as an obsm matrix of cells whose X are three genes."""
    return anndata.AnnData(
        csr_matrix(np.ones((adata.n_obs, 3)), dtype=np.float32), obs=adata.obs,
        var=pd.DataFrame(index=list("xyz")),
        obsm={"protein_expression": pd.DataFrame(adata.X.toarray(), adata.obs_names, PROTEINS)},
    )  # fmt: skip


def centred(x_np: np.ndarray) -> np.ndarray:
    """ln(1 + x / g), written out: g of a cell is exp(mean ln(1 + x))."""
    return np.stack([np.log(1 + row / np.exp(np.mean([np.log(1 + x) for x in row]))) for row in x_np])


def scaled(values: np.ndarray, batch: np.ndarray) -> np.ndarray:
    out = values.copy()
    for name in np.unique(batch):
        out[batch == name] /= values[batch == name].max(axis=0)
    return out


def check(view: Collection, adata: anndata.AnnData, proteins: list[str]) -> None:
    cells = adata[view.obs_names, proteins]
    expected = scaled(centred(cells.X.toarray()), cells.obs["batch"].to_numpy())
    assert list(view.var_names) == proteins
    np.testing.assert_allclose(transformed(view), expected, rtol=2e-6)
    assert transformed(view).max() == pytest.approx(1)


def test_from_x(tmp_path: Path) -> None:
    adata = panel()
    store = sx.convert([adata], tmp_path / "store", batch_key="batch", threads=1)
    view = sx.preprocess(store, tmp_path / "view", profile="ADT", threads=1)
    assert view.n_obs == 120  # none is filtered, not even the empty cell
    check(view, adata, PROTEINS)


def test_from_obsm_of_cells_with_genes(tmp_path: Path) -> None:
    adata = panel()
    rna = beside_genes(adata)
    store = sx.convert([rna], tmp_path / "store", batch_key="batch", threads=1)
    settings = {"profile": "ADT", "obsm": "protein_expression", "threads": 1}
    check(sx.preprocess(store, tmp_path / "view", **settings), adata, PROTEINS)
    dark = (rna.obs["batch"] == "b").to_numpy()
    rna.obsm["protein_expression"].loc[dark] = 0.0  # what files hold where nothing was measured
    store = sx.convert([rna], tmp_path / "dark", batch_key="batch", threads=1)
    with pytest.raises(BatchError, match="no protein of 'protein_expression' was measured in b") as caught:
        sx.preprocess(store, tmp_path / "no", **settings)
    assert caught.value.fix == "--batches a"
    assert sx.preprocess(store, tmp_path / "a", batches=("a",), **settings).n_obs == (~dark).sum()


def test_a_list_is_the_panel(tmp_path: Path) -> None:
    adata, without_control = panel(), PROTEINS[:-1]
    store = sx.convert([adata], tmp_path / "store", batch_key="batch", threads=1)
    view = sx.preprocess(store, tmp_path / "view", profile="ADT", genes=without_control, threads=1)
    check(view, adata, without_control)
    with pytest.raises(UsageError, match="of a panel of proteins all are taken"):
        sx.preprocess(store, tmp_path / "no", profile="ADT", n_top_features=3)


@pytest.mark.parametrize("obsm", [None, "protein_expression"])
def test_an_update_takes_the_same_ratios(tmp_path: Path, obsm: str | None) -> None:
    first, second = panel(), panel(1, 80, "c")
    parts = [first, second] if obsm is None else [beside_genes(first), beside_genes(second)]
    store = sx.convert([parts[0]], tmp_path / "store", batch_key="batch", threads=1)
    sx.preprocess(store, tmp_path / "view", profile="ADT", obsm=obsm, threads=1)
    sx.convert({"second": parts[1]}, tmp_path / "store", append=True, threads=1)
    check(update_view(tmp_path / "view", threads=1), anndata.concat([first, second]), PROTEINS)


def test_a_query_gets_what_the_reference_got(needs_torch: None, tmp_path: Path) -> None:
    """The same cells, as a file of their own: the same latents; also where the file has further proteins."""
    adata = panel(n=300)
    store = sx.convert([adata], tmp_path / "store", batch_key="batch", threads=1)
    view = sx.preprocess(store, tmp_path / "view", profile="ADT", threads=1)
    sx.train(view, tmp_path / "model", max_iteration=40, progress=False)
    more = anndata.AnnData(
        csr_matrix(np.c_[np.full(300, 50), adata.X.toarray()[:, ::-1]], dtype=np.float32),
        obs=adata.obs, var=pd.DataFrame(index=["new", *PROTEINS[::-1]]),
    )  # fmt: skip
    settings = {"batch_key": "batch", "norm": "running", "scale": "query", "min_query_cells": 1}
    sx.project(tmp_path / "model", {"q": adata, "more": more}, tmp_path / "out", progress=False, **settings)
    found = [anndata.read_zarr(tmp_path / "out" / f"{name}.zarr") for name in ("q", "more")]
    np.testing.assert_allclose(found[0].obsm["X_scalex"], found[1].obsm["X_scalex"], atol=1e-6)

    from streamx.train.model import load_model

    model = load_model(tmp_path / "model")
    assert model.total == "geometric"


def test_a_query_whose_proteins_lie_in_obsm(needs_torch: None, tmp_path: Path) -> None:
    """The latents of the same proteins in X; from memory, from a file, and of a reference made alike."""
    adata = panel(n=300)
    rna = beside_genes(adata)
    store = sx.convert([rna], tmp_path / "store", batch_key="batch", threads=1)
    view = sx.preprocess(store, tmp_path / "view", profile="ADT", obsm="protein_expression", threads=1)
    sx.train(view, tmp_path / "model", max_iteration=40, norm="running", progress=False)
    own = {"batch_key": "batch", "norm": "running", "scale": "query", "min_query_cells": 1, "progress": False}
    sx.project(tmp_path / "model", {"x": adata}, tmp_path / "out", **own)
    rna.write_h5ad(tmp_path / "rna.h5ad")
    queries = {"memory": rna, "file": tmp_path / "rna.h5ad"}
    sx.project(tmp_path / "model", queries, tmp_path / "out", obsm="protein_expression", **own)
    expected = anndata.read_zarr(tmp_path / "out" / "x.zarr").obsm["X_scalex"]
    reference = anndata.read_zarr(tmp_path / "model" / "reference.zarr")[adata.obs_names]
    np.testing.assert_allclose(reference.obsm["X_scalex"], expected, atol=1e-5)
    for name in queries:
        found = anndata.read_zarr(tmp_path / "out" / f"{name}.zarr").obsm["X_scalex"]
        np.testing.assert_array_equal(found, expected)

    with pytest.raises(GeneError, match="0 of 6 genes found") as caught:
        sx.project(tmp_path / "model", {"q": rna}, tmp_path / "no", **own)
    assert caught.value.fix == "--obsm protein_expression: there the model's features are"
    with pytest.raises(GeneError, match="no obsm matrix 'proteins'") as absent:
        sx.project(tmp_path / "model", {"q": rna}, tmp_path / "no", obsm="proteins", **own)
    assert absent.value.fix == "one of: protein_expression"
    some = {"lacks": adata, "has": rna}
    skipped = sx.project(
        tmp_path / "model", some, tmp_path / "some", obsm="protein_expression", on_error="skip", **own
    )
    assert [report["status"] for report in skipped] == ["failed", "done"]
