"""Silhouettes by blocks: exact, or from a sample of each group, without the n x n matrix."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamx.threads import thread_count

BLOCK, TILE = 64, 4096  # cells scored at a time, against so many: 2 MB, which stay in the cache
PIECE = 1 << 16  # cells whose moments are added up at a time


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
    groups, codes_n = np.unique(codes_n, return_inverse=True)
    order = np.argsort(codes_n, kind="stable")  # groups side by side: their sums are runs of columns
    size_g = np.bincount(codes_n, minlength=len(groups))
    latent_nk = latent_nk.astype(np.float64) - latent_nk.mean(axis=0, dtype=np.float64)
    rows = np.arange(len(latent_nk)) if rows is None else rows

    def finish(part: slice, sums_mg: np.ndarray) -> np.ndarray:
        own_m = codes_n[rows[part]]
        line = np.arange(len(own_m))
        means_mg = sums_mg / size_g
        means_mg[line, own_m] = sums_mg[line, own_m] / np.maximum(size_g[own_m] - 1, 1)
        return _scores(means_mg, own_m, size_g[own_m] == 1)

    with _one_blas_thread():
        return _by_blocks(latent_nk[rows], latent_nk[order], size_g, finish, threads)


def _one_blas_thread() -> Any:
    """Blocks run in threads of their own. To find the libraries takes 10 ms: once, not for each label."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


def _by_blocks(
    x_mk: np.ndarray,
    reference_rk: np.ndarray,
    size_g: np.ndarray,
    finish: Callable[[slice, np.ndarray], np.ndarray],
    threads: int,
) -> np.ndarray:
    """`finish` of each block of rows and its summed distances to every group; a value per row.

    Parameters
    ----------
    x_mk, reference_rk
        float64, near the origin; references group by group.
    size_g
        References of each group, none empty.
    """
    start_g = np.cumsum(size_g) - size_g
    norm_r = np.einsum("rk,rk->r", reference_rk, reference_rk)
    right_kr = np.vstack([-2 * reference_rk.T, norm_r, np.ones(len(norm_r))])  # |x|^2 - 2 x r + |r|^2 at once
    left_mk = np.column_stack([x_mk, np.ones(len(x_mk)), np.einsum("mk,mk->m", x_mk, x_mk)])
    found = np.empty(len(x_mk))

    def one(start: int) -> None:
        part = slice(start, start + BLOCK)
        left = left_mk[part]
        sums_mg = np.zeros((len(left), len(size_g)))
        for low in range(0, len(reference_rk), TILE):
            distances = left @ right_kr[:, low : low + TILE]
            np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
            inside = (start_g < low + TILE) & (start_g + size_g > low)
            starts = np.maximum(start_g[inside] - low, 0)
            sums_mg[:, inside] += np.add.reduceat(distances, starts, axis=1)
        found[part] = finish(part, sums_mg)

    with ThreadPoolExecutor(thread_count(threads)) as pool:
        list(pool.map(one, range(0, len(x_mk), BLOCK)))
    return found


def _scores(means_mg: np.ndarray, own_m: np.ndarray, alone_m: np.ndarray) -> np.ndarray:
    """Silhouettes from mean distances to every group."""
    line = np.arange(len(own_m))
    a = means_mg[line, own_m]
    others_mg = means_mg.copy()
    others_mg[line, own_m] = np.inf
    b = others_mg.min(axis=1)
    widest = np.maximum(a, b)
    score = np.divide(b - a, widest, out=np.zeros(len(own_m)), where=widest > 0)
    score[alone_m] = 0
    return score


@dataclass(frozen=True, eq=False)
class Groups:
    """The cells of each group, and the first two moments of their latents about the centre of all.

    Attributes
    ----------
    order_n, start_g, size_g
        Cells, group by group; where each group begins, and its size.
    center_k, mean_gk, square_g
        Mean of all cells; of each group's cells, as seen from there; mean of their squared norms.
    """

    order_n: np.ndarray
    start_g: np.ndarray
    size_g: np.ndarray
    center_k: np.ndarray
    mean_gk: np.ndarray
    square_g: np.ndarray

    def members(self, group: int) -> np.ndarray:
        return self.order_n[self.start_g[group] : self.start_g[group] + self.size_g[group]]


