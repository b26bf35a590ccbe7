"""Composition-matched statistics of the encoder's batch norm.

A batch's own statistics (what SCALEX's inference amounts to) remove a batch effect, and with it whatever sets
the batch's *composition* apart: a query of one cell type is spread over all of them. Running statistics keep
the composition, and the batch effect with it. Here a batch is moved so that its mean and variance become
those that the reference would have *at the batch's composition*: the composition is read off the nearest
reference clusters, the move is estimated, the cells are encoded anew, and so on.

Not part of SCALEX; the numbers that decided for it are in ``benchmarks/LOG.md``.

With h the pre-activations and u = (h - running mean) / running sd, a batch gets one gain g and offset t per
unit, and is encoded from g u + t; that is again a mean and a variance of h, so every encoder of this package
takes it as such (:func:`as_statistics`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from streamx.models.layers import EPS
from streamx.models.scalex import Scalex, running_stats
from streamx.models.sparse import Rows

# Three are enough to map a query; integrating many batches takes until ten or so to settle.
ROUNDS = 10
CELLS_PER_CLUSTER = 250
MIN_CLUSTERS, MAX_CLUSTERS = 10, 100
# Cells beyond this quantile of their cluster's distances are no guide to the batch effect: unseen types.
FIT_QUANTILE = 0.95
# Weight of "no move", in cells: few cells say little about a batch.
SHRINKAGE_CELLS = 50.0
# Half-way (on the log scale of the sd) to a full match of the variance: a full one mixes slightly more and
# costs one-type queries up to .09 of accuracy.
VARIANCE_POWER = 0.25
VARIANCE_FLOOR = 1e-2
# Cells that are sampled for it; 500 per batch change accuracy and mixing by less than .005.
REFERENCE_SAMPLE, REFERENCE_BATCH_SAMPLE, QUERY_BATCH_SAMPLE = 50_000, 2_000, 10_000


@dataclass(frozen=True, eq=False)
class Clusters:
    """What the reference looks like, type by type without knowing types.

    Attributes
    ----------
    centre_kl
        k-means centres of its latents, float64 (n_clusters, n_latent).
    mean_kh, var_kh
        Mean and variance of its moved pre-activations in each cluster, float64 (n_clusters, n_hidden).
    radius_k
        Squared distance to the centre within which 95 % of a cluster's cells lie, float64.
    """

    centre_kl: np.ndarray
    mean_kh: np.ndarray
    var_kh: np.ndarray
    radius_k: np.ndarray


@dataclass(frozen=True, eq=False)
class Move:
    """Gain and offset per unit, float64 (n_hidden,)."""

    gain_h: np.ndarray
    offset_h: np.ndarray

    def __call__(self, u_nh: np.ndarray) -> np.ndarray:
        return (u_nh * self.gain_h + self.offset_h).astype(np.float32)


def stay(n_hidden: int) -> Move:
    return Move(np.ones(n_hidden), np.zeros(n_hidden))


def as_statistics(model: Scalex, move: Move) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (n_hidden,) of h with which the batch norm makes this move, float64."""
    mean_h, var_h = running_stats(model)
    sd_h = np.sqrt(var_h + EPS)
    return mean_h - move.offset_h * sd_h / move.gain_h, (sd_h / move.gain_h) ** 2 - EPS


@torch.no_grad()
def normalised(model: Scalex, x_ng: np.ndarray | torch.Tensor | Rows) -> np.ndarray:
    """u of some cells, float32 (n, n_hidden)."""
    device = model.encoder.hidden.weight.device
    mean_h, var_h = (torch.as_tensor(v, device=device).float() for v in running_stats(model))
    h_nh = model.encoder.hidden(x_ng if isinstance(x_ng, Rows) else torch.as_tensor(x_ng, device=device))
    return ((h_nh - mean_h) / torch.sqrt(var_h + EPS)).cpu().numpy()


@torch.no_grad()
def _head(model: Scalex, u_nh: np.ndarray) -> np.ndarray:
    """Latents of (moved) u, float32 (n, n_latent)."""
    encoder = model.encoder
    u = torch.as_tensor(u_nh, device=encoder.hidden.weight.device)
    return encoder.mean(torch.relu(u * encoder.norm.weight + encoder.norm.bias)).cpu().numpy()


