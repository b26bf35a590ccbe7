"""Latents, and how well a model explains cells: what every class of scvi-tools' kind is asked for.

The functions of this file and the next ones are the classes' methods: ``self`` is any object with a state.
Their arguments are those of scvi-tools; ``batch_size`` is accepted, minibatches are of 4,096 cells. What is
random is drawn by ``seed``, so the same call gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from streamx.arches.state import State, generator_for, opened
from streamx.errors import UsageError
from streamx.models import gaussian
from streamx.models.cells import Cells
from streamx.models.scanvi import Scanvi
from streamx.posterior.draws import evaluating
from streamx.posterior.evidence import elbo, marginal_ll, reconstruction_error
from streamx.posterior.expression import latent_library_size
from streamx.train.counts import LN_DRAWS, latent_of

Indices = Sequence[int] | np.ndarray | None


class Holder(Protocol):
    """An object of this room."""

    state: State


def get_latent_representation(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    give_mean: bool = True,
    mc_samples: int = LN_DRAWS,
    batch_size: int | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Latents of cells, float32 (n_cells, n_latent).

    Parameters
    ----------
    adata
        AnnData, file, store or view; default: the data that the model was made with.
    indices
        Rows, as numbers or a bool mask.
    give_mean
        The mean of q(z|x); otherwise one draw.
    mc_samples
        Draws for the mean of a logistic-normal latent.

    Raises
    ------
    UntrainedError
        Before training.
    BatchError
        If the encoder sees batches, and the model does not know one of the data's.
    """
    with opened(self.state, adata, indices, whole=False) as (model, cells):
        generator = generator_for(model, seed)
        parts = [np.zeros((0, 0), np.float32)]
        with evaluating(model.module):
            for minibatch in cells:
                if give_mean:
                    z_nk = latent_of(model.module, minibatch, mc_samples)
                else:
                    z_nk = _drawn(model.module, minibatch, generator)
                parts.append(z_nk.cpu().numpy())
    return np.concatenate(parts[1:] or parts)


def _drawn(module: Any, cells: Cells, generator: torch.Generator) -> torch.Tensor:
    core = module.vae if isinstance(module, Scanvi) else module
    mean_nk, var_nk = module.encode(cells)[:2]
    z_nk = gaussian.draw(mean_nk, var_nk, generator)
    return core.latent(z_nk) if hasattr(core, "latent") else z_nk


def get_elbo(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    batch_size: int | None = None,
    *,
    seed: int = 0,
) -> float:
    """The evidence lower bound at one draw, mean over cells: higher is better."""
    with opened(self.state, adata, indices) as (model, cells):
        return elbo(model.module, cells, generator_for(model, seed))


def get_reconstruction_error(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    batch_size: int | None = None,
    *,
    seed: int = 0,
) -> float:
    """-ln p(x | z) at one draw, mean over cells: lower is better (before scvi-tools 1.0: its negative)."""
    with opened(self.state, adata, indices) as (model, cells):
        return reconstruction_error(model.module, cells, generator_for(model, seed))["reconstruction"]


def get_reconstruction_error_by_part(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    mode: str = "total",
    batch_size: int | None = None,
    *,
    seed: int = 0,
) -> float:
    """-ln p(x, y | z) at one draw, mean over cells; ``mode``: total, or of gene or protein counts alone."""
    parts = {"total": "", "gene": "_gene", "protein": "_protein"}
    if mode not in parts:
        raise UsageError(f"mode = {mode!r}", fix=f"one of {', '.join(parts)}")
    with opened(self.state, adata, indices) as (model, cells):
        found = reconstruction_error(model.module, cells, generator_for(model, seed))
    return found[f"reconstruction{parts[mode]}"]


def get_marginal_ll(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    n_mc_samples: int = 1000,
    batch_size: int | None = None,
    return_mean: bool = True,
    *,
    seed: int = 0,
) -> float | np.ndarray:
    """ln p(x) by importance sampling: its mean over cells, or float64 (n_cells,).

    Raises
    ------
    UsageError
        For scANVI and logistic-normal latents.
    """
    with opened(self.state, adata, indices) as (model, cells):
        found_n = marginal_ll(model.module, cells, n_mc_samples, generator_for(model, seed))
    return float(found_n.mean()) if return_mean else found_n


def get_latent_library_size(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    give_mean: bool = True,
    batch_size: int | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Library sizes, float32 (n_cells, 1): the posterior's mean or a draw; the sum where it is observed."""
    with opened(self.state, adata, indices) as (model, cells):
        found = latent_library_size(model.module, cells, give_mean, generator_for(model, seed))
        return np.concatenate([part[:, None] for part in found])
