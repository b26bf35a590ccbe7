"""Likelihoods equal scvi-tools' numbers to 1e-6, and their gradients the differences of their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from streamx.models.likelihoods import nb, nb_mixture, poisson, zinb

# Worked out by hand, and printed by scvi-tools 1.4.2.
NB = [-0.0099013, -1.3862944, -1.9989262, -2.5122871, -7.8860474]
ZINB = [-0.0087159, -2.0794415, -4.1258545, -2.5190029, -9.1993408]
MIXTURE = [-0.0663235, -1.7465029, -2.1013467, -7.5155034, -7.9097958]


@pytest.fixture
def given(golden: Path) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(v) for name, v in np.load(golden / "likelihoods.npz").items()}


def test_parity(given: dict[str, torch.Tensor]) -> None:
    x, mu, theta, pi = (given[name] for name in ("x", "mu", "theta", "pi"))
    for got, name, by_hand in (
        (nb(x, mu, theta), "nb", NB),
        (zinb(x, mu, theta, pi), "zinb", ZINB),
        (nb_mixture(x, mu, 8 * mu, theta, pi), "mix", MIXTURE),
    ):
        torch.testing.assert_close(got, given[name].view(-1), atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(got, by_hand, atol=5e-7, rtol=1e-6)


def test_against_scipy() -> None:
    x = torch.arange(0, 40, dtype=torch.float64)
    np.testing.assert_allclose(poisson(x, torch.tensor(3.5)), stats.poisson.logpmf(x, 3.5), atol=1e-12)
    assert poisson(torch.zeros(1), torch.zeros(1)).item() == 0
    mu, theta = torch.tensor(7.0, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    want = stats.nbinom.logpmf(x, 2.5, 2.5 / (2.5 + 7))
    np.testing.assert_allclose(nb(x, mu, theta), want, atol=1e-6)
    lost = 1 / (1 + np.exp(-0.3))
    want_zinb = np.log(lost * (np.asarray(x) == 0) + (1 - lost) * np.exp(want))
    got = zinb(x, mu, theta, torch.tensor(0.3, dtype=torch.float64))
    np.testing.assert_allclose(got, want_zinb, atol=1e-6)


def test_probabilities_add_up_to_one() -> None:
    x = torch.arange(0, 4000, dtype=torch.float64)
    mu, theta, pi = (torch.tensor(v, dtype=torch.float64) for v in (30.0, 0.7, -1.0))
    for log_p in (nb(x, mu, theta), zinb(x, mu, theta, pi), nb_mixture(x, mu, 4 * mu, theta, pi)):
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.tensor([0.0, 0, 1, 3, 20, 150], dtype=torch.float64)
    mu, theta, mu_2 = (torch.rand(6, generator=g, dtype=torch.float64) * 5 + 0.1 for _ in range(3))
    pi = torch.randn(6, generator=g, dtype=torch.float64) * 3
    inputs = [v.requires_grad_() for v in (mu, theta, pi, mu_2)]
    check = torch.autograd.gradcheck
    assert check(lambda mu, *_: poisson(x, mu), inputs[:1])
    assert check(lambda mu, theta: nb(x, mu, theta), inputs[:2])
    assert check(lambda mu, theta, pi: zinb(x, mu, theta, pi), inputs[:3])
    assert check(lambda mu, theta, pi, mu_2: nb_mixture(x, mu, mu_2, theta, pi), inputs)
