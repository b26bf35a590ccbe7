"""Run SCVI or SCANVI of scvi-tools 1.4.2 on a reference, map queries by surgery, and save the latents.

Needs only the peer's packages. Called by ``quality.py``. scArches' settings of the network, the defaults of
training but for the number of epochs, weight decay 0 in surgery (as its documentation asks for). SCANVI
begins from the SCVI of the same seed, which is kept in ``--models``.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clock import clock, peak_rss_mb, pin_threads, since

pin_threads()

import anndata as ad  # noqa: E402
import asked  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402

PACKAGES = ("scvi-tools", "torch", "numpy", "anndata", "pandas", "scipy", "lightning")
ARCHES = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1, "logger": None}


def reference_model(args: argparse.Namespace, adata: ad.AnnData, folder: Path) -> tuple[Any, int]:
    """The trained model, and its training steps."""
    labels = {"labels_key": "cell_type"} if args.kind == "scanvi" else {}
    base = folder / f"scvi-{args.seed}-e{args.epochs}"
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    if base.exists():
        model = scvi.model.SCVI.load(str(base), adata=adata, accelerator="cpu")
    else:
        model = scvi.model.SCVI(adata, **ARCHES)
        model.train(args.epochs, batch_size=args.minibatch_size, **QUIET)
        model.save(str(base))
    per_epoch = -(-round(0.9 * adata.n_obs) // args.minibatch_size)
    if not labels:
        return model, args.epochs * per_epoch
    scvi.settings.seed = args.seed
    model = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category=asked.UNKNOWN, **labels)
    model.train(args.labelled_epochs, batch_size=args.minibatch_size, **QUIET)
    return model, (args.epochs + args.labelled_epochs) * per_epoch


def main() -> None:
    args = asked.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    scvi.settings.seed = args.seed
    scvi.settings.dl_num_workers = 0
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    out, folder = Path(args.out), Path(args.models)
    out.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    genes = Path(args.genes).read_text().split("\n")[:-1]
    cls = {"scvi": scvi.model.SCVI, "scanvi": scvi.model.SCANVI}[args.kind]
    times: dict[str, Any] = {}

    start = clock()
    adata = ad.read_h5ad(args.reference)[:, genes].copy()
    model, steps = reference_model(args, adata, folder)
    times["train"] = times["reference"] = since(start)
    asked.save(out / "reference.npz", model.get_latent_representation(), adata.obs_names, args.reference)
    counts = {"reference": adata.n_obs}
    for name, path in args.query:
        query = ad.read_h5ad(path)
        del query.obs["cell_type"]
        start = clock()
        cls.prepare_query_anndata(query, model)
        scvi.settings.seed = args.seed
        mapped = cls.load_query_data(query, model, accelerator="cpu")
        mapped.train(
            args.query_epochs,
            batch_size=args.minibatch_size,
            plan_kwargs={"weight_decay": 0.0},
            **QUIET,
        )
        latent = mapped.get_latent_representation()
        times[f"surgery {name}"] = since(start)
        counts[name] = query.n_obs
        asked.save(out / f"{name}.npz", latent, query.obs_names, path)
    result = {
        "steps": steps,
        "n_genes": adata.n_vars,
        "n_cells": counts,
        "times": times,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (out / "run.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
