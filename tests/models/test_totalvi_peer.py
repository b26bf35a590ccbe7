"""scvi-tools 1.4.2's totalVI beside ours: one step of its optimisers from equal weights and equal noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from streamx.interop.scvi_names import fill, gathered, of_linear, of_stack
from streamx.interop.scvi_totalvi import module_from, state_dict_of
from streamx.models.adversary import Adversary
from streamx.models.cells import Cells
from streamx.models.totalvi import Totalvi

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

N, G, P, B = 40, 30, 6, 3
KL_WEIGHT = 0.3
NO_DROPOUT = {"dropout_rate_encoder": 0.0, "dropout_rate_decoder": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "nb": {},
    "zinb, dispersions per batch": {
        "gene_likelihood": "zinb",
        "gene_dispersion": "gene-batch",
        "protein_dispersion": "protein-batch",
    },
    "latent library, logistic normal": {
        "latent_distribution": "ln",
        "use_observed_lib_size": False,
        "library_log_means": np.full((1, B), 4.0),
        "library_log_vars": np.full((1, B), 0.5),
    },
    "layer norm, covariates not encoded": {
        "encode_covariates": False,
        "use_layer_norm": "both",
        "use_batch_norm": "none",
        "n_cats_per_cov": [4],
        "n_continuous_cov": 2,
    },
    "deep, covariates": {
        "n_layers_encoder": 3,
        "n_layers_decoder": 2,
        "n_cats_per_cov": [4],
        "n_continuous_cov": 2,
        "extra_decoder_kwargs": {"activation_function_bg": "exp"},
    },
}


def some_cells(measured_bp: np.ndarray) -> Cells:
    rng = np.random.default_rng(0)
    batch_n = rng.integers(0, B, N)
    y_np = rng.poisson(5, (N, P)) * measured_bp[batch_n]
    return Cells(
        torch.as_tensor(rng.poisson(2, (N, G)).astype(np.float32)),
        torch.as_tensor(batch_n),
        category_nc=torch.as_tensor(rng.integers(0, 4, (N, 1))),
        continuous_nc=torch.as_tensor(rng.normal(size=(N, 2)).astype(np.float32)),
        protein_np=torch.as_tensor(y_np.astype(np.float32)),
    )


def of_theirs(cells: Cells, variant: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {
        "X": cells.x_ng,
        "proteins": cells.protein_np,
        "batch": cells.batch_n[:, None],
        "labels": torch.zeros(N, 1, dtype=torch.int64),
    }
    if "n_cats_per_cov" in variant:
        tensors |= {"extra_categorical_covs": cells.category_nc, "extra_continuous_covs": cells.continuous_nc}
    return tensors  # type: ignore[return-value]


def modules(variant: dict[str, Any], measured_bp: np.ndarray | None) -> tuple[Any, Totalvi]:
    """Theirs and ours with equal weights, in training mode."""
    from scvi.module import TOTALVAE

    torch.manual_seed(0)
    mask = None if measured_bp is None else {str(b): row for b, row in enumerate(measured_bp)}
    arguments = variant | NO_DROPOUT | {"n_hidden": 16, "n_latent": 4}
    theirs = TOTALVAE(G, P, n_batch=B, n_panel=B, n_labels=1, protein_batch_mask=mask, **arguments)
    for table in theirs.parameters():
        if table.shape == (P, B):  # priors and efficiencies that begin alike for all
            table.data += 0.3 * torch.randn(table.shape)
    ours = module_from(theirs.state_dict(), variant | NO_DROPOUT, "1.4.2", measured_bp)
    return theirs.train(), ours.train()


def assert_equal_weights(theirs: Any, ours: Totalvi) -> None:
    got, want = state_dict_of(ours), theirs.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        # An observed library needs no encoder: its norm, which scvi-tools keeps moving, is left as it is.
        if "l_gene_encoder" in name and ".1." in name and ours.config.use_observed_lib_size:
            continue
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("missing", [False, True], ids=["all measured", "missing"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_one_step(variant: dict[str, Any], missing: bool) -> None:
    measured_bp = np.ones((B, P), bool)
    measured_bp[1, 2:4] = not missing
    theirs, ours = modules(variant, measured_bp if missing else None)
    cells = some_cells(measured_bp)
    torch.manual_seed(5)
    _, _, want = theirs(of_theirs(cells, variant), loss_kwargs={"kl_weight": KL_WEIGHT})
    torch.manual_seed(5)
    got = ours.loss(cells, KL_WEIGHT)
    torch.testing.assert_close(got["loss"], want.loss, rtol=1e-6, atol=0)
    for name, part in (
        ("reconstruction_gene", want.reconstruction_loss["reconst_loss_gene"]),
        ("reconstruction_protein", want.reconstruction_loss["reconst_loss_protein"]),
        ("kl", want.kl_local["kl_div_z"]),
        ("kl_background", want.kl_local["kl_div_back_pro"]),
    ):
        torch.testing.assert_close(got[name], part.mean(), rtol=1e-5, atol=1e-5, msg=name)
    for module, loss in ((theirs, want.loss), (ours, got["loss"])):
        steps = torch.optim.Adam(module.parameters(), lr=4e-3, eps=0.01, weight_decay=1e-6)
        loss.backward()
        steps.step()
    assert_equal_weights(theirs, ours)


def test_one_step_against_an_adversary() -> None:
    """The order of scvi-tools' plan: the model's step with the fool loss, then the classifier's."""
    from scvi.train import AdversarialTrainingPlan

    measured_bp = np.ones((B, P), bool)
    measured_bp[1, 2:4] = False
    (theirs, ours), cells = modules({}, measured_bp), some_cells(measured_bp)
    plan = AdversarialTrainingPlan(theirs, adversarial_classifier=True)
    peer = plan.adversarial_classifier.train()
    adversary = Adversary(4, B, dropout=0.0)
    for part in peer.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    names = of_stack(adversary.stack, "classifier.0", "stack") | of_linear("classifier.1", "out")
    fill(adversary, names, peer.state_dict())
    kappa, batch_n = 1 - KL_WEIGHT, cells.batch_n

    torch.manual_seed(5)
    inferred, _, want = theirs(of_theirs(cells, {}), loss_kwargs={"kl_weight": KL_WEIGHT})
    torch.manual_seed(5)
    got, z_nk = ours.loss_and_latent(cells, KL_WEIGHT)
    torch.testing.assert_close(z_nk, inferred["z"])
    their_fool = plan.loss_adversarial_classifier(inferred["z"], batch_n[:, None], False)
    fool = adversary.fool_loss(z_nk, batch_n)
    torch.testing.assert_close(fool, their_fool)
    for module, loss in ((theirs, want.loss + kappa * their_fool), (ours, got["loss"] + kappa * fool)):
        steps = torch.optim.Adam(module.parameters(), lr=4e-3, eps=0.01, weight_decay=1e-6)
        loss.backward()
        steps.step()
    assert_equal_weights(theirs, ours)

    their_loss = plan.loss_adversarial_classifier(inferred["z"].detach(), batch_n[:, None], True)
    loss = adversary.loss(z_nk, batch_n)
    torch.testing.assert_close(loss, their_loss)
    for module, value in ((peer, kappa * their_loss), (adversary, kappa * loss)):
        steps = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)
        steps.zero_grad()
        value.backward()
        steps.step()
    for name, value in gathered(adversary, names).items():
        torch.testing.assert_close(value, peer.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
