"""Maximum mean discrepancy between the batches of a minibatch.

Gretton et al. 2012, "A Kernel Two-Sample Test", as trVAE uses it (Lotfollahi et al. 2020, "Conditional
out-of-distribution generation for unpaired data using transfer VAE"): a sum of Gaussian kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Squared bandwidths s of the kernels exp(-|x - y|^2 / (2 s)).
BANDWIDTHS = (
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0, 10.0, 15.0),
    *(20.0, 25.0, 30.0, 35.0, 100.0, 1e3, 1e4, 1e5, 1e6),
)


def kernel(y_nd: Tensor) -> Tensor:
    """Sum over the bandwidths of the Gaussian kernels between all rows: (n, d) float32 -> (n, n)."""
    # Distances by differences, not by |x|^2 + |y|^2 - 2 xy: rounding would drown the narrow kernels.
    distance_nn = torch.cdist(y_nd, y_nd, compute_mode="donot_use_mm_for_euclid_dist")
    rate_w = -0.5 / torch.tensor(BANDWIDTHS, dtype=y_nd.dtype, device=y_nd.device)
    return (distance_nn.square()[..., None] * rate_w).exp().sum(-1)


def compared(n_b: Tensor, boundary: int | None = None) -> Tensor:
    """Which batches a minibatch with ``n_b`` cells of each compares: bool (n_batches, n_batches), symmetric.

    All pairs with a cell each; with a boundary k, pairs of a batch below k (of the reference) and one from k
    on (new), with two cells each.
    """
    present_b = n_b >= (1 if boundary is None else 2)
    code_b = torch.arange(len(n_b), device=n_b.device)
    if boundary is None:
        pairs_bb = code_b[:, None] != code_b
    else:
        pairs_bb = (code_b[:, None] < boundary) != (code_b < boundary)
    return pairs_bb & present_b & present_b[:, None]


def mmd(y_nd: Tensor, batch_n: Tensor, n_batches: int, boundary: int | None = None) -> Tensor:
    """Squared maximum mean discrepancies, added over all pairs of batches: a scalar.

    Of two batches a and b: mean K(a, a) + mean K(b, b) - 2 mean K(a, b), diagonals included (the biased
    estimate). A minibatch without a pair gives a tensor of 0, where the Dec 2020 reference fails.

    Parameters
    ----------
    y_nd
        Latents or hidden units, float32 (n, d).
    batch_n
        Batch codes, int64 in [0, n_batches).
    boundary
        Number of reference batches, if only these are compared with the others, and not among themselves.
    """
    onehot_bn = F.one_hot(batch_n, n_batches).t().to(y_nd.dtype)
    n_b = onehot_bn.sum(1)
    share_bn = onehot_bn / n_b.clamp(min=1)[:, None]
    mean_bb = share_bn @ kernel(y_nd) @ share_bn.t()
    own_b = mean_bb.diagonal()
    pairs_bb = compared(n_b, boundary).triu(1).to(y_nd.dtype)
    return (pairs_bb * (own_b[:, None] + own_b - 2 * mean_bb)).sum()
