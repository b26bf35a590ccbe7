"""The sparse path on the CPU: a layer, and a loss, that take a minibatch's non-zeros instead of its zeros.

Single-cell counts are 3 to 10 % non-zeros. Results equal those of the dense operations up to the rounding of
float32; which path is taken is the caller's choice, by the type of the input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.models import kernels
from streamx.models.layers import EPS, MOMENTUM, DomainNorm, linear
from streamx.models.vectors import FEW, LANES

# Of the values of a matrix; above it dense operations are faster.
DENSITY_LIMIT = 0.25


@dataclass(frozen=True, eq=False)
class Rows:
    """Cells as sparse rows.

    Attributes
    ----------
    first_n
        int64 (n + 1,): the values of cell i are ``first_n[i]:first_n[i + 1]``.
    gene_v, value_v
        int32 and float32 (n_values,): gene and value; ascending genes within a cell are fastest.
    """

    first_n: np.ndarray
    gene_v: np.ndarray
    value_v: np.ndarray
    n_genes: int

    @classmethod
    def of(cls, x_ng: Any) -> Rows:
        """From anything with ``indptr``, ``indices`` and ``data`` (scipy's CSR, a loader's minibatch)."""
        n_genes = x_ng.n_genes if hasattr(x_ng, "n_genes") else x_ng.shape[1]
        first_n = np.ascontiguousarray(x_ng.indptr, np.int64)
        gene_v = np.ascontiguousarray(x_ng.indices, np.int32)
        return cls(first_n, gene_v, np.ascontiguousarray(x_ng.data, np.float32), n_genes)

    def __len__(self) -> int:
        return len(self.first_n) - 1

    def dense(self) -> Tensor:
        """float32 (n, n_genes)."""
        row_v = np.repeat(np.arange(len(self)), np.diff(self.first_n))
        out_ng = np.zeros((len(self), self.n_genes), np.float32)
        out_ng[row_v, self.gene_v] = self.value_v
        return torch.from_numpy(out_ng)

    @cached_property
    def sum_n(self) -> Tensor:
        """Each cell's sum, float32 (n,)."""
        before_v = np.concatenate([[0.0], np.cumsum(self.value_v, dtype=np.float64)])
        return torch.from_numpy(np.diff(before_v[self.first_n])).float()

    def log1p(self) -> Rows:
        """ln(1 + x), as of a tensor."""
        return replace(self, value_v=np.log1p(self.value_v))

    @cached_property
    def by_gene(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same values gene by gene: first (n_genes + 1,) int64, cell int32, value float32."""
        first_g = np.empty(self.n_genes + 1, np.int64)
        cell_v, value_v = np.empty_like(self.gene_v), np.empty_like(self.value_v)
        kernels.transpose(self.first_n, self.gene_v, self.value_v, first_g, cell_v, value_v)
        return first_g, cell_v, value_v


class SparseLinear(nn.Linear):
    """A linear layer on genes that also takes :class:`Rows`.

    ``weight`` has torch's shape (n_out, n_genes), but lies gene by gene in memory, so that a non-zero meets
    n_out contiguous numbers.

    Attributes
    ----------
    pending
        None: the weights' gradient is a dense tensor, as always. A list: gradients by sparse rows are put
        there as factors (rows, gradient by the output), for an optimiser that knows them
        (:class:`streamx.train.adam.Adam`) and multiplies them out where it uses them.
    """

    pending: list[tuple[Rows, np.ndarray]] | None = None

    @classmethod
    def drawn(cls, n_in: int, n_out: int, generator: torch.Generator) -> SparseLinear:
        """Initialised as :func:`streamx.models.layers.linear`, to the same numbers."""
        plain = linear(n_in, n_out, generator)
        layer = nn.utils.skip_init(cls, n_in, n_out)
        layer.weight = nn.Parameter(plain.weight.detach().t().contiguous().t())
        layer.bias = plain.bias
        return layer

    def forward(self, x: Tensor | Rows) -> Tensor:
        if isinstance(x, Rows):
            return _Product.apply(self.weight, self.bias, x, self)
        return torch.addmm(self.bias, x, self.weight.t())  # whose gradient has the order of the weights


def gene_major(weight_hg: Tensor) -> np.ndarray:
    """A :class:`SparseLinear`'s weights (n_out, n_genes) as a contiguous numpy array (n_genes, n_out)."""
    array = weight_hg.detach().t().numpy()
    assert array.flags.c_contiguous, "the weights lost their order in memory"
    return array


def dense_gradient(x: Rows, d_nh: np.ndarray) -> Tensor:
    """Gradient of the weights (n_out, n_genes), in their order in memory."""
    d_gh = torch.empty(x.n_genes, d_nh.shape[1])
    kernels.gradient(*x.by_gene, d_nh, d_gh.numpy())
    return d_gh.t()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_hg: Tensor, bias_h: Tensor, x: Rows, layer: SparseLinear) -> Tensor:
        out_nh = torch.empty(len(x), len(bias_h))
        kernels.product(
            x.first_n, x.gene_v, x.value_v, gene_major(weight_hg), bias_h.detach().numpy(), out_nh.numpy()
        )
        ctx.x, ctx.layer = x, layer
        return out_nh

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_nh = grads[0].contiguous()
        if not ctx.needs_input_grad[0]:  # frozen, as surgery leaves it
            return None, d_nh.sum(0) if ctx.needs_input_grad[1] else None, None, None
        if ctx.layer.pending is not None:
            ctx.layer.pending.append((ctx.x, d_nh.numpy()))
            return None, d_nh.sum(0), None, None
        return dense_gradient(ctx.x, d_nh.numpy()), d_nh.sum(0), None, None


