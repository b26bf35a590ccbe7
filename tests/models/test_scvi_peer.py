"""One optimiser step from equal weights and equal noise: scvi-tools 1.4.2's losses and weights are ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from streamx.interop.scvi_tools import module_from, state_dict_of
from streamx.models.cells import Cells
from streamx.models.scanvi import Scanvi

pytestmark = pytest.mark.peer

N, N_GENES, N_BATCHES, N_LABELS = 64, 50, 3, 4
ARCHES = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}
LIBRARY = (np.full((1, N_BATCHES), 4.0), np.full((1, N_BATCHES), 0.6))
CASES: dict[str, dict[str, Any]] = {
    "zinb": {},
    "nb": {"gene_likelihood": "nb"},
    "poisson": {"gene_likelihood": "poisson"},
    "arches zinb": ARCHES,
    "arches nb": ARCHES | {"gene_likelihood": "nb"},
    "deep gene-batch": {"n_layers": 2, "encode_covariates": True, "dispersion": "gene-batch"},
    "gene-label": {"dispersion": "gene-label"},
    "gene-cell": {"dispersion": "gene-cell"},
    "ln": {"latent_distribution": "ln"},
    "covariates": {"n_cats_per_cov": [2, 3], "n_continuous_cov": 2, "encode_covariates": True, "n_layers": 2},
    "latent library": {"use_observed_lib_size": False},
}


@pytest.fixture(scope="module")
def scvi_module() -> Any:
    return pytest.importorskip("scvi.module")


def made_up() -> tuple[Cells, dict[str, torch.Tensor]]:
    """The same cells for us and for scvi-tools."""
    rng = np.random.default_rng(0)
    x_ng = rng.poisson(rng.gamma(0.5, 3, (N, N_GENES))).astype(np.float32)
    x_ng[:, 0] += 1
    cells = Cells(
        torch.as_tensor(x_ng),
        torch.as_tensor(rng.integers(0, N_BATCHES, N)),
        label_n=torch.as_tensor(rng.integers(0, N_LABELS, N)),
        category_nc=torch.as_tensor(np.stack([rng.integers(0, 2, N), rng.integers(0, 3, N)], 1)),
        continuous_nc=torch.as_tensor(rng.normal(size=(N, 2)), dtype=torch.float32),
    )
    assert cells.label_n is not None
    theirs = {"X": cells.x_ng, "batch": cells.batch_n[:, None], "labels": cells.label_n[:, None]}
    return cells, theirs


def stepped(module: torch.nn.Module, loss: torch.Tensor) -> None:
    optimiser = torch.optim.Adam(
        [p for p in module.parameters() if p.requires_grad], lr=1e-3, eps=0.01, weight_decay=1e-6
    )
    loss.backward()
    optimiser.step()


def compare(ours: Any, state: dict[str, torch.Tensor]) -> None:
    """Weights after the step: to 1e-6 of their size; a step moves a weight by up to 1e-3."""
    got = state_dict_of(ours)
    moved = 0
    for name, want in state.items():
        if any(part in name for part in unused_parts(ours)):
            continue
        torch.testing.assert_close(got[name], want, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved += want.numel()
    assert moved > 10_000


def unused_parts(ours: Any) -> list[str]:
    """What scvi-tools keeps though the model never uses it."""
    vae = ours.vae if isinstance(ours, Scanvi) else ours
    parts = ["l_encoder"] if vae.library_encoder is None else []
    parts += ["px_r_decoder"] if vae.decoder.log_theta is None else []
    parts += ["px_dropout_decoder"] if vae.decoder.dropout is None else []
    return parts + (["px_r"] if vae.config.gene_likelihood == "poisson" else [])


@pytest.mark.parametrize("case", CASES)
def test_scvi(scvi_module: Any, case: str) -> None:
    settings = CASES[case]
    torch.manual_seed(0)
    extra = {}
    if not settings.get("use_observed_lib_size", True):
        extra = {"library_log_means": LIBRARY[0], "library_log_vars": LIBRARY[1]}
    peer = scvi_module.VAE(
        N_GENES, n_batch=N_BATCHES, n_labels=N_LABELS, dropout_rate=0.0, **settings, **extra
    ).train()
    ours = module_from("scvi", peer.state_dict(), settings | {"dropout_rate": 0.0}).train()
    cells, tensors = made_up()
    if "n_cats_per_cov" in settings:
        tensors |= {"extra_categorical_covs": cells.category_nc, "extra_continuous_covs": cells.continuous_nc}
    torch.manual_seed(1)
    _, _, want = peer(tensors, loss_kwargs={"kl_weight": 0.3})
    torch.manual_seed(1)
    got = ours.loss(cells, 0.3)
    torch.testing.assert_close(got["loss"], want.loss, atol=0, rtol=1e-6)
    torch.testing.assert_close(
        got["reconstruction"], want.dict_sum(want.reconstruction_loss).mean(), atol=0, rtol=1e-6
    )
    torch.testing.assert_close(got["kl"], want.kl_local["kl_divergence_z"].mean(), atol=1e-6, rtol=1e-6)
    stepped(peer, want.loss)
    stepped(ours, got["loss"])
    compare(ours, peer.state_dict())


@pytest.mark.parametrize("case", ["zinb", "nb", "arches zinb", "deep gene-batch", "latent library"])
@pytest.mark.parametrize("linear", [True, False])
def test_scanvi(scvi_module: Any, case: str, linear: bool) -> None:
    settings = CASES[case] | {"linear_classifier": linear}
    torch.manual_seed(0)
    extra = {}
    if not settings.get("use_observed_lib_size", True):
        extra = {"library_log_means": LIBRARY[0], "library_log_vars": LIBRARY[1]}
    peer = scvi_module.SCANVAE(
        N_GENES, n_batch=N_BATCHES, n_labels=N_LABELS, dropout_rate=0.0, **settings, **extra
    ).train()
    ours = module_from("scanvi", peer.state_dict(), settings | {"dropout_rate": 0.0}).train()
    assert isinstance(ours, Scanvi)
    cells, tensors = made_up()
    torch.manual_seed(1)
    _, _, want = peer(
        tensors, loss_kwargs={"kl_weight": 0.3, "labelled_tensors": tensors, "classification_ratio": 50}
    )
    torch.manual_seed(1)
    got = ours.loss(cells, 0.3, labelled=cells)
    torch.testing.assert_close(got["loss"], want.loss, atol=0, rtol=1e-6)
    torch.testing.assert_close(got["classification"], want.classification_loss, atol=1e-6, rtol=1e-6)
    stepped(peer, want.loss)
    stepped(ours, got["loss"])
    compare(ours, peer.state_dict())
