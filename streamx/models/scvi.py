"""scVI: a variational autoencoder of counts; its decoder (and, if asked, its encoder) sees the batch.

Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics". Network, loss and constants as
scvi-tools has them; surgery on such a model is that of scArches (Lotfollahi 2022). This file knows
minibatches as :class:`Cells`; it knows no store and no loader.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.config import ScviConfig
from streamx.models import gaussian
from streamx.models.cells import Cells
from streamx.models.count_loss import mean_count_loss
from streamx.models.counts import Counts
from streamx.models.layers import linear
from streamx.models.sparse import Rows
from streamx.models.stack import Stack

VAR_EPS = 1e-4


class Encoder(nn.Module):
    """A stack, then mean and variance of a normal distribution; the variance is above ``var_eps``."""

    def __init__(
        self,
        stack: Stack,
        n_hidden: int,
        n_out: int,
        generator: torch.Generator,
        *,
        var_eps: float = VAR_EPS,
    ) -> None:
        super().__init__()
        self.stack, self.var_eps = stack, var_eps
        self.mean = linear(n_hidden, n_out, generator)
        self.log_var = linear(n_hidden, n_out, generator)

    def forward(
        self,
        x: Tensor | Rows,
        batch_n: Tensor | None = None,
        category_nc: Tensor | None = None,
        continuous_nc: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(n, n_in) -> mean and variance, (n, n_out) float32."""
        h_nh = self.stack(x, batch_n, category_nc, continuous_nc, generator)
        return self.mean(h_nh).float(), self.log_var(h_nh).float().exp() + self.var_eps


