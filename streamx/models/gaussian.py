"""Normal distributions given by mean and variance, element by element."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(mean: Tensor, var: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw that gradients pass through."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return torch.addcmul(mean, noise, var.sqrt())


def log_prob(x: Tensor, mean: Tensor | float, var: Tensor) -> Tensor:
    """ln N(x; mean, var)."""
    return -0.5 * ((x - mean).square() / var + var.log() + math.log(2 * math.pi))


def kl(mean: Tensor, var: Tensor, to_mean: Tensor | float = 0.0, to_var: Tensor | None = None) -> Tensor:
    """KL(N(mean, var) || N(to_mean, to_var)), by default to the standard normal; element by element."""
    ratio = var if to_var is None else var / to_var
    square = (mean - to_mean).square()
    return 0.5 * (ratio + (square if to_var is None else square / to_var) - 1 - ratio.log())
