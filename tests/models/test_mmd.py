from pathlib import Path

import numpy as np
import pytest
import torch

from streamx.models.mmd import BANDWIDTHS, mmd


def between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The discrepancy of two sets, written out."""

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        d = (x[:, None] - y).square().sum(-1)
        return torch.stack([(-d / (2 * s)).exp().sum() for s in BANDWIDTHS]).sum() / d.numel()

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def test_value_of_the_reference(golden: Path) -> None:
    f = np.load(golden / "mmd.npz")
    y = torch.as_tensor(np.concatenate([f["x"], f["y"]]))
    batch = torch.tensor([0] * 7 + [1] * 5)
    assert float(mmd(y, batch, 2)) == pytest.approx(float(f["v"]), abs=1e-5)
    assert float(mmd(y, batch, 2)) == pytest.approx(3.0827789, abs=1e-5)


@pytest.mark.parametrize(
    ("boundary", "pairs"), [(None, [(0, 1), (0, 3), (1, 3)]), (1, [(0, 1)]), (2, []), (3, [])]
)
def test_pairs_of_batches(boundary: int | None, pairs: list[tuple[int, int]]) -> None:
    """Batch 2 is absent, batch 3 has one cell: it counts, but not beyond a boundary."""
    y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 3])
    expected = sum(float(between(y[batch == a], y[batch == b])) for a, b in pairs)
    assert float(mmd(y, batch, 4, boundary)) == pytest.approx(expected, abs=1e-12)


def test_one_batch_gives_a_tensor_of_zero_with_a_gradient() -> None:
    y = torch.randn(6, 3, requires_grad=True)
    value = mmd(y, torch.ones(6, dtype=torch.int64), 3)
    assert value.item() == 0
    value.backward()
    assert torch.equal(y.grad, torch.zeros(6, 3))


def test_gradient() -> None:
    g = torch.Generator().manual_seed(1)
    y = torch.randn(9, 3, generator=g, dtype=torch.float64)
    y[4] = y[2]  # a cell twice: no direction between them, and no NaN
    y.requires_grad_()
    batch = torch.tensor([0, 1, 0, 1, 2, 2, 0, 1, 1])
    got = torch.autograd.grad(mmd(y, batch, 3), y)[0]
    whole = sum(between(y[batch == a], y[batch == b]) for a in range(3) for b in range(a))
    want = torch.autograd.grad(whole, y)[0]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_close_cells_are_told_apart() -> None:
    """Narrow kernels see differences that the expanded square of float32 would lose."""
    y = 100 + 1e-3 * torch.randn(40, 10, generator=torch.Generator().manual_seed(2))
    batch = torch.arange(40) % 2
    exact = float(between(y[batch == 0].double(), y[batch == 1].double()))
    assert float(mmd(y, batch, 2)) == pytest.approx(exact, rel=1e-4)
