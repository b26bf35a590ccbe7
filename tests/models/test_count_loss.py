"""The loss in one pass equals the likelihoods' functions, values and gradients, up to float32 rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from streamx.config import ScviConfig
from streamx.models import likelihoods
from streamx.models.cells import Cells
from streamx.models.count_loss import mean_count_loss
from streamx.models.scvi import Scvi
from streamx.models.sparse import Rows


def drawn(
    n: int, n_genes: int, n_rows: int, spread: float = 1.0, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(n * n_genes)
    x_ng = rng.poisson(rng.gamma(0.1, 20 * scale, (n, n_genes)))
    x_ng[n // 2] = 0
    given = {
        "y": rng.normal(size=(n, n_genes)) * spread,
        "library": np.log(np.maximum(x_ng.sum(1), 1)),
        "log_theta": rng.normal(size=(n_rows, n_genes)) * spread,
        "dropout": rng.normal(size=(n, n_genes)) * 3 * spread,
        "x": x_ng,
    }
    found = {name: torch.as_tensor(v, dtype=torch.float32) for name, v in given.items()}
    return found | {"row": torch.as_tensor(rng.integers(0, n_rows, n))}


def plainly(given: dict[str, torch.Tensor], zinb: bool) -> torch.Tensor:
    mu = given["library"].exp()[:, None] * torch.softmax(given["y"], 1)
    theta = given["log_theta"][given["row"]].exp()
    if zinb:
        return -likelihoods.zinb(given["x"], mu, theta, given["dropout"]).sum(1).mean()
    return -likelihoods.nb(given["x"], mu, theta).sum(1).mean()


def at_once(given: dict[str, torch.Tensor], zinb: bool) -> torch.Tensor:
    rows = Rows.of(sparse.csr_matrix(given["x"].float().numpy()))
    dropout = given["dropout"] if zinb else None
    return mean_count_loss(given["y"], given["library"], given["log_theta"], given["row"], rows, dropout)


def gradients(loss: torch.Tensor, given: dict[str, torch.Tensor], zinb: bool) -> dict[str, torch.Tensor]:
    names = ["y", "library", "log_theta"] + ["dropout"] * zinb
    return dict(zip(names, torch.autograd.grad(loss, [given[name] for name in names]), strict=True))


def differing(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v.detach().requires_grad_(v.is_floating_point() and n != "x") for n, v in given.items()}


def compare(given: dict[str, torch.Tensor], zinb: bool, factor: float = 1.0) -> None:
    """Against the plain functions in float64; the error may be 2e-6 of the largest value, or twice what the
    plain functions have in float32 (where terms that are a million times their sum cancel).
    """
    single = differing(given)
    double = differing({n: v.double() if v.is_floating_point() else v for n, v in given.items()})
    losses = at_once(single, zinb), plainly(single, zinb), plainly(double, zinb)
    got, in_single, want = (loss.item() for loss in losses)
    assert abs(got - want) <= max(2e-6 * abs(want), 2 * abs(in_single - want))
    of_got, of_single = (gradients(loss * factor, single, zinb) for loss in losses[:2])
    for name, value in gradients(losses[2] * factor, double, zinb).items():
        error, plain_error = ((grads[name] - value).abs().max() for grads in (of_got, of_single))
        assert error <= max(2e-6 * value.abs().max(), 2 * plain_error), name


@pytest.mark.parametrize("zinb", [True, False])
@pytest.mark.parametrize(("n", "n_genes", "n_rows"), [(1, 1, 1), (3, 17, 2), (130, 200, 1), (66, 333, 5)])
def test_values_and_gradients(n: int, n_genes: int, n_rows: int, zinb: bool) -> None:
    compare(drawn(n, n_genes, n_rows), zinb)
    compare(drawn(n, n_genes, n_rows), zinb, factor=0.3)


@pytest.mark.parametrize("zinb", [True, False])
def test_far_out(zinb: bool) -> None:
    """Logits of +-20, dispersions from e^-12 to e^12, counts of thousands, and values that are not whole."""
    compare(drawn(40, 100, 3, spread=4.0, scale=100), zinb)
    given = drawn(40, 100, 3)
    compare(given | {"x": given["x"] * 1.37}, zinb)
    compare(given | {"log_theta": given["log_theta"].detach() + 14}, zinb)
    compare(given | {"dropout": given["dropout"].detach() * 30}, zinb)


@pytest.mark.parametrize("zinb", [True, False])
def test_a_cell_without_counts(zinb: bool) -> None:
    given = drawn(5, 30, 1)
    given["library"] = given["x"].sum(1).log()
    single = differing(given)
    loss = at_once(single, zinb)
    assert torch.isfinite(loss)
    grads = torch.autograd.grad(loss, [single["y"], single["log_theta"]])
    assert all(torch.isfinite(g).all() for g in grads)
    assert grads[0][2].abs().max() == 0


@pytest.mark.parametrize("name", ["y", "dropout", "log_theta", "library"])
def test_a_value_that_is_no_number_is_seen(name: str) -> None:
    given = drawn(5, 200, 1)
    given[name].view(-1)[3] = float("nan")
    single = differing(given)
    loss = at_once(single, zinb=True)
    assert torch.isnan(loss)
    [grad] = torch.autograd.grad(loss, single[name])
    assert torch.isnan(grad.view(-1)[3])


@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("n_batches", [2, 90])
def test_the_models_loss_takes_it(likelihood: str, dispersion: str, n_batches: int) -> None:
    given = drawn(40, 60, 1)
    x_ng = given["x"] + (torch.arange(60) == 0)
    batch = torch.arange(40) * 7 % n_batches
    cells = Cells(x_ng, batch, label_n=torch.arange(40) % 3)
    config = ScviConfig(
        n_hidden=16,
        n_latent=3,
        gene_likelihood=likelihood,
        dispersion=dispersion,
        use_observed_lib_size=False,
    )
    library = (np.full(n_batches, 4.0), np.ones(n_batches))
    found = []
    for x in (x_ng, Rows.of(sparse.csr_matrix(x_ng.numpy()))):
        g = torch.Generator().manual_seed(0)
        module = Scvi(60, n_batches, config, n_labels=3, library_b=library, generator=g)
        losses = module.loss(replace(cells, x_ng=x), 0.5, torch.Generator().manual_seed(1))
        losses["loss"].backward()
        found.append(
            ({n: v.detach() for n, v in losses.items()}, {n: p.grad for n, p in module.named_parameters()})
        )
    torch.testing.assert_close(found[1], found[0], atol=3e-5, rtol=3e-5)
