"""One page of what was mapped onto what: open it in any browser, send it by mail.

    python examples/13_report.py -o results/report

Runs on the cells that come with streamx (lung cancer cell lines, `streamx/demo/data/SOURCE.md`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata

import streamx as sx
from streamx.demo import DATA, LABEL_KEY, QUERY

parser = argparse.ArgumentParser()
parser.add_argument("-o", "--output", default="results/report", type=Path)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    out = args.output

    store = sx.convert(sorted(DATA.glob("sc_celseq2*.h5ad")), out / "store")
    sx.train(sx.preprocess(store, out / "view"), out / "model", max_iteration=100 if args.quick else 1_000)
    sx.project(out / "model", [DATA / f"{QUERY}.h5ad"], out / "mapped")
    sx.transfer(out / "model", out / "mapped", label_key=LABEL_KEY)
    print(sx.report(out / "mapped", out / "report.html", model=out / "model"))

    # The flows of the page as a figure of their own, from counts: cells can be counted piece by piece.
    obs = anndata.read_zarr(out / "mapped" / f"{QUERY}.zarr").obs
    counts = sx.pl.crosstab(obs[LABEL_KEY], obs[f"{LABEL_KEY}_pred"])
    sx.pl.sankey(counts=counts, save_path=out / "sankey.png", labels=("given", "transferred"))


if __name__ == "__main__":
    main()
