from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from streamx.config import ScalexConfig
from streamx.interop.scalex import to_ours
from streamx.models.layers import DomainNorm
from streamx.models.scalex import Scalex, encode, encode_by_minibatch, norm_stats, running_stats


@pytest.fixture
def reference(golden: Path) -> tuple[Scalex, dict[str, np.ndarray]]:
    """The network of SCALEX 1.0.4 and what it computed."""
    f = dict(np.load(golden / "scalex_net.npz"))
    weights = to_ours({k[3:]: torch.as_tensor(v) for k, v in f.items() if k.startswith("sd:")})
    model = Scalex(12, 3, ScalexConfig(n_latent=3, n_hidden=16))
    model.load_state_dict(weights)
    return model, f


def close(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got.detach().numpy(), want, atol=1e-5, rtol=0)


def test_parity_in_training_mode(reference: tuple[Scalex, dict[str, np.ndarray]]) -> None:
    model, f = reference
    x, batch = torch.as_tensor(f["X"]), torch.as_tensor(f["y"])
    assert np.bincount(f["y"]).min() == 1, "the fixture holds a batch of one cell"
    mu, _ = model.encoder(x)
    close(mu, f["mu_train"])
    logits = model.decoder(torch.as_tensor(f["mu_train"]), batch)
    close(torch.sigmoid(logits), f["rec_train"])


def test_parity_in_inference_mode(reference: tuple[Scalex, dict[str, np.ndarray]]) -> None:
    model, f = reference
    model.eval()
    x, batch = torch.as_tensor(f["X"]), torch.as_tensor(f["y"])
    mu, _ = model.encoder(x)
    close(mu, f["mu_eval"])
    close(torch.sigmoid(model.decoder(mu, batch, copy_single=True)), f["rec_eval"])
    mean, var = running_stats(model)
    latent = np.concatenate(
        list(encode(model, lambda: [(x[:7], batch[:7]), (x[7:], batch[7:])], mean[None], var[None]))
    )
    close(torch.as_tensor(latent), f["mu_eval"])


def test_parity_of_the_loss(reference: tuple[Scalex, dict[str, np.ndarray]]) -> None:
    model, f = reference
    with torch.no_grad():
        loss = model.loss(torch.as_tensor(f["X"]), torch.as_tensor(f["y"]), torch.zeros(40, 3))
    assert float(loss.kl) == pytest.approx(float(f["kl"]), abs=1e-5)
    assert float(loss.reconstruction) == pytest.approx(float(f["bce"]), abs=1e-5)
    assert float(loss.total) == pytest.approx(float(f["bce"]) + 0.5 * float(f["kl"]), abs=1e-5)


def per_batch_norms(x: torch.Tensor, batch: torch.Tensor, norm: DomainNorm) -> tuple[torch.Tensor, ...]:
    """The same with one torch batch norm per batch."""
    out, mean, var = torch.zeros_like(x), norm.running_mean.clone(), norm.running_var.clone()
    for b in range(len(norm.weight)):
        rows = batch == b
        if rows.sum() == 1:
            out[rows] = x[rows]
        elif rows.sum() > 1:
            out[rows] = F.batch_norm(x[rows], mean[b], var[b], norm.weight[b], norm.bias[b], True, 0.1, 1e-5)
    return out, mean, var


