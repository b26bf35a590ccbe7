"""Silhouettes by blocks: exact for every cell asked for, without the n x n matrix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from streamx.threads import thread_count

BLOCK, TILE = 64, 4096  # cells scored at a time, against so many: 2 MB, which stay in the cache


def silhouette_samples(
    latent_nk: np.ndarray, codes_n: np.ndarray, rows: np.ndarray | None = None, *, threads: int = 0
) -> np.ndarray:
    """(b - a) / max(a, b) of each of `rows` (default all), Euclidean, against all cells.

    a is the mean distance to the other cells of the own group, b the smallest mean distance to another group;
    a cell alone in its group has 0 (Rousseeuw 1987, as sklearn).

    Parameters
    ----------
    latent_nk, codes_n
        (n, n_latent) float, finite; group of each cell, at least two groups.
    """
    from threadpoolctl import threadpool_limits

    groups, codes_n = np.unique(codes_n, return_inverse=True)
    order = np.argsort(codes_n, kind="stable")  # groups side by side: their sums are runs of columns
    size_g = np.bincount(codes_n, minlength=len(groups))
    start_g = np.cumsum(size_g) - size_g
    latent_nk = latent_nk.astype(np.float64) - latent_nk.mean(axis=0, dtype=np.float64)
    norm_n = np.einsum("nk,nk->n", latent_nk, latent_nk)
    ones_n = np.ones(len(latent_nk))
    right_kn = np.vstack([-2 * latent_nk[order].T, norm_n[order], ones_n])  # |q|^2 - 2 q r + |r|^2 at once
    left_nk = np.column_stack([latent_nk, ones_n, norm_n])
    rows = np.arange(len(latent_nk)) if rows is None else rows
    found = np.empty(len(rows))

    def one(start: int) -> None:
        block = rows[start : start + BLOCK]
        sums_mg = np.zeros((len(block), len(groups)))
        for left in range(0, len(latent_nk), TILE):
            distances = left_nk[block] @ right_kn[:, left : left + TILE]
            np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
            inside = (start_g < left + TILE) & (start_g + size_g > left)
            starts = np.maximum(start_g[inside] - left, 0)
            sums_mg[:, inside] += np.add.reduceat(distances, starts, axis=1)
        found[start : start + BLOCK] = _from_sums(sums_mg, size_g, codes_n[block])

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(thread_count(threads)) as pool:
        list(pool.map(one, range(0, len(rows), BLOCK)))
    return found


def _from_sums(sums_mg: np.ndarray, size_g: np.ndarray, own_m: np.ndarray) -> np.ndarray:
    line = np.arange(len(own_m))
    own_size = size_g[own_m]
    a = sums_mg[line, own_m] / np.maximum(own_size - 1, 1)
    means = sums_mg / size_g
    means[line, own_m] = np.inf
    b = means.min(axis=1)
    widest = np.maximum(a, b)
    score = np.divide(b - a, widest, out=np.zeros(len(own_m)), where=widest > 0)
    score[own_size == 1] = 0
    return score


def batch_silhouettes(
    latent_nk: np.ndarray,
    labels_n: np.ndarray,
    batches_n: np.ndarray,
    *,
    max_rows: int | None = None,
    rng: np.random.Generator | None = None,
    threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """1 - |silhouette of the batches| inside each label that has several batches, as scArches and scib.

    Labels in one batch only are left out, and labels in which every cell has its own batch.

    Parameters
    ----------
    max_rows
        Cells per label that are scored (drawn by `rng`), each against all cells of the label.

    Returns
    -------
    scores, labels
        Of the scored cells.
    """
    scores, owners = [np.empty(0)], [np.empty(0, dtype=labels_n.dtype)]
    for label in np.unique(labels_n):
        cells = np.flatnonzero(labels_n == label)
        n_batches = len(np.unique(batches_n[cells]))
        if n_batches == 1 or n_batches == len(cells):
            continue
        rows = None
        if max_rows is not None and len(cells) > max_rows and rng is not None:
            rows = np.sort(rng.choice(len(cells), max_rows, replace=False))
        found = silhouette_samples(latent_nk[cells], batches_n[cells], rows, threads=threads)
        scores.append(1 - np.abs(found))
        owners.append(np.full(len(found), label))
    return np.concatenate(scores), np.concatenate(owners)
