"""``sx.SCVI_EVAL`` and ``sx.TRVAE_EVAL`` (SA19): every method, on values that can be computed by hand."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from arches_data import ARCHES, QUICK, cells
from sklearn.metrics import f1_score, silhouette_samples, silhouette_score
from sklearn.neighbors import NearestNeighbors

import streamx as sx
from streamx.errors import StreamxWarning, UntrainedError, UsageError

SMALL: dict[str, Any] = {"n_hidden": 8, "n_latent": 3}


@lru_cache
def trained(kind: str) -> Any:
    adata = cells("ab", 50, seed=2)
    if kind == "scanvi":
        model: Any = sx.SCANVI(adata, "?", **SMALL, **ARCHES, batch_key="study", labels_key="type")
        model.train(n_epochs_unsupervised=2, n_epochs_semisupervised=2, **QUICK)
        return model
    if kind == "scvi":
        model = sx.SCVI(adata, **SMALL, **ARCHES, batch_key="study")
    elif kind == "totalvi":
        model = sx.TOTALVI(adata, **SMALL, batch_key="study", protein_expression_obsm_key="adt")
    else:
        model = sx.TRVAE(adata, "study", ["a", "b"], [8], latent_dim=3)
    model.train(2, **QUICK)
    return model


def evaluation(kind: str, *data: Any, **more: Any) -> Any:
    cls = sx.TRVAE_EVAL if kind == "trvae" else sx.SCVI_EVAL
    return cls(trained(kind), *data, cell_type_key="type", **more)


def neighbours(z_nk: np.ndarray) -> np.ndarray:
    """The 50 nearest of each cell, without itself."""
    found = NearestNeighbors(n_neighbors=51, algorithm="brute").fit(z_nk)
    return found.kneighbors(z_nk, return_distance=False)[:, 1:]


@pytest.mark.parametrize("kind", ["scvi", "scanvi", "totalvi", "trvae"])
def test_sa19_scores_by_hand(kind: str) -> None:
    found = evaluation(kind)
    adata = found.latent_as_anndata()
    z, batch, label = adata.X, adata.obs["batch"].to_numpy(), adata.obs["cell_type"].to_numpy()
    data = trained(kind).adata
    assert batch.tolist() == data.obs["study"].tolist()
    assert [str(name) for name in label] == data.obs["type"].astype(str).tolist()
    near = neighbours(z)
    share_n = (batch[near] == "a").mean(axis=1)
    p = np.clip(np.stack([share_n, 1 - share_n]), 1e-300, 1)
    assert found.get_ebm(n_pools=1) == pytest.approx(-(p * np.log2(p)).sum(0).mean(), abs=1e-6)
    assert found.get_ebm() == pytest.approx(found.get_ebm(n_pools=1), abs=0.03)
    known = data.obs["type"].notna().to_numpy()
    assert 0 < known.sum() < len(known)  # cells without a type are in no score of types
    z, batch, label = z[known], batch[known], label[known].astype(str)
    own = pd.Series((label[neighbours(z)] == label[:, None]).mean(axis=1)).groupby(label).mean().mean()
    assert found.get_knn_purity() == pytest.approx(own, abs=1e-6)
    assert found.get_latent_score() == pytest.approx(found.get_ebm() + own, abs=1e-6)
    of_batch, of_type = found.get_asw()
    assert of_type == pytest.approx((silhouette_score(z, label) + 1) / 2, abs=1e-5)
    inside = [
        (1 - abs(silhouette_samples(z[label == name], batch[label == name]))).mean()
        for name in np.unique(label)
    ]
    assert of_batch == pytest.approx(np.mean(inside), abs=1e-5)
    assert 0 <= found.get_nmi() <= 1


@pytest.mark.parametrize("kind", ["scvi", "totalvi", "trvae"])
def test_sa19_latents(kind: str) -> None:
    """A draw as documented, totalVI's mean; the mean on request."""
    model = trained(kind)
    mean = model.get_latent_representation(give_mean=True)
    given, asked = (evaluation(kind, **more).latent_as_anndata().X for more in ({}, {"give_mean": True}))
    np.testing.assert_array_equal(asked, mean)
    assert np.array_equal(given, mean) == (kind == "totalvi")


