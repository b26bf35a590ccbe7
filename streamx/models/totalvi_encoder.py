"""totalVI's encoder: from a cell's gene and protein counts to its latent and its library (Gayoso 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from streamx.config import TotalviConfig
from streamx.models.layers import linear
from streamx.models.scvi import VAR_EPS
from streamx.models.sparse import Rows
from streamx.models.stack import Stack

# What a stack takes: genes, batch codes, codes of categories, and proteins beside continuous covariates.
Inputs = tuple[Tensor | Rows, Tensor, Tensor | None, Tensor]


@dataclass(frozen=True, eq=False)
class Inferred:
    """Posterior of a minibatch's latent variables, and a draw.

    Attributes
    ----------
    mean_nk, var_nk
        Of q(z | x, y), (n, n_latent).
    normal_nk, z_nk
        A draw of it, and the latent that it stands for (its softmax, for a logistic normal).
    library_n
        ln of the total counts; or drawn, where it is latent.
    of_library
        Mean and variance of q(ln library | x, y), (n,) each; None where it is observed.
    """

    mean_nk: Tensor
    var_nk: Tensor
    normal_nk: Tensor
    z_nk: Tensor
    library_n: Tensor
    of_library: tuple[Tensor, Tensor] | None = None


def seen(x: Tensor | Rows, config: TotalviConfig) -> Tensor | Rows:
    """Counts as the encoder sees them: over 1 + the cell's mean (``scaled``), then ln(1 + x)."""
    scaled, logarithm = config.input_transform == "scaled", config.log_variational
    if isinstance(x, Rows):
        value_v = x.value_v
        if scaled:
            mean_n = x.sum_n.numpy() / np.float32(x.n_genes)
            value_v = value_v / np.repeat(1 + mean_n, np.diff(x.first_n))
        return Rows(x.first_n, x.gene_v, np.log1p(value_v) if logarithm else value_v, x.n_genes)
    x = x / (1 + x.mean(1, keepdim=True)) if scaled else x
    return torch.log1p(x) if logarithm else x


class Encoder(nn.Module):
    """Genes, proteins and covariates -> q(z | x, y), and q(ln library | x, y) by a network of its own.

    Proteins enter the first layer as continuous covariates do, through columns of their own, so that the
    genes may come as sparse rows.

    Parameters
    ----------
    n_genes, n_beside
        Genes; proteins and continuous covariates together.
    config, generator
        Sizes; draws the initial weights.
    n_batches, n_levels
        Batches, and levels of each further categorical covariate; None and () where the encoder sees none.
    """

    def __init__(
        self,
        n_genes: int,
        n_beside: int,
        config: TotalviConfig,
        generator: torch.Generator,
        *,
        n_batches: int | None,
        n_levels: tuple[int, ...],
    ) -> None:
        super().__init__()

        def stack(n_layers: int) -> Stack:
            return Stack(
                n_genes,
                config.n_hidden,
                n_layers,
                generator=generator,
                n_batches=n_batches,
                n_levels=n_levels,
                n_continuous=n_beside,
                norm=config.use_batch_norm in ("encoder", "both"),
                layer_norm=config.use_layer_norm in ("encoder", "both"),
                dropout=config.dropout_rate_encoder,
                sparse=True,
            )

        self.stack = stack(config.n_layers_encoder)
        self.mean = linear(config.n_hidden, config.n_latent, generator)
        self.log_var = linear(config.n_hidden, config.n_latent, generator)
        self.library = stack(1)
        self.library_mean = linear(config.n_hidden, 1, generator)
        self.library_log_var = linear(config.n_hidden, 1, generator)

    def latent(self, inputs: Inputs, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Mean and variance of z, (n, n_latent)."""
        h_nh = self.stack(*inputs, generator=generator)
        return self.mean(h_nh).float(), self.log_var(h_nh).float().exp() + VAR_EPS

    def log_library(self, inputs: Inputs, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Mean and variance of ln(library), (n,)."""
        h_nh = self.library(*inputs, generator=generator)
        mean_n1, log_var_n1 = self.library_mean(h_nh).float(), self.library_log_var(h_nh).float()
        return mean_n1[:, 0], log_var_n1[:, 0].exp() + VAR_EPS
