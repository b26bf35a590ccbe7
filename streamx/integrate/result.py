"""One AnnData of all cells: what the model saw, latents, imputation, UMAP, clusters, scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from streamx.config import MetricsConfig
from streamx.loader.transform import Transform, apply_transform
from streamx.metrics import batch_entropy_mixing_score, silhouette_score
from streamx.metrics.clusters import fuzzy_graph, leiden
from streamx.neighbors import nearest
from streamx.plots import embedding, umap
from streamx.store.cells import FILE, FILE_ROW
from streamx.store.collection import Collection
from streamx.train.latent import ROWS, impute
from streamx.train.model import Model

log = logging.getLogger("streamx")

IN_MEMORY = 2 << 30  # bytes of X, or of an imputed layer, up to which it is an array and not on disk
N_NEIGHBORS, MIN_DIST = 30, 0.1  # the original's recipe
COLORED = ("batch", "celltype", "cell_type", "leiden")


def assemble(view: Collection, files: Sequence[str], latent_nk: np.ndarray) -> AnnData:
    """Cells, obs and latents of a view.

    X is what the model saw, float32 in [0, 1]: a CSR matrix with cells in the order of `files` and of their
    rows; where that would not fit, a dask array of blocks on disk, in the order of the view.
    """
    obs = view.obs.drop(columns=[name for name in view.obs_columns if name.startswith("_streamx_")])
    obs = obs.drop(columns="sampled", errors="ignore")
    if view.batch_key is not None:
        obs["batch"] = obs[view.batch_key]
    var = pd.DataFrame(index=view.var_names)
    if view.nnz * 8 <= IN_MEMORY:
        order = input_order(view, files)
        x_ng: Any = seen(view, 0, view.n_obs)[order]
        obs, latent_nk = obs.iloc[order], latent_nk[order]
    else:
        log.info("X stays on disk, as a dask array; cells are in the order of the view")
        x_ng = _blocks(partial(seen, view), view.n_obs, view.n_vars, ROWS * 16, sparse.csr_matrix)
    adata = AnnData(X=x_ng, obs=obs, var=var)
    adata.obsm["latent"] = latent_nk
    return adata


def input_order(view: Collection, files: Sequence[str]) -> np.ndarray:
    """Rows of the view in the order of the files and of their rows, int64 (n_cells,)."""
    position = pd.Index(files).get_indexer(view.obs_column(FILE).astype(str))
    return np.lexsort((view.obs_column(FILE_ROW).to_numpy(), position))


def seen(view: Collection, start: int, stop: int) -> sparse.csr_matrix:
    """Rows as the model sees them: the view's transform, applied."""
    x_ng = view.read(start, stop)
    total_n = view.obs_column("_streamx_total", start, stop).to_numpy()
    apply_transform(
        x_ng,
        Transform.of((view.view or {}).get("transform")),
        total_n=total_n,
        batch_n=view.batch_codes[start:stop],
        scale_bg=view.scale_bg,
    )
    if view.scale_bg is not None:  # by the largest value, but for the last bit
        np.minimum(x_ng.data, 1, out=x_ng.data)
    return x_ng


def _blocks(rows: Any, n: int, width: int, block: int, kind: Any) -> Any:
    import dask.array as da
    from dask import delayed

    return da.concatenate(
        [
            da.from_delayed(
                delayed(rows)(start, min(start + block, n)),
                shape=(min(start + block, n) - start, width),
                dtype=np.float32,
                meta=kind((0, 0), dtype=np.float32),
            )
            for start in range(0, n, block)
        ]
    )


def join_reference(reference: AnnData, query: AnnData) -> AnnData:
    """Reference above query, over the same features; ``obs["projection"]`` tells them apart.

    A query batch that is called like one of the reference is another batch all the same: it is renamed.
    """
    reference = reference[:, query.var_names]
    known = set(map(str, reference.obs["batch"].unique()))
    alike = {name: f"{name} (query)" for name in map(str, query.obs["batch"].unique()) if name in known}
    if alike:
        query.obs["batch"] = query.obs["batch"].astype(str).replace(alike).astype("category")
        log.info("batches called alike are not the same: renamed to %s", ", ".join(alike.values()))
    obs = pd.concat(
        [reference.obs.assign(projection="reference"), query.obs.assign(projection="query")], join="outer"
    )
    for name in obs.columns:  # unlike categories became plain text
        if obs[name].dtype == object:
            obs[name] = obs[name].astype("category")
    x_ng = sparse.vstack([sparse.csr_matrix(reference.X), query.X], format="csr")
    both = AnnData(X=x_ng, obs=obs, var=pd.DataFrame(index=query.var_names))
    both.obsm["latent"] = np.vstack([reference.obsm["latent"], query.obsm["latent"]])
    both.obs_names_make_unique()
    return both


