"""SCALEX's one call, with SCALEX's arguments and output files, within bounded memory.

    python examples/03_like_scalex.py -o results/scalex

Runs on the cells that come with streamx (lung cancer cell lines, `streamx/demo/data/SOURCE.md`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import streamx as sx
from streamx.demo import DATA, QUERY, REFERENCE

parser = argparse.ArgumentParser()
parser.add_argument("-o", "--output", default="results/scalex", type=Path)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    plates = [f"{DATA}/{name}.h5ad" for name in REFERENCE]
    steps = 100 if args.quick else 1_000

    reference = sx.SCALEX(
        plates, batch_categories=list(REFERENCE), outdir=str(args.output / "reference"), max_iteration=steps
    )
    print(reference)

    both = sx.SCALEX(
        [f"{DATA}/{QUERY}.h5ad"],
        batch_categories=[QUERY],
        projection=str(args.output / "reference"),
        outdir=str(args.output / "mapped"),
    )
    print(both.obs.groupby("projection", observed=True)["cell_line"].value_counts())


if __name__ == "__main__":
    main()
