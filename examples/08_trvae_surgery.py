"""scArches' trVAE tutorial: studies drawn together by their discrepancy, and surgery for two new ones.

    python examples/08_trvae_surgery.py -o results/trvae
    python examples/08_trvae_surgery.py --data pancreas_normalized.h5ad

Runs on the cells that come with streamx, or on the tutorial's file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata

import streamx as sx
from streamx.demo import DATA, QUERY, REFERENCE

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, help="h5ad: raw counts in .raw, obs study and cell_type")
parser.add_argument("--query", nargs="+", default=["Pancreas CelSeq2", "Pancreas SS2"], help="studies")
parser.add_argument("-o", "--output", default="results/trvae", type=Path)
parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs")
STOPPING = {"early_stopping_metric": "val_unweighted_loss", "threshold": 0, "patience": 20}
STOPPING |= {"reduce_lr": True, "lr_patience": 13, "lr_factor": 0.1}


def cells(file: Path | None, query: list[str]) -> tuple[anndata.AnnData, list[str]]:
    """Raw counts, and which studies are the query."""
    if file is not None:
        return anndata.read_h5ad(file).raw.to_adata(), query
    studies = {name: anndata.read_h5ad(DATA / f"{name}.h5ad") for name in (*REFERENCE, QUERY)}
    return anndata.concat(studies, label="study", index_unique="-"), [QUERY]


def main() -> None:
    args = parser.parse_args()
    adata, query_studies = cells(args.data, args.query)
    is_query = adata.obs["study"].isin(query_studies)
    source, target = adata[~is_query].copy(), adata[is_query].copy()
    training = {"n_epochs": 2 if args.quick else 500, "early_stopping_kwargs": STOPPING}
    training |= {"alpha_epoch_anneal": 1 if args.quick else 200}

    conditions = sorted(source.obs["study"].unique())
    model = sx.TRVAE(source, condition_key="study", conditions=conditions, hidden_layer_sizes=[128, 128])
    model.train(**training)
    model.save(args.output / "reference", overwrite=True)

    query = sx.TRVAE.load_query_data(target, args.output / "reference")
    query.train(**training, weight_decay=0)
    query.save(args.output / "query", overwrite=True)
    adata.obsm["X_trvae"] = query.get_latent(adata.X, adata.obs["study"], mean=True)
    adata.write_h5ad(args.output / "both.h5ad")
    print(query.history.tail(1).T, *query.conditions_, sep="\n")


if __name__ == "__main__":
    main()
