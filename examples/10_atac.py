"""SCALEX's tutorial of chromatin accessibility: peaks of several batches, integrated and scored.

    python examples/10_atac.py -o results/atac
    python examples/10_atac.py --data mouse_brain_atac.h5ad --label celltype

Runs on simulated peaks, or on files of raw counts with an obs column batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import streamx as sx

parser = argparse.ArgumentParser()
parser.add_argument("--data", nargs="+", type=Path, help="h5ad: cells x peaks")
parser.add_argument("--label", default="cell_type", help="obs column, to score with")
parser.add_argument("-o", "--output", default="results/atac", type=Path)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    files, out = args.data, args.output
    if files is None:
        simulated = {"n_cells": 1_500 if args.quick else 20_000, "n_genes": 2_000, "n_batches": 3}
        sx.simulate(out / "simulated", features="peaks", format="h5ad", **simulated)
        files = sorted((out / "simulated").glob("*.h5ad"))

    store = sx.convert(files, out / "store")
    # peaks open in about half of the cells vary most; values are ones, scaled per cell and within the batch
    view = sx.preprocess(store, out / "view", profile="ATAC", n_top_features=1_000, min_features=10)
    print(f"{view.n_obs:,} cells, {view.n_vars:,} variable peaks")
    sx.train(view, out / "model", max_iteration=100 if args.quick else 10_000)

    scores = sx.metrics(out / "model", label_key=args.label)
    print({name: scores[name] for name in ("batch_entropy_mixing", "ilisi", "asw_label", "nmi")})


if __name__ == "__main__":
    main()
