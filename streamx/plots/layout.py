"""UMAP of any number of cells: fitted on a sketch, the rest placed from their neighbours."""

from __future__ import annotations

import warnings

import numpy as np

from streamx.errors import BadValuesError
from streamx.metrics.clusters import fuzzy_graph
from streamx.neighbors import build_index, nearest, reach_recall

SKETCH = 200_000
PLACED_BY = 10  # neighbours in the sketch that place a further cell
ROWS = 50_000


def umap(
    latent_nk: np.ndarray,
    *,
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
        (n_cells, n_latent) float. Rows with NaN stay NaN.
    n_neighbors
        Counting the cell itself, as scanpy's.
    sketch
        UMAP is fitted on at most so many cells, drawn by `seed`; every other cell is placed at the mean of
        those of its 10 nearest cells of the sketch that lie together (:func:`_place`).

    Returns
    -------
    xy_n2
        float32.
    """
    latent_nk = np.asarray(latent_nk)
    if latent_nk.ndim != 2:
        raise BadValuesError(f"latents of shape {latent_nk.shape}, not (cells, dimensions)")
    xy_n2 = np.full((len(latent_nk), 2), np.nan, dtype=np.float32)
    rows = np.flatnonzero(np.isfinite(latent_nk).all(axis=1))
    fitted = rows
    if len(rows) > sketch:
        fitted = np.sort(np.random.default_rng(seed).choice(rows, sketch, replace=False))
    xy_n2[fitted] = _fit(latent_nk[fitted], n_neighbors, min_dist, seed, index, threads)
    rest = np.setdiff1d(rows, fitted, assume_unique=True)
    if not len(rest):
        return xy_n2
    searcher = build_index(latent_nk[fitted], len(rest), method=index, seed=seed, threads=threads)
    reach_recall(searcher, latent_nk[rest], PLACED_BY, seed=seed)
    for start in range(0, len(rest), ROWS):
        some = rest[start : start + ROWS]
        near, distances = searcher.search(latent_nk[some], PLACED_BY)
        xy_n2[some] = _place(xy_n2[fitted][near], distances)
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
