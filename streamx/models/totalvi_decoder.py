"""totalVI's decoder: from a latent to the parameters of gene counts and of protein counts (Gayoso 2021).

A protein's counts are a mixture of two negative binomials: background, whose mean is itself a latent variable
(log-normal, per cell and protein), and foreground, whose mean is the background's times a factor above 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.config import TotalviConfig
from streamx.models import likelihoods
from streamx.models.counts import Counts
from streamx.models.stack import CovariateLinear, Stack

_LEAST = 1e-8


@dataclass(frozen=True, eq=False)
class Proteins:
    """The distribution of a minibatch's protein counts.

    Attributes
    ----------
    back_mean_np, back_sd_np
        Of ln(mean of the background), which is normal, (n, n_proteins).
    log_back_np
        A draw of it.
    fore_scale_np
        Mean of the foreground over that of the background; above 1.
    mixing_np
        Logit of the probability of background.
    theta
        Inverse dispersion of both: (n_proteins,) or (n, n_proteins).
    log_efficiency_np
        ln of a factor on both means in the cell's batch; None in a model without it.
    """

    back_mean_np: Tensor
    back_sd_np: Tensor
    log_back_np: Tensor
    fore_scale_np: Tensor
    mixing_np: Tensor
    theta: Tensor
    log_efficiency_np: Tensor | None = None

    @cached_property
    def rate_back_np(self) -> Tensor:
        """Mean of the background, without the batch's efficiency."""
        return self.log_back_np.exp()

    @cached_property
    def rate_fore_np(self) -> Tensor:
        """Mean of the foreground, without the batch's efficiency."""
        return self.rate_back_np * self.fore_scale_np

    def at_mean(self) -> Proteins:
        """The same with ln(background) at its mean, which draws nothing."""
        return replace(self, log_back_np=self.back_mean_np)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Means of background and foreground counts, with the batch's efficiency."""
        if self.log_efficiency_np is None:
            return self.rate_back_np, self.rate_fore_np
        factor_np = self.log_efficiency_np.exp()
        return factor_np * self.rate_back_np, factor_np * self.rate_fore_np

    def log_prob(self, y_np: Tensor) -> Tensor:
        """ln p(y), (n, n_proteins)."""
        return likelihoods.nb_mixture(y_np, *self.means, self.theta, self.mixing_np)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Counts drawn from it, float32 (n, n_proteins)."""
        back_np, fore_np = self.means
        uniform_np = torch.rand(back_np.shape, generator=generator, device=back_np.device)
        rate_np = torch.where(uniform_np < torch.sigmoid(self.mixing_np), back_np, fore_np)
        return Counts(rate_np, rate_np, self.theta).sample(generator)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Distributions of a minibatch's genes and proteins."""

    genes: Counts
    proteins: Proteins


@dataclass(frozen=True, eq=False)
class Networks:
    """What the decoder's networks give, before any noise, library or dispersion; ``scale_ng`` as logits."""

    logit_ng: Tensor
    dropout_ng: Tensor | None
    back_mean_np: Tensor
    back_sd_np: Tensor
    fore_scale_np: Tensor
    mixing_np: Tensor


class Decoder(nn.Module):
    """Four stacks on the latent; heads that see one beside the latent; covariates in every layer.

    Parameters
    ----------
    n_genes, n_proteins, n_batches, n_levels, n_continuous
        Genes, proteins, batches, levels of each further categorical covariate, continuous covariates.
    config, generator
        Sizes; draws the initial weights.
    """

    def __init__(
        self,
        n_genes: int,
        n_proteins: int,
        n_batches: int,
        config: TotalviConfig,
        generator: torch.Generator,
        *,
        n_levels: tuple[int, ...] = (),
        n_continuous: int = 0,
    ) -> None:
        super().__init__()
        self.config = config

        def stack() -> Stack:
            return Stack(
                config.n_latent,
                config.n_hidden,
                config.n_layers_decoder,
                generator=generator,
                n_batches=n_batches,
                n_levels=n_levels,
                n_continuous=n_continuous,
                norm=config.use_batch_norm in ("decoder", "both"),
                layer_norm=config.use_layer_norm in ("decoder", "both"),
                dropout=config.dropout_rate_decoder,
            )

        def head(n_out: int) -> CovariateLinear:
            return CovariateLinear(
                config.n_hidden + config.n_latent,
                n_out,
                generator=generator,
                n_batches=n_batches,
                n_levels=n_levels,
                n_continuous=n_continuous,
            )

        self.gene, self.scale = stack(), head(n_genes)
        self.back, self.back_mean, self.back_sd = stack(), head(n_proteins), head(n_proteins)
        self.fore, self.fore_scale = stack(), head(n_proteins)
        self.mix, self.dropout, self.mixing = stack(), head(n_genes), head(n_proteins)

    def forward(
        self,
        z_nk: Tensor,
        batch_n: Tensor,
        category_nc: Tensor | None = None,
        continuous_nc: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Networks:
        """(n, n_latent) and covariates -> what the networks give; ``generator`` draws the dropout."""
        columns = (batch_n, category_nc, continuous_nc)

        def beside_z(stack: Stack) -> Tensor:
            return torch.cat([stack(z_nk, *columns, generator=generator), z_nk], dim=1)

        gene_nh, back_nh = beside_z(self.gene), beside_z(self.back)
        fore_nh, mix_nh = beside_z(self.fore), beside_z(self.mix)
        zinb = self.config.gene_likelihood == "zinb"
        positive = torch.exp if self.config.background_activation == "exp" else F.softplus
        return Networks(
            logit_ng=self.scale(gene_nh, *columns).float(),
            dropout_ng=self.dropout(mix_nh, *columns).float() if zinb else None,
            back_mean_np=self.back_mean(back_nh, *columns).float(),
            back_sd_np=positive(self.back_sd(back_nh, *columns).float()) + _LEAST,
            fore_scale_np=F.relu(self.fore_scale(fore_nh, *columns).float()) + 1 + _LEAST,
            mixing_np=self.mixing(mix_nh, *columns).float(),
        )
