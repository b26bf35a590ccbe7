"""Evidence against its definition: sums over cells; integrals over a grid, for a latent of one number."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from count_models import scanvi, scvi, seed, some_cells, totalvi
from torch.distributions import Normal

from streamx.config import ScviConfig, TotalviConfig
from streamx.errors import UsageError
from streamx.models.cells import Cells
from streamx.models.scvi import Scvi
from streamx.models.totalvi import Totalvi
from streamx.posterior.evidence import elbo, marginal_ll, reconstruction_error

GRID = torch.linspace(-7, 7, 1401)
STEP = float(GRID[1] - GRID[0])


@pytest.mark.parametrize("make", [scvi, totalvi, lambda: scvi(use_observed_lib_size=False)])
def test_means_are_over_cells_and_not_over_minibatches(make: Any) -> None:
    module = make().train()
    parts = [some_cells(5), some_cells(17, 1)]
    module.eval()
    draw = seed(3)
    with torch.no_grad():
        terms = [module.terms(part, draw) for part in parts]
    module.train()
    whole = {name: torch.cat([t[name] for t in terms]).mean().item() for name in terms[0]}
    lower = -whole["reconstruction"] - sum(value for name, value in whole.items() if name.startswith("kl"))
    assert elbo(module, iter(parts), seed(3)) == pytest.approx(lower, rel=1e-5)
    errors = reconstruction_error(module, iter(parts), seed(3))
    assert errors.keys() == {name for name in whole if name.startswith("reconstruction")}
    assert errors == pytest.approx({name: whole[name] for name in errors}, rel=1e-5)
    assert module.training, "the module is given back in the mode that it was in"


def test_scanvi_has_a_lower_bound_and_no_marginal_likelihood() -> None:
    assert math.isfinite(elbo(scanvi(), [some_cells()], seed()))
    with pytest.raises(UsageError, match="scANVI"):
        marginal_ll(scanvi(), [some_cells()])
    with pytest.raises(UsageError, match="no cells"):
        elbo(scvi(), [])


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_sa10_the_marginal_likelihood_is_the_integral_over_the_latent(likelihood: str) -> None:
    config = ScviConfig(n_latent=1, n_hidden=8, gene_likelihood=likelihood)
    module = Scvi(4, 2, config).eval()
    rng = np.random.default_rng(0)
    x_ng = torch.as_tensor(rng.poisson(2.0, (3, 4)).astype(np.float32))
    cells = Cells(x_ng, torch.tensor([0, 1, 1]))
    want = []
    with torch.no_grad():
        for i in range(3):
            many = Cells(x_ng[[i] * len(GRID)], cells.batch_n[[i] * len(GRID)])
            log_p = -module.reconstruction(GRID[:, None], many.x_ng.sum(1).log(), many)
            want.append(torch.logsumexp(log_p + Normal(0, 1).log_prob(GRID), 0).item() + math.log(STEP))
    got = marginal_ll(
        module, [Cells(x_ng[:1], cells.batch_n[:1]), Cells(x_ng[1:], cells.batch_n[1:])], 3000, seed()
    )
    np.testing.assert_allclose(got, want, atol=0.02)
    assert elbo(module, [cells], seed()) < np.mean(want) + 0.5


def test_totalvi_integrates_over_latent_and_background() -> None:
    config = TotalviConfig(n_latent=1, n_hidden=8)
    # A prior that an untrained posterior covers: importance weights then have a small variance.
    background = (np.array([[1.0, 0.2]]), np.array([[0.8, 0.5]]))
    module = Totalvi(3, 2, config, n_proteins=1, background=background).eval()
    x_ng, y_np = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[2.0]])
    cells = Cells(x_ng, torch.tensor([1]), protein_np=y_np)
    z_z, b_b = torch.linspace(-6, 6, 241), torch.linspace(-4, 6, 401)
    many = Cells(x_ng.expand(241, 3), torch.ones(241, dtype=torch.int64), protein_np=y_np.expand(241, 1))
    with torch.no_grad():
        decoded = module.decode(z_z[:, None], many.x_ng.sum(1).log(), many)
        gene_z = decoded.genes.log_prob(many.x_ng).sum(1)
        protein_zb = torch.stack(
            [
                replace(decoded.proteins, log_back_np=b.expand(241, 1)).log_prob(many.protein_np)[:, 0]
                for b in b_b
            ],
            dim=1,
        )
    log_zb = protein_zb + Normal(0.2, 0.5).log_prob(b_b) + (gene_z + Normal(0, 1).log_prob(z_z))[:, None]
    want = torch.logsumexp(log_zb, (0, 1)).item() + math.log(12 / 240) + math.log(10 / 400)
    got = marginal_ll(module, [cells], 6000, seed())
    assert got[0] == pytest.approx(want, abs=0.04)
    hidden = Totalvi(3, 2, config, n_proteins=1, measured_bp=np.array([[True], [False]])).eval()
    hidden.load_state_dict(module.state_dict() | {"measured_bp": hidden.measured_bp})
    alone = torch.logsumexp(gene_z + Normal(0, 1).log_prob(z_z), 0).item() + math.log(12 / 240)
    assert marginal_ll(hidden, [cells], 6000, seed())[0] == pytest.approx(alone, abs=0.04)
