"""Train a count model of streamx, map queries by surgery, in a process of its own, and save the latents.

The public Python functions with the models' defaults (scVI, scANVI: ``arches``), but for the number of
epochs and one thread: one setting for every data set. Called by ``quality.py``; arguments and output as those
of ``peers/scvi_peer.py``. Query files are handed over without their labels.
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
import asked  # noqa: E402

import streamx as sx  # noqa: E402

PACKAGES = ("streamx", "torch", "numpy", "zarr", "anndata", "pandas", "scipy", "scikit-learn")
DEVICE = {"device": "cpu", "threads": 1, "progress": False}


def trained(args: argparse.Namespace, view: Any, folder: Path) -> tuple[Path, int]:
    """The reference model, made unless it is there, and its training steps; scANVI on top of a scVI."""
    settings: dict[str, Any] = {"seed": args.seed, "minibatch_size": args.minibatch_size} | DEVICE
    arches = {} if args.kind == "trvae" else {"arches": True}
    base = folder / f"{args.kind.replace('scanvi', 'scvi')}-{args.seed}-e{args.epochs}"
    first = sx.train(
        view, base, model=base.name.partition("-")[0], max_epochs=args.epochs, **arches, **settings
    )
    if args.kind != "scanvi":
        return base, first.steps
    model = folder / f"scanvi-{args.seed}-e{args.epochs}-{args.labelled_epochs}"
    settings |= {"label_key": "cell_type", "unlabeled": asked.UNKNOWN, "init": str(base)}
    second = sx.train(view, model, model="scanvi", max_epochs=args.labelled_epochs, **arches, **settings)
    return model, first.steps + second.steps


def main() -> None:
    args = asked.parser(__doc__).parse_args()
    folder, out = Path(args.models), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    (out / "queries").mkdir(parents=True)
    times: dict[str, Any] = {}

    begun = clock()
    if not (folder / "counts" / "streamx.json").exists():
        store = sx.convert([args.reference], folder / "counts-store", batch_key="batch", threads=1)
        sx.preprocess(store, folder / "counts", profile="counts", genes=args.genes, threads=1)
    view = sx.open(folder / "counts")
    start = clock()
    model, steps = trained(args, view, folder)
    times["train"], times["reference"] = since(start), since(begun)
    key = f"X_{args.kind}"
    reference = ad.read_zarr(model / "reference.zarr")
    asked.save(out / "reference.npz", reference.obsm[key], reference.obs_names, args.reference)

    counts = {"reference": reference.n_obs}
    for name, path in args.query:
        hidden = ad.read_h5ad(path)
        del hidden.obs["cell_type"]
        hidden.write_h5ad(out / "queries" / f"{name}.h5ad")
        start = clock()
        sx.surgery(
            model,
            {name: str(out / "queries" / f"{name}.h5ad")},
            out / "updated",
            max_epochs=args.query_epochs,
            minibatch_size=args.minibatch_size,
            seed=args.seed,
            **DEVICE,
        )
        times[f"surgery {name}"] = since(start)
        query = ad.read_zarr(out / "updated" / "added" / f"{name}.zarr")
        counts[name] = query.n_obs
        asked.save(out / f"{name}.npz", query.obsm[key], query.obs_names, path)

    result = {
        "steps": steps,
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
