"""Train totalVI of streamx, map cells without proteins by surgery, and decode their proteins.

The public Python functions with the model's defaults, but for the number of epochs and one thread; proteins
come from the network that they wrote. Called by ``proteins.py``, in a process of its own.
"""

from __future__ import annotations

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
import numpy as np  # noqa: E402
import torch  # noqa: E402

import streamx as sx  # noqa: E402
from streamx.models.cells import Cells  # noqa: E402
from streamx.train.model import Model, load_model  # noqa: E402

PACKAGES = ("streamx", "torch", "numpy", "zarr", "anndata")
BLOCK = 512


@torch.no_grad()
def decoded(model: Model, query: ad.AnnData, batch: str, n_draws: int, seed: int) -> np.ndarray:
    """Foreground mean x its probability as of a batch, mean over draws, (n_cells, n_proteins)."""
    schema, module = model.schema, model.module.eval()
    generator = torch.Generator().manual_seed(seed)
    assert list(query.var_names) == list(schema.genes)
    own, asked_for = (schema.batches.index(name) for name in (query.obs["batch"].iloc[0], batch))
    found = []
    for low in range(0, query.n_obs, BLOCK):
        x_ng = torch.from_numpy(query.X[low : low + BLOCK].toarray().astype(np.float32))
        cells = Cells(
            x_ng,
            torch.full((len(x_ng),), own),
            protein_np=torch.zeros(len(x_ng), len(schema.proteins)),
        )
        total_np = torch.zeros(len(x_ng), len(schema.proteins))
        for _ in range(n_draws):
            latent = module.infer(cells, generator)
            proteins = module.decode(latent.z_nk, latent.library_n, cells, asked_for, generator).proteins
            total_np += proteins.means[1] * torch.sigmoid(-proteins.mixing_np)
        found.append((total_np / n_draws).numpy())
    return np.concatenate(found)


def main() -> None:
    args = asked.proteins_parser(__doc__).parse_args()
    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    free: dict[str, Any] = {"device": "cpu", "threads": 1, "progress": False}
    settings = {"seed": args.seed, "minibatch_size": args.minibatch_size} | free
    times: dict[str, Any] = {}

    start = clock()
    store = sx.convert([args.reference], out / "store", batch_key="batch", threads=1)
    view = sx.preprocess(store, out / "view", profile="counts", n_top_features=0, min_cells=0, threads=1)
    trained = sx.train(view, out / "model", model="totalvi", max_epochs=args.epochs, **settings)
    times["reference"] = since(start)
    query = ad.read_h5ad(args.query)
    name = str(query.obs["batch"].iloc[0])
    start = clock()
    sx.surgery(out / "model", {name: args.query}, out / "updated", max_epochs=args.query_epochs, **settings)
    times["surgery"] = since(start)
    start = clock()
    model = load_model(out / "updated")
    assert list(model.schema.proteins) == list(ad.read_h5ad(args.reference).obsm["protein_expression"])
    np.save(out / "proteins.npy", decoded(model, query, args.batch, args.draws, args.seed))
    times["decode"] = since(start)
    result = {
        "steps": trained.steps,
        "epochs_done": trained.epochs,
        "loss": trained.loss,
        "model": json.loads((out / "model" / "model.json").read_text())["id"],
        "proteins": list(model.schema.proteins),
        "n_cells": {"reference": view.n_obs, name: query.n_obs},
        "times": times,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (out / "run.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
