"""The sparse path equals the dense one up to float32 rounding, and SCALEX's own numbers to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

from streamx.config import ScalexConfig
from streamx.interop.scalex import to_ours
from streamx.models.layers import DomainNorm, linear
from streamx.models.scalex import Scalex, encode, norm_stats, running_stats
from streamx.models.sparse import Rows, SparseLinear, dense_gradient, normed_cross_entropy


def cells(n: int = 37, n_genes: int = 300, density: float = 0.1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x_ng = (rng.random((n, n_genes)) * (rng.random((n, n_genes)) < density)).astype(np.float32)
    x_ng[3 % n] = 0
    x_ng[:, 5] = 0
    return x_ng


def rows(x_ng: np.ndarray) -> Rows:
    return Rows.of(sparse.csr_matrix(x_ng))


def test_rows() -> None:
    x_ng = cells()
    x = rows(x_ng)
    assert len(x) == 37
    assert np.array_equal(x.dense().numpy(), x_ng)
    first, cell, value = x.by_gene
    by_gene = sparse.csc_matrix(x_ng)
    assert np.array_equal(first, by_gene.indptr)
    assert np.array_equal(cell, by_gene.indices)
    assert np.array_equal(value, by_gene.data)


@pytest.mark.parametrize("n_out", [1, 16, 255, 256, 300])
@pytest.mark.parametrize("n_genes", [1, 255, 256, 600])
def test_the_layer_equals_the_dense_one(n_genes: int, n_out: int) -> None:
    layer = SparseLinear.drawn(n_genes, n_out, torch.Generator().manual_seed(0))
    plain = linear(n_genes, n_out, torch.Generator().manual_seed(0))
    assert torch.equal(layer.weight, plain.weight)
    x_ng = cells(29, max(n_genes, 6))[:, :n_genes]
    got, dense, want = layer(rows(x_ng)), layer(torch.as_tensor(x_ng)), plain(torch.as_tensor(x_ng))
    d_nh = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad(y, [m.weight, m.bias], d_nh) for y, m in ((got, layer), (dense, layer))]
    wanted = torch.autograd.grad(want, [plain.weight, plain.bias], d_nh)
    for y in (got, dense):
        torch.testing.assert_close(y, want, atol=2e-6, rtol=1e-5)
    for pair in grads:
        assert pair[0].stride() == layer.weight.stride() or 1 in layer.weight.shape
        torch.testing.assert_close(pair, wanted, atol=2e-5, rtol=1e-5)


def test_genes_in_any_order_within_a_cell() -> None:
    x = rows(cells(n_genes=700))
    swapped = Rows(x.first_n, x.gene_v.copy(), x.value_v.copy(), x.n_genes)
    for low, high in zip(x.first_n[:-1], x.first_n[1:], strict=True):
        swapped.gene_v[low:high] = x.gene_v[low:high][::-1]
        swapped.value_v[low:high] = x.value_v[low:high][::-1]
    layer = SparseLinear.drawn(700, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(swapped), layer(x), atol=2e-6, rtol=1e-5)


def test_factors_wait_for_an_optimiser_that_takes_them() -> None:
    x_ng = cells()
    layer = SparseLinear.drawn(300, 16, torch.Generator().manual_seed(0))
    layer.pending = []
    layer(rows(x_ng)).square().sum().backward()
    [(x, d_nh)] = layer.pending
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    layer.pending = None
    layer(rows(x_ng)).square().sum().backward()
    assert torch.equal(dense_gradient(x, d_nh), layer.weight.grad)


@pytest.mark.parametrize("n_genes", [3, 128, 301])
@pytest.mark.parametrize("codes", [[0] * 70, [1, 0, 1, 3, 3, 3, 0], [2], [0, 0, 1]])
def test_cross_entropy_equals_the_dense_one(codes: list[int], n_genes: int) -> None:
    g = torch.Generator().manual_seed(0)
    x_ng, batch_n = cells(len(codes), max(n_genes, 6))[:, :n_genes], torch.tensor(codes)
    y = (torch.randn(len(codes), n_genes, generator=g) * 3).requires_grad_()
    norms = [DomainNorm(4, n_genes).train() for _ in range(2)]
    for norm in norms:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 4 * n_genes).view(4, n_genes))
            norm.bias.copy_(torch.linspace(-9, 9, 4 * n_genes).view(4, n_genes))
    logits = norms[0](y, batch_n)
    want = F.binary_cross_entropy_with_logits(logits, torch.as_tensor(x_ng), reduction="sum")
    got = normed_cross_entropy(y, norms[1], rows(x_ng), batch_n)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    grads = [
        torch.autograd.grad(loss * 0.25, [y, norm.weight, norm.bias])
        for loss, norm in zip((want, got), norms, strict=True)
    ]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norms[1].state_dict(), norms[0].state_dict(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("logit", [-200.0, -88.0, -30.0, 0.0, 17.0, 60.0, 300.0])
def test_cross_entropy_far_out(logit: float) -> None:
    """One row passes through the norm: what comes in is the logit."""
    x = torch.tensor([[0.0, 0.25, 1.0]])
    y = torch.full((1, 3), logit, requires_grad=True)
    loss = normed_cross_entropy(y, DomainNorm(1, 3).train(), rows(x.numpy()), torch.tensor([0]))
    want = F.binary_cross_entropy_with_logits(y.double(), x.double(), reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    [d] = torch.autograd.grad(loss, y)
    torch.testing.assert_close(d, torch.sigmoid(y.detach()) - x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_seen(wrong: float) -> None:
    y = torch.zeros(5, 200, requires_grad=True)
    with torch.no_grad():
        y[2, 150] = wrong
    loss = normed_cross_entropy(y, DomainNorm(1, 200).train(), rows(cells(5, 200)), torch.zeros(5).long())
    assert torch.isnan(loss)
    [d] = torch.autograd.grad(loss, y)
    assert torch.isnan(d[:, 150]).all()


@pytest.fixture
def reference(golden: Path) -> tuple[Scalex, dict[str, np.ndarray]]:
    """The network of SCALEX 1.0.4 and what it computed."""
    f = dict(np.load(golden / "scalex_net.npz"))
    model = Scalex(12, 3, ScalexConfig(n_latent=3, n_hidden=16))
    model.load_state_dict(to_ours({k[3:]: torch.as_tensor(v) for k, v in f.items() if k.startswith("sd:")}))
    return model, f


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5, rtol=0)


def test_parity_with_scalex(reference: tuple[Scalex, dict[str, np.ndarray]]) -> None:
    model, f = reference
    x, batch = rows(f["X"]), torch.as_tensor(f["y"])
    mean, var = (v.copy() for v in running_stats(model))
    close(np.concatenate(list(encode(model, lambda: [(x, batch)], mean[None], var[None]))), f["mu_eval"])
    with torch.no_grad():
        close(model.encoder(x)[0], f["mu_train"])
        loss = model.loss(x, batch, torch.zeros(40, 3))
    assert float(loss.kl) == pytest.approx(float(f["kl"]), abs=1e-5)
    assert float(loss.reconstruction) == pytest.approx(float(f["bce"]), abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_whole_loss_and_its_gradients(training: bool) -> None:
    x_ng, batch = cells(64), torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for x in (torch.as_tensor(x_ng), rows(x_ng)):
        model = Scalex(300, 3, ScalexConfig(n_latent=4, n_hidden=32), torch.Generator().manual_seed(2))
        model.train(training)
        loss = model.loss(x, batch, noise)
        loss.total.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append((loss.total.detach(), grads, model.state_dict()))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_latents_and_statistics() -> None:
    model = Scalex(300, 3, ScalexConfig(n_latent=4, n_hidden=300), torch.Generator().manual_seed(2)).eval()
    x_ng, batch = cells(101), torch.randint(0, 3, (101,), generator=torch.Generator().manual_seed(0))
    stats = [norm_stats(model, lambda x=x: [(x, batch)]) for x in (torch.as_tensor(x_ng), rows(x_ng))]
    np.testing.assert_allclose(stats[1].mean_bh, stats[0].mean_bh, atol=1e-6)
    np.testing.assert_allclose(stats[1].var_bh, stats[0].var_bh, rtol=1e-5)
    want, got = (
        np.concatenate(list(encode(model, lambda x=x: [(x, batch)], stats[0].mean_bh, stats[0].var_bh)))
        for x in (torch.as_tensor(x_ng), rows(x_ng))
    )
    np.testing.assert_allclose(got, want, atol=2e-6)
    one_by_one = [(rows(x_ng[i : i + 1]), batch[i : i + 1]) for i in range(101)]
    single = np.concatenate(list(encode(model, lambda: one_by_one, stats[0].mean_bh, stats[0].var_bh)))
    np.testing.assert_allclose(single, got, atol=1e-6)


@pytest.mark.parametrize("n_latent", [1, 16, 37])
@pytest.mark.parametrize("n_hidden", [1, 64, 130])
def test_latents_of_any_shape(n_hidden: int, n_latent: int) -> None:
    config = ScalexConfig(n_latent=n_latent, n_hidden=n_hidden)
    model = Scalex(300, 3, config, torch.Generator().manual_seed(2)).eval()
    x_ng, batch = cells(), torch.arange(37) % 3
    rng = np.random.default_rng(1)
    mean_bh, var_bh = rng.normal(size=(3, n_hidden)) / 10, rng.random((3, n_hidden)) + 0.5
    found = [
        next(iter(encode(model, lambda x=x: [(x, batch)], mean_bh, var_bh)))
        for x in (torch.as_tensor(x_ng), rows(x_ng))
    ]
    np.testing.assert_allclose(found[1], found[0], atol=2e-6, rtol=1e-5)


def test_a_latent_depends_on_its_cell_alone() -> None:
    """To the last bit, whatever cells come with it."""
    model = Scalex(700, 2, ScalexConfig(n_latent=10, n_hidden=200), torch.Generator().manual_seed(2)).eval()
    x_ng, batch = cells(101, 700), torch.arange(101) % 2
    stats = norm_stats(model, lambda: [(rows(x_ng), batch)])

    def latents(cell_n: np.ndarray) -> np.ndarray:
        given = [(rows(x_ng[cell_n]), batch[cell_n])]
        return next(iter(encode(model, lambda: given, stats.mean_bh, stats.var_bh)))

    together, order = latents(np.arange(101)), np.random.default_rng(0).permutation(101)
    assert np.array_equal(latents(order), together[order])
    assert np.array_equal(latents(order[:1]), together[order[:1]])


def test_rows_in_the_middle_of_larger_arrays() -> None:
    x_ng, batch = cells(), torch.arange(37) % 3
    x = rows(x_ng)
    model = Scalex(300, 3, ScalexConfig(n_latent=4, n_hidden=64), torch.Generator().manual_seed(2)).eval()
    mean, var = (v[None] for v in running_stats(model))
    some = Rows(x.first_n[7:20], x.gene_v, x.value_v, 300)
    [want], [got] = (
        list(encode(model, lambda x=x: [(x, batch[7:19])], mean, var)) for x in (rows(x_ng[7:19]), some)
    )
    assert np.array_equal(got, want)


def test_no_number_in_a_cell_is_no_number_in_its_latent() -> None:
    x_ng = cells()
    x_ng[4, 7] = np.nan
    model = Scalex(300, 1, ScalexConfig(n_latent=4, n_hidden=64), torch.Generator().manual_seed(2)).eval()
    mean, var = (v[None] for v in running_stats(model))
    [z_nk] = encode(model, lambda: [(rows(x_ng), torch.zeros(37).long())], mean, var)
    assert np.isnan(z_nk).all(1).tolist() == [i == 4 for i in range(37)]
