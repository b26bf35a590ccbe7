"""The classes: trained, asked, saved, loaded, extended; what they say is what the pure functions say."""

from __future__ import annotations

import gc
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from arches_data import ARCHES, KEYS, N_GENES, QUICK, cells

import streamx as sx
from streamx.arches.data import open_data
from streamx.errors import (
    BatchError,
    GeneError,
    StreamxWarning,
    UntrainedError,
    UsageError,
)
from streamx.interop.save import save_for_scvi_tools
from streamx.posterior.evidence import elbo, marginal_ll
from streamx.posterior.expression import Asked, normalized_expression
from streamx.train.model import load_model

SMALL: dict[str, Any] = {"n_hidden": 8, "n_latent": 3}


@lru_cache
def trained(kind: str) -> Any:
    """A model of cells of the studies a and b, trained for two epochs; tests leave it as it is."""
    adata = cells()
    if kind == "scvi":
        model: Any = sx.SCVI(adata, **SMALL, **ARCHES, **KEYS)
    elif kind == "scanvi":
        model = sx.SCANVI(adata, "?", **SMALL, **ARCHES, batch_key="study", labels_key="type")
    elif kind == "totalvi":
        model = sx.TOTALVI(adata, **SMALL, batch_key="study", protein_expression_obsm_key="adt")
    else:
        model = sx.TRVAE(adata, "study", ["a", "b"], [8], latent_dim=3)
    more = {"n_epochs_unsupervised": 2} if kind == "scanvi" else {}
    model.train(n_epochs_semisupervised=2, **more, **QUICK) if more else model.train(2, **QUICK)
    return model


KINDS = ("scvi", "scanvi", "totalvi", "trvae")


def latents(model: Any, *data: Any) -> np.ndarray:
    return model.get_latent_representation(*data)


