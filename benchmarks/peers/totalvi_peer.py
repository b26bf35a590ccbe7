"""Train TOTALVI of scvi-tools 1.4.2, map cells without proteins by surgery, and decode their proteins.

Needs only the peer's packages. Called by ``proteins.py``, in a process of its own. Defaults but for the
number of epochs; weight decay 0 in surgery. The query's proteins are zeros, as the documentation has it.
"""

from __future__ import annotations

import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clock import clock, peak_rss_mb, pin_threads, since

pin_threads()

import anndata as ad  # noqa: E402
import asked  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402

PACKAGES = ("scvi-tools", "torch", "numpy", "anndata", "pandas", "lightning")
KEY = "protein_expression"


def main() -> None:
    args = asked.proteins_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    scvi.settings.seed = args.seed
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    out = Path(args.out)
    times: dict[str, Any] = {}
    fit = {"batch_size": args.minibatch_size, "enable_progress_bar": False, "accelerator": "cpu"}

    start = clock()
    reference = ad.read_h5ad(args.reference)
    names = list(reference.obsm[KEY].columns)
    scvi.model.TOTALVI.setup_anndata(reference, protein_expression_obsm_key=KEY, batch_key="batch")
    model = scvi.model.TOTALVI(reference)
    model.train(args.epochs, **fit)
    times["reference"] = since(start)
    start = clock()
    query = ad.read_h5ad(args.query)
    query.obsm[KEY] = pd.DataFrame(0.0, query.obs_names, names)
    scvi.settings.seed = args.seed
    mapped = scvi.model.TOTALVI.load_query_data(query, model, accelerator="cpu")
    mapped.train(args.query_epochs, plan_kwargs={"weight_decay": 0.0}, **fit)
    times["surgery"] = since(start)
    start = clock()
    _, found = mapped.get_normalized_expression(
        query, n_samples=args.draws, return_mean=True, transform_batch=[args.batch]
    )
    np.save(out / "proteins.npy", found[names].to_numpy(dtype=np.float32))
    times["decode"] = since(start)
    per_epoch = -(-round(0.9 * reference.n_obs) // args.minibatch_size)
    epochs = len(model.history["elbo_train"])
    result = {
        "steps": epochs * per_epoch,
        "epochs_done": epochs,
        "n_cells": {"reference": reference.n_obs, "query": query.n_obs},
        "times": times,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (out / "run.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
