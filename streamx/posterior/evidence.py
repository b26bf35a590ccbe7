"""How well a model explains cells: lower bound, reconstruction error, marginal likelihood; one pass each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from streamx.errors import UsageError
from streamx.models.cells import Cells
from streamx.models.scanvi import Scanvi
from streamx.posterior.draws import CountModel, evaluating


def elbo(module: CountModel, minibatches: Iterable[Cells], generator: torch.Generator | None = None) -> float:
    """The evidence lower bound, ln p(x | z) minus all KL divergences at one draw, mean over cells."""
    means = _mean_losses(module, minibatches, generator)
    return -means["reconstruction"] - sum(value for name, value in means.items() if name.startswith("kl"))


def reconstruction_error(
    module: CountModel, minibatches: Iterable[Cells], generator: torch.Generator | None = None
) -> dict[str, float]:
    """-ln p(x | z, l) at one draw, mean over cells; totalVI's also of genes and of proteins apart.

    Positive, as in scvi-tools 1.x; releases before gave its negative.

    Returns
    -------
    ``reconstruction`` and, for totalVI, ``reconstruction_gene`` and ``reconstruction_protein``.
    """
    means = _mean_losses(module, minibatches, generator)
    return {name: value for name, value in means.items() if name.startswith("reconstruction")}


def _mean_losses(
    module: CountModel, minibatches: Iterable[Cells], generator: torch.Generator | None
) -> dict[str, float]:
    """Every part of the loss, mean over all cells: a minibatch counts by its size."""
    sums: dict[str, float] = {}
    n_cells = 0
    with evaluating(module):
        for cells in minibatches:
            if isinstance(module, Scanvi) and cells.label_n is None:
                cells = replace(
                    cells, label_n=torch.full_like(cells.batch_n, -1)
                )  # the bound knows no labels
            for name, value in module.loss(cells, 1.0, generator).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(cells)
            n_cells += len(cells)
    if not n_cells:
        raise UsageError("no cells to evaluate", fix="give at least one minibatch")
    return {name: value / n_cells for name, value in sums.items()}


def marginal_ll(
    module: CountModel,
    minibatches: Iterable[Cells],
    n_samples: int = 1000,
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """ln p(x) of each cell, by importance sampling from its posterior, float64 (n_cells,).

    The logarithm of a mean of draws is on average too low, the less so the more draws. Its mean over cells is
    what scvi-tools reports, but for the weights there of minibatches of unequal size.

    Raises
    ------
    UsageError
        For scANVI, whose marginal likelihood this is not.
    """
    if isinstance(module, Scanvi):
        raise UsageError("scANVI has no marginal likelihood here", fix="ask the scVI model in it")
    found = []
    with evaluating(module):
        for cells in minibatches:
            total_n = torch.full((len(cells),), -math.inf, dtype=torch.float64, device=cells.batch_n.device)
            for _ in range(n_samples):
                total_n = torch.logaddexp(total_n, module.log_weight(cells, generator).double())
            found.append((total_n - math.log(n_samples)).cpu().numpy())
    return np.concatenate(found)
