"""UMAP of any number of cells: fitted on a sketch, the rest, and cells that come later, placed by it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from streamx.errors import BadValuesError
from streamx.metrics.clusters import fuzzy_graph
from streamx.neighbors import build_index, nearest, reach_recall
from streamx.neighbors.blocks import finite_rows

SKETCH = 100_000
PLACED_BY = 10  # neighbours in the sketch that place a further cell
RARE = 10  # a stratum has at least a tenth of an equal share of the sketch, if it has so many cells
ROWS = 50_000


def umap(
    latent_nk: np.ndarray,
    *,
    strata: Any = None,
    n_neighbors: int = 30,
    min_dist: float = 0.1,
    sketch: int = SKETCH,
    seed: int = 0,
    index: str = "auto",
    threads: int = 0,
) -> np.ndarray:
    """Two-dimensional coordinates of cells (McInnes 2018), with SCALEX's settings.

    Parameters
    ----------
    latent_nk
        (n_cells, n_latent) float. Rows with NaN stay NaN. May be memory-mapped.
    strata
        Codes, one per cell, such as of batch and label together: the sketch has cells of each.
    n_neighbors
        Counting the cell itself, as scanpy's.
    sketch
        UMAP is fitted on at most so many cells (:func:`sketch_rows`); :func:`place` puts all others.

    Returns
    -------
    xy_n2
        float32.
    """
    latent_nk = np.asanyarray(latent_nk)
    if latent_nk.ndim != 2:
        raise BadValuesError(f"latents of shape {latent_nk.shape}, not (cells, dimensions)")
    fitted = sketch_rows(latent_nk, sketch, strata, seed)
    fitted_fk = np.asarray(latent_nk[fitted])
    fitted_f2 = _fit(fitted_fk, n_neighbors, min_dist, seed, index, threads)
    others = np.ones(len(latent_nk), dtype=bool)
    others[fitted] = False
    xy_n2 = place(latent_nk, fitted_fk, fitted_f2, only=others, seed=seed, index=index, threads=threads)
    xy_n2[fitted] = fitted_f2
    return xy_n2


def sketch_rows(latent_nk: Any, size: int, strata: Any = None, seed: int = 0) -> np.ndarray:
    """Sorted rows with a latent: all, or `size` of them, of each stratum by its share.

    A stratum whose share is less than a tenth of an equal one gets that tenth (or all that it has), at the
    cost of the others. The same seed draws the same cells.
    """
    rows = np.flatnonzero(finite_rows(latent_nk))
    if len(rows) <= size:
        return rows
    codes = np.zeros(len(rows), dtype=np.int64)
    if strata is not None:
        codes = np.unique(np.asarray(strata)[rows], return_inverse=True)[1]
    rows = rows[np.argsort(codes, kind="stable")]
    count_s = np.bincount(codes)
    floor_s = np.minimum(count_s, size // (RARE * len(count_s)))
    room_s = count_s - floor_s
    end_s = np.cumsum(room_s) * ((size - floor_s.sum()) / room_s.sum())  # rounded ends: shares that sum up
    take_s = floor_s + np.diff(np.rint(end_s).astype(np.int64), prepend=0)
    rng = np.random.default_rng(seed)
    parts = np.split(rows, np.cumsum(count_s)[:-1])
    drawn = [
        rng.choice(part, min(take, len(part)), replace=False)
        for part, take in zip(parts, take_s, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def place(
    latent_nk: np.ndarray,
    fitted_fk: np.ndarray,
    fitted_f2: np.ndarray,
    *,
    only: np.ndarray | None = None,
    seed: int = 0,
    index: str = "auto",
    threads: int = 0,
) -> np.ndarray:
    """Coordinates of cells among those that a UMAP was fitted on, whose own stay as they are.

    A cell goes to the mean of those of its 10 nearest fitted cells that lie together (:func:`_place`).

    Parameters
    ----------
    latent_nk
        (n_cells, n_latent) of the cells to place; rows with NaN get NaN.
    fitted_fk, fitted_f2
        Latents and coordinates of the cells that the UMAP was fitted on.
    only
        Mask of the cells to place; the others get NaN.

    Returns
    -------
    xy_n2
        float32.
    """
    xy_n2 = np.full((len(latent_nk), 2), np.nan, dtype=np.float32)
    asked = finite_rows(latent_nk)
    rows = np.flatnonzero(asked if only is None else asked & only)
    if not len(rows) or not len(fitted_fk):
        return xy_n2
    searcher = build_index(fitted_fk, len(rows), method=index, seed=seed, threads=threads)
    tested = np.sort(np.random.default_rng(seed).choice(rows, min(ROWS, len(rows)), replace=False))
    reach_recall(searcher, latent_nk[tested], PLACED_BY, seed=seed)
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        near, distances = searcher.search(latent_nk[some], PLACED_BY)
        xy_n2[some] = _place(fitted_f2[near], distances)
    return xy_n2


def _place(xy_nm2: np.ndarray, distances_nm: np.ndarray) -> np.ndarray:
    """Where cells with these neighbours go: the mean of the half that lies around their weighted medoid.

    A mean of all would put cells between clusters, where no cell of the sketch is. Weights are exp(-distance)
    in units of the mean distance.
    """
    n, m, _ = xy_nm2.shape
    mean = distances_nm.mean(axis=1, keepdims=True)
    weights = np.exp(-distances_nm / np.where(mean > 0, mean, 1))
    apart_nmm = np.linalg.norm(xy_nm2[:, :, None] - xy_nm2[:, None], axis=3)
    medoid = np.einsum("nij,nj->ni", apart_nmm, weights).argmin(axis=1)
    around = np.argsort(apart_nmm[np.arange(n), medoid], axis=1)[:, : (m + 1) // 2]
    weights = np.take_along_axis(weights, around, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("nm,nmd->nd", weights, np.take_along_axis(xy_nm2, around[:, :, None], axis=1))


def _fit(
    latent_nk: np.ndarray, n_neighbors: int, min_dist: float, seed: int, index: str, threads: int
) -> np.ndarray:
    n = len(latent_nk)
    if n < 4:  # nothing to optimise
        return np.column_stack([np.arange(n, dtype=np.float32), np.zeros(n, dtype=np.float32)])
    found = nearest(latent_nk, n_neighbors=min(n_neighbors, n) - 1, method=index, seed=seed, threads=threads)
    graph = fuzzy_graph(found.indices_nm, found.distances_nm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap's: on disconnected graphs and on its own imports
        from umap.umap_ import find_ab_params, simplicial_set_embedding

        a, b = find_ab_params(1.0, min_dist)
        coordinates, _ = simplicial_set_embedding(
            latent_nk.astype(np.float32),
            graph.tocoo(),
            n_components=2,
            initial_alpha=1.0,
            a=a,
            b=b,
            gamma=1.0,
            negative_sample_rate=5,
            n_epochs=None,
            init="spectral" if n > 20 else "random",
            random_state=np.random.RandomState(seed),
            metric="euclidean",
            metric_kwds={},
            densmap=False,
            densmap_kwds={},
            output_dens=False,
            parallel=False,  # in parallel the result depends on timing
        )
    return np.asarray(coordinates, dtype=np.float32)
