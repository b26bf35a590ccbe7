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


def reference_view(folder: Path, file: str, filters: dict[str, int], times: dict[str, Any]) -> Any:
    """The view of the reference, made unless it is there."""
    if not (folder / "view" / "streamx.json").exists():
        start = clock()
        store = sx.convert([file], folder / "store", batch_key="batch", threads=1)
        times["convert"] = since(start)
        start = clock()
        sx.preprocess(store, folder / "view", threads=1, **filters)
        times["preprocess"] = since(start)
    return sx.open(folder / "view")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True)
    parser.add_argument("--query", action="append", default=[], help="NAME=FILE, any number of times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-iteration", type=int, required=True)
    parser.add_argument("--min-features", type=int, default=1)
    parser.add_argument("--min-cells", type=int, default=3)
    parser.add_argument("--norm", default="matched", help="statistics of the encoder's batch norm")
    parser.add_argument("--n-latent", type=int, default=10)
    parser.add_argument("--also", nargs="*", default=[], help="norms by which the same weights map it too")
    parser.add_argument("--models", required=True, help="folder of store, view and models of this data set")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    folder, out = Path(args.models), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    kind = "" if args.norm == "matched" else f"-{args.norm}"
    kind += "" if args.n_latent == 10 else f"-k{args.n_latent}"
    model = folder / f"model-{args.seed}-i{args.max_iteration}{kind}"
    times: dict[str, Any] = {}

    begun = clock()
    filters = {"min_features": args.min_features, "min_cells": args.min_cells}
    view = reference_view(folder, args.reference, filters, times)
    start = clock()
    trained = sx.train(
        view,
        model,
        seed=args.seed,
        max_iteration=args.max_iteration,
        norm=args.norm,
        n_latent=args.n_latent,
        device="cpu",
        threads=1,
        progress=False,
    )
    times["train"] = since(start)
    times["reference"] = since(begun)
    # a model that was there already keeps the times of the run that trained it
    kept = model.with_name(f"{model.name}.times.json")
    if kept.exists():
        times = json.loads(kept.read_text())
    else:
        kept.write_text(json.dumps(times))
    reference = ad.read_zarr(model / "reference.zarr")
    save(out / "reference.npz", reference)

    # what training with that norm would write: the weights are the same, maxima and statistics are its own
    own = {"batch_key": "batch", "scale": "query", "min_query_cells": 1, "min_features": args.min_features}
    for norm in args.also:
        start = clock()
        mapped = {norm: args.reference}
        sx.project(model, mapped, out / "mapped", norm=norm, device="cpu", threads=1, progress=False, **own)
        times[f"norm {norm}"] = since(start)
        save(out / f"{norm}.npz", ad.read_zarr(out / "mapped" / f"{norm}.zarr"))

    counts = {"reference": reference.n_obs}
    for item in args.query:
        name, _, path = item.partition("=")
        start = clock()
        sx.project(model, {name: path}, out / "mapped", device="cpu", threads=1, progress=False)
        times[f"project {name}"] = since(start)
        query = ad.read_zarr(out / "mapped" / f"{name}.zarr")
        counts[name] = query.n_obs
        save(out / f"{name}.npz", query)

    result = {
        "steps": trained.steps,
        "model": json.loads((model / "model.json").read_text())["id"],
        "n_genes": view.n_vars,
        "n_cells": counts,
        "times": times,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (out / "run.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
