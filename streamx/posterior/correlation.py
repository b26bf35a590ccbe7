"""How features go together once a model has taken the noise out of their counts.

Each cell gives denoised draws: of the Gamma distribution that the negative binomial mixes over, with the mean
(factor x scale) and the gene's inverse dispersion as shape; proteins are their foreground's, and zero where a
draw says background (Lopez 2018; Gayoso 2021). Correlations are over cells and draws together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamx.errors import UsageError
from streamx.models.cells import Cells
from streamx.models.counts import Counts
from streamx.models.totalvi_decoder import Proteins
from streamx.posterior.draws import CountModel, decoded, evaluating, latents
from streamx.posterior.expression import OWN, Batches

_LOG_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Correlation:
    """A correlation matrix and what it rests on.

    Attributes
    ----------
    matrix_ff
        float64 (n_features, n_features), genes then proteins; NaN for a feature that does not vary.
    n_rows, n_used
        Denoised draws per batch (cells x samples), and how many of them the matrix was computed from:
        fewer, a uniform sample, where ranks of all would not fit.
    """

    matrix_ff: np.ndarray
    n_rows: int
    n_used: int


class CrossProducts:
    """Pearson correlation in one pass: sums of deviations from a minibatch's mean, and of their products."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._centre_f = self._sum_f = self._product_ff = np.empty(0)

    def add(self, x_rf: np.ndarray) -> None:
        """Rows (n, n_features), any float."""
        if not self.n_rows:
            self._centre_f = x_rf.mean(axis=0, dtype=np.float64)
            self._sum_f = np.zeros(x_rf.shape[1])
            self._product_ff = np.zeros((x_rf.shape[1],) * 2)
        d_rf = x_rf - self._centre_f
        self._sum_f += d_rf.sum(axis=0)
        self._product_ff += d_rf.T @ d_rf
        self.n_rows += len(x_rf)

    def correlation(self) -> Correlation:
        shift_f = self._sum_f / self.n_rows
        covariance_ff = self._product_ff / self.n_rows - np.outer(shift_f, shift_f)
        return Correlation(_normalised(covariance_ff), self.n_rows, self.n_rows)


class RankSample:
    """Spearman correlation of a uniform sample of at most ``max_rows`` rows; of all, where they are fewer.

    Every row gets a random key, and the rows with the smallest keys are kept.
    """

    def __init__(self, max_rows: int, rng: np.random.Generator) -> None:
        self.n_rows, self.max_rows, self._rng = 0, max_rows, rng
        self._key_r, self._kept_rf = np.empty(0), np.empty((0, 0), np.float32)

    def add(self, x_rf: np.ndarray) -> None:
        """Rows (n, n_features), any float."""
        key_r = self._rng.random(len(x_rf))
        self.n_rows += len(x_rf)
        if len(self._key_r) == self.max_rows:
            candidate_r = key_r < self._key_r.max()
            key_r, x_rf = key_r[candidate_r], x_rf[candidate_r]
        if self._key_r.size:
            key_r, x_rf = np.concatenate([self._key_r, key_r]), np.concatenate([self._kept_rf, x_rf])
        if len(key_r) > self.max_rows:
            kept_r = np.argpartition(key_r, self.max_rows)[: self.max_rows]
            key_r, x_rf = key_r[kept_r], x_rf[kept_r]
        self._key_r, self._kept_rf = key_r, x_rf

    def correlation(self) -> Correlation:
        from scipy.stats import rankdata

        rank_rf = rankdata(self._kept_rf, axis=0)
        rank_rf -= rank_rf.mean(axis=0)
        matrix_ff = _normalised(rank_rf.T @ rank_rf / len(rank_rf))
        return Correlation(matrix_ff, self.n_rows, len(rank_rf))


