"""scANVI: scVI with labels, of which many may be missing.

Xu et al. 2021, "Probabilistic harmonization and annotation of single-cell transcriptomics data with deep
generative models". The latent z1 of scVI comes from a latent z2 and the label; a classifier gives the label
of z1. Network, loss and constants as scvi-tools has them.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.config import ScanviConfig, ScviConfig
from streamx.models import gaussian
from streamx.models.cells import Cells
from streamx.models.counts import Counts
from streamx.models.layers import linear
from streamx.models.scvi import Encoder, Scvi
from streamx.models.stack import Stack


class Classifier(nn.Module):
    """z1 -> (stack ->) one number per label."""

    def __init__(self, stack: Stack | None, n_in: int, n_labels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.stack = stack
        self.out = linear(n_in, n_labels, generator)

    def forward(self, z_nk: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(n, n_latent) -> logits (n, n_labels), float32."""
        return self.out(z_nk if self.stack is None else self.stack(z_nk, generator=generator)).float()


class Scanvi(nn.Module):
    """The scANVI network.

    Parameters
    ----------
    vae
        The scVI network that becomes its part; use :func:`from_scvi` for one that is trained already.
    n_labels
        Number of labels, "unlabelled" not among them.
    config
        What it adds to scVI; the settings that both have are the scVI network's.
    generator
        CPU generator for the initial weights; default: seed 0.

    Raises
    ------
    ValueError
        If the latent of the scVI network is not normal: its density is a term of the loss.
    """

    label_prior_l: Tensor

    def __init__(
        self,
        vae: Scvi,
        n_labels: int,
        config: ScanviConfig | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if vae.config.latent_distribution != "normal":
            raise ValueError("scANVI needs latent_distribution normal")
        self.vae, self.n_labels = vae, n_labels
        shared = {field.name: getattr(vae.config, field.name) for field in fields(ScviConfig)}
        self.config = replace(config or ScanviConfig(), **shared)
        generator = generator or torch.Generator().manual_seed(0)
        n_latent, n_hidden = vae.config.n_latent, vae.config.n_hidden
        if self.config.linear_classifier:
            self.classifier = Classifier(None, n_latent, n_labels, generator)
        else:
            stack = self._stack("encoder", generator, labels=False)
            self.classifier = Classifier(stack, n_hidden, n_labels, generator)
        self.z2_encoder = Encoder(self._stack("encoder", generator), n_hidden, n_latent, generator)
        self.z1_decoder = Encoder(self._stack("decoder", generator), n_hidden, n_latent, generator, var_eps=0)
        self.register_buffer("label_prior_l", torch.full((n_labels,), 1 / n_labels))

    def _stack(self, side: str, generator: torch.Generator, *, labels: bool = True) -> Stack:
        config: ScviConfig = self.vae.config
        return Stack(
            config.n_latent,
            config.n_hidden,
            config.n_layers,
            generator=generator,
            n_levels=(self.n_labels,) if labels else (),
            norm=config.use_batch_norm in ("both", side),
            layer_norm=config.use_layer_norm in ("both", side),
            dropout=config.dropout_rate if side == "encoder" else 0.0,
        )

    @property
    def n_batches(self) -> int:
        return self.vae.n_batches

    def encode(self, cells: Cells, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z1 | x), float32 (n, n_latent), as :meth:`Scvi.encode`."""
        return self.vae.encode(cells, generator)

    def decode(self, z_nk: Tensor, library_n: Tensor, cells: Cells, batch: int | None = None) -> Counts:
        """The distribution of counts, as :meth:`Scvi.decode`."""
        return self.vae.decode(z_nk, library_n, cells, batch)

    def predict(self, cells: Cells) -> Tensor:
        """Probabilities of the labels, float32 (n, n_labels), at the mean of q(z1 | x)."""
        return torch.softmax(self.classifier(self.encode(cells)[0]), -1)

    def loss(
        self,
        cells: Cells,
        kl_weight: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
        labelled: Cells | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a minibatch: means over its cells.

        Every cell counts as unlabelled: the sum over all labels, weighted by the classifier's probabilities.
        Labels enter through the classification term alone.

        Parameters
        ----------
        kl_weight
            Weight of the KL divergences (of z2, of the label, and of a latent library size), 0 to 1.
        generator
            Of the cells' device, draws dropout and noise; None: torch's own.
        labelled
            Cells for the classification, as scvi-tools takes them from a loader of their own; default: those
            of the minibatch that have a label, which saves encoding them a second time.

        Returns
        -------
        ``loss``, ``reconstruction`` (with the terms of z1), ``kl``, ``classification`` (cross-entropy; 0
        where no cell has a label).
        """
        mean_nk, var_nk = self.encode(cells, generator)
        z1_nk = gaussian.draw(mean_nk, var_nk, generator)
        library_n, of_library = self.vae.library(cells, generator)
        z1_term_nl, kl_z2_nl = self._by_label(z1_nk, generator)
        log_p_nl = torch.log_softmax(self.classifier(z1_nk, generator), -1)
        p_nl = log_p_nl.exp()
        z1_term_n = gaussian.log_prob(z1_nk, mean_nk, var_nk).sum(1) + (z1_term_nl * p_nl).sum(1)
        reconstruction = self.vae.mean_reconstruction(z1_nk, library_n, cells) + z1_term_n.mean()
        kl_n = (kl_z2_nl * p_nl).sum(1) + (p_nl * (log_p_nl - self.label_prior_l.log())).sum(1)
        kl_n = sum(of_library.values(), kl_n)
        if labelled is None:
            classification = self._cross_entropy(mean_nk, cells, generator)
        else:
            classification = self._cross_entropy(self.encode(labelled, generator)[0], labelled, generator)
        kl = kl_n.mean()
        return {
            "loss": reconstruction + kl_weight * kl + self.config.classification_ratio * classification,
            "reconstruction": reconstruction,
            "kl": kl,
            "classification": classification,
        }

    def _by_label(self, z1_nk: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """-ln p(z1 | z2, label) at a draw of z2, and KL of z2, for every label: (n, n_labels) each."""
        n, n_labels = len(z1_nk), self.n_labels
        label_m1 = torch.arange(n_labels, device=z1_nk.device).repeat_interleave(n)[:, None]
        z1_mk = z1_nk.repeat(n_labels, 1)
        mean_mk, var_mk = self.z2_encoder(z1_mk, category_nc=label_m1, generator=generator)
        z2_mk = gaussian.draw(mean_mk, var_mk, generator)
        of_z1_m = -gaussian.log_prob(z1_mk, *self.z1_decoder(z2_mk, category_nc=label_m1)).sum(1)
        kl_m = gaussian.kl(mean_mk, var_mk).sum(1)
        return of_z1_m.view(n_labels, n).t(), kl_m.view(n_labels, n).t()

    def _cross_entropy(self, z_nk: Tensor, cells: Cells, generator: torch.Generator | None) -> Tensor:
        """Mean over the cells that have a label; 0 where there is none, or no column of labels at all."""
        if cells.label_n is None:
            return z_nk.new_zeros(())
        logits_nl = self.classifier(z_nk, generator)
        if not self.config.logits:
            logits_nl = torch.softmax(logits_nl, -1)
        total = F.cross_entropy(logits_nl, cells.label_n, ignore_index=-1, reduction="sum")
        return total / (cells.label_n >= 0).sum().clamp(min=1)


def from_scvi(
    vae: Scvi,
    n_labels: int,
    config: ScanviConfig | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Scanvi:
    """scANVI that begins with the weights of a trained scVI; the given module stays as it is."""
    return Scanvi(copy.deepcopy(vae), n_labels, config, generator=generator)
