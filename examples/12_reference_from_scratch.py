"""scArches' notebook of a reference from scratch: build it, judge it, share it, and fetch it again.

    python examples/12_reference_from_scratch.py -o results/shared
    ZENODO_SANDBOX_TOKEN=... python examples/12_reference_from_scratch.py --creator "Doe, Jane"

With a token of Zenodo's sandbox it uploads the model as a draft, which is not published; fetch takes what is
published, also of scArches: `streamx fetch 10.5281/zenodo.NUMBER -o model`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata

import streamx as sx
from streamx.demo import DATA, LABEL_KEY, REFERENCE

parser = argparse.ArgumentParser()
parser.add_argument("--creator", nargs="+", default=["Doe, Jane"], help="who made the model")
parser.add_argument("-o", "--output", default="results/shared", type=Path)
parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    plates = {name: anndata.read_h5ad(DATA / f"{name}.h5ad") for name in REFERENCE}
    adata = anndata.concat(plates, label="plate", index_unique="-")
    sx.setup_anndata(adata, batch_key="plate", labels_key=LABEL_KEY)
    model = sx.SCVI(adata, n_layers=2, encode_covariates=True, deeply_inject_covariates=False)
    model.train(n_epochs=2 if args.quick else 200)

    judged = sx.SCVI_EVAL(model, cell_type_key=LABEL_KEY)
    print(judged.get_model_arch().tail(3))
    print(f"entropy of batch mixing {judged.get_ebm():.3f}, k-NN purity {judged.get_knn_purity():.3f}")
    judged.plot_latent(show=False, save=True, dir_path=args.output)

    folder = args.output / "lung-lines"
    model.save(folder, overwrite=True)
    print((folder / "README.md").read_text())  # the card, which `streamx info` shows and `publish` puts up
    if os.environ.get("ZENODO_SANDBOX_TOKEN"):
        print(sx.publish(folder, sandbox=True, draft=True, creator=args.creator))
    else:
        print("no ZENODO_SANDBOX_TOKEN: not uploaded")


if __name__ == "__main__":
    main()