def fit_reference(
    model: Scalex, u_nh: np.ndarray, batch_n: np.ndarray, n_batches: int, *, min_cells: int, seed: int
) -> tuple[Clusters, list[Move]]:
    """Clusters of the reference, and the move of each of its batches.

    Parameters
    ----------
    u_nh, batch_n
        A sample of the reference's cells: normalised pre-activations and batch codes.
    min_cells
        Batches with fewer cells in the sample are not moved.
    seed
        Of k-means.
    """
    moves = [stay(u_nh.shape[1])] * n_batches
    z_nl = _head(model, u_nh)
    centre_kl = _centres(z_nl, seed)
    clusters = _describe(u_nh, z_nl, centre_kl)
    members = [np.flatnonzero(batch_n == b) for b in range(n_batches)]
    moved_nh = u_nh.copy()
    for step in range(ROUNDS):
        for b, rows in enumerate(members):
            if len(rows) >= min_cells:
                moves[b] = _estimate(u_nh[rows], z_nl[rows], clusters, first=step == 0)
                moved_nh[rows] = moves[b](u_nh[rows])
        z_nl = _head(model, moved_nh)
        clusters = _describe(moved_nh, z_nl, centre_kl)
    return clusters, moves


def fit_query(model: Scalex, u_nh: np.ndarray, clusters: Clusters) -> Move:
    """The move of one query batch, from (a sample of) its cells.

    A query of nothing but a type that the reference lacks can't be told from a batch effect, and is moved
    onto the type that it resembles most.
    """
    move = stay(u_nh.shape[1])
    z_nl = _head(model, u_nh)
    for step in range(ROUNDS):
        move = _estimate(u_nh, z_nl, clusters, first=step == 0)
        z_nl = _head(model, move(u_nh))
    return move


def _estimate(u_nh: np.ndarray, z_nl: np.ndarray, clusters: Clusters, *, first: bool) -> Move:
    """The move to the statistics that the reference would have at this batch's composition."""
    cluster_n, distance_n = _nearest(z_nl, clusters.centre_kl)
    ratio_n = distance_n / clusters.radius_k[cluster_n]
    # in the first round a strong batch effect may have carried every cell out of its cluster
    fits = ratio_n <= (max(1.0, float(np.median(ratio_n))) if first else 1.0)
    n = int(fits.sum())
    if n < 2:
        return stay(u_nh.shape[1])
    share_k = np.bincount(cluster_n[fits], minlength=len(clusters.centre_kl)) / n
    wanted_h = share_k @ clusters.mean_kh
    wanted_var_h = np.maximum(share_k @ (clusters.var_kh + clusters.mean_kh**2) - wanted_h**2, 0)
    mean_h, var_h = u_nh[fits].mean(0, dtype=np.float64), u_nh[fits].var(0, dtype=np.float64)
    trust = n / (n + SHRINKAGE_CELLS)
    gain_h = ((wanted_var_h + VARIANCE_FLOOR) / (var_h + VARIANCE_FLOOR)) ** (trust * VARIANCE_POWER)
    return Move(gain_h, mean_h + trust * (wanted_h - mean_h) - gain_h * mean_h)


def _describe(u_nh: np.ndarray, z_nl: np.ndarray, centre_kl: np.ndarray) -> Clusters:
    cluster_n, distance_n = _nearest(z_nl, centre_kl)
    mean_kh = np.zeros((len(centre_kl), u_nh.shape[1]))
    var_kh, radius_k = np.zeros_like(mean_kh), np.full(len(centre_kl), 1e-12)
    for k in range(len(centre_kl)):
        rows = np.flatnonzero(cluster_n == k)
        if len(rows):
            mean_kh[k] = u_nh[rows].mean(0, dtype=np.float64)
            var_kh[k] = u_nh[rows].var(0, dtype=np.float64)
            radius_k[k] = max(float(np.quantile(distance_n[rows], FIT_QUANTILE)), 1e-12)
    return Clusters(centre_kl, mean_kh, var_kh, radius_k)


def _nearest(z_nl: np.ndarray, centre_kl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre and squared distance to it."""
    d_nk = np.stack([((z_nl - centre_l) ** 2).sum(1) for centre_l in centre_kl], axis=1)
    nearest_n = d_nk.argmin(1)
    return nearest_n, d_nk[np.arange(len(z_nl)), nearest_n]


def _centres(z_nl: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    n = len(z_nl)
    wanted = min(n, int(np.clip(n // CELLS_PER_CLUSTER, MIN_CLUSTERS, MAX_CLUSTERS)))
    distinct = len(np.unique(z_nl, axis=0))
    with threadpool_limits(1):  # sums of several threads round differently
        fitted = KMeans(min(wanted, distinct), n_init=3, random_state=seed % 2**32).fit(z_nl)
    return fitted.cluster_centers_.astype(np.float64)
