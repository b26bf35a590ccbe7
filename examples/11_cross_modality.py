"""SCALEX's tutorial across modalities: RNA and gene activity of chromatin as two batches of the same genes.

    python examples/11_cross_modality.py -o results/modalities
    python examples/11_cross_modality.py --rna rna.h5ad --activity gene_activity.h5ad --label celltype

Runs on simulated cells, or on files of counts. Nothing is filtered, as in the tutorial: gene activity is too
sparse for the limits of RNA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import numpy as np
from scipy import sparse

import streamx as sx

parser = argparse.ArgumentParser()
parser.add_argument("--rna", type=Path, help="h5ad: cells x genes")
parser.add_argument("--activity", type=Path, help="h5ad: cells x genes, fragments in a gene and before it")
parser.add_argument("--label", default="cell_type", help="obs column of both, to score with")
parser.add_argument("-o", "--output", default="results/modalities", type=Path)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def simulated(folder: Path, n_cells: int) -> list[Path]:
    """RNA; and what gene activity looks like: fewer counts, blurred by what every cell shows of a gene."""
    sx.simulate(folder, n_cells=n_cells, n_genes=1_000, n_batches=2, format="h5ad")
    rna, activity = sorted(folder.glob("*.h5ad"))
    adata, rng = anndata.read_h5ad(activity), np.random.default_rng(0)
    x_ng = sparse.csr_matrix(adata.X)
    blur_g = 0.2 * np.asarray(x_ng.mean(axis=0)).ravel()
    thinned_ng = rng.binomial(x_ng.toarray().astype(int), 0.4) + rng.poisson(blur_g, x_ng.shape)
    adata.X = sparse.csr_matrix(thinned_ng.astype(np.float32))
    adata.write_h5ad(activity)
    return [rna, activity]


def main() -> None:
    args = parser.parse_args()
    files = [args.rna, args.activity]
    if args.rna is None:
        files = simulated(args.output / "simulated", 1_000 if args.quick else 10_000)
    adata = sx.SCALEX(
        files,
        batch_categories=["RNA", "ATAC"],
        batch_name="batch",
        min_features=0,
        min_cells=0,
        max_iteration=100 if args.quick else 10_000,
        outdir=str(args.output / "integrated"),
        show=False,
    )
    mixing = sx.scalex.batch_entropy_mixing_score(adata.obsm["latent"], adata.obs["batch"])
    apart = sx.scalex.silhouette_score(adata.obsm["latent"], adata.obs[args.label])
    print(f"{adata.n_obs:,} cells: mixing {mixing:.3f} of {np.log(2):.3f}, silhouette of types {apart:.3f}")


if __name__ == "__main__":
    main()