def add_imputed(adata: AnnData, model: Model, batch: str) -> None:
    """``layers["impute"]``: expression in a reference batch, float32 in [0, 1]."""
    latent_nk = adata.obsm["latent"]

    def rows(start: int, stop: int) -> np.ndarray:
        return np.concatenate(list(impute(model, latent_nk[start:stop], batch)))

    if adata.n_obs * adata.n_vars * 4 <= IN_MEMORY:
        adata.layers["impute"] = rows(0, adata.n_obs)
    else:
        adata.layers["impute"] = _blocks(rows, adata.n_obs, adata.n_vars, ROWS, np.empty)


def add_umap(adata: AnnData, seed: int) -> None:
    """``obsm["X_umap"]`` and ``obsm["X_scalex_umap"]`` (the same), with the parameters in uns."""
    xy_n2 = umap(adata.obsm["latent"], n_neighbors=N_NEIGHBORS, min_dist=MIN_DIST, seed=seed)
    adata.obsm["X_umap"] = xy_n2
    adata.obsm["X_scalex_umap"] = xy_n2.copy()
    adata.uns["umap"] = {"params": {"min_dist": MIN_DIST, "random_state": seed}}


def add_clusters(adata: AnnData, seed: int) -> None:
    """``obs["leiden"]`` on the graph of 30 neighbours, which stays in obsp as scanpy would leave it."""
    found = nearest(adata.obsm["latent"], n_neighbors=min(N_NEIGHBORS, adata.n_obs) - 1, seed=seed)
    graph = fuzzy_graph(found.indices_nm, found.distances_nm)
    adata.obsp["connectivities"] = graph
    n, k = found.indices_nm.shape
    indptr = np.arange(0, n * k + 1, k)
    shape = (n, n)
    adata.obsp["distances"] = sparse.csr_matrix(
        (found.distances_nm.ravel(), found.indices_nm.ravel(), indptr), shape=shape
    )
    adata.uns["neighbors"] = {
        "connectivities_key": "connectivities",
        "distances_key": "distances",
        "params": {"n_neighbors": N_NEIGHBORS, "method": "umap", "use_rep": "latent", "metric": "euclidean"},
    }
    clusters = leiden(graph, seed=seed)
    by_size = np.argsort(np.argsort(-np.bincount(clusters), kind="stable"), kind="stable")
    names = [str(number) for number in range(len(by_size))]
    adata.obs["leiden"] = pd.Categorical.from_codes(by_size[clusters], names)
    adata.uns["leiden"] = {"params": {"resolution": 1.0, "random_state": seed}}


def draw_umap(adata: AnnData, folder: Path | None, show: bool) -> None:
    """``umap.png``: batches, cell types and clusters, as far as they are known; after mapping also
    ``umap_<color>.png``, reference and query apart."""
    import matplotlib.pyplot as plt
    import scanpy as sc

    colors = [name for name in COLORED if name in adata.obs]
    figure = sc.pl.umap(adata, color=colors, show=False, return_fig=True)
    if folder is not None:
        figure.savefig(folder / "umap.png", bbox_inches="tight", dpi=150)
        if "projection" in adata.obs:
            for color in colors:
                path = folder / f"umap_{color}.png"
                embedding(adata, color=color, groupby="projection", save=path, show=False)
    if show and plt.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)


def assess(adata: AnnData, seed: int) -> None:
    """Batch mixing and, with ``obs["celltype"]``, silhouette on the UMAP: logged, and kept in uns."""
    xy_n2 = adata.obsm["X_umap"]
    scores: dict[str, float] = {}
    if adata.obs["batch"].nunique() > 1:
        scores["batch_entropy_mixing_score"] = batch_entropy_mixing_score(
            xy_n2, adata.obs["batch"], seed=seed
        )
    if "celltype" in adata.obs:
        scores["silhouette_score"] = silhouette_score(
            xy_n2, adata.obs["celltype"], sample_size=MetricsConfig.max_cells, seed=seed
        )
    for name, value in scores.items():
        log.info("%s: %.3f", name, value)
    adata.uns["scalex"] = scores
