"""Our Adam beside torch's, on dense gradients and on factors, and taken up again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from streamx.config import ScalexConfig
from streamx.models.scalex import Scalex
from streamx.models.sparse import Rows
from streamx.train.adam import Adam


def minibatches(n: int) -> list[tuple[Rows, torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        x_ng = (rng.random((20, 50)) * (rng.random((20, 50)) < 0.1)).astype(np.float32)
        batch_n = torch.from_numpy(rng.integers(0, 3, 20))
        found.append(
            (Rows.of(sparse.csr_matrix(x_ng)), batch_n, torch.from_numpy(rng.normal(size=(20, 4))).float())
        )
    return found


def make_model() -> Scalex:
    config = ScalexConfig(n_latent=4, n_hidden=24)
    return Scalex(50, 3, config, torch.Generator().manual_seed(2)).train()


def run(
    optimizer: Adam | torch.optim.Adam, model: Scalex, *, dense: bool = False, accumulate: int = 1
) -> Scalex:
    given = minibatches(12)
    for low in range(0, 12, accumulate):
        optimizer.zero_grad()
        for x, batch_n, noise_nk in given[low : low + accumulate]:
            loss = model.loss(x.dense() if dense else x, batch_n, noise_nk).total
            (loss / accumulate).backward()
        optimizer.step()
    return model


def settled(model: Scalex) -> dict[str, torch.Tensor]:
    """The state but for biases in front of a batch norm: gradient 0, and Adam steps along its rounding."""
    idle = (
        "encoder.hidden.bias",
        "decoder.out.bias",
        "encoder.norm.running_mean",
        "decoder.norm.running_mean",
    )
    return {name: value for name, value in model.state_dict().items() if name not in idle}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_torchs(accumulate: int) -> None:
    model = make_model()
    torchs = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-4)
    want = run(torchs, model, dense=True, accumulate=accumulate)
    for factors, dense in ((True, False), (False, False), (True, True)):
        model = make_model()
        ours = Adam(model, 1e-3, 5e-4, factors=factors)
        got = run(ours, model, dense=dense, accumulate=accumulate)
        torch.testing.assert_close(settled(got), settled(want), atol=2e-5, rtol=1e-4)
        for number, slots in torchs.state_dict()["state"].items():
            mine = ours.state_dict()["state"][number]
            assert mine["step"] == slots["step"] == 12 // accumulate
            torch.testing.assert_close(mine["exp_avg"], slots["exp_avg"], atol=2e-5, rtol=1e-3)


def test_dense_gradient_and_factors_add_up() -> None:
    results = []
    for first_dense in (False, True):
        model = make_model()
        optimizer = Adam(model, 1e-3, 0.0)
        for number, (x, batch_n, noise_nk) in enumerate(minibatches(2)):
            dense = first_dense and number == 0
            model.loss(x.dense() if dense else x, batch_n, noise_nk).total.backward()
        optimizer.step()
        results.append(settled(model))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


def test_zero_grad_forgets_factors() -> None:
    model = make_model()
    optimizer = Adam(model, 1e-3, 0.0)
    x, batch_n, noise_nk = minibatches(1)[0]
    model.loss(x, batch_n, noise_nk).total.backward()
    optimizer.zero_grad()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_state_survives() -> None:
    whole = run(Adam(model := make_model(), 1e-3, 5e-4), model)
    model = make_model()
    optimizer = Adam(model, 1e-3, 5e-4)
    for number, (x, batch_n, noise_nk) in enumerate(minibatches(12)):
        if number == 5:  # as a checkpoint does: everything through plain contiguous copies
            weights = {
                k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()
            }
            moments = {
                n: {k: v.clone(memory_format=torch.contiguous_format) for k, v in slots.items()}
                for n, slots in optimizer.state_dict()["state"].items()
            }
            model = make_model()
            optimizer = Adam(model, 1e-3, 5e-4)
            model.load_state_dict(weights)
            optimizer.load_state_dict({"state": moments})
        optimizer.zero_grad()
        model.loss(x, batch_n, noise_nk).total.backward()
        optimizer.step()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