def digest(module: torch.nn.Module) -> str:
    """Of every bit of a network."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_model_says_so(kind: str) -> None:
    names = {"trvae": {"condition_key": "study"}}.get(kind, {"batch_key": "study", "labels_key": "type"})
    model = getattr(sx, kind.upper())(cells(), **names)
    assert not model.is_trained
    for ask in (model.get_latent_representation, lambda: model.save("nowhere")):
        with pytest.raises(UntrainedError, match="not trained yet"):
            ask()
    with pytest.raises(RuntimeError):
        model.get_latent_representation()
    with pytest.raises(UntrainedError):
        type(model).load_query_data(cells("c"), model)
    if kind == "scvi":
        with pytest.raises(UntrainedError):
            sx.SCANVI(cells(), "?", pretrained_model=model, labels_key="type")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="no data"):
        sx.SCVI(None)
    with pytest.raises(UsageError, match="unknown setting 'n_layer'"):
        sx.SCVI(cells(), n_layer=2)
    with pytest.raises(UsageError, match="learns from labels"):
        sx.SCANVI(cells(), "?", batch_key="study")
    with pytest.raises(UsageError, match="alphabet"):
        sx.TRVAE(cells(), "study", ["b", "a"], mmd_boundary=1)
    with pytest.raises(BatchError, match="conditions a, b"):
        sx.TRVAE(cells(), "study", ["a", "c"]).train(1, **QUICK)
    with pytest.raises(UsageError, match="no batch_key"):
        sx.SCVI(["one.h5ad", "two.h5ad"]).train(1, **QUICK)


@pytest.mark.parametrize("kind", KINDS)
def test_sa06_latents_in_the_order_of_the_data(kind: str) -> None:
    model = trained(kind)
    z_nk = latents(model)
    assert z_nk.shape == (120, 3)
    with open_data(model.state.model, model.adata, model.state.keys) as found:
        want = torch.cat([model.state.model.module.encode(part)[0] for part in found]).detach()
    np.testing.assert_array_equal(z_nk, want.numpy())
    rows = [7, 3, 3, 100]
    np.testing.assert_allclose(model.get_latent_representation(indices=rows), z_nk[rows], atol=1e-6)
    drawn = model.get_latent_representation(give_mean=False)
    assert np.abs(drawn - z_nk).max() > 1e-3
    np.testing.assert_array_equal(model.get_latent_representation(give_mean=False), drawn)
    assert np.abs(model.get_latent_representation(give_mean=False, seed=1) - drawn).max() > 1e-3


def test_sa05_trvae_latents_of_a_matrix() -> None:
    model, adata = trained("trvae"), cells()
    z_nk = model.get_latent(mean=True)
    for x in (adata.X, adata.X.toarray()):
        np.testing.assert_allclose(model.get_latent(x, adata.obs["study"], mean=True), z_nk, atol=1e-5)
    assert np.abs(model.get_latent(adata.X, adata.obs["study"]) - z_nk).max() > 1e-3
    assert np.abs(model.get_latent() - z_nk).max() > 1e-3
    with pytest.raises(BatchError, match="Incorrect conditions: c"):
        model.get_latent(adata.X[:2], ["a", "c"])
    with pytest.raises(UsageError):
        model.get_latent(adata.X[:, :3], adata.obs["study"])
    assert model.conditions_ == ["a", "b"]


@pytest.mark.parametrize("kind", ["scvi", "scanvi", "totalvi"])
def test_sa09_what_is_asked_is_what_the_pure_functions_say(kind: str) -> None:
    model, rows = trained(kind), np.arange(90, 30, -1)
    of = model.state.model

    def minibatches() -> Any:
        return open_data(of, model.adata, model.state.keys, rows)

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    with minibatches() as found:
        assert model.get_elbo(indices=rows, seed=4) == elbo(of.module, found, seed())
    assert np.isfinite(model.get_elbo())
    assert model.get_reconstruction_error(indices=rows) > 0
    with minibatches() as found:
        if kind == "scanvi":
            assert not hasattr(model, "get_marginal_ll")
        else:
            want = marginal_ll(of.module, found, 7, seed())
            np.testing.assert_array_equal(
                model.get_marginal_ll(indices=rows, n_mc_samples=7, return_mean=False, seed=4), want
            )
    asked = Asked(batches=(1, 0), n_samples=3, library_size="latent", genes=np.array([2, 5]))
    with minibatches() as found:
        parts = list(normalized_expression(of.module, found, asked, seed()))
    want_ng = np.concatenate([part[0] for part in parts])
    settings = {"transform_batch": ["b", "a"], "n_samples": 3, "library_size": "latent", "seed": 4}
    got = model.get_normalized_expression(indices=rows, gene_list=["g5", "g2"], **settings)
    if kind == "totalvi":
        got, proteins = got
        np.testing.assert_array_equal(proteins, np.concatenate([part[1] for part in parts]))
        assert list(proteins.columns) == ["p0", "p1", "p2", "p3", "p4"]
        total, *of_parts = (model.get_reconstruction_error(mode=m) for m in ("total", "gene", "protein"))
        assert total == pytest.approx(sum(of_parts))
    np.testing.assert_array_equal(got, want_ng)
    assert list(got.columns) == ["g2", "g5"]
    assert list(got.index) == list(model.adata.obs_names[rows])
    size_n1 = model.get_latent_library_size(indices=rows)
    np.testing.assert_allclose(size_n1, model.adata.X[rows].sum(1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["scvi", "totalvi"])
def test_shapes_are_those_that_users_know(kind: str) -> None:
    model = trained(kind)
    n_features = N_GENES + (5 if kind == "totalvi" else 0)
    every = model.get_normalized_expression(n_samples=4, return_mean=False)
    if kind == "totalvi":
        assert [part.shape for part in every] == [(120, N_GENES, 4), (120, 5, 4)]
        shares = model.get_protein_foreground_probability(protein_list=["p3", "p1"], transform_batch="b")
        assert list(shares.columns) == ["p1", "p3"]
        assert ((shares > 0) & (shares < 1)).all(axis=None)
        every = model.get_protein_foreground_probability(n_samples=4, return_mean=False)
        assert every.shape == (120, 5, 4)
    else:
        assert every.shape == (4, 120, N_GENES)
    assert model.posterior_predictive_sample().shape == (120, n_features)
    assert model.posterior_predictive_sample(n_samples=3).shape == (120, n_features, 3)
    parameters = model.get_likelihood_parameters(n_samples=3)
    assert parameters["mean"].shape == (3, 120, N_GENES)
    assert model.get_likelihood_parameters(n_samples=3, give_mean=True)["mean"].shape == (120, N_GENES)
    correlation = model.get_feature_correlation_matrix(correlation_type="pearson", n_samples=2)
    assert correlation.shape == (n_features, n_features)
    assert correlation.attrs["n_used"] == 240
    with pytest.raises(BatchError, match="no batch 'c'"):
        model.get_normalized_expression(transform_batch="c")
    with pytest.raises(GeneError, match="no gene h1"):
        model.get_normalized_expression(gene_list=["g1", "h1"])
    with pytest.raises(UsageError):
        model.get_normalized_expression(n_samples=2, return_mean=False, return_numpy=False)


@pytest.mark.parametrize("kind", ["scvi", "totalvi"])
def test_expression_on_disk(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("streamx.query.BLOCK_ROWS", 13)
    monkeypatch.setattr("streamx.arches.write.CHUNK_VALUES", N_GENES * 8)
    model = trained(kind)
    path = model.get_normalized_expression(out=tmp_path / "out.zarr", seed=3)
    written = anndata.read_zarr(path)
    want = model.get_normalized_expression(seed=3)
    genes, proteins = want if kind == "totalvi" else (want, None)
    np.testing.assert_array_equal(written.X, genes)
    assert list(written.obs_names) == list(model.adata.obs_names)
    assert list(written.var_names) == list(model.state.model.genes)
    if proteins is not None:
        np.testing.assert_array_equal(written.obsm["protein_expression"], proteins)
        assert list(written.uns["protein_expression"]) == list(proteins.columns)
    with pytest.raises(UsageError, match="is there already"):
        model.get_normalized_expression(out=path)
    with pytest.raises(UsageError, match="all draws"):
        model.get_normalized_expression(out=tmp_path / "b", n_samples=2, return_mean=False)


def test_sa07_labels() -> None:
    model = trained("scanvi")
    soft = model.predict(soft=True)
    assert list(soft.columns) == ["B", "Mono", "NK", "T"]
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(model.predict(), soft.columns[soft.to_numpy().argmax(1)])
    np.testing.assert_array_equal(model.predict(indices=[5, 2]), model.predict()[[5, 2]])
    with open_data(model.state.model, model.adata, model.state.keys) as found:
        want = torch.cat([model.state.model.module.predict(part) for part in found]).detach()
    np.testing.assert_array_equal(soft, want.numpy())
    assert [len(table) for table in model.history.values()] == [2, 2]


def test_scanvi_on_a_trained_scvi() -> None:
    vae = sx.SCVI(cells(), **SMALL, **ARCHES, batch_key="study")
    vae.train(1, **QUICK)
    before = digest(vae.state.model.module)
    model = sx.SCANVI.from_scvi_model(vae, "?", labels_key="type")
    model.train(n_epochs_semisupervised=1, lr=1e-9, **QUICK)
    assert digest(vae.state.model.module) == before
    np.testing.assert_allclose(latents(model), latents(vae), atol=1e-5)
    assert model.state.model.schema.unlabeled == "?"
    assert len(model.history["unsupervised_trainer_history"]) == 0


def test_history() -> None:
    table = trained("scvi").history
    assert list(table.index) == [0, 1]
    np.testing.assert_allclose(table["elbo_train_set"], table["reconstruction"] + table["kl"])
    total = trained("totalvi").history
    parts = ["kl", "kl_background", "reconstruction"]
    assert set(parts) < set(total.columns)
    np.testing.assert_allclose(total["elbo_train_set"], total[parts].sum(axis=1))
    np.testing.assert_allclose(total["elbo_test_set"], total["validation_loss"], rtol=1e-5)


def test_training_goes_on() -> None:
    model = sx.SCVI(cells(), **SMALL, **ARCHES, batch_key="study")
    model.train(1, **QUICK)
    before = latents(model)
    model.train(n_epochs=2, lr=1e-9, **QUICK)
    assert list(model.history["loss"].index) == [0, 1, 2]
    np.testing.assert_allclose(latents(model), before, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sa18_a_reference_stays_as_it_is_and_a_query_learns(kind: str, tmp_path: Path) -> None:
    model, adata, query = trained(kind), cells(), cells("c", seed=3)
    if kind == "totalvi":
        del query.obsm["adt"]
    before, z_nk = digest(model.state.model.module), latents(model)
    model.save(tmp_path / "reference")
    files = {p: p.read_bytes() for p in (tmp_path / "reference").rglob("*") if p.is_file()}
    for reference in (model, tmp_path / "reference"):
        found = type(model).load_query_data(query, reference)
        assert not found.is_trained
        start = digest(found.state.model.module)
        with pytest.raises(UntrainedError):
            latents(found)
        found.train(max_epochs=2, **QUICK)
        assert digest(found.state.model.module) != start
        assert latents(found).shape == (60, 3)
        assert found.state.model.batches == ("a", "b", "c")
        if kind != "totalvi":  # whose decoder's batch norms move, but not its encoder's
            assert {p: p.read_bytes() for p in files} == files
        np.testing.assert_array_equal(latents(found, adata), z_nk)
        assert digest(model.state.model.module) == before
    with pytest.raises((BatchError, UsageError)):
        latents(model, query)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, adata, query = trained(kind), cells(), cells("c", seed=3)
    of, folder = type(model), tmp_path / "model"
    model.save(folder, save_anndata=True)
    with pytest.raises(UsageError, match="is there already"):
        model.save(folder)
    model.save(folder, overwrite=True)
    assert sx.verify(folder)["ok"]
    loaded = of.load(folder)
    table, again = (m.history if kind == "scanvi" else {"": m.history} for m in (model, loaded))
    for name in table:
        pd.testing.assert_frame_equal(again[name], table[name])
    assert loaded.is_trained
    genes = len(model.state.model.genes)
    shown = f"streamx {type(model).__name__}, trained: {genes} genes, 2 batches"
    assert repr(loaded).startswith(shown)
    np.testing.assert_array_equal(latents(of.load(folder, adata)), latents(model))
    with pytest.raises(UsageError, match="without data"):
        latents(loaded)
    model.save(tmp_path / "whole", save_anndata=True)
    np.testing.assert_allclose(latents(of.load(tmp_path / "whole")), latents(model), atol=1e-6)
    extended = of.load_query_data(query, model)
    assert "with batches to learn" in repr(extended)
    extended.train(max_epochs=1, **QUICK)
    extended.save(tmp_path / "query")
    assert load_model(tmp_path / "query").batches == ("a", "b", "c")
    assert sx.verify(tmp_path / "query")["ok"]
    kept = anndata.read_zarr(tmp_path / "query" / "reference.zarr")
    of_query = latents(extended)[query.obs_names.get_indexer(kept.obs_names)]
    np.testing.assert_allclose(kept.obsm[f"X_{kind}"], of_query, atol=1e-6)
    again = of.load(tmp_path / "query", query)
    np.testing.assert_array_equal(latents(again), latents(extended))
    again.train(max_epochs=1, **QUICK)  # still only what may move
    np.testing.assert_array_equal(latents(again, adata), latents(model))
    other = sx.TRVAE if kind == "scvi" else sx.SCVI
    with pytest.raises(UsageError, match=f"holds a {kind}"):
        other.load(folder)


def test_other_queries(tmp_path: Path) -> None:
    model = trained("scvi")
    with pytest.warns(StreamxWarning, match="nothing to learn"):
        known = sx.SCVI.load_query_data(cells(), model)
    np.testing.assert_array_equal(latents(known), latents(model))
    query = cells("cd", seed=3)
    store = sx.convert([query], tmp_path / "store", batch_key="study")
    found = []
    for data in (query, store):
        extended = sx.SCVI.load_query_data(data, model)
        extended.train(1, **QUICK)
        assert extended.state.model.batches == ("a", "b", "c", "d")
        found.append(latents(extended, query))
    assert np.abs(found[0] - found[1]).max() < 0.5
    moved = sx.SCVI.load_query_data(query, model, unfrozen=True)
    moved.train(1, **QUICK)
    assert np.abs(latents(moved, cells()) - latents(model)).max() > 1e-6


def test_new_levels_of_a_covariate(tmp_path: Path) -> None:
    """The reference's latents stay; in scvi-tools a new batch takes the column of the first level."""
    keys = {"batch_key": "study", "categorical_covariate_keys": ("donor",)}
    model = sx.SCVI(cells(), **SMALL, **ARCHES, **keys)
    model.train(1, **QUICK)
    query = cells("c", seed=3)
    query.obs["donor"] = "new"
    extended = sx.SCVI.load_query_data(query, model)
    [(key, levels)] = extended.state.model.schema.categories
    assert (key, levels[-1], extended.state.model.batches[-1]) == ("donor", "new", "c")
    before = latents(model)
    for trained_once in (False, True):
        extended.train(1, **QUICK)
        np.testing.assert_array_equal(latents(extended, cells()), before)
        if not trained_once:
            first = latents(extended, query)
            extended.save(tmp_path / "extended")
            extended = sx.SCVI.load(tmp_path / "extended", query)
    assert np.abs(latents(extended, query) - first).max() > 1e-6
    same_study = cells("b", seed=3)
    same_study.obs["donor"] = "new"
    known = sx.SCVI.load_query_data(same_study, model)
    known.train(1, **QUICK)
    np.testing.assert_array_equal(latents(known, cells()), before)


