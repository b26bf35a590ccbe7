"""Which cells train and which validate, and which genes a query is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arches_data import ARCHES, N_GENES, QUICK, cells
from test_models import latents, trained

import streamx as sx
from streamx.arches.options import training_settings
from streamx.arches.state import split_of, training_cells
from streamx.errors import UsageError
from streamx.store.collection import Collection

SMALL: dict[str, Any] = {"n_hidden": 8, "n_latent": 3, **ARCHES, "batch_key": "study"}
TRAIN, VALIDATION = np.arange(0, 80), np.arange(80, 100)


def names_of(model: Any, view: Collection, indices: Any) -> list[set[str]]:
    """Cells that train and that validate, by name."""
    found = split_of(model.state, view, indices)
    assert found is not None
    return [set(view.obs_names[found[name]]) for name in ("train", "validation")]


def test_rows_are_found_again_in_the_store() -> None:
    model = trained("scvi")
    names, view = model.adata.obs_names, training_cells(model.state)
    assert list(names) != list(view.obs_names)
    both = names_of(model, view, (TRAIN, VALIDATION))
    assert both == [set(names[TRAIN]), set(names[VALIDATION])]
    mask = np.isin(np.arange(120), TRAIN)
    assert names_of(model, view, (mask, None)) == [set(names[:80]), set(names[80:])]
    assert names_of(model, view, (None, VALIDATION)) == [
        set(names[:80]) | set(names[100:]),
        both[1],
    ]
    assert names_of(model, view, (TRAIN, ())) == [set(names[:80]), set()]
    of_store = sx.SCVI(view, **SMALL | {"batch_key": None})
    assert names_of(of_store, view, (TRAIN, None))[0] == set(view.obs_names[TRAIN])


@pytest.mark.parametrize("kind", ["scvi", "scanvi", "totalvi", "trvae"])
def test_cells_that_are_left_out_change_nothing(kind: str) -> None:
    """Other counts in cells that neither train nor validate: the same weights; in some that train: others."""
    weights = []
    for changed in (None, [100, 110], list(range(10))):
        adata = cells()
        adata.obs["type"] = adata.obs["type"].astype(object).fillna("?")
        if changed is not None:
            x_ng = adata.X.toarray()
            x_ng[np.ix_(changed, range(5))] = 50
            adata.X = x_ng
        if kind == "trvae":
            model: Any = sx.TRVAE(adata, "study", None, [8], latent_dim=3)
        elif kind == "totalvi":
            keys = {"batch_key": "study", "protein_expression_obsm_key": "adt"}
            model = sx.TOTALVI(
                adata, n_hidden=8, n_latent=3, empirical_protein_background_prior=False, **keys
            )
        elif kind == "scanvi":
            model = sx.SCANVI(adata, "?", **SMALL, labels_key="type")
        else:
            model = sx.SCVI(adata, **SMALL)
        more = {"n_epochs_unsupervised": 1} if kind == "scanvi" else {}
        model.train(max_epochs=2, train_indices=TRAIN, validation_indices=VALIDATION, **more, **QUICK)
        assert "validation_loss" in next(iter(_tables(model)))
        weights.append([value.numpy().copy() for value in model.state.model.module.state_dict().values()])
    same = [all(np.array_equal(a, b) for a, b in zip(weights[0], w, strict=True)) for w in weights]
    assert same == [True, True, False]


def _tables(model: Any) -> Any:
    return model.history.values() if isinstance(model.history, dict) else [model.history]


def test_a_query_takes_them_too() -> None:
    query = cells("c", seed=3)
    found = sx.SCVI.load_query_data(query, trained("scvi"))
    found.train(max_epochs=1, train_indices=np.arange(40), validation_indices=np.arange(40, 60), **QUICK)
    assert np.isfinite(found.history["validation_loss"]).all()
    view = found.state.cells
    assert names_of(found, view, (np.arange(40), None))[0] == set(query.obs_names[:40])


def test_in_the_words_of_scvi_tools() -> None:
    def indices(**options: Any) -> Any:
        return training_settings("scvi", options)["indices"]

    assert indices(datasplitter_kwargs={"external_indexing": [[1, 2], [3], [4]]}) == ([1, 2], [3])
    assert indices(external_indexing=[[1, 2]]) == ([1, 2], ())
    assert indices(external_indexing=[[1, 2], None, [3]]) == ([1, 2], ())
    assert indices(train_indices=[1]) == ([1], None)
    assert "indices" not in training_settings("scvi", {"train_size": 0.8})
    with pytest.raises(UsageError, match="both say which cells train"):
        indices(train_indices=[1], train_size=0.9)


def test_what_is_wrong_with_them(tmp_path: Path) -> None:
    adata = cells()
    model = sx.SCVI(adata, **SMALL)
    for rows, match in (
        ({"train_indices": [0, 1], "validation_indices": [1]}, "both train and validate"),
        ({"train_indices": []}, "no cell trains"),
        ({"train_indices": [120]}, "no row 120"),
        ({"train_indices": np.ones(5, bool)}, "a mask of 5 for 120"),
    ):
        with pytest.raises(UsageError, match=match):
            model.train(1, **rows, **QUICK)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(UsageError, match="which rows train") as caught:
        sx.SCVI(str(tmp_path / "cells.h5ad"), **SMALL).train(1, train_indices=[0, 1], **QUICK)
    assert "AnnData" in str(caught.value.fix)
    half = np.arange(120) < 60
    split, view = {"train": half, "validation": ~half}, training_cells(model.state)
    with pytest.raises(UsageError, match="scalex trains on all cells"):
        sx.train(view, tmp_path / "m", split=split)


@pytest.mark.parametrize("kind", ["scvi", "scanvi", "totalvi", "trvae"])
def test_genes_that_a_query_lacks_are_left_out_of_its_likelihood(kind: str, tmp_path: Path) -> None:
    """Of a new batch nothing is learnt on them; the reference's latents keep their bits."""
    model, adata = trained(kind), cells()
    query = cells("c", seed=3)[:, 6:].copy()
    losses = {}
    for mask in (False, True):
        found = type(model).load_query_data(query, model, mask_missing=mask)
        start = {name: value.clone() for name, value in found.state.model.module.state_dict().items()}
        found.train(max_epochs=2, **QUICK)
        table = found.history if kind != "scanvi" else found.history["semisupervised_trainer_history"]
        losses[mask] = table["reconstruction"].iloc[0]
        if kind != "totalvi":
            np.testing.assert_array_equal(latents(found, adata), latents(model))
        by_gene = [n for n, v in start.items() if v.shape[:1] == (N_GENES,) and "encoder" not in n]
        now = found.state.model.module.state_dict()
        if mask:
            assert by_gene, "something that has a row per gene"
            assert all((now[name][:6] == start[name][:6]).all() for name in by_gene)
    assert losses[True] != losses[False]
    found.save(tmp_path / "query")  # with the latents of its cells, by the genes that they have
    again = type(model).load(tmp_path / "query", query)
    assert again.state.surgery.mask_missing
    np.testing.assert_array_equal(latents(again), latents(found))
    again.train(max_epochs=1, **QUICK)
    assert latents(again).shape == (60, 3)


def test_a_store_that_lacks_genes(tmp_path: Path) -> None:
    query = cells("c", seed=3)[:, 6:].copy()
    store = sx.convert([query], tmp_path / "store", batch_key="study")
    found = sx.SCVI.load_query_data(store, trained("scvi"), mask_missing=True)
    found.train(max_epochs=1, **QUICK)
    assert found.state.cells.n_vars == N_GENES - 6
    assert latents(found).shape == (60, 3)
