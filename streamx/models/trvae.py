"""trVAE: a conditional variational autoencoder whose latents of different batches are drawn together.

Lotfollahi et al. 2020, "Conditional out-of-distribution generation for unpaired data using transfer VAE", and
Lotfollahi et al. 2022, "Mapping single-cell data to reference atlases by transfer learning" (scArches).
Network, losses and constants as scArches documents them in December 2020; where later versions differ, a
setting says so. What scArches calls a condition is a batch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.config import TrvaeConfig
from streamx.errors import UsageError
from streamx.models import likelihoods
from streamx.models.cells import Cells
from streamx.models.count_loss import mean_count_loss
from streamx.models.layers import batch_norm, linear
from streamx.models.mmd import mmd
from streamx.models.scvi import dense
from streamx.models.sparse import Rows, SparseLinear
from streamx.models.stack import LAYER_NORM_EPS, dropped

VARIANCE_FLOOR = 1e-4


class Block(nn.Module):
    """Linear, plus the batch's column in a first layer -> batch or layer norm -> ReLU -> dropout.

    Parameters
    ----------
    n_in, n_out
        Width of the input and of the result.
    config
        Its norms and dropout.
    bias
        The decoder's blocks have none.
    n_batches
        Batches of a first layer, with a column each, a single one too; None for the other layers.
    sparse
        The input may be sparse rows.

    Attributes
    ----------
    linear
        Weights (n_out, n_in), bias.
    batch
        (n_out, n_batches), or None.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        config: TrvaeConfig,
        generator: torch.Generator,
        *,
        bias: bool,
        n_batches: int | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.linear = SparseLinear.drawn(n_in, n_out, generator) if sparse else linear(n_in, n_out, generator)
        if not bias:
            self.linear.register_parameter("bias", None)
        self.batch: nn.Parameter | None = None
        if n_batches is not None:
            columns = linear(n_batches, n_out, generator)  # a layer of its own in the reference
            self.batch = nn.Parameter(columns.weight.detach())
        self.norm = nn.BatchNorm1d(n_out) if config.use_bn else None
        self.layer_norm = config.use_ln and not config.use_bn
        self.dropout = config.dr_rate

    def new_batch(self, name: str, generator: torch.Generator) -> Tensor:
        """The column (n_out,) of one batch more: zeros, a batch without an effect.

        scArches draws it, from a range so wide that the few hundred steps of surgery on a small query do not
        undo what was drawn. Zero is also where the weight decay of the reference's training pulls columns.
        """
        assert name == "batch"
        assert self.batch is not None
        return torch.zeros(len(self.batch))

    def forward(
        self, x: Tensor | Rows, batch_n: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """(n, n_in) -> (n, n_out); ``generator`` draws the dropout while training."""
        h_nh = self.linear(x)
        if self.batch is not None:
            assert batch_n is not None
            h_nh = h_nh + F.embedding(batch_n, self.batch.t())
        if self.norm is not None:
            h_nh = batch_norm(self.norm, h_nh)
        if self.layer_norm:
            h_nh = F.layer_norm(h_nh, h_nh.shape[-1:], eps=LAYER_NORM_EPS)
        h_nh = F.relu(h_nh)
        return dropped(h_nh, self.dropout, generator) if self.training else h_nh


def _blocks(
    widths: Sequence[int], n_batches: int, config: TrvaeConfig, generator: torch.Generator, *, encoder: bool
) -> nn.ModuleList:
    """A block per pair of widths, from left to right; batches enter the first."""
    return nn.ModuleList(
        Block(
            n_in,
            n_out,
            config,
            generator,
            bias=encoder,
            n_batches=None if number else n_batches,
            sparse=encoder and number == 0,
        )
        for number, (n_in, n_out) in enumerate(pairwise(widths))
    )


class Encoder(nn.Module):
    """Input (n, n_genes) and batch -> blocks -> mean and variance of q(z|x), (n, latent_dim)."""

    def __init__(self, n_genes: int, n_batches: int, config: TrvaeConfig, generator: torch.Generator) -> None:
        super().__init__()
        widths = [n_genes, *config.hidden_layer_sizes]
        self.blocks = _blocks(widths, n_batches, config, generator, encoder=True)
        self.mean = linear(widths[-1], config.latent_dim, generator)
        self.log_var = linear(widths[-1], config.latent_dim, generator)

    def forward(
        self, x: Tensor | Rows, batch_n: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        h: Tensor | Rows = x
        for block in self.blocks:
            h = block(h, batch_n, generator)
        assert isinstance(h, Tensor)
        return self.mean(h), self.log_var(h).exp() + VARIANCE_FLOOR


@dataclass(frozen=True, eq=False)
class Expression:
    """What the decoder says of cells; float32.

    Attributes
    ----------
    scale_ng
        Share of each gene in the cell's counts (nb, zinb); with mse the expression itself, ln(1 + x).
    rate_ng
        Mean count: share x size factor (mse: as scale_ng).
    r_ng
        Inverse dispersion (nb, zinb).
    dropout_ng
        Logit of the probability that a count is lost (zinb).
    hidden_ny
        Output of the first block, y.
    """

    scale_ng: Tensor
    rate_ng: Tensor
    r_ng: Tensor | None
    dropout_ng: Tensor | None
    hidden_ny: Tensor


class Decoder(nn.Module):
    """Latent (n, latent_dim) and batch -> blocks, as the encoder's but backwards -> logits per gene."""

    def __init__(self, n_genes: int, n_batches: int, config: TrvaeConfig, generator: torch.Generator) -> None:
        super().__init__()
        widths = [config.latent_dim, *reversed(config.hidden_layer_sizes)]
        self.blocks = _blocks(widths, n_batches, config, generator, encoder=False)
        self.out = linear(widths[-1], n_genes, generator)
        self.dropout = linear(widths[-1], n_genes, generator) if config.recon_loss == "zinb" else None

    def forward(
        self, z_nk: Tensor, batch_n: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits of the expression, logits of losing a count or None, and y."""
        first, *others = self.blocks
        hidden_ny = h_nh = first(z_nk, batch_n, generator)
        for block in others:
            h_nh = block(h_nh, None, generator)
        lost_ng = None if self.dropout is None else self.dropout(h_nh)
        return self.out(h_nh), lost_ng, hidden_ny


class Trvae(nn.Module):
    """The trVAE network.

    Parameters
    ----------
    n_genes, n_batches
        Width of the input, number of batches (conditions).
    config
        Sizes, losses, and which version's size factor.
    generator
        CPU generator for the initial weights; default: seed 0.

    Raises
    ------
    UsageError
        Without a hidden layer or a batch.

    Attributes
    ----------
    log_theta_gb
        ln of the inverse dispersion, (n_genes, n_batches); None with mse.
    """

    log_theta_gb: nn.Parameter | None

    def __init__(
        self,
        n_genes: int,
        n_batches: int,
        config: TrvaeConfig | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config or TrvaeConfig()
        if not self.config.hidden_layer_sizes or n_batches < 1:
            raise UsageError(
                f"hidden_layer_sizes = {self.config.hidden_layer_sizes}, {n_batches} batches",
                fix="at least one of each",
            )
        self.n_genes, self.n_batches = n_genes, n_batches
        generator = generator or torch.Generator().manual_seed(0)
        self.log_theta_gb = None
        if self.config.recon_loss != "mse":
            self.log_theta_gb = nn.Parameter(torch.randn(n_genes, n_batches, generator=generator))
        self.encoder = Encoder(n_genes, n_batches, self.config, generator)
        self.decoder = Decoder(n_genes, n_batches, self.config, generator)

    def new_batch(self, name: str, generator: torch.Generator) -> Tensor:
        """ln theta (n_genes,) of one batch more: zeros, as :meth:`Block.new_batch`."""
        assert name == "log_theta_gb"
        return torch.zeros(self.n_genes)

    def encode(self, cells: Cells, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|x), float32 (n, latent_dim); ``generator`` draws dropout while training.

        ``cells.x_ng`` are raw counts (mse: normalised counts, not negative), also as sparse rows.
        """
        return self.encoder(self._input(cells.x_ng), cells.batch_n, generator)

    def decode(
        self, z_nk: Tensor, batch_n: Tensor, size_n: Tensor, generator: torch.Generator | None = None
    ) -> Expression:
        """Expression of latents as of the given batches, for cells of the given size factors (n,)."""
        logits_ng, dropout_ng, hidden_ny = self.decoder(z_nk, batch_n, generator)
        return self._expression(logits_ng, dropout_ng, hidden_ny, batch_n, size_n)

    def _expression(
        self,
        logits_ng: Tensor,
        dropout_ng: Tensor | None,
        hidden_ny: Tensor,
        batch_n: Tensor,
        size_n: Tensor,
    ) -> Expression:
        if self.log_theta_gb is None:
            fitted_ng = F.relu(logits_ng)
            return Expression(fitted_ng, fitted_ng, None, None, hidden_ny)
        scale_ng = F.softmax(logits_ng, dim=-1)
        r_ng = F.embedding(batch_n, self.log_theta_gb.t()).exp()
        return Expression(scale_ng, scale_ng * size_n[:, None], r_ng, dropout_ng, hidden_ny)

    def size_factors(self, x_ng: Tensor | Rows) -> Tensor:
        """Size factor of each cell (n,): its sum, or (December 2020) the logarithm of its sum.

        A cell without counts has the logarithm 0 there, where the reference has -inf and then NaN.
        """
        sum_n = x_ng.sum_n if isinstance(x_ng, Rows) else x_ng.sum(1)
        return sum_n.clamp(min=1).log() if self.config.size_factor == "log_sum" else sum_n

    def loss(
        self, cells: Cells, kl_weight: float | Tensor = 1.0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses of a minibatch: means over its cells, sums over genes or latent dimensions; scalars.

        Parameters
        ----------
        cells
            As for :meth:`encode`.
        kl_weight
            Weight of the divergence in ``loss`` (the reference's alpha, which grows while training).
        generator
            On the tensors' device: draws dropout and the latents' noise.

        Returns
        -------
        ``loss`` = ``reconstruction`` + kl_weight x ``kl`` + ``mmd``; the last already times beta.
        """
        mean_nk, var_nk = self.encode(cells, generator)
        noise_nk = torch.randn(mean_nk.shape, generator=generator, device=mean_nk.device)
        z_nk = torch.addcmul(mean_nk, var_nk.sqrt(), noise_nk)
        logits_ng, dropout_ng, hidden_ny = self.decoder(z_nk, cells.batch_n, generator)
        reconstruction = self._mean_reconstruction(cells, logits_ng, dropout_ng, hidden_ny)
        kl = 0.5 * (var_nk + mean_nk.square() - 1 - var_nk.log()).sum(1).mean()
        apart = mean_nk.new_zeros(())
        if self.config.use_mmd:
            drawn = z_nk if self.config.mmd_on == "z" else hidden_ny
            apart = self.config.beta * mmd(drawn, cells.batch_n, self.n_batches, self.config.mmd_boundary)
        loss = reconstruction + kl_weight * kl + apart
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "mmd": apart}

    def _mean_reconstruction(
        self, cells: Cells, logits_ng: Tensor, dropout_ng: Tensor | None, hidden_ny: Tensor
    ) -> Tensor:
        """Summed over genes, its mean over cells; counts that come as sparse rows in one pass."""
        x, size_n = cells.x_ng, self.size_factors(cells.x_ng)
        if isinstance(x, Rows) and self.log_theta_gb is not None:
            table_rg = self.log_theta_gb.t()
            return mean_count_loss(logits_ng, size_n.log(), table_rg, cells.batch_n, x, dropout_ng)
        found = self._expression(logits_ng, dropout_ng, hidden_ny, cells.batch_n, size_n)
        return self._reconstruction(dense(x), found).sum(1).mean()

    def _reconstruction(self, x_ng: Tensor, found: Expression) -> Tensor:
        """Squared error or negative log-likelihood of each value, (n, n_genes)."""
        if found.r_ng is None:
            fitted_ng = x_ng.log1p() if self.config.log_input else x_ng
            return (found.scale_ng - fitted_ng).square()
        if found.dropout_ng is None:
            return -likelihoods.nb(x_ng, found.rate_ng, found.r_ng)
        return -likelihoods.zinb(x_ng, found.rate_ng, found.r_ng, found.dropout_ng)

    def _input(self, x_ng: Tensor | Rows) -> Tensor | Rows:
        """What the first layer is given: ln(1 + x), or x itself."""
        if self.config.recon_loss == "mse" and not self.config.log_input:
            return x_ng
        return x_ng.log1p()
