"""Surgery: old weights and latents stay the same bits; what moves is what the options say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamx.config import FreezeConfig, ScviConfig
from streamx.models.cells import Cells
from streamx.models.freeze import Trainable, freeze, trainable
from streamx.models.grow import batch_dimension, batch_tables, covariate_layers, extended, with_levels
from streamx.models.scanvi import Scanvi
from streamx.models.scvi import Scvi
from streamx.train.adam import Adam

DEEP = ScviConfig(n_hidden=8, n_latent=3, n_layers=2, encode_covariates=True, dispersion="gene-batch")
ARCHES = replace(DEEP, deeply_inject_covariates=False, use_layer_norm="both", use_batch_norm="none")


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def cells(batches: list[int], n: int = 24, n_genes: int = 20) -> Cells:
    rng = np.random.default_rng(0)
    x_ng = torch.as_tensor(rng.poisson(2.0, (n, n_genes)), dtype=torch.float32)
    return Cells(x_ng, torch.as_tensor(np.resize(batches, n)))


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_which_tensors_have_batches() -> None:
    assert batch_tables(Scvi(20, 2, DEEP)) == {
        "decoder.stack.layers.0.columns.batch": 1,
        "decoder.stack.layers.1.columns.batch": 1,
        "encoder.stack.layers.0.columns.batch": 1,
        "encoder.stack.layers.1.columns.batch": 1,
        "log_theta_gb": 1,
    }
    library = (np.ones(2), np.ones(2))
    tables = batch_tables(Scvi(20, 2, replace(ARCHES, use_observed_lib_size=False), library_b=library))
    assert tables["library_mean_b"] == tables["library_var_b"] == 0
    assert "decoder.stack.layers.1.columns.batch" not in tables
    assert batch_dimension("a.num_batches_tracked") is None
    assert batch_dimension("a.bias") is None
    assert batch_dimension("log_theta_gl") is None


@pytest.mark.parametrize("n_old", [1, 2])
def test_several_batches_in_one_go_equal_one_by_one(n_old: int) -> None:
    module = Scvi(20, n_old, DEEP)
    before = bits(module)
    at_once = extended(module, seeds(5, 6))
    one_by_one = extended(extended(module, seeds(5)), seeds(6))
    assert at_once.n_batches == one_by_one.n_batches == n_old + 2
    assert bits(at_once).keys() == before.keys()
    for name, value in bits(at_once).items():
        assert torch.equal(value, one_by_one.state_dict()[name]), name
    other = extended(module, seeds(7, 6))
    assert not torch.equal(other.log_theta_gb[:, n_old], at_once.log_theta_gb[:, n_old])
    assert torch.equal(other.log_theta_gb[:, n_old + 1], at_once.log_theta_gb[:, n_old + 1])
    for name, value in bits(module).items():
        assert torch.equal(value, before[name]), name  # the reference is not touched


@pytest.mark.parametrize("n_old", [1, 2])
@pytest.mark.parametrize("config", [DEEP, ARCHES])
def test_the_old_batches_keep_their_bits(n_old: int, config: ScviConfig) -> None:
    module = Scvi(20, n_old, config).eval()
    grown = extended(module, seeds(5, 6, 7))
    tables = batch_tables(module)
    for name, old in bits(module).items():
        new = grown.state_dict()[name]
        if name not in tables:
            assert torch.equal(new, old), name
            continue
        dimension = tables[name]
        assert new.shape[dimension] == n_old + 3
        first, last = new.split([n_old, 3], dimension)
        assert torch.equal(first, old if old.numel() else torch.zeros_like(first)), name
        assert last.std() > 0
        if name.endswith("batch"):
            weight = grown.get_submodule(name.rpartition(".")[0]).linear.weight
            assert last.abs().max() <= 1 / weight.shape[1] ** 0.5
    reference = cells(list(range(n_old)))
    for want, got in zip(module.encode(reference), grown.encode(reference), strict=True):
        assert torch.equal(want, got)
    counts = (m.decode(torch.ones(24, 3), torch.ones(24), reference) for m in (module, grown))
    assert torch.equal(*(c.log_prob(reference.x_ng) for c in counts))


def test_tables_that_are_given() -> None:
    config = replace(DEEP, use_observed_lib_size=False)
    module = Scvi(20, 2, config, library_b=(np.ones(2), np.ones(2)))
    with pytest.raises(ValueError, match="library_mean_b must be given"):
        extended(module, seeds(5))
    given = {"library_mean_b": torch.tensor([3.0, 4.0]), "library_var_b": torch.tensor([0.3, 0.4])}
    with pytest.raises(ValueError, match="1 new batches"):
        extended(module, seeds(5), given)
    grown = extended(module, seeds(5, 6), given)
    assert grown.library_mean_b.tolist() == [1, 1, 3, 4]
    assert torch.isfinite(grown.loss(cells([0, 3]), 1.0)["loss"])


def learnt(module: Scvi, options: FreezeConfig, n_new: int = 2) -> tuple[dict[str, torch.Tensor], Trainable]:
    """The differences that ten steps on the new batches make, where there are any."""
    plan = trainable(module, n_new, options)
    freeze(module, plan)
    module.train()
    before = bits(module)
    optimiser = Adam(module, 1e-2, 0.0)
    for step in range(10):
        optimiser.zero_grad()
        module.loss(cells([2, 3]), 0.5, *seeds(step))["loss"].backward()
        optimiser.step()
    module.eval()
    moved = {name: value - before[name] for name, value in module.state_dict().items()}
    return {n: d for n, d in moved.items() if d.abs().max() > 0 and "num_batches" not in n}, plan


@pytest.mark.parametrize("config", [DEEP, ARCHES])
def test_only_new_columns_move(config: ScviConfig) -> None:
    module = Scvi(20, 2, config).eval()
    grown = extended(module, seeds(5, 6))
    moved, plan = learnt(grown, FreezeConfig(freeze_batchnorm_decoder=True))
    tables = batch_tables(grown)
    assert moved.keys() == tables.keys() == plan.moves.keys()
    for name, difference in moved.items():
        old, new = difference.split([2, 2], tables[name])
        assert old.abs().max() == 0, name
        assert (new.abs().amax(1 - tables[name]) > 0).all(), name
    reference = cells([0, 1])
    for want, got in zip(module.encode(reference), grown.encode(reference), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("freeze_expression", False, ["encoder.stack.layers.0.columns.linear.weight"]),
        ("freeze_decoder_first_layer", False, ["decoder.stack.layers.0.columns.linear.weight"]),
        ("freeze_batchnorm_encoder", False, ["encoder.stack.layers.1.norm.running_mean"]),
        ("freeze_batchnorm_decoder", True, []),
        ("freeze_dispersion", True, []),
    ],
)
def test_options(option: str, value: bool, parts: list[str]) -> None:
    default, _ = learnt(extended(Scvi(20, 2, DEEP), seeds(5, 6)), FreezeConfig())
    moved, _ = learnt(extended(Scvi(20, 2, DEEP), seeds(5, 6)), replace(FreezeConfig(), **{option: value}))
    assert any(name.startswith("decoder.stack.layers.0.norm") for name in default)  # scvi-tools' default
    if option == "freeze_dispersion":
        assert default.keys() - moved.keys() == {"log_theta_gb"}
    elif not parts:
        norms = {name for name in default if ".norm." in name}
        assert default.keys() - moved.keys() == norms
    else:
        assert set(parts) <= moved.keys() - default.keys()
        stays = moved.keys() - default.keys()
        where = parts[0].rsplit(".columns", 1)[0].rsplit(".1.norm", 1)[0]
        assert all(name.startswith(where) for name in stays)
    if option == "freeze_expression":
        column = moved["encoder.stack.layers.0.columns.batch"]
        assert column[:, 2:].abs().max() > 0


def test_dropout_and_everything() -> None:
    grown = extended(Scvi(20, 2, DEEP), seeds(5))
    plan = trainable(grown, 1, FreezeConfig(freeze_dropout=True))
    freeze(grown, plan)
    assert all(layer.dropout == 0 for layer in grown.encoder.stack.layers)
    assert len(plan.still_norms) == 2
    grown = extended(Scvi(20, 2, DEEP), seeds(5, 6))
    moved, plan = learnt(grown, FreezeConfig(unfrozen=True))
    assert plan.still_norms == plan.no_dropout == ()
    assert moved.keys() >= dict(grown.named_parameters()).keys()


def test_a_latent_library_is_learnt_again() -> None:
    config = replace(DEEP, use_observed_lib_size=False)
    grown = extended(
        Scvi(20, 2, config, library_b=(np.ones(2), np.ones(2))),
        seeds(5, 6),
        {"library_mean_b": torch.ones(2), "library_var_b": torch.ones(2)},
    )
    moved, _ = learnt(grown, FreezeConfig())
    own = {name for name, _ in grown.named_parameters() if name.startswith("library_encoder.")}
    assert own <= moved.keys()
    assert moved["library_encoder.stack.layers.0.columns.linear.weight"].abs().max() > 0


@pytest.mark.parametrize("config", [DEEP, ARCHES])
def test_new_levels_of_covariates_move_alone(config: ScviConfig) -> None:
    module = Scvi(20, 2, config, n_levels=(2, 1)).eval()
    grown = with_levels(module, [[], seeds(8)])
    assert (grown.n_levels, module.n_levels) == ((2, 2), (2, 1))
    reference = cells([0, 1])
    codes = torch.stack([reference.batch_n.flip(0), torch.zeros(24).long()], 1)
    reference = replace(reference, category_nc=codes)
    for want, got in zip(module.encode(reference), grown.encode(reference), strict=True):
        assert torch.equal(want, got)
    grown = extended(grown, seeds(5))
    plan = trainable(grown, 1, FreezeConfig(), [0, 1])
    freeze(grown, plan)
    grown.train()
    before, optimiser = bits(grown), Adam(grown, 1e-2, 0.0)
    query = replace(cells([2]), category_nc=torch.ones(24, 2).long())
    for step in range(5):
        optimiser.zero_grad()
        grown.loss(query, 0.5, *seeds(step))["loss"].backward()
        optimiser.step()
    layers = covariate_layers(grown)
    assert len(layers) == (4 if config is DEEP else 2)
    for name, layer in layers.items():
        moved = layer.category - before[f"{name}.category"]
        assert moved[:, :3].abs().max() == 0, (
            name
        )  # of the first covariate, and the zeros of the second's first
        assert moved[:, 3].abs().max() > 0, name
    for want, got in zip(module.encode(reference), grown.eval().encode(reference), strict=True):
        assert torch.equal(want, got)


def test_labels_are_no_covariate() -> None:
    module = Scanvi(Scvi(20, 2, ARCHES, n_levels=(2,)), 4)
    grown = with_levels(module, [seeds(8)])
    assert grown.vae.n_levels == (3,)
    for stack in (grown.z2_encoder.stack, grown.z1_decoder.stack):
        assert stack.layers[0].columns.n_levels == (4,)
    assert all(name.startswith("vae.") for name in covariate_layers(grown))
