"""Run SCALEX 1.0.4 (PyPI) on a reference and its queries, in a process of its own, and save the latents.

Needs only the peer's packages. Called by ``quality.py``; by hand::

    python benchmarks/peers/scalex_peer.py --reference reference.h5ad --query pbmc4k=pbmc4k.h5ad \
        --seed 0 --max-iteration 30000 --out runs/pbmc_map-0

SCALEX's defaults everywhere, but for min_features. Its release does not run on today's packages, so two
names are lent to it: ``np.Inf`` (gone in numpy 2), and ``torch.load`` with ``weights_only=False`` (its
config.pt holds a pandas Index). Projection is called with ``repeat=True``: the other way raises NameError
in 1.0.4. ``num_workers=0``: its worker processes would hide part of the CPU time, and change no result.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clock import clock, peak_rss_mb, pin_threads, since

pin_threads()

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

PACKAGES = ("scalex", "torch", "numpy", "scanpy", "anndata", "pandas", "scipy", "scikit-learn")


def lend_names() -> None:
    """Give SCALEX 1.0.4 the two names that newer numpy and torch took away."""
    setattr(np, "Inf", np.inf)  # noqa: B010
    load = torch.load

    def load_trusted(*args: Any, **kwargs: Any) -> Any:
        kwargs["weights_only"] = False
        return load(*args, **kwargs)

    torch.load = load_trusted


def save(path: Path, adata: ad.AnnData) -> None:
    """Latent and obs as plain arrays, so that the scoring side needs none of the peer's packages."""
    np.savez_compressed(
        path,
        latent=adata.obsm["latent"].astype(np.float32),
        cell=adata.obs_names.to_numpy(dtype=str),
        batch=adata.obs["batch"].to_numpy(dtype=str),
        cell_type=adata.obs["cell_type"].to_numpy(dtype=str),
    )


def watch_fit(times: dict[str, Any], steps: list[int]) -> None:
    """Note how long training alone takes and how many steps it makes, without changing it."""
    from scalex.net.utils import EarlyStopping
    from scalex.net.vae import VAE

    fit, judge = VAE.fit, EarlyStopping.__call__

    def timed(self: Any, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        start = clock()
        epochs.clear()
        fit(self, dataloader, *args, **kwargs)
        times["fit"] = since(start)
        steps.append(len(epochs) * len(dataloader))

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        epochs.append(1)
        return judge(self, *args, **kwargs)

    epochs: list[int] = []
    VAE.fit, EarlyStopping.__call__ = timed, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True)
    parser.add_argument("--query", action="append", default=[], help="NAME=FILE, any number of times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-iteration", type=int, default=30_000)
    parser.add_argument("--min-features", type=int, default=1)
    parser.add_argument("--min-cells", type=int, default=3)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    lend_names()
    from scalex import SCALEX

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    times: dict[str, Any] = {}
    steps: list[int] = []
    watch_fit(times, steps)
    settings = {"min_features": args.min_features, "min_cells": args.min_cells, "seed": args.seed}
    settings |= {"num_workers": 0, "ignore_umap": True}

    start = clock()
    reference = SCALEX(
        ad.read_h5ad(args.reference), max_iteration=args.max_iteration, outdir=str(out / "model"), **settings
    )
    times["reference"] = since(start)
    save(out / "reference.npz", reference)

    counts = {"reference": reference.n_obs}
    for item in args.query:
        name, _, path = item.partition("=")
        start = clock()
        query = SCALEX(ad.read_h5ad(path), projection=str(out / "model"), repeat=True, **settings)
        times[f"project {name}"] = since(start)
        counts[name] = query.n_obs
        save(out / f"{name}.npz", query)

    result = {
        "steps": steps[0],
        "n_genes": reference.n_vars,
        "n_cells": counts,
        "times": times,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (out / "run.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
