"""scArches' scVI tutorial: a reference without labels, and surgery for two studies that it has not seen.

    python examples/05_scvi_surgery.py -o results/scvi
    python examples/05_scvi_surgery.py --data pancreas_normalized.h5ad

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
parser.add_argument("-o", "--output", default="results/scvi", type=Path)
parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs")
STOPPING = {"early_stopping_metric": "elbo", "patience": 10, "threshold": 0}
STOPPING |= {"reduce_lr_on_plateau": True, "lr_patience": 8, "lr_factor": 0.1}
ARCHES = {"n_layers": 2, "encode_covariates": True, "deeply_inject_covariates": False}
ARCHES |= {"use_layer_norm": "both", "use_batch_norm": "none"}


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
    epochs = 2 if args.quick else 500

    sx.setup_anndata(source, batch_key="study")
    model = sx.SCVI(source, **ARCHES)
    model.train(n_epochs=epochs, frequency=1, early_stopping_kwargs=STOPPING)
    model.save(args.output / "reference", overwrite=True)

    query = sx.SCVI.load_query_data(target, args.output / "reference", freeze_dropout=True)
    query.train(n_epochs=epochs, frequency=1, early_stopping_kwargs=STOPPING, weight_decay=0)
    adata.obsm["X_scvi"] = query.get_latent_representation(adata)  # the reference's are what they were
    adata.write_h5ad(args.output / "both.h5ad")
    print(f"{source.n_obs:,} + {target.n_obs:,} cells, ELBO of the query {query.get_elbo():.1f}")


if __name__ == "__main__":
    main()
