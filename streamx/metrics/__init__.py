"""Metrics of latents, labels and batches: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamx.config import UNLABELED
from streamx.metrics.agreement import agreement
from streamx.metrics.measure import Measure
from streamx.metrics.score import BATCH_METRICS, LABEL_METRICS, Scores, score_latent

__all__ = [
    "BATCH_METRICS",
    "LABEL_METRICS",
    "Measure",
    "Scores",
    "agreement",
    "batch_entropy_mixing_score",
    "score_latent",
    "silhouette_score",
]


def batch_entropy_mixing_score(
    data: np.ndarray,
    batches: Any,
    n_neighbors: int = 100,
    n_pools: int = 100,
    n_samples_per_pool: int = 100,
    *,
    seed: int = 0,
) -> float:
    """SCALEX's ``metrics.batch_entropy_mixing_score``: 0 (separate) to ln 2 = 0.693 (perfectly mixed).

    Equal to the original after ``numpy.random.seed(seed)``; only the drawn cells are searched.

    Parameters
    ----------
    data
        (n_cells, n_latent) float, finite.
    batches
        One per cell, at least two different ones.
    """
    from streamx.errors import BadValuesError, BatchError
    from streamx.labels import encode_labels
    from streamx.metrics import mixing
    from streamx.neighbors import nearest

    batch = encode_labels(batches, ())
    if len(batch) != len(data):
        raise BadValuesError(f"{len(batch):,} batches for {len(data):,} cells")
    if len(batch.names) < 2:
        raise BatchError(f"mixing needs two batches, there is {len(batch.names) or 'none'}")
    draws = mixing.draw_cells(len(data), n_pools, n_samples_per_pool, seed)
    rows, drawn = np.unique(draws, return_inverse=True)
    found = nearest(data, data[rows], n_neighbors, own_m=rows, method="exact")
    share_b = np.bincount(batch.codes_n, minlength=len(batch.names)) / len(data)
    entropies = mixing.mixing_entropies(batch.codes_n[found.indices_nm], share_b)
    return float(entropies[drawn].mean() / np.log2(len(batch.names)))


def silhouette_score(
    data: np.ndarray,
    labels: Any,
    *,
    sample_size: int | None = None,
    seed: int = 0,
    unlabeled: Sequence[str] = UNLABELED,
) -> float:
    """Mean silhouette of the labelled cells (Euclidean), as sklearn's, or of a sample of them.

    Unlike sklearn's, a sample is scored against *all* cells, which has no bias.
    """
    from streamx.errors import UsageError
    from streamx.labels import encode_labels
    from streamx.metrics.silhouette import silhouette_samples

    label = encode_labels(labels, unlabeled)
    known = label.known_n
    data, codes = np.asarray(data)[known], label.codes_n[known]
    if not 2 <= len(label.names) <= len(codes) - 1:
        raise UsageError(f"a silhouette needs 2 to {len(codes) - 1} labels, there are {len(label.names)}")
    rows = None
    if sample_size is not None and sample_size < len(codes):
        rows = np.sort(np.random.default_rng(seed).choice(len(codes), sample_size, replace=False))
    return float(silhouette_samples(data, codes, rows).mean())
