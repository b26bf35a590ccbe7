"""Run trVAE of scArches 0.6.1 on a reference, map queries by surgery, and save the latents.

Needs only the peer's packages. Called by ``quality.py``. scArches installs with ``pip install --no-deps
scArches==0.6.1 requests`` beside scvi-tools; what it imports and trVAE never uses is replaced by empty
modules, and ``anndata.read``, which is gone, lent to it. Settings are its documented defaults, but for the
number of epochs: early stopping with patience 20, learning rate lowered after 7 epochs (0.6.1's own: 13).
In surgery dropout is removed and weight decay 0, as its documentation has it. Matrices are dense.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clock import clock, peak_rss_mb, pin_threads, since

pin_threads()

import anndata as ad  # noqa: E402
import asked  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

PACKAGES = ("scArches", "torch", "numpy", "anndata", "pandas", "scipy")
STOPPING = {
    "early_stopping_metric": "val_unweighted_loss",
    "threshold": 0,
    "patience": 20,
    "reduce_lr": True,
    "lr_patience": 7,
    "lr_factor": 0.1,
}


class Empty(types.ModuleType):
    """A module with every name in it."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def imported() -> Any:
    """The class TRVAE."""
    setattr(ad, "read", ad.read_h5ad)  # noqa: B010
    for name in ("scHPL", "scHPL.learn", "scHPL.predict", "scHPL.utils", "scHPL.train", "scHPL.evaluate"):
        sys.modules.setdefault(name, Empty(name))
    logging.disable(logging.WARNING)
    from scarches.models import TRVAE

    return TRVAE


def dense(path: str, genes: list[str]) -> ad.AnnData:
    """Cells of a file with these genes; those that it lacks are zero."""
    adata = ad.read_h5ad(path)
    at = adata.var_names.get_indexer(genes)
    x_ng = np.zeros((adata.n_obs, len(genes)), np.float32)
    x_ng[:, at >= 0] = adata.X[:, at[at >= 0]].toarray()
    found = ad.AnnData(x_ng, obs=adata.obs[["batch"]].copy())
    found.var_names = genes
    return found


def latent(model: Any, adata: ad.AnnData) -> np.ndarray:
    return model.get_latent(adata.X, adata.obs["batch"].to_numpy(dtype=str), mean=True)


def main() -> None:
    args = asked.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    cls = imported()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    genes = Path(args.genes).read_text().split("\n")[:-1]
    settings = {"batch_size": args.minibatch_size, "early_stopping_kwargs": STOPPING, "seed": args.seed}
    times: dict[str, Any] = {}

    start = clock()
    np.random.seed(args.seed)  # noqa: NPY002 - the package draws from it
    torch.manual_seed(args.seed)
    adata = dense(args.reference, genes)
    model = cls(adata, condition_key="batch")
    with contextlib.redirect_stdout(None):
        model.train(n_epochs=args.epochs, monitor=False, **settings)
    times["train"] = times["reference"] = since(start)
    asked.save(out / "reference.npz", latent(model, adata), adata.obs_names, args.reference)
    model.save(str(out / "model"), overwrite=True)  # an in-memory reference would be changed by surgery
    epochs = {"reference": model.trainer.epoch + 1}
    counts = {"reference": adata.n_obs}
    for name, path in args.query:
        start = clock()
        query = dense(path, genes)
        np.random.seed(args.seed)  # noqa: NPY002
        torch.manual_seed(args.seed)
        mapped = cls.load_query_data(query, str(out / "model"), remove_dropout=True)
        with contextlib.redirect_stdout(None):
            mapped.train(n_epochs=args.query_epochs, monitor=False, weight_decay=0, **settings)
        times[f"surgery {name}"] = since(start)
        epochs[name], counts[name] = mapped.trainer.epoch + 1, query.n_obs
        asked.save(out / f"{name}.npz", latent(mapped, query), query.obs_names, path)
    result = {
        "steps": epochs["reference"] * -(-round(0.9 * adata.n_obs) // args.minibatch_size),
        "epochs_done": epochs,
        "n_genes": adata.n_vars,
        "n_cells": counts,
        "times": times,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (out / "run.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
