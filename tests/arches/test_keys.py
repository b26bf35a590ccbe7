from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from arches_data import KEYS, cells

import streamx as sx
from streamx.arches.keys import Keys, _of_objects, keys_of, with_protein_names
from streamx.errors import UsageError
from streamx.schema import Schema


def test_it_is_remembered_beside_the_object_and_not_in_it() -> None:
    adata = cells()
    columns = list(adata.obs)
    assert sx.setup_anndata(adata, labels_key="type", **KEYS) is None
    want = Keys("study", "type", categorical_covariate_keys=("donor",), continuous_covariate_keys=("age",))
    assert keys_of(adata) == want
    assert list(adata.obs) == columns
    assert not adata.uns
    assert keys_of(cells()) == Keys()
    assert keys_of(adata, Keys(batch_key="donor")).batch_key == "donor"
    assert keys_of(adata, Keys(batch_key="donor")).labels_key == "type"
    assert keys_of(adata, otherwise=Keys("donor", layer="counts")) == replace(want, layer="counts")
    other = sx.setup_anndata(adata, batch_key="donor", copy=True)
    assert keys_of(other) == Keys("donor")
    assert keys_of(adata) == want
    known = len(_of_objects)
    del adata, other
    gc.collect()
    assert len(_of_objects) == known - 2


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("batch_key", "obs column"),
        ("layer", "layer"),
        ("protein_expression_obsm_key", "obsm matrix"),
        ("protein_names_uns_key", "uns entry"),
    ],
)
def test_what_is_not_there(name: str, match: str) -> None:
    with pytest.raises(UsageError, match=f"no {match} 'absent'"):
        sx.setup_anndata(cells(), **{name: "absent"})


def test_only_objects() -> None:
    with pytest.raises(UsageError, match="can't be set up"):
        sx.setup_anndata("file.h5ad")


def test_the_models_words_in_the_datas() -> None:
    schema = Schema(
        ("g",), ("a",), "study", ("B",), "type", categories=(("donor", ("1", "2")),), continuous=("age",)
    )
    found = Keys("batch", "label", categorical_covariate_keys=("patient",)).spoken(schema)
    assert (found.batch_key, found.label_key) == ("batch", "label")
    assert found.categories == (("patient", ("1", "2")),)
    assert found.continuous == ("age",)
    assert Keys().spoken(schema) == schema
    with pytest.raises(UsageError, match="2 covariates, the model has 1"):
        Keys(continuous_covariate_keys=("age", "depth")).spoken(schema)


def test_names_of_proteins_in_an_array() -> None:
    adata = cells()
    frame = adata.obsm["adt"]
    adata.obsm["adt"], adata.uns["names"] = frame.to_numpy(), list(frame.columns)
    shell = with_protein_names(adata, Keys(protein_expression_obsm_key="adt", protein_names_uns_key="names"))
    assert shell.obsm["adt"].equals(frame)
    assert shell.X is adata.X
