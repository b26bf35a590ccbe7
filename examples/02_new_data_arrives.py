"""New data arrive: append to the store, carry the view on, and map the newcomers without training again.

    python examples/02_new_data_arrives.py -o results/append

Runs on the cells that come with streamx (lung cancer cell lines, `streamx/demo/data/SOURCE.md`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import streamx as sx
from streamx.demo import DATA, QUERY
from streamx.preprocess.run import update_view

parser = argparse.ArgumentParser()
parser.add_argument("-o", "--output", default="results/append", type=Path)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    out = args.output
    first, second = sorted(DATA.glob("sc_celseq2*p[12].h5ad"))

    store = sx.convert([first, second], out / "store")
    view = sx.preprocess(store, out / "view")
    sx.train(view, out / "model", max_iteration=100 if args.quick else 1_000)
    print(f"generation {store.generation}: {store.n_obs} cells; the view was made from it")

    # A third plate. Nothing that was written changes: the store gets its next generation.
    grown = sx.convert([DATA / "sc_celseq2_5cl_p3.h5ad"], out / "store", append=True)
    print(f"generation {grown.generation}: {grown.n_obs} cells, batches {grown.batches}")

    # One pass over the new cells, with the genes, totals and old batches' scales that the view already has.
    view = update_view(out / "view")
    print(f"view: {view.n_obs} cells, made from generation {view.view['store_generation']}")

    # The model keeps its own genes and tables: it is never stale, and maps whatever comes.
    for result in sx.project(out / "model", [DATA / f"{QUERY}.h5ad"], out / "mapped"):
        print(result)


if __name__ == "__main__":
    main()
