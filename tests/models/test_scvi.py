"""scVI equals scvi-tools 1.4.2 to 1e-5, and its loss is what its parts say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from scvi_fixtures import fixture
from torch.distributions import Normal, kl_divergence

from streamx.config import ScviConfig
from streamx.models import gaussian
from streamx.models.cells import Cells
from streamx.models.counts import Counts
from streamx.models.scvi import Scvi, observed_library
from streamx.models.sparse import Rows

LIBRARY = (np.array([3.0, 3.5, 4.0]), np.array([0.5, 0.7, 0.9]))


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def made_up(n: int = 40, n_genes: int = 30) -> Cells:
    rng = np.random.default_rng(0)
    x_ng = rng.poisson(rng.gamma(0.5, 3, (1, n_genes)) * rng.random((n, 1)), (n, n_genes))
    x_ng[:, 0] += 1  # every cell has a count
    category = np.stack([rng.integers(0, 2, n), rng.integers(0, 3, n)], 1)
    return Cells(
        torch.as_tensor(x_ng, dtype=torch.float32),
        torch.as_tensor(rng.integers(0, 3, n)),
        label_n=torch.as_tensor(rng.integers(0, 4, n)),
        category_nc=torch.as_tensor(category),
        continuous_nc=torch.as_tensor(rng.normal(size=(n, 2)), dtype=torch.float32),
    )


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["scvi_arches", "scvi_bn_deep", "scvi_nb_genebatch"])
@torch.no_grad()
def test_parity(golden: Path, name: str) -> None:
    module, cells, f = fixture(golden, name)
    mean, var = module.encode(cells)
    close(mean, f["qz_m"])
    close(var, f["qz_v"])
    library = observed_library(cells)
    counts = module.decode(mean, library, cells)
    close(counts.scale_ng, f["px_scale"])
    close(counts.rate_ng, f["px_rate"])
    close(counts.theta.expand_as(counts.rate_ng), f["px_r"])
    if "px_dropout" in f:
        close(counts.dropout_ng, f["px_dropout"])
    else:
        assert counts.dropout_ng is None
    close(module.decode(mean, library, cells, batch=1).scale_ng, f["px_scale_tb1"])
    close(module.reconstruction(mean, library, cells), f["rec_at_zmean"])
    close(gaussian.kl(mean, var).sum(1), f["kl"])


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("observed", [True, False])
def test_every_distribution_trains(likelihood: str, dispersion: str, observed: bool) -> None:
    cells = made_up()
    config = ScviConfig(
        n_hidden=16,
        n_latent=3,
        n_layers=2,
        dispersion=dispersion,
        gene_likelihood=likelihood,
        latent_distribution="ln" if observed else "normal",
        encode_covariates=True,
        use_observed_lib_size=observed,
    )
    sizes = {"n_labels": 4, "n_levels": (2, 3), "n_continuous": 2, "library_b": LIBRARY}
    module = Scvi(30, 3, config, **sizes, generator=seed())
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-2)
    losses = []
    for step in range(10):
        found = module.loss(cells, 1.0, seed(step))
        optimiser.zero_grad()
        found["loss"].backward()
        unused = {name for name, p in module.named_parameters() if p.grad is None}
        assert unused == ({n for n in unused if "log_theta" in n} if likelihood == "poisson" else set())
        optimiser.step()
        losses.append(found["loss"].item())
    assert list(found)[:3] == ["loss", "reconstruction", "kl"]
    assert ("kl_library" in found) != observed
    assert losses[-1] < 0.9 * losses[0]


def test_loss_is_the_sum_of_its_parts() -> None:
    config = ScviConfig(n_hidden=16, n_latent=3, use_observed_lib_size=False)
    module = Scvi(30, 3, config, library_b=LIBRARY).eval()
    cells = made_up()
    found = module.loss(cells, 0.25, seed())
    want = found["reconstruction"] + 0.25 * found["kl"] + found["kl_library"]
    close(found["loss"], want)
    mean, var = module.encode_library(cells)
    prior = Normal(
        *(torch.as_tensor(t[cells.batch_n.numpy()]).float() for t in (LIBRARY[0], LIBRARY[1] ** 0.5))
    )
    close(found["kl_library"], kl_divergence(Normal(mean, var.sqrt()), prior).mean())
    mean, var = module.encode(cells)
    close(found["kl"], kl_divergence(Normal(mean, var.sqrt()), Normal(0, 1)).sum(1).mean())
    assert torch.equal(module.loss(cells, 0.25, seed())["loss"], found["loss"])


def test_the_noise_is_that_of_torchs_normal() -> None:
    mean, var = torch.randn(7, 3, generator=seed()), torch.rand(7, 3, generator=seed(1))
    torch.manual_seed(5)
    want = Normal(mean, var.sqrt()).rsample()
    torch.testing.assert_close(gaussian.draw(mean, var, seed(5)), want)
    close(gaussian.log_prob(want, mean, var), Normal(mean, var.sqrt()).log_prob(want))


def test_library_size() -> None:
    x = torch.tensor([[1.0, 0, 2], [0, 0, 0], [5, 5, 0]])
    batch = torch.zeros(3).long()
    want = torch.tensor([3.0, 0, 10]).log()
    assert torch.equal(observed_library(Cells(x, batch)), want)
    assert torch.equal(observed_library(Cells(Rows.of(sparse.csr_matrix(x.numpy())), batch)), want)
    with pytest.raises(ValueError, match="observed"):
        Scvi(3, 1).encode_library(Cells(x, batch))
    with pytest.raises(ValueError, match="library_b"):
        Scvi(3, 1, ScviConfig(use_observed_lib_size=False))


def test_a_cell_without_counts_has_a_finite_loss() -> None:
    x = torch.zeros(4, 30)
    for likelihood in ("zinb", "nb", "poisson"):
        module = Scvi(30, 1, ScviConfig(n_hidden=8, gene_likelihood=likelihood))
        loss = module.loss(Cells(x, torch.zeros(4).long()), 1.0, seed())["loss"]
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [True, False])
def test_sparse_rows(training: bool) -> None:
    cells = made_up()
    rows = replace(cells, x_ng=Rows.of(sparse.csr_matrix(cells.x_ng.numpy())))
    found = []
    for given in (cells, rows):
        config = ScviConfig(n_hidden=16, dropout_rate=0.0, use_observed_lib_size=False)
        module = Scvi(30, 3, config, library_b=LIBRARY, generator=seed()).train(training)
        loss = module.loss(given, 0.5, seed(1))
        loss["loss"].backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        found.append(({name: v.detach() for name, v in loss.items()}, grads))
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-5)


def test_the_same_seed_gives_the_same_weights() -> None:
    states = [Scvi(30, 3, ScviConfig(n_hidden=8), generator=seed(n)).state_dict() for n in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["encoder.mean.weight"], states[2]["encoder.mean.weight"])


def test_samples() -> None:
    """Mean and variance of 200,000 draws, and the share of zeros that dropout adds."""
    n, mu, theta = 200_000, 3.0, 2.0
    rate = torch.full((n, 1), mu)
    draws = {
        "nb": Counts(rate, rate, torch.tensor([theta])).sample(seed()),
        "poisson": Counts(rate, rate).sample(seed()),
        "zinb": Counts(rate, rate, torch.tensor([theta]), torch.full((n, 1), 0.5)).sample(seed()),
    }
    assert draws["nb"].mean().item() == pytest.approx(mu, rel=0.02)
    assert draws["nb"].var().item() == pytest.approx(mu + mu**2 / theta, rel=0.03)
    assert draws["poisson"].var().item() == pytest.approx(mu, rel=0.02)
    lost = torch.sigmoid(torch.tensor(0.5)).item()
    at_zero = lost + (1 - lost) * (theta / (theta + mu)) ** theta
    assert (draws["zinb"] == 0).float().mean().item() == pytest.approx(at_zero, abs=0.005)


def test_marginal_likelihood() -> None:
    """A decoder that ignores z: every weight's expectation is p(x) = the decoder's own likelihood."""
    module = Scvi(30, 3, ScviConfig(n_hidden=8, n_latent=2)).eval()
    with torch.no_grad():
        module.decoder.stack.layers[0].columns.linear.weight.zero_()
    n = 5000
    cell = made_up(n=1)
    cells = Cells(cell.x_ng.expand(n, -1), cell.batch_n.expand(n))
    want = -module.reconstruction(torch.zeros(1, 2), observed_library(cell), cell)
    got = module.log_weight(cells, seed()).logsumexp(0) - np.log(n)
    assert got.item() == pytest.approx(want.item(), abs=0.1)
    with pytest.raises(ValueError, match="normal"):
        Scvi(30, 3, ScviConfig(latent_distribution="ln")).log_weight(cells)