def test_surgery_fools_no_classifier() -> None:
    """totalVI's training does where a batch lacks proteins; new batches are not told from those of before."""

    def without(adata: Any, study: str) -> Any:
        adata.obsm["adt"] = adata.obsm["adt"].mul(adata.obs["study"] != study, axis=0)
        return adata

    keys = {"batch_key": "study", "protein_expression_obsm_key": "adt"}
    model = sx.TOTALVI(without(cells(), "b"), **SMALL, **keys)
    model.train(1, **QUICK)
    assert "fooled" in model.state.history[-1]
    query = without(cells("cd", seed=3), "c")
    extended = sx.TOTALVI.load_query_data(query, model)
    extended.train(1, **QUICK)
    assert "fooled" not in extended.state.history[-1]
    assert np.isfinite(latents(extended)).all()


def test_hidden_labels_of_a_query() -> None:
    query = cells("c", seed=3)
    blank = query.copy()
    blank.obs["type"] = "?"
    found = []
    for data in (query, blank):
        extended = sx.SCANVI.load_query_data(data, trained("scanvi"), freeze_classifier=False)
        extended._labeled_indices = []
        extended.train(n_epochs_semisupervised=1, **QUICK)
        found.append(digest(extended.state.model.module))
    assert found[0] == found[1]
    with pytest.raises(UsageError):
        extended._labeled_indices = [1]