class HeadOfUnits:
    """head(relu(layer(x) * scale + shift)) for inference, with scale and shift per batch.

    Parameters
    ----------
    scale_bh, shift_bh
        float64 (n_batches, n_out of the layer).
    head
        A layer on the hidden units.
    """

    def __init__(self, layer: SparseLinear, scale_bh: Tensor, shift_bh: Tensor, head: nn.Linear) -> None:
        self.layer, self.head, self.scale_bh = layer, head, scale_bh.float()
        self.shift_bh = (shift_bh + layer.bias.detach().double() * scale_bh).float()

    @cached_property
    def _tables(self) -> tuple[np.ndarray, ...]:
        """Weights, scale, shift and head's weights, padded, as :func:`kernels.head_of_units` takes them."""
        weight_gh = self.layer.weight.detach().t()
        n_genes, n_out = weight_gh.shape
        n_tiles = -(-n_out // LANES)
        tiles = torch.zeros(n_tiles, n_genes, LANES)  # torch's memory begins at a cache line
        for k, part_gt in enumerate(weight_gh.split(LANES, 1)):
            tiles[k, :, : part_gt.shape[1]] = part_gt
        units = (0, n_tiles * LANES - n_out)
        head_kh = F.pad(self.head.weight.detach(), (*units, 0, -self.head.out_features % FEW))
        head_lhf = head_kh.unflatten(0, (-1, FEW)).transpose(1, 2)
        scale_bh, shift_bh = F.pad(self.scale_bh, units), F.pad(self.shift_bh, units)
        return tuple(table.contiguous().numpy() for table in (tiles, scale_bh, shift_bh, head_lhf))

    def __call__(self, x: Tensor | Rows, code_n: Tensor) -> Tensor:
        """float32 (n, n_out of the head); ``code_n`` int64 are rows of the tables."""
        if isinstance(x, Rows):
            out_nlf = torch.empty(len(x), len(self._tables[-1]), FEW)
            kernels.head_of_units(
                x.first_n, x.gene_v, x.value_v, code_n.numpy(), *self._tables, out_nlf.numpy()
            )
            return out_nlf.flatten(1)[:, : self.head.out_features] + self.head.bias
        product_nh = x @ self.layer.weight.t()
        shift_nh, scale_nh = self.shift_bh.index_select(0, code_n), self.scale_bh.index_select(0, code_n)
        return self.head(torch.addcmul(shift_nh, product_nh, scale_nh).relu_())


def normed_cross_entropy(y_ng: Tensor, norm: DomainNorm, x: Rows, batch_n: Tensor) -> Tensor:
    """Sum over all values of the binary cross-entropy of the logits ``norm(y_ng)`` against ``x``, in [0, 1].

    The same as ``binary_cross_entropy_with_logits(norm(y_ng, batch_n), x, reduction="sum")`` in training
    mode, running statistics included, in one pass over ``y_ng``.
    """
    code_n = batch_n.numpy()
    n_b = np.bincount(code_n, minlength=len(norm.weight))
    total, mean_bg, var_bg = _NormedCrossEntropy.apply(y_ng, norm.weight, norm.bias, x, code_n, n_b)
    running = (norm.running_mean.numpy(), norm.running_var.numpy(), norm.num_batches_tracked.numpy())
    kernels.track(*running, mean_bg.numpy(), var_bg.numpy(), n_b, np.float32(MOMENTUM))
    return total


class _NormedCrossEntropy(torch.autograd.Function):
    """Gradients come with the value; backward only multiplies them with its own."""

    @staticmethod
    def forward(
        ctx: Any,
        y_ng: Tensor,
        weight_bg: Tensor,
        bias_bg: Tensor,
        x: Rows,
        code_n: np.ndarray,
        n_b: np.ndarray,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_ng, (dweight_bg, dbias_bg) = torch.empty_like(y_ng), torch.empty(2, *weight_bg.shape)
        mean_bg, var_bg = torch.empty(2, *weight_bg.shape)
        norm = (code_n, n_b, weight_bg.detach().numpy(), bias_bg.detach().numpy(), np.float32(EPS))
        out = (table.numpy() for table in (d_ng, dweight_bg, dbias_bg, mean_bg, var_bg))
        total = kernels.normed_cross_entropy(y_ng.detach().numpy(), *norm, *x.by_gene, *out)
        ctx.save_for_backward(d_ng, dweight_bg, dbias_bg)
        ctx.mark_non_differentiable(mean_bg, var_bg)
        return torch.tensor(total, dtype=y_ng.dtype), mean_bg, var_bg

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_ng, dweight_bg, dbias_bg = ctx.saved_tensors
        return d_ng * grads[0], dweight_bg * grads[0], dbias_bg * grads[0], None, None, None
