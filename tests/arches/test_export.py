"""``export``: what is written for scvi-tools, from an object and from a folder; what is refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arches_data import ARCHES, QUICK, cells
from test_models import trained

import streamx as sx
from streamx.cli.main import invoke
from streamx.config import ScalexConfig
from streamx.errors import UntrainedError, UsageError
from streamx.interop.load import load_foreign
from streamx.interop.scalex import write_checkpoint
from streamx.models.scalex import Scalex


@pytest.mark.parametrize("kind", ["scvi", "scanvi"])
def test_an_object_and_its_folder_give_the_same(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save(tmp_path / "ours")
    found = sx.export(model, tmp_path / "one", layer="counts")
    argv = ["export", str(tmp_path / "ours"), "-o", str(tmp_path / "two"), "--layer", "counts"]
    assert invoke(argv) == found | {"path": str(tmp_path / "two")}
    assert (found["model"], found["n_genes"], found["n_batches"]) == (kind, 30, 2)
    assert (found["batch_key"], found["layer"]) == ("study", "counts")
    covariates = (["donor"], ["age"]) if kind == "scvi" else ([], [])
    assert (found["category_keys"], found["continuous_keys"]) == covariates
    files = [tmp_path / name / "model.pt" for name in ("one", "two")]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["model.pt"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert invoke(argv)["model"] == kind, "the same command once more"
    again = load_foreign(tmp_path / "two")
    assert again.layer == "counts"
    for name, value in model.state.model.module.state_dict().items():
        if "category" not in name:
            assert torch.equal(again.module.state_dict()[name], value), name


def test_totalvi_as_scvi_tools_scales_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="input_transform = log1p"):
        sx.export(trained("totalvi"), tmp_path / "out")
    keys = {"batch_key": "study", "protein_expression_obsm_key": "adt"}
    model = sx.TOTALVI(cells(), n_hidden=8, n_latent=3, input_transform="scaled", **keys)
    model.train(1, **QUICK)
    assert sx.export(model, tmp_path / "out")["protein_key"] == "adt"
    assert load_foreign(tmp_path / "out").kind == "totalvi"


def test_what_has_no_counterpart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scvi-tools has no trVAE"):
        sx.export(trained("trvae"), tmp_path / "out")
    untrained = sx.SCVI(cells(), n_hidden=8, n_latent=3, **ARCHES, batch_key="study")
    with pytest.raises(UntrainedError):
        sx.export(untrained, tmp_path / "out")
    with pytest.raises(UsageError, match="only a folder"):
        sx.export(trained("scvi"), "s3://bucket/model")
    assert not (tmp_path / "out").exists()


def test_scalex_is_refused(tmp_path: Path) -> None:
    module = Scalex(5, 2, ScalexConfig(n_hidden=4))
    write_checkpoint(tmp_path / "scalex" / "checkpoint", module, list("abcde"))
    with pytest.raises(UsageError, match="scvi-tools has no SCALEX") as caught:
        sx.export(tmp_path / "scalex", tmp_path / "out")
    assert caught.value.fix == "train scvi, scanvi or totalvi for it"


def test_a_model_s_folder_is_not_written_into(tmp_path: Path) -> None:
    trained("scvi").save(tmp_path / "ours")
    before = {path.name for path in (tmp_path / "ours").iterdir()}
    with pytest.raises(UsageError, match="not to be mixed"):
        sx.export(tmp_path / "ours", tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == before


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["scvi", "scanvi", "totalvi"])
def test_scvi_tools_loads_what_the_verb_wrote(kind: str, tmp_path: Path) -> None:
    scvi = pytest.importorskip("scvi")
    adata = cells()
    adata.obs["type"] = adata.obs["type"].astype(object).fillna("?")
    small: dict[str, Any] = {"n_hidden": 8, "n_latent": 3, "batch_key": "study"}
    if kind == "totalvi":
        model: Any = sx.TOTALVI(adata, **small, input_transform="scaled", protein_expression_obsm_key="adt")
    elif kind == "scanvi":
        model = sx.SCANVI(adata, "?", **small, **ARCHES, labels_key="type")
    else:
        model = sx.SCVI(adata, **small, categorical_covariate_keys=["donor"])
    model.train(max_epochs=2, **QUICK)
    model.save(tmp_path / "ours")
    invoke(["export", str(tmp_path / "ours"), "-o", str(tmp_path / "theirs")])
    loaded = getattr(scvi.model, kind.upper()).load(str(tmp_path / "theirs"), adata, accelerator="cpu")
    got = loaded.get_latent_representation()
    np.testing.assert_allclose(got, model.get_latent_representation(), atol=1e-5)
    if kind == "scanvi":
        np.testing.assert_array_equal(loaded.predict(), model.predict())
