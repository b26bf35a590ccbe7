"""scvi-tools 1.4.2 on cells in memory, in a process of its own: how fast its own ``train`` is.

Needs only the peer's packages. Called by ``count_training.py``; prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from importlib.metadata import version
from typing import Any

from clock import clock, peak_rss_mb, pin_threads, since

pin_threads()
warnings.simplefilter("ignore")

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402

LOSS = {"scvi": "train_loss", "scanvi": "train_loss", "totalvi": "reconstruction_loss_train"}


def model_of(kind: str, adata: ad.AnnData) -> Any:
    """With the package's defaults."""
    if kind == "totalvi":
        scvi.model.TOTALVI.setup_anndata(
            adata, batch_key="batch", protein_expression_obsm_key="protein_expression"
        )
        return scvi.model.TOTALVI(adata)
    if kind == "scvi":
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        return scvi.model.SCVI(adata)
    scvi.model.SCANVI.setup_anndata(adata, "cell_type", "unknown", batch_key="batch")
    return scvi.model.SCANVI(adata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="h5ad of raw counts")
    parser.add_argument("--model", choices=tuple(LOSS), required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="keep the counts as a dense matrix")
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    scvi.settings.verbosity = 40
    scvi.settings.seed = args.seed
    adata = ad.read_h5ad(args.data)
    if args.dense:
        adata.X = adata.X.toarray()
    options = {"accelerator": args.accelerator, "enable_progress_bar": False, "enable_model_summary": False}
    few = adata[np.random.default_rng(0).permutation(adata.n_obs)[:1000]].copy()
    model_of(args.model, few).train(max_epochs=1, **options)  # what a first call loads and allocates
    model = model_of(args.model, adata)
    start = clock()
    model.train(max_epochs=args.epochs, **options)
    spent = since(start)
    packages = ("scvi-tools", "torch", "lightning", "numpy", "anndata")
    result = {
        "cells": args.epochs * len(model.train_indices),
        "losses": [float(value) for value in model.history[LOSS[args.model]].iloc[:, 0]],
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }
    print(json.dumps({"seed": args.seed, **result, **spent}))


if __name__ == "__main__":
    main()
