"""How fast SCALEX trains and projects on one CPU thread: the package itself, ours from disk and from memory.

    python benchmarks/training.py --sets pbmc synthetic --peer-python PEER/bin/python --repeats 5

All ways get the same cells, genes, transformed values, minibatches of 64 and number of epochs. Every run is
a process of its own with pinned threads; runs of all ways alternate, each with another seed. Clocks run from
the first minibatch on: what reads and prepares the cells for the package, and compiles our inner loops, is
not counted. CPU seconds (user + system, of all threads) are what to compare on a shared machine.

* scalex own: SCALEX 1.0.4, its dataset and DataLoader (in the same process), its loop.
* scalex patched: its network and loop, fed from a dense matrix in memory, with a fused Adam.
* streamx: from a view on disk. streamx memory: the same from minibatches that lie ready in memory.
* project: latents of all cells by the trained network, package (own loader) and ours (from the view on disk).

One JSON line per run and one summary per set, also appended to ``results/training.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE / "peers"))

from clock import clock, peak_rss_mb, pin_threads, since  # noqa: E402

RESULTS = HERE / "results" / "training.jsonl"
MINIBATCH = 64
TRAINING = ("streamx", "streamx memory", "scalex own", "scalex patched")
PROJECTION = ("streamx project", "scalex project")
PEER_PROJECTS = 4_000  # cells: enough for a rate


# -- data ------------------------------------------------------------------------------------------------


def prepare(name: str, folder: Path, n_cells: int) -> None:
    """``view``, and ``cells.npz``: its transformed values, for the ways that work in memory."""
    import numpy as np

    import streamx as sx

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "view" / "streamx.json").exists():
        if name == "synthetic":
            from preprocess import write_h5ad

            source = folder / "data.h5ad"
            write_h5ad(source, n_cells, 20_000)
        else:
            from sets import SETS, write_inputs

            source = write_inputs(SETS["pbmc_map"], folder)["reference"]
        store = sx.convert(source, folder / "store", batch_key="batch", threads=1)
        sx.preprocess(store, folder / "view", min_features=1, threads=1)
    if not (folder / "cells.npz").exists():
        import torch

        from streamx.train.feed import all_inputs, make_loader

        view = sx.open(folder / "view")
        parts = list(all_inputs(make_loader(view, 4096, device=torch.device("cpu"), order="sequential")))
        first = [np.diff(x.first_n) for x, _ in parts]
        np.savez(
            folder / "cells.npz",
            indptr=np.cumsum(np.concatenate([[0], *first])),
            indices=np.concatenate([x.gene_v for x, _ in parts]),
            # a gene's largest value may come out as 1 + 1e-7, which torch refuses as a target of its loss
            data=np.minimum(np.concatenate([x.value_v for x, _ in parts]), 1),
            n_genes=view.n_vars,
            batch=view.batch_codes,
        )


# -- one run of ours ---------------------------------------------------------------------------------------


def run_ours(way: str, folder: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Train or project in this process, with what ``streamx train`` itself is made of."""
    import torch

    import streamx as sx
    from streamx.models.scalex import Scalex
    from streamx.train.early_stopping import EarlyStopping
    from streamx.train.feed import make_loader, training_inputs
    from streamx.train.fit import State, fit, make_optimizer
    from streamx.train.latent import latents
    from streamx.train.scalex import named_losses

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    view = sx.open(folder / "view")
    module = Scalex(view.n_vars, len(view.batches), generator=torch.Generator().manual_seed(seed))
    if way == "streamx project":
        latents(module, view, "running")  # compiles, and brings the view into the page cache
        passes = max(1, 100_000 // view.n_obs)
        start = clock()
        for _ in range(passes):
            latents(module, view, "running")
        return {"cells": passes * view.n_obs, "losses": [], **since(start)}
    loader = make_loader(view, MINIBATCH, device=cpu, drop_last=True, seed=seed)
    minibatches = partial(training_inputs, loader, module.config.n_latent, seed)
    few = [minibatch for minibatch, _ in zip(minibatches(0, 0), range(3), strict=False)]
    if way == "streamx memory":
        ready = [list(minibatches(epoch, 0)) for epoch in range(min(epochs, 4))]
        minibatches = lambda epoch, done: ready[epoch % len(ready)]  # noqa: E731

    def train(module: Scalex, n_epochs: int, minibatches: Any) -> State:
        return fit(
            module,
            make_optimizer(module, 2e-4, 5e-4),
            minibatches,
            named_losses(module),
            n_epochs=n_epochs,
            state=State(0, [], EarlyStopping(10**6)),
            progress=False,
        )

    train(Scalex(view.n_vars, len(view.batches)), 1, lambda epoch, done: few)  # compiles
    start = clock()
    state = train(module, epochs, minibatches)
    spent = since(start)
    return {
        "cells": epochs * len(loader) * MINIBATCH,
        "losses": [row["loss"] for row in state.history],
        **spent,
    }


# -- many runs ---------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    packages = {name: version(name) for name in ("torch", "numpy", "scipy", "numba", "zarr")}
    return {
        "commit": commit,
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
    }


def spawn(way: str, folder: Path, epochs: int, seed: int, peer_python: str) -> dict[str, Any]:
    if way.startswith("streamx"):
        command = [sys.executable, __file__, "--one", way, "--work", str(folder)]
    else:
        command = [peer_python, "-W", "ignore", str(HERE / "peers" / "scalex_fit.py")]
        command += ["--data", str(folder / "cells.npz"), "--way", way.split()[1]]
        command += ["--cells", str(PEER_PROJECTS)] if "project" in way else []
    command += ["--epochs", str(epochs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"way": way}


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of each way, and the ratios that count."""
    rates: dict[str, dict[str, float]] = {}
    curves: dict[str, list[float]] = {}
    for way in dict.fromkeys(run["way"] for run in runs):
        of_way = [run for run in runs if run["way"] == way]
        rates[way] = {
            "cells_per_cpu_second": round(statistics.median(r["cells"] / r["cpu_s"] for r in of_way)),
            "cells_per_second": round(statistics.median(r["cells"] / r["wall_s"] for r in of_way)),
            "peak_rss_mb": statistics.median(r["peak_rss_mb"] for r in of_way),
            "runs": len(of_way),
        }
        if of_way[0]["losses"]:
            by_epoch = zip(*(run["losses"] for run in of_way), strict=True)
            curves[way] = [round(statistics.mean(losses), 3) for losses in by_epoch]
    ratios = {
        f"{one} / {other}": round(rates[one][measure] / rates[other][measure], 3)
        for one, other, measure in (
            ("streamx", "scalex own", "cells_per_cpu_second"),
            ("streamx", "scalex patched", "cells_per_cpu_second"),
            ("streamx", "streamx memory", "cells_per_cpu_second"),
            ("streamx project", "scalex project", "cells_per_cpu_second"),
        )
        if one in rates and other in rates
    }
    if "streamx" in rates and "streamx memory" in rates:
        wall = [rates[way]["cells_per_second"] for way in ("streamx", "streamx memory")]
        ratios["streamx / streamx memory, wall"] = round(wall[0] / wall[1], 3)
    return {"summary": name, "ways": rates, "ratios": ratios, "losses": curves}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=["pbmc", "synthetic"], choices=("pbmc", "synthetic"))
    parser.add_argument("--ways", nargs="+", default=[*TRAINING, *PROJECTION])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cells", type=int, default=20_000, help="of the synthetic set")
    parser.add_argument("--peer-python", default=sys.executable, help="python that has scalex 1.0.4")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "training")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    pin_threads()
    if args.one:
        row = run_ours(args.one, args.work, args.epochs, args.seed)
        print(json.dumps(row | {"seed": args.seed, "peak_rss_mb": peak_rss_mb()}))
        return
    about = environment()
    RESULTS.parent.mkdir(exist_ok=True)
    for name in args.sets:
        folder = args.work / (name if name == "pbmc" else f"{name}-{args.cells}")
        prepare(name, folder, args.cells)
        rows: list[dict[str, Any]] = []
        for repeat in range(args.repeats):
            for way in args.ways:
                run = spawn(way, folder, args.epochs, repeat, args.peer_python)
                rows.append({"set": name, "epochs": args.epochs, **run, **about})
                print(json.dumps(rows[-1]), flush=True)
        rows.append({**summarise(name, rows), **about})
        print(json.dumps(rows[-1]), flush=True)
        with open(RESULTS, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
