"""totalVI: one latent for a cell's genes and surface proteins.

Gayoso et al. 2021, "Joint probabilistic modeling of single-cell multi-omic data with totalVI". Network, loss
and constants as scvi-tools has them; what its releases differ in is a setting
(:class:`streamx.config.TotalviConfig`). This file knows minibatches as :class:`Cells`; it knows no store and
no loader.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.config import TotalviConfig
from streamx.models import gaussian
from streamx.models.cells import Cells
from streamx.models.count_loss import mean_count_loss
from streamx.models.counts import Counts
from streamx.models.scvi import dense, observed_library
from streamx.models.sparse import Rows
from streamx.models.totalvi_decoder import Decoded, Decoder, Networks, Proteins
from streamx.models.totalvi_encoder import Encoder, Inferred, Inputs, seen

_LARGEST_LOG_LIBRARY = 15.0
_EXPRESSED_WEIGHT = 1e-3
_BACKGROUND = (3.0, 1.0)  # prior mean and standard deviation of ln(background) where none is given


class Totalvi(nn.Module):
    """The totalVI network.

    Parameters
    ----------
    n_genes, n_batches
        Width of the gene counts; number of batches.
    config
        Sizes and variants.
    n_proteins
        Width of the protein counts.
    n_labels
        Number of label codes, for dispersions per label.
    n_levels, n_continuous
        Levels of each further categorical covariate; number of continuous ones.
    measured_bp
        bool (n_batches, n_proteins): which proteins a batch measured; default: all. Others neither enter
        the encoder nor the loss.
    background
        Prior mean and standard deviation of ln(background), (n_proteins, n_batches) each, to start from
        (:func:`streamx.models.background.empirical_background`).
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

    measured_bp: Tensor
    library_mean_b: Tensor | None
    library_var_b: Tensor | None

    def __init__(
        self,
        n_genes: int,
        n_batches: int,
        config: TotalviConfig | None = None,
        *,
        n_proteins: int,
        n_labels: int = 0,
        n_levels: tuple[int, ...] = (),
        n_continuous: int = 0,
        measured_bp: np.ndarray | None = None,
        background: tuple[np.ndarray, np.ndarray] | None = None,
        library_b: tuple[np.ndarray, np.ndarray] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or TotalviConfig()
        self.n_genes, self.n_proteins, self.n_batches = n_genes, n_proteins, n_batches
        self.n_labels, self.n_levels, self.n_continuous = n_labels, n_levels, n_continuous
        generator = generator or torch.Generator().manual_seed(0)
        self._add_dispersions(generator)
        self._add_tables(measured_bp, background, library_b)
        covariates = config.encode_covariates
        self.encoder = Encoder(
            n_genes,
            n_proteins + (n_continuous if covariates else 0),
            config,
            generator,
            n_batches=n_batches if covariates else None,
            n_levels=n_levels if covariates else (),
        )
        self.decoder = Decoder(
            n_genes, n_proteins, n_batches, config, generator, n_levels=n_levels, n_continuous=n_continuous
        )

    def _add_dispersions(self, generator: torch.Generator) -> None:
        """ln theta of genes and of proteins; the name's end says which axes it has."""
        for kind, width, draw in (
            (self.config.gene_dispersion, self.n_genes, torch.randn),
            (self.config.protein_dispersion, self.n_proteins, torch.rand),
        ):
            of, _, by = kind.partition("-")
            if by == "label" and not self.n_labels:
                raise ValueError(f"dispersion {kind} needs n_labels")
            shape = {"": (width,), "batch": (width, self.n_batches), "label": (width, self.n_labels)}[by]
            table = draw(shape, generator=generator) * (2 if of == "protein" else 1)
            self.register_parameter(f"log_theta_{of[0]}{by[:1]}", nn.Parameter(table))

    def _add_tables(
        self,
        measured_bp: np.ndarray | None,
        background: tuple[np.ndarray, np.ndarray] | None,
        library_b: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        """The background's prior and efficiencies, which are trained; what was measured; the libraries."""
        shape = (self.n_proteins, self.n_batches)
        mean_pb, sd_pb = (
            torch.as_tensor(np.broadcast_to(np.asarray(table, np.float32), shape).copy())
            for table in (background or _BACKGROUND)
        )
        self.background_mean_pb = nn.Parameter(mean_pb)
        self.background_log_sd_pb = nn.Parameter(sd_pb.log())
        efficient = self.config.per_batch_efficiency
        self.log_efficiency_pb = nn.Parameter(torch.zeros(shape)) if efficient else None
        measured_bp = np.ones(shape[::-1], bool) if measured_bp is None else np.array(measured_bp, bool)
        self.register_buffer("measured_bp", torch.as_tensor(measured_bp))
        if self.config.use_observed_lib_size:
            self.library_mean_b = self.library_var_b = None
            return
        if library_b is None or len(library_b[0]) != self.n_batches:
            raise ValueError("a latent library size needs library_b: mean and variance per batch")
        self.register_buffer("library_mean_b", torch.as_tensor(np.array(library_b[0], np.float32)))
        self.register_buffer("library_var_b", torch.as_tensor(np.array(library_b[1], np.float32)))

    def new_batch(self, name: str, generator: torch.Generator) -> Tensor:
        """The values of one batch more in a table, as they are at the beginning; all its proteins measured.

        Raises
        ------
        ValueError
            For the prior of the library size, which comes from cells.
        """
        if name == "log_theta_gb":
            return torch.randn((self.n_genes,), generator=generator)
        if name == "log_theta_pb":
            return 2 * torch.rand((self.n_proteins,), generator=generator)
        constant = {
            "background_mean_pb": _BACKGROUND[0],
            "background_log_sd_pb": math.log(_BACKGROUND[1]),
            "log_efficiency_pb": 0.0,
            "measured_bp": 1.0,
        }
        if name not in constant:
            raise ValueError(f"a new batch's {name} must be given")
        return torch.full((self.n_proteins,), constant[name])

    # -- q(z, l | x, y) ------------------------------------------------------------------------------------

    def measured(self, cells: Cells, measured_p: Tensor | None = None) -> Tensor:
        """Which proteins count as measured, bool (n, n_proteins): by the batch, and by ``measured_p``."""
        measured_np = self.measured_bp.index_select(0, cells.batch_n)
        return measured_np if measured_p is None else measured_np & measured_p

    def _inputs(self, cells: Cells, measured_p: Tensor | None) -> Inputs:
        assert cells.protein_np is not None
        y_np = seen(cells.protein_np * self.measured(cells, measured_p), self.config)
        assert isinstance(y_np, Tensor)
        if self.n_continuous and self.config.encode_covariates:
            assert cells.continuous_nc is not None
            y_np = torch.cat([y_np, cells.continuous_nc], dim=1)
        return seen(cells.x_ng, self.config), cells.batch_n, cells.category_nc, y_np

    def encode(
        self,
        cells: Cells,
        generator: torch.Generator | None = None,
        measured_p: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z | x, y), float32 (n, n_latent); before the softmax of an ``ln`` latent.

        Parameters
        ----------
        cells
            A minibatch with its proteins.
        generator
            Draws the dropout in training mode; outside it nothing is random.
        measured_p
            bool (n_proteins,) or (n, n_proteins): False hides a protein, as if it was not measured.
        """
        return self.encoder.latent(self._inputs(cells, measured_p), generator)

    def encode_library(
        self,
        cells: Cells,
        generator: torch.Generator | None = None,
        measured_p: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(ln library | x, y), float32 (n,).

        Raises
        ------
        ValueError
            If the library size is observed.
        """
        if self.config.use_observed_lib_size:
            raise ValueError("the library size is observed: it has no distribution")
        return self.encoder.log_library(self._inputs(cells, measured_p), generator)

    def latent(self, z_nk: Tensor) -> Tensor:
        """What the decoder takes, from a draw of q(z | x, y): its softmax where the latent is ``ln``."""
        return torch.softmax(z_nk, -1) if self.config.latent_distribution == "ln" else z_nk

    def infer(
        self,
        cells: Cells,
        generator: torch.Generator | None = None,
        measured_p: Tensor | None = None,
    ) -> Inferred:
        """Posterior of the latent variables, and a draw.

        ``generator`` draws the dropout while training, then noise of z, (n, n_latent), and the library, (n,);
        the latter also where it is observed, so that a seed means in both what it means in scvi-tools.
        """
        mean_nk, var_nk = self.encode(cells, generator, measured_p)
        normal_nk = gaussian.draw(mean_nk, var_nk, generator)
        z_nk = self.latent(normal_nk)
        if self.config.use_observed_lib_size:
            library_n = observed_library(cells)
            torch.randn(library_n.shape, generator=generator, device=library_n.device)
            return Inferred(mean_nk, var_nk, normal_nk, z_nk, library_n)
        of_library = self.encode_library(cells, generator, measured_p)
        library_n = gaussian.draw(*of_library, generator).clamp(max=_LARGEST_LOG_LIBRARY)
        return Inferred(mean_nk, var_nk, normal_nk, z_nk, library_n, of_library)

    # -- p(x, y | z, l) ------------------------------------------------------------------------------------

    def decode(
        self,
        z_nk: Tensor,
        library_n: Tensor,
        cells: Cells,
        batch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Decoded:
        """The distributions of gene and protein counts.

        Parameters
        ----------
        z_nk
            Latent (:meth:`latent`), float32.
        library_n
            ln of the library size, float32.
        cells
            Whose covariates (and labels, for dispersions per label) hold; its counts are not looked at.
        batch
            Decode every cell as if it were of this batch.
        generator
            Draws the dropout while training, then the noise of the background, (n, n_proteins).
        """
        batch_n = cells.batch_n if batch is None else torch.full_like(cells.batch_n, batch)
        parts, proteins = self._decoded(z_nk, batch_n, cells, generator)
        return Decoded(self._genes(parts, library_n, batch_n, cells), proteins)

    def _decoded(
        self, z_nk: Tensor, batch_n: Tensor, cells: Cells, generator: torch.Generator | None
    ) -> tuple[Networks, Proteins]:
        """What the networks give, and the proteins' distribution."""
        parts = self.decoder(z_nk, batch_n, cells.category_nc, cells.continuous_nc, generator)
        like = parts.back_mean_np
        noise_np = torch.randn(like.shape, generator=generator, device=like.device)
        proteins = Proteins(
            parts.back_mean_np,
            parts.back_sd_np,
            torch.addcmul(parts.back_mean_np, noise_np, parts.back_sd_np),
            parts.fore_scale_np,
            parts.mixing_np,
            _theta(*self._log_theta(self.config.protein_dispersion, batch_n, cells)),
            None if self.log_efficiency_pb is None else F.embedding(batch_n, self.log_efficiency_pb.t()),
        )
        return parts, proteins

    def _genes(self, parts: Networks, library_n: Tensor, batch_n: Tensor, cells: Cells) -> Counts:
        scale_ng = parts.logit_ng.softmax(1)
        theta = _theta(*self._log_theta(self.config.gene_dispersion, batch_n, cells))
        return Counts(scale_ng, library_n.exp()[:, None] * scale_ng, theta, parts.dropout_ng)

    def _log_theta(self, kind: str, batch_n: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Table of ln theta of genes or proteins, one row per code; and each cell's row of it."""
        of, _, by = kind.partition("-")
        table = self.get_parameter(f"log_theta_{of[0]}{by[:1]}")
        if not by:
            return table[None], torch.zeros_like(batch_n)
        code_n = batch_n if by == "batch" else cells.label_n
        assert code_n is not None
        return table.t(), code_n

    # -- the loss ------------------------------------------------------------------------------------------

    def loss(
        self,
        cells: Cells,
        kl_weight: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
        measured_p: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a minibatch: means over its cells. As :meth:`loss_and_latent`, without the latent."""
        return self.loss_and_latent(cells, kl_weight, generator, measured_p)[0]

    def loss_and_latent(
        self,
        cells: Cells,
        kl_weight: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
        measured_p: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss of a minibatch, and the latents that an adversary is to be fooled with.

        Parameters
        ----------
        cells
            A minibatch with its proteins.
        kl_weight
            Weight of the KL divergences of z and background, 0 to 1; with ``protein_warmup`` also of the
            proteins. That of a latent library size has weight 1.
        generator
            Of the cells' device, draws as in :meth:`infer`, then :meth:`decode`; None: torch's own.
        measured_p
            bool (n_proteins,) or (n, n_proteins): False hides a protein from the encoder and the loss.

        Returns
        -------
        losses
            ``loss``, ``reconstruction`` (genes and proteins), ``kl`` (of z), then ``reconstruction_gene``,
            ``reconstruction_protein``, ``kl_background`` and, where the library is latent, ``kl_library``.
        z_nk
            (n, n_latent).
        """
        inferred = self.infer(cells, generator, measured_p)
        parts, proteins = self._decoded(inferred.z_nk, cells.batch_n, cells, generator)
        terms = self._terms(cells, inferred, proteins, measured_p)
        means = {name: term_n.mean() for name, term_n in terms.items()}
        gene = self._mean_of_genes(parts, inferred.library_n, cells)
        means = {
            "reconstruction": gene + means["reconstruction_protein"],
            "kl": means["kl"],
            "reconstruction_gene": gene,
        } | means
        protein_weight = kl_weight if self.config.protein_warmup else 1.0
        loss = gene + protein_weight * means["reconstruction_protein"]
        loss = loss + kl_weight * (means["kl"] + means["kl_background"])
        if "kl_library" in means:
            loss = loss + means["kl_library"]
        return {"loss": loss} | means, inferred.z_nk

    def _mean_of_genes(self, parts: Networks, library_n: Tensor, cells: Cells) -> Tensor:
        """-ln p of the gene counts, its mean over cells; against sparse rows in one pass."""
        x = cells.x_ng
        if not isinstance(x, Rows):
            return -self._genes(parts, library_n, cells.batch_n, cells).log_prob(x).sum(1).mean()
        table = self._log_theta(self.config.gene_dispersion, cells.batch_n, cells)
        return mean_count_loss(parts.logit_ng, library_n, *table, x, parts.dropout_ng)

    def terms(
        self,
        cells: Cells,
        generator: torch.Generator | None = None,
        measured_p: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the loss is made of, per cell (n,), unweighted, at one draw.

        The background's divergence holds, in a model with efficiencies, their prior (ln-normal) and a slight
        pull of every protein towards background, as in scvi-tools.
        """
        inferred = self.infer(cells, generator, measured_p)
        decoded = self.decode(inferred.z_nk, inferred.library_n, cells, generator=generator)
        terms = self._terms(cells, inferred, decoded.proteins, measured_p)
        gene_n = -decoded.genes.log_prob(dense(cells.x_ng)).sum(1)
        return {
            "reconstruction": gene_n + terms["reconstruction_protein"],
            "kl": terms["kl"],
            "reconstruction_gene": gene_n,
        } | terms

    def _terms(
        self, cells: Cells, inferred: Inferred, proteins: Proteins, measured_p: Tensor | None
    ) -> dict[str, Tensor]:
        """All terms but the genes', (n,) each."""
        assert cells.protein_np is not None
        measured_np = self.measured(cells, measured_p)
        prior = self._background_prior(cells)
        back_np = gaussian.kl(proteins.back_mean_np, proteins.back_sd_np.square(), *prior)
        background_n = (back_np * measured_np).sum(1)
        if proteins.log_efficiency_np is not None:
            expressed_np = _EXPRESSED_WEIGHT * F.softplus(-proteins.mixing_np)
            background_n = background_n + (_minus_log_normal(proteins.log_efficiency_np) + expressed_np).sum(
                1
            )
        terms = {
            "kl": gaussian.kl(inferred.mean_nk, inferred.var_nk).sum(1),
            "reconstruction_protein": -(proteins.log_prob(cells.protein_np) * measured_np).sum(1),
            "kl_background": background_n,
        }
        if inferred.of_library is not None:
            terms["kl_library"] = gaussian.kl(*inferred.of_library, *self._library_prior(cells))
        return terms

    def _background_prior(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Mean and variance of ln(background), (n, n_proteins) each."""
        mean_np = F.embedding(cells.batch_n, self.background_mean_pb.t())
        return mean_np, F.embedding(cells.batch_n, (2 * self.background_log_sd_pb).exp().t())

    def _library_prior(self, cells: Cells) -> tuple[Tensor, Tensor]:
        assert self.library_mean_b is not None
        assert self.library_var_b is not None
        return self.library_mean_b[cells.batch_n], self.library_var_b[cells.batch_n]

    @torch.no_grad()
    def log_weight(self, cells: Cells, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x, y, z, l, b) - ln q(z, l, b | x, y) at one draw, (n,); b: background of measured proteins.

        The logarithm of the mean of its exponentials over many draws estimates ln p(x, y).

        Raises
        ------
        ValueError
            For an ``ln`` latent, whose density this is not.
        """
        if self.config.latent_distribution != "normal":
            raise ValueError("the marginal likelihood needs latent_distribution normal")
        inferred = self.infer(cells, generator)
        decoded = self.decode(inferred.z_nk, inferred.library_n, cells, generator=generator)
        measured_np, proteins = self.measured(cells), decoded.proteins
        z_nk, var_nk = inferred.normal_nk, inferred.var_nk
        of_z_nk = gaussian.log_prob(z_nk, 0.0, torch.ones_like(var_nk))
        weight_n = (of_z_nk - gaussian.log_prob(z_nk, inferred.mean_nk, var_nk)).sum(1)
        b_np = proteins.log_back_np
        of_b_np = gaussian.log_prob(b_np, *self._background_prior(cells))
        of_b_np -= gaussian.log_prob(b_np, proteins.back_mean_np, proteins.back_sd_np.square())
        weight_n += (of_b_np * measured_np).sum(1)
        if inferred.of_library is not None:
            weight_n += gaussian.log_prob(inferred.library_n, *self._library_prior(cells))
            weight_n -= gaussian.log_prob(inferred.library_n, *inferred.of_library)
        weight_n += decoded.genes.log_prob(dense(cells.x_ng)).sum(1)
        assert cells.protein_np is not None
        return weight_n + (proteins.log_prob(cells.protein_np) * measured_np).sum(1)


def _theta(log_theta_rx: Tensor, row_n: Tensor) -> Tensor:
    """(width,) where all cells have the same, else (n, width)."""
    return (log_theta_rx[0] if len(log_theta_rx) == 1 else F.embedding(row_n, log_theta_rx)).exp()


def _minus_log_normal(log_value: Tensor) -> Tensor:
    """-ln of the density of exp(log_value) under LogNormal(0, 1)."""
    return 0.5 * log_value.square() + log_value + 0.5 * math.log(2 * math.pi)