def _normalised(covariance_ff: np.ndarray) -> np.ndarray:
    """Covariances -> correlations within [-1, 1], with ones on the diagonal."""
    sd_f = np.sqrt(np.clip(np.diag(covariance_ff), 0, None))
    sd_f[sd_f == 0] = np.nan
    matrix_ff = np.clip(covariance_ff / np.outer(sd_f, sd_f), -1, 1)
    matrix_ff[np.diag_indices_from(matrix_ff)] = np.where(np.isnan(sd_f), np.nan, 1.0)
    return matrix_ff


def feature_correlation(
    module: CountModel,
    minibatches: Iterable[Cells],
    *,
    kind: str = "spearman",
    batches: Batches = OWN,
    n_samples: int = 10,
    rna_size_factor: float = 1000.0,
    log_transform: bool = False,
    max_rows: int = 10_000,
    rng: np.random.Generator | None = None,
    generator: torch.Generator | None = None,
) -> Correlation:
    """Correlation of denoised genes (and totalVI's proteins), the mean over the batches decoded as.

    Parameters
    ----------
    kind
        ``"pearson"``: exact, from cross products that one pass accumulates; ``"spearman"``: of the ranks of
        at most ``max_rows`` rows, which :class:`Correlation` says.
    batches
        Codes to decode every cell as, each a correlation of its own; None: each cell's own batch.
    n_samples
        Denoised draws per cell.
    rna_size_factor
        Library size of the denoised genes.
    log_transform
        Logarithms of the draws: ln(x + 1e-8) of genes, ln(1 + x) of proteins.
    rng, generator
        Draw the kept rows, and everything else; default: seed 0, and torch's own.

    Raises
    ------
    UsageError
        For an unknown kind, fewer than one sample, or a Poisson model, which has no such Gamma distribution.
    """
    if kind not in ("pearson", "spearman"):
        raise UsageError(f"correlation {kind!r}", fix="pearson or spearman")
    if n_samples < 1 or not batches:
        raise UsageError(f"{n_samples} samples as {len(batches)} batches", fix="at least one of each")
    rng = rng or np.random.default_rng(0)
    sums = [CrossProducts() if kind == "pearson" else RankSample(max_rows, rng) for _ in batches]
    with evaluating(module):
        for cells in minibatches:
            for z_nk, library_n in latents(module, cells, n_samples, generator):
                for batch, rows in zip(batches, sums, strict=True):
                    genes, proteins = decoded(module, z_nk, library_n, cells, batch, generator)
                    rows.add(_denoised(genes, proteins, rna_size_factor, log_transform, generator))
    if not sums[0].n_rows:
        raise UsageError("no cells to correlate", fix="give at least one minibatch")
    found = [rows.correlation() for rows in sums]
    matrix_ff = np.mean([one.matrix_ff for one in found], axis=0)
    return Correlation(matrix_ff, found[0].n_rows, found[0].n_used)


def _denoised(
    genes: Counts,
    proteins: Proteins | None,
    factor: float,
    log_transform: bool,
    generator: torch.Generator | None,
) -> np.ndarray:
    """One draw of each cell, float32 (n, n_features)."""
    if genes.theta is None:
        raise UsageError("a Poisson model has no dispersion to draw by", fix="train with nb or zinb")
    gene_ng = _gamma(factor * genes.scale_ng, genes.theta, generator)
    parts = [torch.log(gene_ng + _LOG_EPS) if log_transform else gene_ng]
    if proteins is not None:
        protein_np = _gamma(proteins.rate_fore_np, proteins.theta, generator)
        background_np = torch.bernoulli(torch.sigmoid(proteins.mixing_np), generator=generator)
        protein_np = protein_np * (1 - background_np)
        parts.append(torch.log1p(protein_np) if log_transform else protein_np)
    return torch.cat(parts, dim=1).cpu().numpy()


def _gamma(mean: Tensor, shape: Tensor, generator: torch.Generator | None) -> Tensor:
    shape = shape.expand_as(mean).contiguous()
    return torch._standard_gamma(shape, generator=generator) * (mean / shape)