def test_sa19_labels_of_scanvi() -> None:
    found = evaluation("scanvi")
    model = trained("scanvi")
    labels, types = model.predict(), model.adata.obs["type"]
    known, truth = types.notna().to_numpy(), types.astype(str).to_numpy()
    assert found.get_classification_accuracy() == pytest.approx((labels == truth)[known].mean())
    obs = found.latent_as_anndata().obs
    assert obs["predictions"].tolist() == labels.tolist()
    assert obs["certainty"].to_numpy() == pytest.approx(model.predict(soft=True).max(axis=1).to_numpy())
    assert obs["type_check"].notna().tolist() == known.tolist()
    assert (obs["type_check"][known] == "Correct").tolist() == (labels == truth)[known].tolist()
    assert found.get_f1_score() == pytest.approx(
        f1_score(truth[known], labels[known].astype(str), average="macro", labels=np.unique(truth[known]))
    )
    other = evaluation("scvi")
    with pytest.warns(StreamxWarning, match="SCVI predicts no labels"):
        assert other.get_classification_accuracy() is None
    assert other.get_f1_score() is None


def test_sa19_architecture_and_pictures(tmp_path: Path) -> None:
    found = evaluation("scanvi")
    table = found.get_model_arch()
    assert table["size"].sum() == sum(p.numel() for p in trained("scanvi").state.model.module.parameters())
    assert len(found.plot_history(show=False, save=True, dir_path=tmp_path)) == 2
    found.plot_latent(show=False, save=True, dir_path=tmp_path, predictions=True)
    found.plot_latent(show=False, save=True, dir_path=tmp_path, in_one=True)
    names = ["history_0", "history_1", "latent", "latent_batch", "latent_cell_type", "latent_predictions"]
    assert sorted(p.stem for p in tmp_path.iterdir()) == [*names, "latent_type_check"]
    assert min(p.stat().st_size for p in tmp_path.iterdir()) > 3000
    assert len(evaluation("trvae").plot_history(show=False)) == 1


def test_sa19_other_data(tmp_path: Path) -> None:
    """An object that is not the model's own, and a file: the same cells, the same scores."""
    adata = cells("ab", 50, seed=2)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    want = evaluation("scvi", give_mean=True)
    for data in (adata, tmp_path / "cells.h5ad"):
        found = evaluation("scvi", data, give_mean=True, batch_key="study")
        assert found.get_knn_purity() == want.get_knn_purity()
        assert found.get_ebm() == want.get_ebm()


def test_sa19_more_types_than_a_byte_holds() -> None:
    adata = cells("ab", 150, seed=3)
    adata.obs["fine"] = [f"type {i // 2}" for i in range(adata.n_obs)]
    found = sx.SCVI_EVAL(trained("scvi"), adata, cell_type_key="fine", batch_key="study")
    assert 0 < found.get_knn_purity(n_neighbors=5) < 1
    assert len(found.latent_as_anndata().obs["cell_type"].cat.categories) == 150


def test_sa19_one_type_or_none() -> None:
    adata = cells("ab", 50, seed=2)
    adata.obs["one"] = pd.Categorical(["T"] * adata.n_obs, categories=["T", "nobody's"])
    adata.obs["none"] = pd.Categorical([None] * adata.n_obs, categories=["T"])
    one, none = (
        sx.SCVI_EVAL(trained("scanvi"), adata, cell_type_key=key, batch_key="study")
        for key in ("one", "none")
    )
    assert one.get_knn_purity() == 1
    assert (one.get_nmi(), one.get_asw()[1], none.get_nmi()) == (None, None, None)  # nothing to tell apart
    assert one.get_classification_accuracy() == (trained("scanvi").predict() == "T").mean()
    assert none.get_classification_accuracy() is None
    with pytest.raises(UsageError, match="no cell has a cell type"):
        none.get_knn_purity()
    figures = [found.plot_latent(show=False, predictions=True) for found in (one, none)]
    assert [len(shown) for shown in figures] == [4, 2]


def test_sa19_what_cannot_be_asked() -> None:
    with pytest.raises(UntrainedError):
        sx.SCVI_EVAL(sx.SCVI(cells(), batch_key="study"))
    with pytest.raises(UsageError, match="cell_type_key"):
        sx.SCVI_EVAL(trained("scvi")).get_knn_purity()
    one: anndata.AnnData = trained("scvi").adata
    one = one[one.obs["study"] == "a"].copy()
    with pytest.raises(UsageError, match="two batches"):
        sx.SCVI_EVAL(trained("scvi"), one, cell_type_key="type", batch_key="study").get_ebm()
