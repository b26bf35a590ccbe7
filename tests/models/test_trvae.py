from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from streamx.config import TrvaeConfig
from streamx.errors import UsageError
from streamx.interop.scarches_trvae import to_ours
from streamx.models.cells import Cells
from streamx.models.sparse import Rows
from streamx.models.trvae import Trvae

SMALL = {"hidden_layer_sizes": (8, 6), "latent_dim": 3, "dr_rate": 0.0}
LOSSES = ["nb", "zinb", "mse"]


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def network(n_batches: int = 3, **settings: Any) -> Trvae:
    return Trvae(12, n_batches, TrvaeConfig(**SMALL | settings))


def cells(n: int = 30, n_batches: int = 3) -> Cells:
    x = torch.poisson(torch.full((n, 12), 1.5), generator=seed(1))
    return Cells(x, torch.randint(0, n_batches, (n,), generator=seed(2)))


def reference(golden: Path, loss: str) -> tuple[Trvae, Cells, dict[str, np.ndarray]]:
    """The network of scArches of December 2020 and what it computed."""
    f = dict(np.load(golden / f"trvae_{loss}.npz"))
    model = network(recon_loss=loss, size_factor="log_sum")
    model.load_state_dict(to_ours({k[3:]: torch.as_tensor(v) for k, v in f.items() if k.startswith("sd:")}))
    return model, Cells(torch.as_tensor(f["x"]), torch.as_tensor(f["c"]).long()), f


@pytest.mark.parametrize("loss", LOSSES)
def test_parity(golden: Path, loss: str) -> None:
    model, given, f = reference(golden, loss)
    mean, var = model.eval().encode(given)
    np.testing.assert_allclose(mean.detach(), f["z_mean"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(var.detach(), np.exp(f["z_logvar"]) + 1e-4, atol=1e-5, rtol=0)
    if loss != "mse":
        np.testing.assert_allclose(model.size_factors(given.x_ng), f["sf"], atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_parity_of_the_losses(golden: Path, loss: str) -> None:
    """The fixture's noise is that of seed 1."""
    model, given, f = reference(golden, loss)
    with torch.no_grad():
        got = {name: value.item() for name, value in model.loss(given, 0.25, seed(1)).items()}
    assert got["reconstruction"] == pytest.approx(float(f["recon"]), abs=1e-5)
    assert got["kl"] == pytest.approx(float(f["kl"]), abs=1e-5)
    assert got["mmd"] == pytest.approx(float(f["mmd"]), abs=1e-5)
    total = float(f["recon"]) + 0.25 * float(f["kl"]) + float(f["mmd"])
    assert got["loss"] == pytest.approx(total, abs=2e-5)
    assert list(got) == ["loss", "reconstruction", "kl", "mmd"]


def test_settings_of_the_discrepancy() -> None:
    def apart(**settings: Any) -> float:
        with torch.no_grad():
            return network(**settings).loss(cells(), 1.0, seed())["mmd"].item()

    z, y = apart(), apart(mmd_on="y")
    assert z > 0
    assert y > 0
    assert y != pytest.approx(z, rel=1e-3)
    assert apart(beta=3.0) == pytest.approx(3 * z, rel=1e-6)
    assert 0 < apart(mmd_boundary=1) < z
    assert apart(mmd_boundary=3) == 0  # no batch is beyond it
    assert apart(use_mmd=False) == 0


@pytest.mark.parametrize("mmd_on", ["z", "y"])
def test_a_minibatch_of_one_batch(mmd_on: str) -> None:
    model = network(mmd_on=mmd_on)
    given = cells()
    losses = model.loss(Cells(given.x_ng, torch.ones(30).long()), 1.0, seed())
    assert isinstance(losses["mmd"], torch.Tensor)
    assert losses["mmd"].item() == 0
    losses["loss"].backward()
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), name


def test_only_the_minibatch_s_columns_have_a_gradient() -> None:
    model = network()
    model.loss(Cells(cells().x_ng, torch.ones(30).long()), 1.0, seed())["loss"].backward()
    for table in (model.log_theta_gb, model.encoder.blocks[0].batch, model.decoder.blocks[0].batch):
        moved = table.grad.abs().sum(0) > 0
        assert moved.tolist() == [False, True, False]


def test_size_factors_and_an_empty_cell() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0] + [0.0] * 9, [0.0] * 12])
    assert network().size_factors(x).tolist() == [7.0, 0.0]
    torch.testing.assert_close(
        network(size_factor="log_sum").size_factors(x), torch.tensor([np.log(7.0), 0.0], dtype=torch.float32)
    )
    for size_factor in ("sum", "log_sum"):
        model = network(size_factor=size_factor)
        losses = model.loss(Cells(x, torch.tensor([0, 1])), 1.0, seed())
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"])
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_mse_fits() -> None:
    given = cells()
    logged, plain = network(recon_loss="mse"), network(recon_loss="mse", log_input=False)
    mean = logged.encode(given)[0]
    torch.testing.assert_close(mean, plain.encode(Cells(given.x_ng.log1p(), given.batch_n))[0])
    with torch.no_grad():
        got = logged.loss(given, 1.0, seed())
        want = plain.loss(Cells(given.x_ng.log1p(), given.batch_n), 1.0, seed())
    assert got["reconstruction"].item() == pytest.approx(want["reconstruction"].item(), rel=1e-6)
    found = logged.decode(mean, given.batch_n, torch.ones(30))
    assert found.r_ng is None
    assert found.scale_ng.min() == 0  # a ReLU


