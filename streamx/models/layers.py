"""Layers that several models share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
MOMENTUM = 0.1


def linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer, initialised as torch does (uniform, +-1/sqrt(n_in)) but from ``generator``."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    bound = 1 / math.sqrt(n_in)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def batch_norm(norm: nn.BatchNorm1d, x_nh: Tensor) -> Tensor:
    """Batch norm that leaves a minibatch of one row alone while training: one row has no variance."""
    return x_nh if norm.training and len(x_nh) == 1 else norm(x_nh)


class DomainNorm(nn.Module):
    """One batch norm per batch (domain-specific batch normalisation, Chang 2019), in few operations.

    Rows of a batch that has a single row in the minibatch pass through without normalisation, as in SCALEX.
    Outside training, running statistics normalise every row, such single rows too, so that an output
    depends on its own cell only; ``copy_single=True`` gives SCALEX's rule there as well.

    Parameters
    ----------
    n_batches, n_features
        Size of the tables ``weight``, ``bias``, ``running_mean`` and ``running_var``, float32.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, n_batches: int, n_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_batches, n_features))
        self.bias = nn.Parameter(torch.zeros(n_batches, n_features))
        self.register_buffer("running_mean", torch.zeros(n_batches, n_features))
        self.register_buffer("running_var", torch.ones(n_batches, n_features))
        self.register_buffer("num_batches_tracked", torch.zeros(n_batches, dtype=torch.int64))

    def forward(self, x_ng: Tensor, batch_n: Tensor, *, copy_single: bool = False) -> Tensor:
        """(n, g) float32 and batch codes (n,) int64 in [0, n_batches) -> (n, g)."""
        device = x_ng.device.type
        if torch.is_autocast_enabled(device):  # statistics of bfloat16 would have three digits
            with torch.autocast(device, enabled=False):
                return self(x_ng.float(), batch_n, copy_single=copy_single)
        onehot_bn = F.one_hot(batch_n, len(self.weight)).t().to(x_ng.dtype)
        n_b = onehot_bn.sum(1)[:, None]
        if self.training:
            y_ng, mean_bg, var_bg = _DomainNorm.apply(x_ng, self.weight, self.bias, onehot_bn, n_b, batch_n)
            self._track(mean_bg, var_bg, n_b)
            return y_ng
        scale_bg = self.weight * (self.running_var + EPS).rsqrt()
        shift_bg = self.bias - self.running_mean * scale_bg
        if copy_single:
            scale_bg = torch.where(n_b == 1, 1.0, scale_bg)
            shift_bg = torch.where(n_b == 1, 0.0, shift_bg)
        return torch.addcmul(shift_bg.index_select(0, batch_n), x_ng, scale_bg.index_select(0, batch_n))

    @torch.no_grad()
    def _track(self, mean_bg: Tensor, var_bg: Tensor, n_b: Tensor) -> None:
        """Move the running statistics of batches with several rows (unbiased variance, as torch does)."""
        share_b = torch.where(n_b > 1, MOMENTUM, 0.0)
        unbiased_b = n_b / (n_b - 1).clamp(min=1)
        self.running_mean.lerp_(mean_bg, share_b.expand_as(mean_bg))
        self.running_var.lerp_(var_bg * unbiased_b, share_b.expand_as(var_bg))
        self.num_batches_tracked += (n_b[:, 0] > 1).to(torch.int64)


class _DomainNorm(torch.autograd.Function):
    """Normalise each batch's rows by their own mean and (biased) variance; single rows stay as they are.

    Written out because on 64 x 2,000 values autograd's bookkeeping costs more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ng: Tensor,
        weight_bg: Tensor,
        bias_bg: Tensor,
        onehot_bn: Tensor,
        n_b: Tensor,
        batch_n: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        many_b = (n_b > 1).to(x_ng.dtype)
        share_bn = onehot_bn / n_b.clamp(min=1)
        mean_bg = (share_bn @ x_ng) * many_b
        centred_ng = x_ng - mean_bg.index_select(0, batch_n)
        var_bg = share_bn @ (centred_ng * centred_ng)
        inv_bg = (var_bg + EPS).rsqrt()
        scale_bg = torch.where(n_b > 1, weight_bg * inv_bg, 1.0)
        y_ng = (bias_bg * many_b).index_select(0, batch_n)
        y_ng.addcmul_(centred_ng, scale_bg.index_select(0, batch_n))
        ctx.save_for_backward(centred_ng, inv_bg, scale_bg, onehot_bn, n_b, batch_n)
        ctx.mark_non_differentiable(mean_bg, var_bg)
        return y_ng, mean_bg, var_bg

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dy_ng = grads[0]
        centred_ng, inv_bg, scale_bg, onehot_bn, n_b, batch_n = ctx.saved_tensors
        many_b = (n_b > 1).to(dy_ng.dtype)
        dbias_bg = (onehot_bn @ dy_ng) * many_b
        dweight_bg = (onehot_bn @ (dy_ng * centred_ng)) * (inv_bg * many_b)
        per_row_bg = scale_bg / n_b.clamp(min=1)
        dx_ng = dy_ng * scale_bg.index_select(0, batch_n)
        dx_ng -= (per_row_bg * dbias_bg).index_select(0, batch_n)
        dx_ng.addcmul_(centred_ng, (per_row_bg * inv_bg * dweight_bg).index_select(0, batch_n), value=-1)
        return dx_ng, dweight_bg, dbias_bg, None, None, None