@pytest.mark.parametrize("codes", [[0] * 9, [0, 1, 1, 0, 3, 3, 3, 1, 2], [2, 2, 2, 2, 2, 2, 2, 2, 0], [3]])
def test_domain_norm_equals_one_batch_norm_per_batch(codes: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    norm = DomainNorm(4, 5)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.rand(p.shape, generator=g) + 0.5)
    batch = torch.tensor(codes)
    x = torch.randn(len(batch), 5, generator=g, requires_grad=True)
    expected, mean, var = per_batch_norms(x, batch, norm)
    grad = torch.randn(x.shape, generator=g)
    inputs = [x, norm.weight, norm.bias]
    want = torch.autograd.grad(expected, inputs, grad, allow_unused=True, retain_graph=True)
    got_y = norm(x, batch)
    got = torch.autograd.grad(got_y, inputs, grad, allow_unused=True)
    torch.testing.assert_close(got_y, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked.tolist() == [int((batch == b).sum() > 1) for b in range(4)]


def test_domain_norm_keeps_its_precision_under_autocast() -> None:
    x, batch = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    norms = [DomainNorm(2, 5), DomainNorm(2, 5)]
    want = norms[0](x.bfloat16().float(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = norms[1](x.bfloat16(), batch)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(norms[1].running_var, norms[0].running_var)


def test_a_single_row_is_normalised_at_inference() -> None:
    norm = DomainNorm(2, 3).eval()
    norm.running_mean += 2.0
    x = torch.ones(1, 3)
    torch.testing.assert_close(norm(x, torch.tensor([1])), -torch.ones(1, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(x, torch.tensor([1]), copy_single=True), x)


@pytest.fixture
def model() -> Scalex:
    model = Scalex(30, 3, ScalexConfig(n_latent=4, n_hidden=16), torch.Generator().manual_seed(1))
    x, batch = cells()
    model.train()
    model.loss(x, batch, torch.zeros(len(x), 4))
    return model.eval()


def cells() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.rand(101, 30, generator=g), torch.randint(0, 3, (101,), generator=g)


def test_norm_statistics_are_those_of_the_whole_batch(model: Scalex) -> None:
    x, batch = cells()
    pre = model.encoder.hidden(x).detach().double().numpy()
    for size in (1, 7, 101):
        stats = norm_stats(model, lambda s=size: zip(x.split(s), batch.split(s), strict=True))
        for b in range(3):
            rows = pre[(batch == b).numpy()]
            np.testing.assert_allclose(stats.mean_bh[b], rows.mean(0), atol=1e-6)
            np.testing.assert_allclose(stats.var_bh[b], rows.var(0), rtol=1e-5)
        mean, var = stats.pooled()
        np.testing.assert_allclose(mean, pre.mean(0), atol=1e-6)
        np.testing.assert_allclose(var, pre.var(0), rtol=1e-5)


def test_domain_latents_do_not_depend_on_minibatches(model: Scalex) -> None:
    x, batch = cells()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for size in (1, 13, 101):
        minibatches = lambda s=size: zip(x.split(s), batch.split(s), strict=True)  # noqa: E731
        stats = norm_stats(model, minibatches)
        results.append(np.concatenate(list(encode(model, minibatches, stats.mean_bh, stats.var_bh))))
    for other in results[1:]:
        np.testing.assert_allclose(results[0], other, atol=1e-6)
    assert results[0].dtype == np.float32
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_sx14_original_inference_is_training_mode_without_its_side_effect(model: Scalex) -> None:
    x, batch = cells()
    before = model.encoder.norm.running_mean.clone()
    [latent] = encode_by_minibatch(model, lambda: [(x, batch)])
    torch.testing.assert_close(model.encoder.norm.running_mean, before)
    model.train()
    torch.testing.assert_close(torch.as_tensor(latent), model.encoder(x)[0].detach())
    [one] = encode_by_minibatch(model, lambda: [(x[:1], batch[:1])])
    assert np.isfinite(one).all()


def test_imputation_of_each_batch(model: Scalex) -> None:
    mu = torch.randn(5, 4)
    values = model.impute(mu, 2)
    assert values.shape == (5, 30)
    assert not torch.equal(values, model.impute(mu, 1))
    with pytest.raises(IndexError):
        model.impute(mu, 3)


def test_weights_come_from_the_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        return Scalex(5, 2, generator=torch.Generator().manual_seed(seed)).encoder.hidden.weight

    torch.manual_seed(0)
    first = weights(3)
    torch.manual_seed(1)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))
