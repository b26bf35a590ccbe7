"""Cells of any input as a model takes them: the same from objects, files, stores and views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arches_data import cells

import streamx as sx
from streamx.arches.data import open_data
from streamx.arches.keys import Keys
from streamx.errors import BatchError, GeneError, StreamxWarning, UsageError
from streamx.loader.transform import Transform
from streamx.models.sparse import Rows
from streamx.schema import Schema
from streamx.train.build import build_module, network_of
from streamx.train.model import Model

SCHEMA = Schema(
    genes=tuple(f"g{g}" for g in (7, 3, 0, *range(10, 30))),
    batches=("a", "b"),
    batch_key="study",
    labels=("B", "Mono", "NK", "T"),
    label_key="type",
    categories=(("donor", ("1", "2", "3")),),
    continuous=("age",),
)


def model(kind: str = "scvi", schema: Schema = SCHEMA, **settings: Any) -> Model:
    tables = {}
    if kind == "totalvi":
        tables["measured_bp"] = np.ones((len(schema.batches), len(schema.proteins)), bool)
    network = network_of(kind, {"n_hidden": 8, "n_latent": 3} | settings)
    module = build_module(kind, schema, network, None, tables).eval()
    return Model(
        kind, module, schema, Transform(), 0, (), "kept", None, None, None, None, "", "model"
    )  # fmt: skip


def as_file(adata: Any, folder: Path) -> Any:
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def as_store(adata: Any, folder: Path) -> Any:
    return sx.convert([adata], folder / "store", batch_key="study", obsm=("adt",))


def as_store_path(adata: Any, folder: Path) -> Any:
    return str(as_store(adata, folder).path)


def as_view(adata: Any, folder: Path) -> Any:
    store = as_store(adata, folder)
    settings = {"profile": "counts", "min_cells": 0, "min_features": 0}
    return sx.preprocess(store, folder / "view", genes=list(SCHEMA.genes), **settings)


INPUTS: dict[str, Callable[[Any, Path], Any]] = {
    "object": lambda adata, folder: adata,
    "file": as_file,
    "files": lambda adata, folder: [as_file(adata, folder)],
    "store": as_store,
    "path of a store": as_store_path,
    "view": as_view,
}


def gathered(minibatches: Any) -> dict[str, np.ndarray]:
    found: dict[str, list[Any]] = {}
    for cells_ in minibatches:
        x = cells_.x_ng
        found.setdefault("x", []).append(x.dense() if isinstance(x, Rows) else x)
        for name in ("batch_n", "label_n", "category_nc", "continuous_nc", "protein_np"):
            if getattr(cells_, name) is not None:
                found.setdefault(name, []).append(getattr(cells_, name))
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_gives_the_same_cells(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("streamx.arches.data.ROWS", 16)
    monkeypatch.setattr("streamx.query.BLOCK_ROWS", 13)
    adata = cells()
    data = INPUTS[name](adata, tmp_path)
    rows = [5, 119, 5, 0, 77]
    for indices in (None, rows, np.arange(120) % 3 == 0):
        with open_data(model(), data, Keys(), indices) as found:
            assert found.n_obs == 120
            of = adata[list(found.names)]
            if name in ("object", "file", "files"):  # stores have an order of their own
                wanted = np.arange(120) if indices is None else np.arange(120)[indices]
                assert list(found.names) == list(adata.obs_names[wanted])
            got = gathered(found)
            assert list(found.column("donor")[found.rows[:2]]) == list(of.obs["donor"][:2])
        np.testing.assert_array_equal(got["x"], of[:, list(SCHEMA.genes)].X.toarray())
        np.testing.assert_array_equal(got["batch_n"], (of.obs["study"] == "b").to_numpy())
        labels = [SCHEMA.labels.index(v) if isinstance(v, str) else -1 for v in of.obs["type"]]
        np.testing.assert_array_equal(got["label_n"], labels)
        np.testing.assert_array_equal(got["category_nc"][:, 0], of.obs["donor"].astype(int) - 1)
        np.testing.assert_array_equal(got["continuous_nc"][:, 0], of.obs["age"])


@pytest.mark.parametrize("name", ["object", "store"])
def test_sa08_proteins_by_name_and_zero_where_there_are_none(tmp_path: Path, name: str) -> None:
    adata = cells()
    schema = Schema(SCHEMA.genes, ("a", "b"), "study", proteins=("p3", "q", "p0"), protein_key="adt")
    data = INPUTS[name](adata, tmp_path)
    with open_data(model("totalvi", schema), data, Keys(), [9, 2]) as found:
        got = gathered(found)["protein_np"]
        of = adata[list(found.names)].obsm["adt"]
    np.testing.assert_array_equal(got, np.stack([of["p3"], 0 * of["p3"], of["p0"]], axis=1))
    bare = adata.copy()
    del bare.obsm["adt"]
    (tmp_path / "bare").mkdir()
    with open_data(model("totalvi", schema), INPUTS[name](bare, tmp_path / "bare"), Keys()) as found:
        assert not gathered(found)["protein_np"].any()


@pytest.mark.parametrize("name", ["object", "store"])
def test_unknown_batches_are_never_taken_for_another(tmp_path: Path, name: str) -> None:
    data = INPUTS[name](cells("abc"), tmp_path)
    for settings in ({}, {"encode_covariates": True}):
        known, caught = model(**settings), pytest.raises(BatchError, match="does not know 1 of 3")
        with caught as caught, open_data(known, data, Keys()) as found:
            list(found)
        assert "load_query_data" in str(caught.value)
    with open_data(model(), data, Keys(), whole=False) as found:  # an encoder that sees no batch
        assert sum(map(len, found)) == 180


def test_a_model_of_one_batch_takes_any(tmp_path: Path) -> None:
    schema = Schema(SCHEMA.genes, ("cells",))
    for name in ("object", "store"):
        with open_data(model(schema=schema), INPUTS[name](cells(), tmp_path), Keys()) as found:
            assert not gathered(found)["batch_n"].any()
    with open_data(model(schema=Schema(SCHEMA.genes)), cells(), Keys()) as found:
        assert not gathered(found)["batch_n"].any()
    with pytest.raises(BatchError), open_data(model(schema=schema), cells(), Keys("study")) as found:
        list(found)


def test_what_is_wrong_with_data(tmp_path: Path) -> None:
    adata = cells()
    for data in (adata[:, :5].copy(), as_store(adata[:, :5].copy(), tmp_path)):
        with pytest.raises(GeneError), open_data(model(), data, Keys()):
            pass
    some = adata[:, [*SCHEMA.genes[:15]]].copy()
    with pytest.warns(StreamxWarning, match="15 of 23 genes"), open_data(model(), some, Keys()) as found:
        got = gathered(found)["x"]
    np.testing.assert_array_equal(got[:, :15], some.X.toarray())
    assert not got[:, 15:].any()
    del adata.obs["donor"]
    with pytest.raises(UsageError, match="no obs column 'donor'"), open_data(model(), adata, Keys()):
        pass
    for rows in ([120], [-121], np.ones(7, bool)):
        with pytest.raises(UsageError), open_data(model(), cells(), Keys(), rows):
            pass


def test_other_names_of_columns() -> None:
    adata = cells()
    adata.obs = adata.obs.rename(columns={"study": "batch", "donor": "patient"})
    keys = Keys("batch", categorical_covariate_keys=("patient",))
    with open_data(model(), adata, keys) as found:
        got = gathered(found)
    np.testing.assert_array_equal(got["batch_n"], (adata.obs["batch"] == "b").to_numpy())
    np.testing.assert_array_equal(got["category_nc"][:, 0], adata.obs["patient"].astype(int) - 1)