def test_from_files_stores_and_views(tmp_path: Path) -> None:
    adata = cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    store = sx.convert([adata], tmp_path / "store", batch_key="study")
    found = []
    for data in (adata, tmp_path / "cells.h5ad", store, str(store.path)):
        model = sx.SCVI(data, **SMALL, batch_key="study")
        model.train(1, seed=3, **QUICK)
        found.append(latents(model, adata))
        assert latents(model).shape == (120, 3)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-6)
    with pytest.raises(UsageError, match="its batches are in 'study'"):
        sx.SCVI(store, batch_key="donor").train(1, **QUICK)


def test_a_temporary_folder_goes_with_the_object_and_a_given_one_stays(tmp_path: Path) -> None:
    model = sx.SCVI(cells(), **SMALL, batch_key="study")
    folder = model.state.folder
    assert folder.is_dir()
    del model
    gc.collect()
    assert not folder.exists()
    model = sx.SCVI(cells(), **SMALL, batch_key="study", folder=tmp_path / "kept")
    model.train(1, **QUICK)
    del model
    gc.collect()
    assert load_model(tmp_path / "kept" / "model-000").kind == "scvi"


def test_without_batches(tmp_path: Path) -> None:
    model = sx.SCVI(cells(), **SMALL)
    model.train(1, **QUICK)
    assert latents(model).shape == (120, 3)
    assert model.get_normalized_expression().shape == (120, N_GENES)
    named = sx.SCVI.load_query_data(cells("c"), model, batch_key="study")
    assert named.state.model.batches == ("adata", "c")
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(latents(sx.SCVI.load(tmp_path / "model", cells())), latents(model))


