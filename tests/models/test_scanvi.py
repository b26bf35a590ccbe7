"""scANVI equals scvi-tools 1.4.2 to 1e-5, and its loss is the sum that the paper writes down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scvi_fixtures import SETTINGS, fixture, weights
from torch.distributions import Normal, kl_divergence

from streamx.config import FreezeConfig, ScanviConfig, ScviConfig
from streamx.interop.scvi_tools import module_from, state_dict_of
from streamx.models.cells import Cells
from streamx.models.freeze import freeze, trainable
from streamx.models.grow import batch_tables, extended
from streamx.models.scanvi import Scanvi, from_scvi
from streamx.models.scvi import Scvi, observed_library
from streamx.train.adam import Adam

CONFIG = ScviConfig(n_hidden=8, n_latent=3, n_layers=2, encode_covariates=True)


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def cells(batches: tuple[int, ...] = (0, 1), n: int = 24) -> Cells:
    """Two kinds of cells, with other genes; the labels of every third are missing."""
    label = torch.arange(n) % 2
    rate = torch.where((torch.arange(20) < 10) == label[:, None].bool(), 6.0, 1.0)
    batch = torch.tensor(batches)[torch.arange(n) // 2 % len(batches)]
    given = torch.where(torch.arange(n) % 3 == 0, -1, label)
    return Cells(torch.poisson(rate, generator=seed()), batch, label_n=given)


@torch.no_grad()
def test_parity(golden: Path) -> None:
    module, given, f = fixture(golden, "scanvi")
    torch.testing.assert_close(module.encode(given)[0], f["z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(module.predict(given), f["soft"], atol=1e-5, rtol=0)


def test_weights_to_scvi_tools_and_back(golden: Path) -> None:
    module, _, f = fixture(golden, "scanvi")
    want, got = weights(f), state_dict_of(module)
    assert {key: value.shape for key, value in got.items()} == {key: v.shape for key, v in want.items()}
    for key, value in want.items():
        if not key.startswith(("l_encoder.", "decoder.px_r_decoder.")):
            assert torch.equal(got[key], value), key
    for version, logits in (("1.4.2", True), ("1.0.3", False), ("0.15.5", False), (None, True)):
        again = module_from("scanvi", got, SETTINGS["scanvi"] | {"scvi_version": version})
        assert again.config.logits == logits
        assert all(torch.equal(again.state_dict()[key], v) for key, v in module.state_dict().items())
    linear = Scanvi(Scvi(20, 2, CONFIG), 4, ScanviConfig(linear_classifier=True))
    settings = {"linear_classifier": True, "encode_covariates": True}
    again = module_from("scanvi", state_dict_of(linear), settings)
    assert "classifier.classifier.0.weight" in state_dict_of(linear)
    assert all(torch.equal(again.state_dict()[key], v) for key, v in linear.state_dict().items())


def test_loss_written_out() -> None:
    """Label by label, cell by cell in evaluation mode, by torch's own distributions."""
    module = Scanvi(Scvi(20, 2, CONFIG), 2).eval()
    given, n = cells(), 24
    with torch.no_grad():
        found = module.loss(given, 0.25, seed(3))
        draws = seed(3)
        mean, var = module.encode(given)
        q_z1 = Normal(mean, var.sqrt())
        z1 = mean + var.sqrt() * torch.randn(n, 3, generator=draws)
        noise = torch.randn(2 * n, 3, generator=draws).view(2, n, 3)
        p = torch.softmax(module.classifier(z1), 1)
        counts = module.decode(z1, observed_library(given), given)
        reconstruction = -counts.log_prob(given.x_ng).sum(1) + q_z1.log_prob(z1).sum(1)
        kl = (p * (p / 0.5).log()).sum(1)
        for label in range(2):
            y = torch.full((n, 1), label)
            m, v = module.z2_encoder(z1, category_nc=y)
            of_z1 = Normal(*(t for t in decoded(module, m + v.sqrt() * noise[label], y)))
            reconstruction -= p[:, label] * of_z1.log_prob(z1).sum(1)
            kl += p[:, label] * kl_divergence(Normal(m, v.sqrt()), Normal(0.0, 1.0)).sum(1)
        known = given.label_n >= 0
        entropy = -torch.log_softmax(module.classifier(mean), 1)[known, given.label_n[known]].mean()
    want = {"reconstruction": reconstruction.mean(), "kl": kl.mean(), "classification": entropy}
    want["loss"] = want["reconstruction"] + 0.25 * want["kl"] + 50 * entropy
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-5)


