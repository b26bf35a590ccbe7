"""Weights of scvi-tools as ours, and back: not a bit is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scvi_fixtures import SETTINGS, fixture, weights

from streamx.config import ScviConfig
from streamx.interop.scvi_tools import module_from, normalised, state_dict_of
from streamx.models.scvi import Scvi


@pytest.mark.parametrize("name", ["scvi_arches", "scvi_bn_deep", "scvi_nb_genebatch"])
def test_round_trip(golden: Path, name: str) -> None:
    module, _, f = fixture(golden, name)
    want, got = weights(f), state_dict_of(module)
    assert got.keys() == want.keys()  # parts that the model never uses are there too
    assert {key: value.shape for key, value in got.items()} == {key: v.shape for key, v in want.items()}
    unused = ("l_encoder.", "decoder.px_r_decoder.") + (("decoder.px_dropout",) if "nb" in name else ())
    for key, value in want.items():
        if not key.startswith(unused):
            assert torch.equal(got[key], value), key
    again = module_from("scvi", got, SETTINGS[name]).state_dict()
    assert all(torch.equal(again[key], value) for key, value in module.state_dict().items())


def test_every_covariate() -> None:
    config = ScviConfig(n_hidden=8, n_latent=3, n_layers=2, encode_covariates=True, dispersion="gene-label")
    module = Scvi(20, 3, config, n_labels=4, n_levels=(2, 1, 3), n_continuous=2)
    state = state_dict_of(module)
    first = state["z_encoder.encoder.fc_layers.Layer 0.0.weight"]
    assert first.shape == (8, 20 + 2 + 3 + 2 + 3)
    columns = module.encoder.stack.layers[0].columns
    assert torch.equal(first[:, 20:22], columns.continuous)
    assert torch.equal(first[:, 22:25], columns.batch)
    assert torch.equal(first[:, 25:], columns.category)
    settings = {
        "encode_covariates": True,
        "dispersion": "gene-label",
        "n_cats_per_cov": [2, 1, 3],
        "n_continuous_cov": 2,
    }
    again = module_from("scvi", state, settings)
    assert again.n_batches == 3
    assert again.config == config
    assert all(torch.equal(again.state_dict()[key], v) for key, v in module.state_dict().items())


def test_a_latent_library() -> None:
    config = ScviConfig(n_hidden=8, use_observed_lib_size=False)
    module = Scvi(20, 2, config, library_b=(torch.tensor([1.0, 2]).numpy(), torch.tensor([0.5, 0.6]).numpy()))
    state = state_dict_of(module)
    assert state["library_log_means"].tolist() == [[1, 2]]
    again = module_from("scvi", state, {"use_observed_lib_size": False}).state_dict()
    assert all(torch.equal(again[key], v) for key, v in module.state_dict().items())


def test_names_of_other_releases(golden: Path) -> None:
    _, _, f = fixture(golden, "scvi_bn_deep")
    old = {
        key.replace("Layer ", "Layer_").replace("px_scale_decoder.0.", "px_scale_decoder."): value
        for key, value in weights(f).items()
    }
    assert old.keys() != weights(f).keys()
    assert normalised(old | {"pyro_param_store": {}}).keys() == weights(f).keys()


def test_settings_that_do_not_fit(golden: Path) -> None:
    _, _, f = fixture(golden, "scvi_arches")
    with pytest.raises(ValueError, match=r"z_encoder.*settings"):
        module_from("scvi", weights(f), SETTINGS["scvi_arches"] | {"encode_covariates": False})
    with pytest.raises(ValueError, match="settings"):
        module_from("scvi", weights(f), SETTINGS["scvi_arches"] | {"use_batch_norm": "both"})
    with pytest.raises(ValueError, match="known: scvi"):
        module_from("linearscvi", weights(f), {})