def group_cells(latent_nk: np.ndarray, codes_n: np.ndarray) -> Groups:
    """:class:`Groups` of cells with codes 0, 1, ...; one pass over the latents, by pieces."""
    size_g = np.bincount(codes_n)
    n_groups, d = len(size_g), latent_nk.shape[1]
    center_k = latent_nk.mean(axis=0, dtype=np.float64)
    sums_gk, squares_g = np.zeros((n_groups, d)), np.zeros(n_groups)
    for low in range(0, len(codes_n), PIECE):
        codes = codes_n[low : low + PIECE]
        z_nk = latent_nk[low : low + PIECE] - center_k
        for k in range(d):
            sums_gk[:, k] += np.bincount(codes, z_nk[:, k], n_groups)
        squares_g += np.bincount(codes, np.einsum("nk,nk->n", z_nk, z_nk), n_groups)
    count_g = np.maximum(size_g, 1)
    return Groups(
        np.argsort(codes_n, kind="stable"),
        np.cumsum(size_g) - size_g,
        size_g,
        center_k,
        sums_gk / count_g[:, None],
        squares_g / count_g,
    )


def sampled_silhouettes(
    latent_nk: np.ndarray,
    groups: Groups,
    chosen: np.ndarray,
    rows: np.ndarray,
    own_m: np.ndarray,
    *,
    per_group: int,
    rng: np.random.Generator,
    threads: int = 0,
) -> np.ndarray:
    """Silhouettes of `rows` among the groups `chosen`, whose cells are represented by `per_group` of each.

    A group's mean distance is estimated by the ratio estimator (Cochran 1977, chapter 6): the mean over its
    drawn cells, times the root of (mean squared distance to all its cells / to the drawn ones). Squares are
    known for all cells from the group's moments, and explain nearly all of what a draw does to the mean. A
    group of at most `per_group` cells is exact; else there is a bias of order 1 / per_group.

    Parameters
    ----------
    own_m
        Position in `chosen` of the group of each row.
    """
    drawn = [groups.members(group) for group in chosen]
    drawn = [
        cells if len(cells) <= per_group else rng.choice(cells, per_group, replace=False) for cells in drawn
    ]
    references = np.concatenate(drawn)
    count_c = np.array([len(cells) for cells in drawn])
    size_c = groups.size_g[chosen]
    reference_rk = latent_nk[references] - groups.center_k
    x_mk = latent_nk[rows] - groups.center_k
    start_c = np.cumsum(count_c) - count_c
    mean_ck = np.add.reduceat(reference_rk, start_c) / count_c[:, None]
    square_c = np.add.reduceat(np.einsum("rk,rk->r", reference_rk, reference_rk), start_c) / count_c
    drawn_m = np.isin(rows, references)

    def finish(part: slice, sums_mc: np.ndarray) -> np.ndarray:
        own, x = own_m[part], x_mk[part]
        line = np.arange(len(own))
        norm_m1 = np.einsum("mk,mk->m", x, x)[:, None]
        every_mc = np.maximum(norm_m1 - 2 * x @ groups.mean_gk[chosen].T + groups.square_g[chosen], 0)
        sample_mc = np.maximum(norm_m1 - 2 * x @ mean_ck.T + square_c, 0)
        means_mc = sums_mc / count_c
        # a cell's distance to itself is no distance to the others of its group
        others, found = size_c[own] - 1, count_c[own] - drawn_m[part]
        every_mc[line, own] *= size_c[own] / np.maximum(others, 1)
        sample_mc[line, own] *= count_c[own] / np.maximum(found, 1)
        means_mc[line, own] *= count_c[own] / np.maximum(found, 1)
        means_mc *= np.sqrt(np.divide(every_mc, sample_mc, out=np.ones_like(every_mc), where=sample_mc > 0))
        return _scores(means_mc, own, others == 0)

    return _by_blocks(x_mk, reference_rk, count_c, finish, threads)


