"""Log-likelihoods of counts.

Everything broadcasts; the result has the shape of what is given together, float32 as its inputs. Formulas and
the constant 1e-8 as scvi-tools has them (Lopez 2018, supplementary; Gayoso 2021 for the mixture).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def poisson(x: Tensor, rate: Tensor) -> Tensor:
    """ln Poisson(x; rate); x = 0 is allowed where the rate is 0."""
    tiny = torch.finfo(rate.dtype).tiny  # the derivative at a rate of 0 is one of 0 ln 0: not a number
    return torch.xlogy(x, rate.clamp(min=tiny)) - rate - torch.lgamma(x + 1)


def nb(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """ln NB(x; mean mu > 0, inverse dispersion theta > 0): variance mu + mu^2 / theta."""
    log_sum = torch.log(theta + mu + EPS)
    from_mean = theta * (torch.log(theta + EPS) - log_sum) + x * (torch.log(mu + EPS) - log_sum)
    return _counted(from_mean, x, theta)


def zinb(x: Tensor, mu: Tensor, theta: Tensor, dropout_logit: Tensor) -> Tensor:
    """ln of a negative binomial that is replaced by 0 with probability sigmoid(dropout_logit)."""
    log_sum = torch.log(theta + mu + EPS)
    log_lost = -F.softplus(-dropout_logit)  # that of being kept is less by dropout_logit
    zero = theta * (torch.log(theta + EPS) - log_sum)
    at_zero = F.softplus(zero - dropout_logit) + log_lost  # ln(lost + kept * NB(0))
    above_zero = _counted(log_lost - dropout_logit + zero + x * (torch.log(mu + EPS) - log_sum), x, theta)
    return torch.where(x < EPS, at_zero, above_zero)


def nb_mixture(x: Tensor, mu_1: Tensor, mu_2: Tensor, theta: Tensor, logit_1: Tensor) -> Tensor:
    """ln of two negative binomials of one dispersion, the first with probability sigmoid(logit_1)."""
    log_sum_1, log_sum_2 = torch.log(theta + mu_1 + EPS), torch.log(theta + mu_2 + EPS)
    log_theta = torch.log(theta + EPS)
    first = theta * (log_theta - log_sum_1) + x * (torch.log(mu_1 + EPS) - log_sum_1)
    second = theta * (log_theta - log_sum_2) + x * (torch.log(mu_2 + EPS) - log_sum_2)
    first, second = _counted(first, x, theta), _counted(second, x, theta)
    return torch.logaddexp(first, second - logit_1) - F.softplus(-logit_1)


def _counted(from_mean: Tensor, x: Tensor, theta: Tensor) -> Tensor:
    """With the binomial coefficient, which the mean does not touch. Rounding depends on the order of sums."""
    return from_mean + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