def test_decoded_as_another_batch() -> None:
    model, given = network(recon_loss="zinb"), cells()
    mean, _ = model.encode(given)
    found = model.decode(mean, given.batch_n, model.size_factors(given.x_ng))
    torch.testing.assert_close(found.scale_ng.sum(1), torch.ones(30))
    torch.testing.assert_close(found.rate_ng.sum(1), given.x_ng.sum(1))
    torch.testing.assert_close(found.r_ng[0], model.log_theta_gb[:, given.batch_n[0]].exp())
    assert found.dropout_ng.shape == (30, 12)
    other = model.decode(mean, (given.batch_n + 1) % 3, model.size_factors(given.x_ng))
    assert not torch.allclose(found.scale_ng, other.scale_ng)
    assert found.hidden_ny.shape == (30, 6)


@pytest.mark.parametrize(
    "settings", [{"use_bn": True}, {"use_ln": False}, {"dr_rate": 0.3}, {"use_bn": True, "dr_rate": 0.3}]
)
def test_evaluation_is_deterministic_and_cell_by_cell(settings: dict[str, Any]) -> None:
    model, given = network(**settings), cells()
    model.loss(given, 1.0, seed())  # moves running statistics
    model.eval()
    mean, var = model.encode(given)
    one = model.encode(Cells(given.x_ng[3:4], given.batch_n[3:4]))
    torch.testing.assert_close(one[0], mean[3:4])
    torch.testing.assert_close(one[1], var[3:4])
    assert (var > 1e-4).all()


def test_norm_of_the_layers() -> None:
    """Batch norm replaces layer norm."""
    block = network(use_bn=True).encoder.blocks[0]
    x, batch = cells().x_ng, torch.zeros(30).long()
    h = block.linear(x) + block.batch[:, 0]
    want = torch.relu((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt())
    torch.testing.assert_close(block(x, batch), want, atol=1e-5, rtol=1e-5)
    plain = network(use_ln=False).encoder.blocks[0]
    torch.testing.assert_close(plain(x, batch), torch.relu(plain.linear(x) + plain.batch[:, 0]))


def test_noise_and_dropout_come_from_the_generator() -> None:
    def loss(model: Trvae, n: int) -> float:
        with torch.no_grad():
            return model.loss(cells(), 1.0, seed(n))["loss"].item()

    model = network(dr_rate=0.3)
    torch.manual_seed(0)
    first = loss(model, 5)
    torch.manual_seed(1)
    assert loss(model, 5) == first
    assert loss(model, 6) != first
    with torch.no_grad():
        torch.manual_seed(5)
        assert model.loss(cells(), 1.0)["loss"].item() == first  # the default generator


@pytest.mark.parametrize("size_factor", ["sum", "log_sum"])
@pytest.mark.parametrize("n_batches", [3, 40], ids=["few", "more than cells"])
@pytest.mark.parametrize("loss", LOSSES)
def test_sparse_rows_equal_a_tensor(loss: str, n_batches: int, size_factor: str) -> None:
    """All losses, and the gradients of all weights, up to float32 rounding; one cell has a single count."""
    given = cells(n_batches=n_batches)
    given.x_ng[0] = torch.eye(12)[4]
    rows = Cells(Rows.of(sparse.csr_matrix(given.x_ng.numpy())), given.batch_n)
    found = []
    for some in (given, rows):
        model = network(n_batches, recon_loss=loss, size_factor=size_factor)
        losses = model.loss(some, 0.5, seed())
        losses["loss"].backward()
        grads = {name: table.grad for name, table in model.named_parameters()}
        found.append(({name: value.detach() for name, value in losses.items()}, grads))
    torch.testing.assert_close(found[1], found[0], rtol=3e-5, atol=3e-5)


def test_initial_weights() -> None:
    """As torch draws a layer: uniform, +-1/sqrt(inputs); the batches' columns as a layer of their own."""
    model = Trvae(400, 5, TrvaeConfig(recon_loss="zinb"))
    first = model.encoder.blocks[0]
    assert first.linear.weight.abs().max().item() == pytest.approx(400**-0.5, rel=1e-2)
    assert first.batch.abs().max().item() == pytest.approx(5**-0.5, rel=1e-2)
    assert first.batch.shape == (256, 5)
    assert [block.linear.bias is None for block in model.encoder.blocks] == [False, False]
    assert [block.linear.bias is None for block in model.decoder.blocks] == [True, True]
    assert model.log_theta_gb.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(model.log_theta_gb, Trvae(400, 5, TrvaeConfig(recon_loss="zinb")).log_theta_gb)
    other = Trvae(400, 5, TrvaeConfig(recon_loss="zinb"), generator=seed(1))
    assert not torch.equal(model.log_theta_gb, other.log_theta_gb)
    assert network(n_batches=1).encoder.blocks[0].batch.shape == (8, 1)
    with pytest.raises(UsageError, match="hidden_layer_sizes"):
        Trvae(12, 2, TrvaeConfig(hidden_layer_sizes=()))


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns(loss: str) -> None:
    model, given = network(recon_loss=loss), cells(60)
    optimizer, g = torch.optim.Adam(model.parameters(), lr=1e-2), seed(3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        value = model.loss(given, 1.0, g)["loss"]
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert np.mean(losses[-20:]) < 0.9 * losses[0]
