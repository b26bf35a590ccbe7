"""scArches' totalVI tutorial: a reference of RNA and proteins, a query of RNA whose proteins are imputed.

    python examples/07_totalvi_surgery.py -o results/totalvi
    python examples/07_totalvi_surgery.py --data cite.h5ad --rna pbmc_10k_v3.h5ad

Runs on simulated cells, or on the tutorial's (`scvi.data.pbmcs_10x_cite_seq()`, 10x's PBMC 10k v3).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import scanpy as sc

import streamx as sx

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, help="h5ad of the reference: counts, proteins, obs batch")
parser.add_argument("--rna", type=Path, help="h5ad of the query: counts")
parser.add_argument("-o", "--output", default="results/totalvi", type=Path)
parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs")


def cells(args: argparse.Namespace) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Reference with proteins, query without."""
    if args.data is not None:
        source, target = anndata.read_h5ad(args.data), anndata.read_h5ad(args.rna)
        target.obs["batch"] = "PBMC 10k (RNA only)"
        source = source[:, source.var_names.isin(target.var_names)].copy()
        sc.pp.highly_variable_genes(source, n_top_genes=4000, flavor="seurat_v3", batch_key="batch")
        return source[:, source.var["highly_variable"]].copy(), target
    files = args.output / "simulated"
    sx.simulate(files, n_cells=1200, n_genes=300, n_proteins=14, n_batches=3, format="h5ad")
    first, second, target = map(anndata.read_h5ad, sorted(files.glob("*.h5ad")))
    del target.obsm["protein_expression"]
    return anndata.concat([first, second]), target


def main() -> None:
    args = parser.parse_args()
    source, target = cells(args)

    sx.setup_anndata(source, batch_key="batch", protein_expression_obsm_key="protein_expression")
    model = sx.TOTALVI(source, use_layer_norm="both", use_batch_norm="none")
    model.train(n_epochs=2 if args.quick else 400)
    model.save(args.output / "reference", overwrite=True)
    query = sx.TOTALVI.load_query_data(target, args.output / "reference", freeze_expression=True)
    query.train(n_epochs=2 if args.quick else 200, weight_decay=0)
    batches = sorted(source.obs["batch"].unique())
    _, proteins = query.get_normalized_expression(n_samples=25, transform_batch=batches)
    target.obsm["imputed"] = proteins
    target.write_h5ad(args.output / "query.h5ad")
    print(proteins.describe().T)


if __name__ == "__main__":
    main()