def decoded(module: Scanvi, z2: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = module.z1_decoder(z2, category_nc=y)
    h = module.z1_decoder.stack(z2, category_nc=y)
    torch.testing.assert_close(var, module.z1_decoder.log_var(h).exp())  # without scVI's 1e-4
    return mean, var.sqrt()


def test_labels_enter_through_the_classification_alone() -> None:
    module, given = Scanvi(Scvi(20, 2, CONFIG), 2).eval(), cells()
    losses = [
        module.loss(replace(given, label_n=y), 1.0, seed()) for y in (given.label_n, given.label_n * 0 - 1)
    ]
    assert torch.equal(losses[0]["reconstruction"], losses[1]["reconstruction"])
    assert losses[1]["classification"] == 0
    own = module.loss(given, 1.0, seed(), labelled=given)
    torch.testing.assert_close(own, losses[0])
    known = Cells(given.x_ng[1:3], given.batch_n[1:3], label_n=given.label_n[1:3])
    assert module.loss(given, 1.0, seed(), labelled=known)["classification"] != own["classification"]
    old = Scanvi(Scvi(20, 2, CONFIG), 2, ScanviConfig(logits=False)).eval()
    p = old.predict(given)
    want = torch.nn.functional.cross_entropy(p, given.label_n, ignore_index=-1)
    torch.testing.assert_close(old.loss(given, 1.0, seed())["classification"], want)


def test_cells_without_a_column_of_labels_are_unlabelled_ones() -> None:
    """A query that is mapped by surgery may have no such column."""
    module, given = Scanvi(Scvi(20, 2, CONFIG), 2), cells()
    found = [
        module.loss(replace(given, label_n=y), 0.5, seed(1))
        for y in (None, torch.full_like(given.batch_n, -1))
    ]
    assert found[0]["classification"] == 0
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_it_learns_labels_from_scvi() -> None:
    config = replace(CONFIG, use_batch_norm="none")  # whose running statistics are slow
    vae = Scvi(20, 2, config, generator=seed(4))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    module = from_scvi(vae, 2, generator=seed(5))
    for name, value in before.items():
        assert torch.equal(module.vae.state_dict()[name], value)
    optimiser, given = Adam(module, 1e-2, 0.0), cells()
    for step in range(40):
        optimiser.zero_grad()
        module.loss(given, 1.0, seed(step))["loss"].backward()
        optimiser.step()
    assert all(torch.equal(vae.state_dict()[name], value) for name, value in before.items())
    module.eval()
    p = module.predict(given)
    torch.testing.assert_close(p.sum(1), torch.ones(24))
    assert torch.equal(p.argmax(1), torch.arange(24) % 2)  # of the unlabelled cells too
    assert module.config == ScanviConfig(**vars(config))  # settings that both have are scVI's
    with pytest.raises(ValueError, match="normal"):
        from_scvi(Scvi(20, 2, replace(CONFIG, latent_distribution="ln")), 2)


@pytest.mark.parametrize("freeze_classifier", [True, False])
def test_surgery(freeze_classifier: bool) -> None:
    module = Scanvi(Scvi(20, 2, CONFIG), 2)
    grown = extended(module, [seed(6)])
    assert grown.n_batches == 3
    assert module.n_batches == 2
    assert set(batch_tables(grown)) == {f"vae.{name}" for name in batch_tables(module.vae)}
    plan = trainable(
        grown, 1, FreezeConfig(freeze_classifier=freeze_classifier, freeze_batchnorm_decoder=True)
    )
    freeze(grown, plan)
    before = {name: value.clone() for name, value in grown.state_dict().items()}
    optimiser = Adam(grown, 1e-2, 0.0)
    for step in range(5):
        optimiser.zero_grad()
        grown.loss(cells((2,)), 1.0, seed(step))["loss"].backward()
        optimiser.step()
    changed = {name for name, value in grown.state_dict().items() if not torch.equal(value, before[name])} - {
        name for name in before if name.endswith("num_batches_tracked")
    }
    classifier = {name for name in changed if name.startswith("classifier.")}
    assert changed - classifier == set(batch_tables(grown))
    assert bool(classifier) != freeze_classifier
    reference = cells((0, 1))
    module.eval()
    grown.eval()
    assert torch.equal(module.encode(reference)[0], grown.encode(reference)[0])
    assert torch.equal(module.predict(reference), grown.predict(reference)) == freeze_classifier