class Decoder(nn.Module):
    """A stack, then logits per gene: of the scale, and where the model has them of dropout and dispersion."""

    def __init__(self, stack: Stack, n_genes: int, config: ScviConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.stack = stack
        self.scale = linear(config.n_hidden, n_genes, generator)
        zinb, per_value = config.gene_likelihood == "zinb", config.dispersion == "gene-cell"
        self.log_theta = linear(config.n_hidden, n_genes, generator) if per_value else None
        self.dropout = linear(config.n_hidden, n_genes, generator) if zinb else None


class Scvi(nn.Module):
    """The scVI network.

    Parameters
    ----------
    n_genes, n_batches
        Width of the input, number of batches of the reference.
    config
        Sizes, distributions, where covariates and norms are.
    n_labels
        Number of label codes, for dispersion ``gene-label``.
    n_levels
        Levels of each further categorical covariate.
    n_continuous
        Number of continuous covariates.
    library_b
        Mean and variance of ln(library size) per batch, (n_batches,) each: the prior where the library
        size is a latent variable.
    generator
        CPU generator for the initial weights; default: seed 0.

    Raises
    ------
    ValueError
        If the configuration needs ``library_b`` or ``n_labels`` and they are missing.
    """

    library_mean_b: Tensor | None
    library_var_b: Tensor | None

    def __init__(
        self,
        n_genes: int,
        n_batches: int,
        config: ScviConfig | None = None,
        *,
        n_labels: int = 0,
        n_levels: tuple[int, ...] = (),
        n_continuous: int = 0,
        library_b: tuple[np.ndarray, np.ndarray] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or ScviConfig()
        self.n_genes, self.n_batches, self.n_labels = n_genes, n_batches, n_labels
        self.n_levels, self.n_continuous = n_levels, n_continuous
        generator = generator or torch.Generator().manual_seed(0)
        self._add_dispersion(generator)
        self.encoder = self._encoder(config.n_latent, config.n_layers, generator)
        if config.use_observed_lib_size:
            self.library_mean_b = self.library_var_b = self.library_encoder = None
        else:
            if library_b is None or len(library_b[0]) != n_batches:
                raise ValueError("a latent library size needs library_b: mean and variance per batch")
            self.register_buffer("library_mean_b", torch.as_tensor(library_b[0], dtype=torch.float32))
            self.register_buffer("library_var_b", torch.as_tensor(library_b[1], dtype=torch.float32))
            self.library_encoder = self._encoder(1, 1, generator)
        stack = Stack(
            config.n_latent,
            config.n_hidden,
            config.n_layers,
            generator=generator,
            n_batches=n_batches,
            n_levels=n_levels,
            n_continuous=n_continuous,
            deep=config.deeply_inject_covariates,
            norm=config.use_batch_norm in ("both", "decoder"),
            layer_norm=config.use_layer_norm in ("both", "decoder"),
        )
        self.decoder = Decoder(stack, n_genes, config, generator)

    def _add_dispersion(self, generator: torch.Generator) -> None:
        """ln theta, by the config's dispersion; the name's end says which axes it has."""
        kind = self.config.dispersion
        if kind == "gene-label" and not self.n_labels:
            raise ValueError("dispersion gene-label needs n_labels")
        if kind == "gene":
            self.log_theta_g = nn.Parameter(torch.randn((self.n_genes,), generator=generator))
        elif kind == "gene-batch":
            self.log_theta_gb = nn.Parameter(torch.randn((self.n_genes, self.n_batches), generator=generator))
        elif kind == "gene-label":
            self.log_theta_gl = nn.Parameter(torch.randn((self.n_genes, self.n_labels), generator=generator))

    def _encoder(self, n_out: int, n_layers: int, generator: torch.Generator) -> Encoder:
        config, covariates = self.config, self.config.encode_covariates
        stack = Stack(
            self.n_genes,
            config.n_hidden,
            n_layers,
            generator=generator,
            n_batches=self.n_batches if covariates else None,
            n_levels=self.n_levels if covariates else (),
            n_continuous=self.n_continuous if covariates else 0,
            deep=config.deeply_inject_covariates,
            norm=config.use_batch_norm in ("both", "encoder"),
            layer_norm=config.use_layer_norm in ("both", "encoder"),
            dropout=config.dropout_rate,
            sparse=True,
        )
        return Encoder(stack, config.n_hidden, n_out, generator)

    def new_batch(self, name: str, generator: torch.Generator) -> Tensor:
        """ln theta (n_genes,) of one batch more, as it is drawn at the beginning.

        Raises
        ------
        ValueError
            For the prior of the library size, which comes from cells.
        """
        if name != "log_theta_gb":
            raise ValueError(f"a new batch's {name} must be given")
        return torch.randn((self.n_genes,), generator=generator)

    # -- q(z, l | x) ---------------------------------------------------------------------------------------

    def _encoded(
        self, encoder: Encoder, x: Tensor | Rows, cells: Cells, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        return encoder(x, cells.batch_n, cells.category_nc, cells.continuous_nc, generator)

    def encode(self, cells: Cells, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z | x), float32 (n, n_latent); before the softmax of an ``ln`` latent.

        ``generator`` draws the dropout in training mode; outside it nothing is random.
        """
        return self._encoded(self.encoder, self._input(cells), cells, generator)

    def encode_library(self, cells: Cells, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(ln library | x), float32 (n,).

        Raises
        ------
        ValueError
            If the library size is observed.
        """
        if self.library_encoder is None:
            raise ValueError("the library size is observed: it has no distribution")
        mean_n1, var_n1 = self._encoded(self.library_encoder, self._input(cells), cells, generator)
        return mean_n1[:, 0], var_n1[:, 0]

    def latent(self, z_nk: Tensor) -> Tensor:
        """What the decoder takes, from a draw of q(z | x): its softmax where the latent is ``ln``."""
        return torch.softmax(z_nk, -1) if self.config.latent_distribution == "ln" else z_nk

    def _input(self, cells: Cells) -> Tensor | Rows:
        x = cells.x_ng
        if not self.config.log_variational:
            return x
        return x.log1p()

    # -- p(x | z, l) ---------------------------------------------------------------------------------------

    def decode(self, z_nk: Tensor, library_n: Tensor, cells: Cells, batch: int | None = None) -> Counts:
        """The distribution of counts.

        Parameters
        ----------
        z_nk
            Latent (:meth:`latent`), float32.
        library_n
            ln of the library size, float32.
        cells
            Whose covariates (and labels, for dispersion ``gene-label``) hold; its counts are not looked at.
        batch
            Decode every cell as if it were of this batch.
        """
        batch_n = cells.batch_n if batch is None else torch.full_like(cells.batch_n, batch)
        h_nh = self._hidden(z_nk, batch_n, cells)
        scale_ng = torch.softmax(self.decoder.scale(h_nh).float(), -1)
        rate_ng = library_n.exp()[:, None] * scale_ng
        dropout_ng = None if self.decoder.dropout is None else self.decoder.dropout(h_nh).float()
        if self.config.gene_likelihood == "poisson":
            return Counts(scale_ng, rate_ng)
        table_rg, row_n = self._log_theta(h_nh, batch_n, cells)
        log_theta = table_rg[0] if len(table_rg) == 1 else F.embedding(row_n, table_rg)
        return Counts(scale_ng, rate_ng, log_theta.exp(), dropout_ng)

    def _hidden(self, z_nk: Tensor, batch_n: Tensor, cells: Cells) -> Tensor:
        return self.decoder.stack(z_nk, batch_n, cells.category_nc, cells.continuous_nc)

    def _log_theta(self, h_nh: Tensor, batch_n: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Table of ln theta (n_rows, n_genes), and each cell's row of it."""
        kind = self.config.dispersion
        if kind == "gene-cell":
            assert self.decoder.log_theta is not None
            return self.decoder.log_theta(h_nh).float(), torch.arange(len(h_nh), device=h_nh.device)
        if kind == "gene-batch":
            return self.log_theta_gb.t(), batch_n
        if kind == "gene-label":
            assert cells.label_n is not None
            return self.log_theta_gl.t(), cells.label_n
        return self.log_theta_g[None], torch.zeros_like(batch_n)

    # -- the loss ------------------------------------------------------------------------------------------

    def loss(
        self, cells: Cells, kl_weight: float | Tensor = 1.0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Loss of a minibatch: means over its cells.

        Parameters
        ----------
        kl_weight
            Weight of the KL divergence of z, 0 to 1; that of a latent library size has weight 1.
        generator
            Of the cells' device, draws dropout and noise; None: torch's own.

        Returns
        -------
        ``loss``, ``reconstruction``, ``kl`` (of z) and, where the library is latent, ``kl_library``.
        """
        z_nk, library_n, kl = self._drawn(cells, generator)
        means = {"reconstruction": self.mean_reconstruction(z_nk, library_n, cells)}
        means |= {name: kl_n.mean() for name, kl_n in kl.items()}
        loss = means["reconstruction"] + kl_weight * means["kl"]
        return {"loss": loss + means["kl_library"] if "kl_library" in means else loss} | means

    def terms(self, cells: Cells, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What the loss is made of, per cell (n,): -ln p(x | z, l) at one draw, and KL divergences."""
        z_nk, library_n, kl = self._drawn(cells, generator)
        return {"reconstruction": self.reconstruction(z_nk, library_n, cells)} | kl

    def _drawn(
        self, cells: Cells, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A draw of latent and library, and their KL divergences (n,)."""
        mean_nk, var_nk = self.encode(cells, generator)
        z_nk = self.latent(gaussian.draw(mean_nk, var_nk, generator))
        library_n, of_library = self.library(cells, generator)
        return z_nk, library_n, {"kl": gaussian.kl(mean_nk, var_nk).sum(1)} | of_library

    def library(
        self, cells: Cells, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ln of the library sizes (n,): observed, or a draw, with its KL divergence as ``kl_library``."""
        if self.library_encoder is None:
            return observed_library(cells), {}
        mean_n, var_n = self.encode_library(cells, generator)
        kl_n = gaussian.kl(mean_n, var_n, *self._library_prior(cells))
        return gaussian.draw(mean_n, var_n, generator), {"kl_library": kl_n}

    def reconstruction(self, z_nk: Tensor, library_n: Tensor, cells: Cells) -> Tensor:
        """-ln p(x | z, l), summed over genes: (n,)."""
        return -self.decode(z_nk, library_n, cells).log_prob(dense(cells.x_ng)).sum(1)

    def mean_reconstruction(self, z_nk: Tensor, library_n: Tensor, cells: Cells) -> Tensor:
        """The mean of :meth:`reconstruction` over cells; against sparse rows in one pass where it can be."""
        x = cells.x_ng
        if not isinstance(x, Rows) or self.config.gene_likelihood == "poisson":
            return self.reconstruction(z_nk, library_n, cells).mean()
        h_nh = self._hidden(z_nk, cells.batch_n, cells)
        table_rg, row_n = self._log_theta(h_nh, cells.batch_n, cells)
        dropout_ng = None if self.decoder.dropout is None else self.decoder.dropout(h_nh)
        return mean_count_loss(self.decoder.scale(h_nh), library_n, table_rg, row_n, x, dropout_ng)

    def _library_prior(self, cells: Cells) -> tuple[Tensor, Tensor]:
        assert self.library_mean_b is not None
        assert self.library_var_b is not None
        return self.library_mean_b[cells.batch_n], self.library_var_b[cells.batch_n]

    @torch.no_grad()
    def log_weight(self, cells: Cells, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x, z, l) - ln q(z, l | x) at one draw, (n,).

        The logarithm of the mean of its exponentials over many draws estimates ln p(x).

        Raises
        ------
        ValueError
            For an ``ln`` latent, whose density this is not.
        """
        if self.config.latent_distribution != "normal":
            raise ValueError("the marginal likelihood needs latent_distribution normal")
        mean_nk, var_nk = self.encode(cells, generator)
        z_nk = gaussian.draw(mean_nk, var_nk, generator)
        of_z_nk = gaussian.log_prob(z_nk, 0.0, torch.ones_like(var_nk)) - gaussian.log_prob(
            z_nk, mean_nk, var_nk
        )
        weight_n = of_z_nk.sum(1)
        if self.library_encoder is None:
            library_n = observed_library(cells)
        else:
            posterior = self.encode_library(cells, generator)
            library_n = gaussian.draw(*posterior, generator)
            weight_n += gaussian.log_prob(library_n, *self._library_prior(cells))
            weight_n -= gaussian.log_prob(library_n, *posterior)
        return weight_n - self.reconstruction(z_nk, library_n, cells)


def observed_library(cells: Cells) -> Tensor:
    """ln of each cell's sum, float32 (n,); -inf for a cell without counts."""
    x = cells.x_ng
    return (x.sum_n if isinstance(x, Rows) else x.sum(1)).log()


def dense(x: Tensor | Rows) -> Tensor:
    return x.dense() if isinstance(x, Rows) else x
