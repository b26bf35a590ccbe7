"""The plain baseline: log1p of counts per 10,000, 2,000 variable genes, 30 principal components.

Mode "map": genes and components come from the reference, and a query is projected onto them (genes that it
lacks are zero). Mode "int": they come from all cells.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc

N_GENES = 2000
N_COMPONENTS = 30


def normalised(adata: ad.AnnData) -> ad.AnnData:
    """log1p of counts per 10,000."""
    adata = adata.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def columns(adata: ad.AnnData, genes: np.ndarray) -> np.ndarray:
    """Dense (n_cells, n_genes) in the order of ``genes``; absent genes are zero."""
    at = adata.var_names.get_indexer(genes)
    x_ng = np.zeros((adata.n_obs, len(genes)), dtype=np.float32)
    x_ng[:, at >= 0] = adata.X[:, at[at >= 0]].toarray()
    return x_ng


def embed(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """``reference`` and each query -> (n_cells, 30); plus ``cell``, ``batch`` and ``cell_type`` of each."""
    files = {name: ad.read_h5ad(path) for name, path in paths.items()}
    reference = normalised(files["reference"])
    n_top = min(N_GENES, reference.n_vars)
    sc.pp.highly_variable_genes(reference, n_top_genes=n_top, batch_key="batch")
    genes = reference.var_names[reference.var["highly_variable"]].to_numpy()
    x_ng = columns(reference, genes)
    mean_g = x_ng.mean(axis=0, dtype=np.float64)
    covariance = (x_ng.T @ x_ng) / len(x_ng) - np.outer(mean_g, mean_g)
    _, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, :N_COMPONENTS]
    found = {"reference": (x_ng - mean_g) @ axes}
    for name, query in files.items():
        if name != "reference":
            found[name] = (columns(normalised(query), genes) - mean_g) @ axes
    return {name: latent.astype(np.float32) for name, latent in found.items()}
