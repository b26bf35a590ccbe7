"""Do clusters of the graph agree with the labels, and does each label hang together?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

GRAPH_NEIGHBORS = 15  # counting the cell itself, scanpy's default
RESOLUTIONS = tuple(round(0.1 * step, 1) for step in range(1, 21))  # scArches' get_nmi


def with_self(indices_nj: np.ndarray, distances_nj: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put each cell in front of its neighbours, at distance 0."""
    n = len(indices_nj)
    own = np.arange(n)[:, None]
    return np.hstack([own, indices_nj]), np.hstack([np.zeros((n, 1)), distances_nj])


def fuzzy_graph(indices_nj: np.ndarray, distances_nj: np.ndarray) -> Any:
    """UMAP's fuzzy graph (McInnes 2018, algorithms 2 and 3), as scanpy clusters it: symmetric CSR in (0, 1].

    Parameters
    ----------
    indices_nj, distances_nj
        Neighbours of every cell without itself.
    """
    from scipy.sparse import csr_matrix

    n, k = indices_nj.shape
    rho_n, sigma_n = _local_scales(distances_nj)
    weights = np.exp(-np.maximum(distances_nj - rho_n[:, None], 0) / sigma_n[:, None])
    graph = csr_matrix((weights.ravel(), indices_nj.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    return graph + graph.T - graph.multiply(graph.T)


def _local_scales(distances_nj: np.ndarray, steps: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """rho: distance of the nearest other point; sigma: sum of memberships = log2(k), k counting the cell."""
    n, k = distances_nj.shape
    positive = np.where(distances_nj > 0, distances_nj, np.inf)
    rho = positive.min(axis=1)
    rho[~np.isfinite(rho)] = 0
    beyond = np.maximum(distances_nj - rho[:, None], 0)
    target = np.log2(k + 1)
    low, high, sigma = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(steps):
        excess = np.exp(-beyond / sigma[:, None]).sum(axis=1) - target
        if (np.abs(excess) < 1e-5).all():
            break
        settled = np.abs(excess) < 1e-5
        high = np.where(~settled & (excess > 0), sigma, high)
        low = np.where(~settled & (excess <= 0), sigma, low)
        middle = np.where(np.isinf(high), sigma * 2, (low + np.where(np.isinf(high), 0, high)) / 2)
        sigma = np.where(settled, sigma, middle)
    floor = 1e-3 * np.where(rho > 0, distances_nj.sum(axis=1) / (k + 1), distances_nj.sum() / (n * (k + 1)))
    return rho, np.maximum(sigma, np.maximum(floor, np.finfo(np.float64).tiny))


def leiden(graph: Any, resolution: float = 1.0, seed: int = 0, n_iterations: int = 2) -> np.ndarray:
    """Leiden clusters of a symmetric weighted sparse graph by modularity, as scanpy's ``flavor="igraph"``."""
    return _communities(_network(graph), resolution, seed, n_iterations)


def _network(graph: Any) -> Any:
    """The graph for igraph: each edge once, its weight beside it."""
    import igraph
    from scipy.sparse import triu

    upper = triu(graph, k=1).tocoo()
    edges = np.column_stack([upper.row, upper.col]).astype(np.int64)  # as igraph reads without copying each
    return igraph.Graph(n=graph.shape[0], edges=edges, edge_attrs={"weight": upper.data})


def _communities(network: Any, resolution: float, seed: int, n_iterations: int = 2) -> np.ndarray:
    """igraph has one generator for the process; it gets ours for this call, then Python's own again."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = network.community_leiden(
            objective_function="modularity",
            weights="weight",
            resolution=resolution,
            n_iterations=n_iterations,
        )
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(found.membership)


def cluster_agreement(
    graph: Any, codes_n: np.ndarray, resolution: float | str = "best", seed: int = 0
) -> dict[str, float]:
    """NMI (arithmetic) and ARI between Leiden clusters and labels, with the resolution used.

    Parameters
    ----------
    resolution
        Or ``"best"``: of 0.1, 0.2, ..., 2.0 the one with the highest NMI, scArches' ``get_nmi``.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    network = _network(graph)
    tried = RESOLUTIONS if resolution == "best" else (float(resolution),)
    best: dict[str, float] = {"nmi": -1.0}
    for value in tried:
        clusters = _communities(network, value, seed)
        nmi = float(normalized_mutual_info_score(codes_n, clusters))
        if nmi > best["nmi"]:
            ari = float(adjusted_rand_score(codes_n, clusters))
            best = {"nmi": nmi, "ari": ari, "resolution": value, "n_clusters": float(clusters.max() + 1)}
    return best


def graph_connectivity(indices_nj: np.ndarray, codes_n: np.ndarray) -> float:
    """Share of each label's cells in its largest connected part of the k-NN graph, mean over labels.

    scib-metrics' definition: directed edges to the nearest neighbours, strong components. Label after label,
    so memory holds the edges of one.

    Parameters
    ----------
    indices_nj
        Neighbours of every cell without itself; may be memory-mapped.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    place_n = np.empty(len(codes_n), dtype=np.int32)  # of each cell among those of its label
    shares = []
    for code in np.unique(codes_n):
        cells = np.flatnonzero(codes_n == code)
        place_n[cells] = np.arange(len(cells), dtype=np.int32)
        near_mj = indices_nj[cells]
        inside_mj = codes_n[near_mj] == code  # edges between labels join nothing inside one
        start_m = np.concatenate([[0], np.cumsum(inside_mj.sum(axis=1))])
        near = place_n[near_mj[inside_mj]]
        graph = csr_matrix((np.ones(len(near)), near, start_m), shape=(len(cells),) * 2)
        _, parts = connected_components(graph, directed=True, connection="strong")
        shares.append(np.bincount(parts).max() / len(cells))
    return float(np.mean(shares))
