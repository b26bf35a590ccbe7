"""trVAE with mse on normalised values: from AnnData and files to latents, queries and surgery; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from arches_data import QUICK, cells

import streamx as sx
from streamx.cli.main import invoke
from streamx.errors import BadValuesError, StreamxWarning
from streamx.train.model import load_model

SMALL: dict[str, Any] = {"hidden_layer_sizes": [8], "latent_dim": 3}


def normalised(names: str = "ab", seed: int = 0, *, logged: bool = True) -> anndata.AnnData:
    """Cells scaled to 10,000, as float32, or ln(1 + x) of that."""
    adata = cells(names, seed=seed)
    x_ng = adata.X.toarray().astype(np.float64)
    x_ng *= 1e4 / x_ng.sum(1, keepdims=True)
    adata.X = (np.log1p(x_ng) if logged else x_ng).astype(np.float32)
    return adata


def model_of(adata: Any, **settings: Any) -> Any:
    return sx.TRVAE(adata, "study", recon_loss="mse", **SMALL, **settings)


def test_values_as_they_are_and_their_logarithm_are_the_same_model() -> None:
    logged = model_of(normalised(), log_input=False)
    logged.train(3, **QUICK)
    plain = model_of(normalised(logged=False))
    plain.train(3, **QUICK)
    z_nk = logged.get_latent(mean=True)
    assert z_nk.std() > 0
    np.testing.assert_allclose(plain.get_latent(mean=True), z_nk, atol=1e-3)
    np.testing.assert_allclose(plain.history["loss"], logged.history["loss"], rtol=1e-3)
    adata = normalised()
    names = adata.obs["study"].to_numpy()
    np.testing.assert_allclose(logged.get_latent(adata.X, names, mean=True), z_nk, atol=1e-5)


def test_a_query_of_normalised_values(tmp_path: Path) -> None:
    model, query = model_of(normalised(), log_input=False), normalised("c", seed=3)
    model.train(2, **QUICK)
    model.save(tmp_path / "model")
    z_nk = model.get_latent(mean=True)
    found = sx.TRVAE.load_query_data(query, tmp_path / "model")
    found.train(2, **QUICK)
    assert found.get_latent(mean=True).shape == (60, 3)
    np.testing.assert_array_equal(found.get_latent_representation(model.adata), z_nk)
    query.write_h5ad(tmp_path / "c.h5ad")
    argv = ["surgery", str(tmp_path / "model"), str(tmp_path / "c.h5ad"), "-o", str(tmp_path / "updated")]
    invoke([*argv, "--batch-key", "study", "--max-epochs", "2"])
    assert load_model(tmp_path / "updated").batches == ("a", "b", "c")
    assert not load_model(tmp_path / "updated").module.config.log_input


def test_on_the_command_line(tmp_path: Path) -> None:
    normalised().write_h5ad(tmp_path / "ab.h5ad")
    store, view, model = (str(tmp_path / name) for name in ("store", "view", "model"))
    invoke(["convert", str(tmp_path / "ab.h5ad"), "-o", store, "--batch-key", "study", "--allow-float"])
    invoke(["preprocess", store, "-o", view, "--processed", "--n-top-features", "0"])
    argv = ["train", view, "-o", model, "--model", "trvae", "--max-epochs", "2", "--hidden-layer-sizes", "8"]
    with pytest.raises(BadValuesError, match="no counts") as caught:
        invoke(argv)
    assert "--recon-loss mse" in str(caught.value.fix)
    argv += ["--recon-loss", "mse"]
    with pytest.warns(StreamxWarning, match="--no-log-input"):
        invoke([*argv, "--max-epochs", "1", "-o", str(tmp_path / "twice")])
    invoke([*argv, "--no-log-input"])
    normalised("a", seed=3).write_h5ad(tmp_path / "a.h5ad")
    invoke(
        ["project", model, str(tmp_path / "a.h5ad"), "-o", str(tmp_path / "mapped"), "--batch-key", "study"]
    )
    assert np.isfinite(anndata.read_zarr(tmp_path / "mapped" / "a.zarr").obsm["X_trvae"]).all()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValuesError) as caught:
        sx.TRVAE(normalised(), "study", **SMALL).train(1, **QUICK)
    fix = "give the raw counts; or recon_loss='mse' if normalised values are meant"
    assert caught.value.fix == fix
    with pytest.raises(BadValuesError) as caught:
        sx.SCVI(normalised(), batch_key="study").train(1, **QUICK)
    assert caught.value.fix == fix.replace("recon", "trVAE with recon")
    centred = normalised()
    centred.X -= centred.X.mean(0)
    with pytest.raises(BadValuesError, match="negative"):
        model_of(centred, log_input=False).train(1, **QUICK)
