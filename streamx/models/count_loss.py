"""The loss of a count decoder against sparse rows on the CPU, its gradients computed with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamx.models import count_kernels
from streamx.models.sparse import Rows


def mean_count_loss(
    y_ng: Tensor,
    library_n: Tensor,
    log_theta_rg: Tensor,
    row_n: Tensor,
    x: Rows,
    dropout_ng: Tensor | None = None,
) -> Tensor:
    """-ln p(x), summed over genes, its mean over cells: NB, or ZINB where there are dropout logits.

    The same, up to float32 rounding, as the functions of :mod:`streamx.models.likelihoods` at means
    exp(library) x softmax(y), in one pass over the logits.

    Parameters
    ----------
    y_ng, dropout_ng
        Logits of the scale and of the dropout, float32 (n, n_genes).
    library_n
        ln of the library sizes, float32 (n,).
    log_theta_rg, row_n
        Table of ln theta, float32, and each cell's row of it, int64.
    x
        The counts.
    """
    if len(log_theta_rg) > len(x):  # the whole table is what a pass costs besides its cells
        log_theta_rg, row_n = F.embedding(row_n, log_theta_rg), torch.arange(len(x))
    return _CountLoss.apply(y_ng, dropout_ng, library_n, log_theta_rg, row_n, x)


class _CountLoss(torch.autograd.Function):
    """Gradients come with the value; backward only multiplies them with its own."""

    @staticmethod
    def forward(
        ctx: Any,
        y_ng: Tensor,
        dropout_ng: Tensor | None,
        library_n: Tensor,
        log_theta_rg: Tensor,
        row_n: Tensor,
        x: Rows,
    ) -> Tensor:
        logits_ng = y_ng.contiguous() if dropout_ng is None else dropout_ng.contiguous()
        dy_ng, ddropout_ng = torch.empty_like(y_ng), torch.empty_like(logits_ng)
        dlog_theta_rg, dlibrary_n = torch.empty(log_theta_rg.shape), torch.empty_like(library_n)
        share = np.float32(1 / max(len(x), 1))
        total = count_kernels.count_loss(
            y_ng.contiguous().numpy(),
            logits_ng.numpy(),
            dropout_ng is not None,
            library_n.numpy(),
            log_theta_rg.exp().contiguous().numpy(),
            row_n.numpy(),
            x.first_n,
            x.gene_v,
            x.value_v,
            share,
            *(d.numpy() for d in (dy_ng, ddropout_ng, dlog_theta_rg, dlibrary_n)),
        )
        ctx.save_for_backward(dy_ng, ddropout_ng, dlibrary_n, dlog_theta_rg)
        ctx.zero_inflated = dropout_ng is not None
        return torch.tensor(total / max(len(x), 1), dtype=y_ng.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        factor = grads[0].item()
        by_y, by_dropout, by_library, by_theta = (d if factor == 1 else d * factor for d in ctx.saved_tensors)
        return by_y, by_dropout if ctx.zero_inflated else None, by_library, by_theta, None, None
