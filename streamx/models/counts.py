"""The distribution of a minibatch's counts, as a decoder gives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamx.models import likelihoods

MAX_RATE = 1e8  # above it a draw from a Poisson distribution loses its meaning in float32


@dataclass(frozen=True, eq=False)
class Counts:
    """The distribution of a minibatch's counts.

    Attributes
    ----------
    scale_ng
        Expected share of the cell's library, (n, n_genes); adds up to 1 over genes.
    rate_ng
        Mean before dropout: library size x scale.
    theta
        Inverse dispersion: (n_genes,) or (n, n_genes); None for Poisson.
    dropout_ng
        Logit of the probability that a count is lost; None but for ZINB.
    """

    scale_ng: Tensor
    rate_ng: Tensor
    theta: Tensor | None = None
    dropout_ng: Tensor | None = None

    def log_prob(self, x_ng: Tensor) -> Tensor:
        """ln p(x), (n, n_genes)."""
        if self.theta is None:
            return likelihoods.poisson(x_ng, self.rate_ng)
        if self.dropout_ng is None:
            return likelihoods.nb(x_ng, self.rate_ng, self.theta)
        return likelihoods.zinb(x_ng, self.rate_ng, self.theta, self.dropout_ng)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Counts drawn from it, float32 (n, n_genes)."""
        rate_ng = self.rate_ng
        if self.theta is not None:
            theta_ng = self.theta.expand_as(rate_ng).contiguous()
            rate_ng = torch._standard_gamma(theta_ng, generator=generator) * (rate_ng / theta_ng)
        x_ng = torch.poisson(rate_ng.clamp(max=MAX_RATE), generator=generator)
        if self.dropout_ng is None:
            return x_ng
        lost_ng = _uniform(x_ng, generator) < torch.sigmoid(self.dropout_ng)
        return x_ng.masked_fill(lost_ng, 0.0)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)
