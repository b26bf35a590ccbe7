"""A blood-cell atlas: four studies become the reference, two new ones are mapped onto it and labelled.

    python examples/01_blood_atlas.py FOLDER -o results/blood

FOLDER holds one h5ad per study: raw counts in X, obs columns `study` and `cell_type` (`unknown` where nobody
has labelled a cell). What was used, all from public GitHub repositories:

    pbmc3k         10x v1                       anna-neufeld/countsplit.tutorials; labels rnabioco/clustifyr
    zheng_facs     10x v1, FACS-sorted          stephenslab/fastTopics (Zheng 2017)
    frozen_donorA  10x v1, no labels            JEFworks/MUDAN
    kang_ctrl      10x v1, control              immunogenomics/harmony (Kang 2018)
    pbmc4k         10x v2, query                constantAmateur/SoupX
    kang_stim      10x v1, interferon, query    immunogenomics/harmony (Kang 2018)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import streamx as sx
from streamx.figures import draw

parser = argparse.ArgumentParser()
parser.add_argument("folders", nargs="*", default=[f"{os.environ.get('STREAMX_DATA', 'data')}/pbmc"])
parser.add_argument("-o", "--output", default="results/blood", type=Path)
parser.add_argument(
    "--queries", nargs="+", default=["pbmc4k", "kang_stim"], help="files that are only mapped"
)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    out = args.output
    files = sorted(path for folder in args.folders for path in Path(folder).glob("*.h5ad"))
    if not files:
        parser.error(f"no h5ad in {', '.join(args.folders)}")
    queries = [path for path in files if path.stem in args.queries]
    reference = [path for path in files if path.stem not in args.queries]

    store = sx.convert(reference, out / "store", batch_key="study", join="inner")
    print(f"reference: {store.n_obs:,} cells, {store.n_vars:,} genes that all of {store.batches} measured")
    # SCALEX's own min_features = 600 would drop most cells of the shallow studies
    view = sx.preprocess(store, out / "view", min_features=1)
    sx.train(view, out / "model", seed=args.seed, max_iteration=500 if args.quick else 10_000)
    sx.project(out / "model", queries, out / "mapped")
    found = sx.transfer(out / "model", out / "mapped", label_key="cell_type", truth_key="cell_type")
    print(f"labels: accuracy {found['accuracy']:.3f}, balanced {found['balanced_accuracy']:.3f}")
    scores = sx.metrics(out / "model", out / "mapped", label_key="cell_type")
    print(*(f"{name} {scores[name]:.3f}" for name in scores["details"]), sep="\n")
    print("figures:", *draw(out / "model", out / "mapped", out / "figures", label_key="cell_type"))


if __name__ == "__main__":
    main()
