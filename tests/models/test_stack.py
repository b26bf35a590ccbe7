"""The stack computes what linear layers on appended one-hot codes do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

from streamx.models.layers import linear
from streamx.models.sparse import Rows, SparseLinear
from streamx.models.stack import CovariateLinear, Stack, dropped


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def test_columns_equal_one_hot_codes() -> None:
    layer = CovariateLinear(5, 4, generator=seed(), n_batches=3, n_levels=(2, 1, 3), n_continuous=2)
    plain = linear(5 + 2 + 3 + 2 + 3, 4, seed())
    tables = [layer.linear.weight, layer.continuous, layer.batch, layer.category]
    assert torch.equal(torch.cat(tables, 1), plain.weight)
    assert torch.equal(layer.linear.bias, plain.bias)
    x, continuous = torch.randn(7, 5, generator=seed(1)), torch.randn(7, 2, generator=seed(2))
    batch = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    category = torch.stack([torch.tensor([0, 1] * 3 + [0]), torch.zeros(7).long(), batch.flip(0)], 1)
    codes = [F.one_hot(batch, 3), F.one_hot(category[:, 0], 2), F.one_hot(category[:, 2], 3)]
    want = plain(torch.cat([x, continuous, *codes], 1))
    torch.testing.assert_close(layer(x, batch, category, continuous), want, atol=1e-6, rtol=0)


def test_one_batch_has_no_column_but_a_table_that_can_grow() -> None:
    layer = CovariateLinear(5, 4, generator=seed(), n_batches=1, n_levels=(1,))
    assert layer.batch is not None
    assert layer.batch.shape == (4, 0)
    assert layer.category is None
    plain = linear(5, 4, seed())
    x = torch.randn(3, 5, generator=seed(1))
    assert torch.equal(layer(x, torch.zeros(3).long(), torch.zeros(3, 1).long()), plain(x))
    assert CovariateLinear(5, 4, generator=seed()).batch is None


@pytest.mark.parametrize("category", [0, 1, 2])
def test_a_level_more_goes_behind_those_of_its_own_category(category: int) -> None:
    layer = CovariateLinear(5, 4, generator=seed(), n_batches=3, n_levels=(2, 1, 3))
    x, batch = torch.randn(6, 5, generator=seed(1)), torch.tensor([0, 1, 2, 2, 1, 0])
    codes = torch.stack([batch % 2, torch.zeros(6).long(), batch.flip(0)], 1)
    before, old = layer(x, batch, codes), layer.category.split([2, 0, 3], 1)
    layer.add_level(category, seed(2))
    assert torch.equal(layer(x, batch, codes), before)
    widths = [n if n > 1 else 0 for n in layer.n_levels]
    blocks = layer.category.split(widths, 1)
    for own, block in zip(old, blocks, strict=True):
        assert torch.equal(block[:, : own.shape[1]], own)
    new = codes.clone()
    new[0, category] = layer.n_levels[category] - 1
    sums = sum(block.t()[new[:, c]] for c, block in enumerate(blocks) if block.shape[1])
    want = layer.linear(x) + layer.batch.t()[batch] + sums
    torch.testing.assert_close(layer(x, batch, new), want, atol=1e-6, rtol=0)
    one = [int(c == category) for c in range(3)]
    added = layer.category[layer.last_levels(one)]
    assert torch.equal(added, blocks[category][:, -1])
    wider = CovariateLinear(5, 4, generator=seed(7), n_batches=9, n_levels=(5, 4, 3))
    wider.add_level(category, seed(2))
    assert torch.equal(wider.category[wider.last_levels(one)], added)


@pytest.mark.parametrize("deep", [True, False])
def test_where_covariates_enter(deep: bool) -> None:
    stack = Stack(5, 4, 3, generator=seed(), n_batches=2, n_levels=(3,), n_continuous=1, deep=deep)
    first, *others = (layer.columns for layer in stack.layers)
    assert first.continuous is not None
    for columns in others:
        assert columns.continuous is None
        assert (columns.batch is not None) == deep
        assert (columns.category is not None) == deep


def test_order_within_a_layer() -> None:
    """Linear, batch norm, layer norm, ReLU."""
    stack = Stack(5, 4, 1, generator=seed(), layer_norm=True)
    [layer] = stack.layers
    x = torch.randn(9, 5, generator=seed(1))
    h = layer.columns.linear(x)
    normed = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-3).sqrt()
    centred = normed - normed.mean(1, keepdim=True)
    want = F.relu(centred / (normed.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(stack(x), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.norm.running_mean, 0.01 * h.mean(0))  # momentum 0.01
    torch.testing.assert_close(layer.norm.running_var, 0.99 + 0.01 * h.var(0))


def test_dropout_by_the_generator() -> None:
    x = torch.ones(200, 300)
    first, again, other = (dropped(x, 0.2, seed(n)) for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, 1.25}
    assert (first == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    stack = Stack(5, 4, 1, generator=seed(), norm=False, dropout=0.5).eval()
    y = torch.randn(9, 5, generator=seed(1))
    assert torch.equal(stack(y, generator=seed(0)), stack(y, generator=seed(1)))
    drawn = seed(7)
    assert torch.equal(dropped(x, 0.0, drawn), x)
    assert torch.equal(torch.rand(3, generator=drawn), torch.rand(3, generator=seed(7)))  # drew nothing


def test_sparse_rows() -> None:
    stacks = [Stack(50, 8, 2, generator=seed(), n_batches=3, sparse=s) for s in (True, False)]
    assert isinstance(stacks[0].layers[0].columns.linear, SparseLinear)
    assert not isinstance(stacks[0].layers[1].columns.linear, SparseLinear)
    rng = np.random.default_rng(0)
    x = (rng.poisson(0.3, (12, 50))).astype(np.float32)
    batch = torch.arange(12) % 3
    got = stacks[0](Rows.of(sparse.csr_matrix(x)), batch)
    torch.testing.assert_close(got, stacks[1](torch.as_tensor(x), batch), atol=1e-5, rtol=1e-5)