def batch_silhouettes(
    latent_nk: np.ndarray, labels_n: np.ndarray, batches_n: np.ndarray, *, threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """1 - |silhouette of the batches| inside each label that has several batches, as scArches and scib.

    Labels in one batch only are left out, and labels in which every cell has its own batch.

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
        found = silhouette_samples(latent_nk[cells], batches_n[cells], threads=threads)
        scores.append(1 - np.abs(found))
        owners.append(np.full(len(found), label))
    return np.concatenate(scores), np.concatenate(owners)


def sampled_label_silhouettes(
    latent_nk: np.ndarray,
    codes_n: np.ndarray,
    *,
    n_rows: int,
    n_references: int,
    repeats: int,
    seed: int = 0,
    threads: int = 0,
) -> np.ndarray:
    """Mean silhouette from `repeats` disjoint samples of cells, each against references of its own.

    Parameters
    ----------
    codes_n
        Label of each cell: 0, 1, ..., each with a cell.
    n_rows, n_references
        Cells scored over all repeats; cells that represent the labels, in equal shares, in each repeat.

    Returns
    -------
    means_r
        (repeats,): their spread holds what rows and references contribute.
    """
    groups = group_cells(latent_nk, codes_n)
    rng = np.random.default_rng(seed)
    chosen = np.arange(len(groups.size_g))
    share = max(n_references // len(chosen), 1)
    scored = rng.choice(len(codes_n), min(n_rows, len(codes_n)), replace=False)
    options: dict[str, Any] = {"per_group": share, "rng": rng, "threads": threads}
    with _one_blas_thread():
        means = [
            sampled_silhouettes(latent_nk, groups, chosen, rows, codes_n[rows], **options).mean()
            for rows in np.array_split(scored, repeats)
        ]
    return np.array(means)


def sampled_batch_silhouettes(
    latent_nk: np.ndarray,
    labels_n: np.ndarray,
    batches_n: np.ndarray,
    *,
    n_rows: int,
    n_references: int,
    repeats: int,
    seed: int = 0,
    threads: int = 0,
) -> tuple[np.ndarray, int]:
    """What :func:`batch_silhouettes` measures, mean over labels of their means, from repeated samples.

    Every label has an equal share of the `n_rows`; in each repeat `n_references` cells represent the batches
    of a label. A label too small for disjoint samples is scored whole in each.

    Returns
    -------
    means_r, n
        (repeats,), empty if no label has several batches; cells scored over all repeats.
    """
    n_batches = int(batches_n.max()) + 1
    groups = group_cells(latent_nk, labels_n.astype(np.int64) * n_batches + batches_n)
    rng = np.random.default_rng(seed)
    combined = np.flatnonzero(groups.size_g)  # labels and the batches in each
    n = 0
    means_lr: list[list[float]] = []
    several = [
        chosen
        for chosen in np.split(combined, np.flatnonzero(np.diff(combined // n_batches)) + 1)
        if 1 < len(chosen) < groups.size_g[chosen].sum()
    ]
    share = max(n_rows // (repeats * max(len(several), 1)), 2)
    with _one_blas_thread():
        for chosen in several:
            cells = np.concatenate([groups.members(group) for group in chosen])
            parts = [cells] * repeats
            if len(cells) > share * repeats:
                parts = np.split(rng.choice(cells, share * repeats, replace=False), repeats)
            n += min(len(cells), share * repeats)
            means_lr.append([])
            for rows in parts:
                group_m = labels_n[rows].astype(np.int64) * n_batches + batches_n[rows]
                found = sampled_silhouettes(
                    latent_nk,
                    groups,
                    chosen,
                    rows,
                    np.searchsorted(chosen, group_m),
                    per_group=max(n_references // len(chosen), 1),
                    rng=rng,
                    threads=threads,
                )
                means_lr[-1].append(float(np.mean(1 - np.abs(found))))
    return np.mean(means_lr, axis=0) if several else np.empty(0), n
