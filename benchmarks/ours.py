"""Run streamx on a reference and its queries, in a process of its own, and save the latents.

The public Python functions with their defaults, but for ``min_features`` and one thread: one setting for
every data set. Called by ``quality.py``; arguments and output as those of ``peers/scalex_peer.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "peers"))

from clock import clock, peak_rss_mb, pin_threads, since

pin_threads()

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402

import streamx as sx  # noqa: E402

PACKAGES = ("streamx", "torch", "numpy", "zarr", "anndata", "pandas", "scipy", "scikit-learn")


def save(path: Path, adata: ad.AnnData) -> None:
    """Latent and obs as plain arrays."""
    np.savez_compressed(
        path,
        latent=np.asarray(adata.obsm["X_scalex"], dtype=np.float32),
        cell=adata.obs_names.to_numpy(dtype=str),
        batch=adata.obs["batch"].to_numpy(dtype=str),
        cell_type=adata.obs["cell_type"].to_numpy(dtype=str),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True)
    parser.add_argument("--query", action="append", default=[], help="NAME=FILE, any number of times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-iteration", type=int, default=None)
    parser.add_argument("--min-features", type=int, default=1)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    times: dict[str, Any] = {}

    start = begun = clock()
    store = sx.convert([args.reference], out / "store", batch_key="batch", threads=1)
    times["convert"] = since(start)
    start = clock()
    view = sx.preprocess(store, out / "view", min_features=args.min_features, threads=1)
    times["preprocess"] = since(start)
    start = clock()
    limit = {} if args.max_iteration is None else {"max_iteration": args.max_iteration}
    trained = sx.train(view, out / "model", seed=args.seed, device="cpu", threads=1, progress=False, **limit)
    times["train"] = since(start)
    times["reference"] = since(begun)
    reference = ad.read_zarr(out / "model" / "reference.zarr")
    save(out / "reference.npz", reference)

    counts = {"reference": reference.n_obs}
    for item in args.query:
        name, _, path = item.partition("=")
        start = clock()
        sx.project(out / "model", {name: path}, out / "mapped", device="cpu", threads=1)
        times[f"project {name}"] = since(start)
        query = ad.read_zarr(out / "mapped" / f"{name}.zarr")
        counts[name] = query.n_obs
        save(out / f"{name}.npz", query)

    result = {
        "steps": trained.steps,
        "n_genes": view.n_vars,
        "n_cells": counts,
        "times": times,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (out / "run.json").write_text(json.dumps(result, indent=1))
    shutil.rmtree(out / "store")


if __name__ == "__main__":
    main()
