"""SCALEX's tutorial of projection and label transfer: labels from a reference, compared where both have them.

    python examples/09_label_transfer.py -o results/labels
    python examples/09_label_transfer.py --reference pancreas.h5ad --query new.h5ad --label celltype

Runs on the cells that come with streamx (lung cancer cell lines), or on files with raw counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import streamx as sx
from streamx.demo import DATA, LABEL_KEY, QUERY, REFERENCE

parser = argparse.ArgumentParser()
parser.add_argument("--reference", nargs="+", default=[DATA / f"{name}.h5ad" for name in REFERENCE])
parser.add_argument("--query", nargs="+", default=[DATA / f"{QUERY}.h5ad"])
parser.add_argument("--label", default=LABEL_KEY, help="obs column of both")
parser.add_argument("--batch", default="batch", help="obs column with the batches, in a single file")
parser.add_argument("-o", "--output", default="results/labels", type=Path)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    out, steps = args.output, 100 if args.quick else 3_000
    shared = {"batch_name": args.batch, "show": False, "ignore_umap": True}
    reference = sx.SCALEX(args.reference, outdir=str(out / "reference"), max_iteration=steps, **shared)
    query = sx.SCALEX(
        args.query, projection=str(out / "reference"), repeat=True, outdir=str(out / "mapped"), **shared
    )

    query.obs["transferred"] = sx.scalex.label_transfer(reference, query, rep="latent", label=args.label)
    known = set(reference.obs[args.label]) & set(query.obs[args.label])
    both = query.obs[query.obs[args.label].isin(known)]
    print(pd.crosstab(both[args.label].astype(str), both["transferred"]))
    path = out / "confusion.png"
    f1, nmi, ari = sx.scalex.plot_confusion(both[args.label], both["transferred"], save=path)
    print(f"{len(both):,} cells of {len(known)} shared types: F1 {f1:.3f}, NMI {nmi:.3f}, ARI {ari:.3f}")
    query.obs.to_csv(out / "labels.csv")


if __name__ == "__main__":
    main()
