from pathlib import Path

import numpy as np
import pytest
import torch

from streamx.config import TotalviConfig
from streamx.interop.scvi_totalvi import config_of, module_from, state_dict_of
from streamx.models.totalvi import Totalvi

# What releases of scvi-tools differ in: input_transform, background_activation, efficiency, protein_warmup.
RELEASES = {
    "0.0.0": ("log1p", "exp", False, False),
    "0.17.1": ("log1p", "exp", False, False),
    "1.1.5": ("log1p", "exp", False, False),
    "1.2.0": ("log1p", "softplus", False, False),
    "1.3.0": ("log1p", "softplus", False, False),
    "1.3.1": ("scaled", "softplus", True, True),
    "1.4.2": ("scaled", "softplus", True, True),
}


@pytest.fixture
def state(golden: Path) -> dict[str, torch.Tensor]:
    with np.load(golden / "totalvi_1_4_2.npz") as f:
        return {name[3:]: torch.as_tensor(f[name]) for name in f.files if name.startswith("sd:")}


@pytest.mark.parametrize("version", RELEASES)
def test_the_release_decides_the_variant(state: dict[str, torch.Tensor], version: str) -> None:
    config = config_of(state, {}, version)
    got = (config.input_transform, config.background_activation, config.per_batch_efficiency)
    assert (*got, config.protein_warmup) == RELEASES[version]
    assert (config.n_latent, config.n_hidden, config.n_layers_encoder, config.n_layers_decoder) == (
        3,
        8,
        2,
        1,
    )
    assert config.use_batch_norm == "none"


def test_a_setting_of_the_decoder_beats_the_release(state: dict[str, torch.Tensor]) -> None:
    settings = {"extra_decoder_kwargs": {"activation_function_bg": "exp"}, "gene_likelihood": "zinb"}
    config = config_of(state, settings, "1.4.2")
    assert (config.background_activation, config.gene_likelihood) == ("exp", "zinb")


def test_there_and_back(state: dict[str, torch.Tensor]) -> None:
    beta = {name.replace("Layer ", "Layer_"): value for name, value in state.items()}
    back = state_dict_of(module_from({**beta, "pyro_param_store": {}}, {}, "1.4.2"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_every_kind_of_column_there_and_back() -> None:
    """Covariates, per-batch and per-label dispersions, a latent library, batch norm, two decoder layers."""
    config = TotalviConfig(
        n_latent=3,
        n_hidden=8,
        n_layers_decoder=2,
        gene_dispersion="gene-label",
        protein_dispersion="protein-batch",
        use_observed_lib_size=False,
    )
    library_b = np.arange(3.0), np.arange(1.0, 4.0)
    ours = Totalvi(
        7, 3, config, n_proteins=5, n_labels=2, n_levels=(4, 1), n_continuous=2, library_b=library_b
    )
    theirs = state_dict_of(ours)
    assert theirs["encoder.encoder.fc_layers.Layer 0.0.weight"].shape == (8, 7 + 5 + 2 + 3 + 4)
    assert theirs["encoder.encoder.fc_layers.Layer 1.0.weight"].shape == (8, 8 + 3 + 4)
    assert theirs["decoder.px_scale_decoder.fc_layers.Layer 0.0.weight"].shape == (7, 8 + 3 + 2 + 3 + 4)
    assert theirs["library_log_vars"].shape == (1, 3)
    settings = {
        "n_cats_per_cov": [4, 1],
        "n_continuous_cov": 2,
        "gene_dispersion": "gene-label",
        "protein_dispersion": "protein-batch",
    }
    again = module_from(theirs, settings, "1.2.0").state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())


def test_weights_that_do_not_fit(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="py_r: got"):
        module_from({**state, "py_r": torch.zeros(4)}, {}, "1.4.2")
    with pytest.raises(ValueError, match="nothing"):
        module_from({name: v for name, v in state.items() if "sigmoid" not in name}, {}, "1.4.2")
