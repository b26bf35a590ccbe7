"""SCALEX: a variational autoencoder; its encoder never sees the batch, its decoder has a batch norm for each.

Xiong et al. 2022, "Online single-cell data integration through projecting heterogeneous datasets into a
common cell-embedding space". Network, loss and constants as the reference implementation documents them.
This file knows minibatches as tensors; it knows no store and no loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.config import ScalexConfig
from streamx.models.layers import EPS, DomainNorm, batch_norm, linear
from streamx.models.sparse import HeadOfUnits, Rows, SparseLinear, normed_cross_entropy

Minibatches = Callable[[], Iterable[tuple[Any, Any]]]


@dataclass(frozen=True)
class Loss:
    """Losses of a minibatch: means over its cells, sums over genes or latent dimensions (scalar tensors)."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


class Encoder(nn.Module):
    """(n, g) -> hidden (n, 1024) -> batch norm -> ReLU -> mean and log-variance (n, 10)."""

    def __init__(self, n_genes: int, config: ScalexConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = SparseLinear.drawn(n_genes, config.n_hidden, generator)
        self.norm = nn.BatchNorm1d(config.n_hidden, eps=EPS)
        self.mean = linear(config.n_hidden, config.n_latent, generator)
        self.log_var = linear(config.n_hidden, config.n_latent, generator)

    def forward(self, x_ng: Tensor | Rows) -> tuple[Tensor, Tensor]:
        h_nh = F.relu(batch_norm(self.norm, self.hidden(x_ng)))
        return self.mean(h_nh), self.log_var(h_nh)


class Decoder(nn.Module):
    """Latent (n, 10) -> linear (n, g) -> the batch's own batch norm -> logits (n, g)."""

    def __init__(
        self, n_genes: int, n_batches: int, config: ScalexConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.out = linear(config.n_latent, n_genes, generator)
        self.norm = DomainNorm(n_batches, n_genes)

    def forward(self, z_nk: Tensor, batch_n: Tensor, *, copy_single: bool = False) -> Tensor:
        return self.norm(self.out(z_nk), batch_n, copy_single=copy_single)


class Scalex(nn.Module):
    """The SCALEX network.

    Parameters
    ----------
    n_genes, n_batches
        Width of the input, number of batches of the reference.
    config
        Sizes and the weight of the KL divergence.
    generator
        CPU generator for the initial weights; default: seed 0.
    """

    def __init__(
        self,
        n_genes: int,
        n_batches: int,
        config: ScalexConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config or ScalexConfig()
        self.n_genes, self.n_batches = n_genes, n_batches
        generator = generator or torch.Generator().manual_seed(0)
        self.encoder = Encoder(n_genes, self.config, generator)
        self.decoder = Decoder(n_genes, n_batches, self.config, generator)

    def loss(self, x_ng: Tensor | Rows, batch_n: Tensor, noise_nk: Tensor) -> Loss:
        """Loss of a minibatch.

        Binary cross-entropy summed over genes plus ``kl_weight`` x KL to N(0, 1), means over cells. The
        reference implementation takes the cross-entropy of a sigmoid, with logarithms clamped at -100; here
        it comes from the logits: equal unless the sigmoid saturates in float32, and several times faster.

        Parameters
        ----------
        x_ng
            Input in [0, 1], float32; as a tensor, or (on the CPU) as sparse rows.
        batch_n
            Batch codes, int64.
        noise_nk
            Standard normal draws, (n, n_latent) float32.
        """
        mu_nk, log_var_nk = self.encoder(x_ng)
        z_nk = torch.addcmul(mu_nk, torch.exp(0.5 * log_var_nk), noise_nk)
        if isinstance(x_ng, Rows) and self.training:
            entropy = normed_cross_entropy(self.decoder.out(z_nk), self.decoder.norm, x_ng, batch_n)
        else:
            target_ng = x_ng.dense() if isinstance(x_ng, Rows) else x_ng
            logits_ng = self.decoder(z_nk, batch_n)
            entropy = F.binary_cross_entropy_with_logits(logits_ng, target_ng, reduction="sum")
        reconstruction = entropy / len(x_ng)
        kl = 0.5 * (log_var_nk.exp() + mu_nk.square() - 1 - log_var_nk).sum(1).mean()
        return Loss(reconstruction + self.config.kl_weight * kl, reconstruction, kl)

    def impute(self, mu_nk: Tensor, batch: int) -> Tensor:
        """Expression in the batch with code ``batch``, (n, g) in [0, 1], from running statistics."""
        if not 0 <= batch < self.n_batches:
            raise IndexError(f"batch code {batch} of {self.n_batches} batches")
        codes_n = torch.full((len(mu_nk),), batch, dtype=torch.int64, device=mu_nk.device)
        return torch.sigmoid(self.decoder(mu_nk, codes_n))


@dataclass(frozen=True)
class NormStats:
    """Statistics of the encoder's 1,024 pre-activations (what its batch norm sees).

    Attributes
    ----------
    n_b
        Cells per batch, int64, (n_batches,).
    mean_bh, var_bh
        Mean and (population) variance per batch, float64, (n_batches, n_hidden).
    """

    n_b: np.ndarray
    mean_bh: np.ndarray
    var_bh: np.ndarray

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (n_hidden,) over the cells of all batches."""
        share_b = self.n_b / max(self.n_b.sum(), 1)
        mean_h = share_b @ self.mean_bh
        return mean_h, share_b @ (self.var_bh + (self.mean_bh - mean_h) ** 2)


def _inputs(model: Scalex, minibatches: Minibatches) -> Iterator[tuple[Tensor | Rows, Tensor]]:
    device = model.encoder.hidden.weight.device
    for x_ng, batch_n in minibatches():
        x_ng = x_ng if isinstance(x_ng, Rows) else torch.as_tensor(x_ng).to(device)
        yield x_ng, torch.as_tensor(batch_n).to(device)


@torch.no_grad()
def norm_stats(model: Scalex, minibatches: Minibatches, n_batches: int | None = None) -> NormStats:
    """Exact statistics of the pre-activations per batch, in one pass.

    Parameters
    ----------
    minibatches
        Gives, at each call, an iterable of (x_ng float32 or sparse rows, batch_n int64), in any
        order and sizes.
    n_batches
        Number of batch codes; default: those of the model.
    """
    n_batches = n_batches or model.n_batches
    # Sums of deviations from the trained running mean, which is close to the true one: float64 loses nothing.
    centre_h = torch.as_tensor(running_stats(model)[0], device=model.encoder.hidden.weight.device)
    n_b = centre_h.new_zeros(n_batches)
    sum_bh = centre_h.new_zeros(n_batches, len(centre_h))
    square_bh = torch.zeros_like(sum_bh)
    for x_ng, batch_n in _inputs(model, minibatches):
        d_nh = model.encoder.hidden(x_ng).double() - centre_h
        onehot_bn = F.one_hot(batch_n, n_batches).t().double()
        n_b += onehot_bn.sum(1)
        sum_bh += onehot_bn @ d_nh
        square_bh += onehot_bn @ d_nh.square_()
    at_least_b = n_b.clamp(min=1)[:, None]
    shift_bh = sum_bh / at_least_b
    var_bh = (square_bh / at_least_b - shift_bh.square()).clamp(min=0)
    return NormStats(n_b.long().cpu().numpy(), (shift_bh + centre_h).cpu().numpy(), var_bh.cpu().numpy())


def running_stats(model: Scalex) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (n_hidden,), float64, that the encoder's batch norm tracked while training."""
    norm = model.encoder.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.double().cpu().numpy(), norm.running_var.double().cpu().numpy()


@torch.no_grad()
def encode(
    model: Scalex, minibatches: Minibatches, mean_bh: np.ndarray, var_bh: np.ndarray
) -> Iterator[np.ndarray]:
    """Latents (means of q(z|x)) of each minibatch, with given statistics of the encoder's batch norm.

    Parameters
    ----------
    minibatches
        Gives an iterable of (x_ng float32 or sparse rows, batch_n int64).
    mean_bh, var_bh
        Statistics per batch code, or of shape (1, n_hidden) for all batches alike.

    Yields
    ------
    float32 (n, n_latent), in the order of the minibatches.
    """
    encoder, device = model.encoder, model.encoder.hidden.weight.device
    scale_bh = encoder.norm.weight.double() / torch.sqrt(torch.as_tensor(var_bh, device=device) + EPS)
    shift_bh = encoder.norm.bias.double() - torch.as_tensor(mean_bh, device=device) * scale_bh
    latents = HeadOfUnits(encoder.hidden, scale_bh, shift_bh, encoder.mean)
    for x_ng, batch_n in _inputs(model, minibatches):
        code_n = batch_n if len(scale_bh) > 1 else torch.zeros_like(batch_n)
        yield latents(x_ng, code_n).cpu().numpy()


@torch.no_grad()
def encode_by_minibatch(model: Scalex, minibatches: Minibatches) -> Iterator[np.ndarray]:
    """Latents as the original infers them: each minibatch, all of one batch, by its own statistics.

    A minibatch of one row is not normalised. The model's running statistics stay as they are (the original
    moves them at every inference).
    """
    encoder = model.encoder
    for x_ng, _ in _inputs(model, minibatches):
        a_nh = encoder.hidden(x_ng)
        if len(a_nh) > 1:
            a_nh = F.batch_norm(a_nh, None, None, encoder.norm.weight, encoder.norm.bias, True, eps=EPS)
        yield encoder.mean(a_nh.relu_()).cpu().numpy()
