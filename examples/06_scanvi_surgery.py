"""scArches' scANVI tutorial: a labelled reference, surgery for unlabelled studies, and their labels.

    python examples/06_scanvi_surgery.py -o results/scanvi
    python examples/06_scanvi_surgery.py --data pancreas_normalized.h5ad

Runs on the cells that come with streamx, or on the tutorial's file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata

import streamx as sx
from streamx.demo import DATA, LABEL_KEY, QUERY, REFERENCE

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, help="h5ad: raw counts in .raw, obs study and cell_type")
parser.add_argument("--query", nargs="+", default=["Pancreas CelSeq2", "Pancreas SS2"], help="studies")
parser.add_argument("-o", "--output", default="results/scanvi", type=Path)
parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs")
RULE = {"patience": 10, "threshold": 0, "reduce_lr_on_plateau": True, "lr_patience": 8, "lr_factor": 0.1}
STOPPING = {"early_stopping_kwargs": RULE}
ARCHES = {"n_layers": 2, "encode_covariates": True, "deeply_inject_covariates": False}
ARCHES |= {"use_layer_norm": "both", "use_batch_norm": "none"}


def cells(file: Path | None, query: list[str]) -> tuple[anndata.AnnData, list[str]]:
    """Raw counts with labels, and which studies are the query."""
    if file is not None:
        return anndata.read_h5ad(file).raw.to_adata(), query
    studies = {name: anndata.read_h5ad(DATA / f"{name}.h5ad") for name in (*REFERENCE, QUERY)}
    adata = anndata.concat(studies, label="study", index_unique="-")
    adata.obs["cell_type"] = adata.obs[LABEL_KEY]
    return adata, [QUERY]


def main() -> None:
    args = parser.parse_args()
    adata, query_studies = cells(args.data, args.query)
    is_query = adata.obs["study"].isin(query_studies)
    source, target = adata[~is_query].copy(), adata[is_query].copy()
    base, semi, surgery = (2, 2, 2) if args.quick else (500, 200, 500)
    sx.setup_anndata(source, batch_key="study", labels_key="cell_type")
    model = sx.SCANVI(source, unlabeled_category="Unknown", **ARCHES)
    model.train(base, semi, unsupervised_trainer_kwargs=STOPPING, semisupervised_trainer_kwargs=STOPPING)
    model.save(args.output / "reference", overwrite=True)
    print(f"reference: accuracy {(model.predict() == source.obs['cell_type']).mean():.4f}")

    query = sx.SCANVI.load_query_data(target, args.output / "reference", freeze_dropout=True)
    query._labeled_indices = []  # they are for the accuracy alone
    query.train(n_epochs_semisupervised=surgery, weight_decay=0, semisupervised_trainer_kwargs=STOPPING)
    print(f"query: accuracy {(query.predict() == target.obs['cell_type']).mean():.4f}")


if __name__ == "__main__":
    main()