@pytest.mark.parametrize("kind", ["scvi", "scanvi"])
def test_a_folder_of_scvi_tools(kind: str, tmp_path: Path) -> None:
    model, adata, query = trained(kind), cells(), cells("c", seed=3)
    of = model.state.model
    adata.layers["counts"], query.layers["counts"] = adata.X.copy(), query.X.copy()
    adata.X.data[:] = 1
    query.X.data[:] = 1
    save_for_scvi_tools(tmp_path / "theirs", of.module, of.schema, layer="counts")
    loaded = type(model).load(tmp_path / "theirs", adata)
    np.testing.assert_array_equal(latents(loaded), latents(model))
    loaded.save(tmp_path / "ours")
    np.testing.assert_array_equal(latents(type(model).load(tmp_path / "ours", adata)), latents(model))
    extended = type(model).load_query_data(query, tmp_path / "theirs")
    extended.train(max_epochs=1, **QUICK)
    np.testing.assert_array_equal(latents(extended, adata), latents(model))
    if kind == "scanvi":
        np.testing.assert_array_equal(loaded.predict(), model.predict())


def test_folders_are_those_of_the_commands(tmp_path: Path) -> None:
    """What is saved here is mapped onto and extended there; what is trained there is loaded here."""
    model, query = trained("scvi"), cells("c", seed=3)
    model.save(tmp_path / "model")
    query.write_h5ad(tmp_path / "c.h5ad")
    [report] = sx.surgery(
        tmp_path / "model", [tmp_path / "c.h5ad"], tmp_path / "updated", batch_key="study", max_epochs=1
    )
    assert report["learnt"].keys() == {"c"}
    updated = sx.SCVI.load(tmp_path / "updated", query)
    np.testing.assert_array_equal(latents(updated, cells()), latents(model))
    sx.project(tmp_path / "updated", [tmp_path / "c.h5ad"], tmp_path / "mapped", batch_key="study")
    mapped = anndata.read_zarr(tmp_path / "mapped" / "c.zarr")
    np.testing.assert_allclose(mapped.obsm["X_scvi"], latents(updated), atol=1e-6)
    store = sx.convert([cells()], tmp_path / "store", batch_key="study")
    sx.train(store, tmp_path / "scvi", model="scvi", max_epochs=1, progress=False, **SMALL)
    loaded = sx.SCVI.load(tmp_path / "scvi", cells())
    assert latents(loaded).shape == (120, 3)
    assert len(loaded.history) == 1
