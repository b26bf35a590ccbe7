"""How fast scVI, scANVI and totalVI train on one CPU thread: scvi-tools from memory, ours from disk.

    python benchmarks/count_training.py --peer-python PEER/bin/python --repeats 3

Both packages get the same cells and genes, their own defaults (which agree), the same minibatches' size and
number of epochs; nine cells in ten train. Every run is a process of its own with pinned threads; runs
alternate, each with another seed. CPU seconds (user + system, of all threads) are what to compare on a shared
machine.

* scvi-tools: ``model.train()`` on an AnnData in memory, sparse or (``--dense``) dense. What reads the cells
  and sets the model up is not counted.
* streamx: all of ``sx.train``, from opening the view on disk to the model's folder with every cell's latent;
  checkpoints and (as by default) a pass over the validation cells after each epoch included.

The losses show that the two learn the same: of training cells, the loss (scVI, scANVI) or the reconstruction
(totalVI, where packages count the adversary's part differently), epoch by epoch. One JSON line per run and
one summary per model, also appended to ``results/count_training.jsonl``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE / "peers"))

from clock import clock, peak_rss_mb, pin_threads, since  # noqa: E402
from provenance import commit, machine  # noqa: E402

RESULTS = HERE / "results" / "count_training.jsonl"
SETS = {"scvi": "pbmc", "scanvi": "pbmc", "totalvi": "cite"}
# What scvi-tools 1.4.2 does by default and older releases do not.
NEWEST = {"input_transform": "scaled", "per_batch_efficiency": True, "protein_warmup": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "scvi": {},
    "scanvi": {"label_key": "cell_type", "unlabeled": "unknown", "base_epochs": 0},
    "totalvi": NEWEST,
}
LOSS = {"scvi": "loss", "scanvi": "loss", "totalvi": "reconstruction"}


def prepare(name: str, folder: Path) -> None:
    """``view``, and ``cells.h5ad``: the same cells and genes, for the package that works in memory."""
    from sets import SETS as FILES
    from sets import data_dir, write_inputs

    import streamx as sx

    if (folder / "cells.h5ad").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if name == "cite":
        source, features = data_dir() / "pbmc_cite_10k_5k.h5ad", {"profile": "counts", "n_top_features": 0}
        store = sx.convert(source, folder / "store", batch_key="batch", obsm=("protein_expression",))
    else:
        source, features = write_inputs(FILES["pbmc_map"], folder)["reference"], {"min_features": 1}
        store = sx.convert(source, folder / "store", batch_key="batch")
    view = sx.preprocess(store, folder / "view", threads=1, **features)
    adata = view.to_anndata()
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata.write_h5ad(folder / "cells.h5ad")


def run_ours(model: str, folder: Path, epochs: int, seed: int) -> dict[str, Any]:
    import streamx as sx
    from streamx.config import TRAINING

    settings = {**SETTINGS[model], "model": model, "seed": seed, "threads": 1, "device": "cpu"}
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        sx.train(folder / "view", Path(kept) / "first", max_epochs=1, progress=False, **settings)  # compiles
        start = clock()
        sx.train(folder / "view", Path(kept) / "model", max_epochs=epochs, progress=False, **settings)
        spent = since(start)
        with open(Path(kept) / "model" / "history.csv") as file:
            history = list(csv.DictReader(file))
        card = json.loads((Path(kept) / "model" / "model.json").read_text())["training"]
    every = round(card["n_cells"] * TRAINING[model]["train_size"])
    cells = min(
        epochs * every, card["steps"] * TRAINING[model]["minibatch_size"]
    )  # the last one may not be full
    losses = [float(row[LOSS[model]]) for row in history]
    return {"seed": seed, "cells": cells, "losses": losses, "peak_rss_mb": peak_rss_mb(), **spent}


def spawn(way: str, model: str, folder: Path, epochs: int, seed: int, peer_python: str) -> dict[str, Any]:
    if way == "streamx":
        command = [sys.executable, __file__, "--one", str(folder)]
    else:
        command = [peer_python, "-W", "ignore", str(HERE / "peers" / "scvi_fit.py")]
        command += ["--data", str(folder / "cells.h5ad"), *(["--dense"] if "dense" in way else [])]
    command += ["--model", model, "--epochs", str(epochs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"way": way}


def summarise(model: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of each way; ratios of neighbouring runs, least, median, largest."""
    rates: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for way in dict.fromkeys(run["way"] for run in runs):
        of_way = [run for run in runs if run["way"] == way]
        rates[way] = [run["cells"] / run["cpu_s"] for run in of_way]
        losses[way] = [round(statistics.mean(x), 2) for x in zip(*(r["losses"] for r in of_way), strict=True)]
    ratios = {
        way: [ours / theirs for ours, theirs in zip(rates["streamx"], rates[way], strict=True)]
        for way in rates
        if way != "streamx" and "streamx" in rates
    }
    return {
        "summary": model,
        "cells_per_cpu_s": {way: round(statistics.median(r)) for way, r in rates.items()},
        "ratio": {w: [round(f(r), 2) for f in (min, statistics.median, max)] for w, r in ratios.items()},
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SETS), choices=tuple(SETS))
    parser.add_argument("--ways", nargs="+", default=["streamx", "scvi-tools", "scvi-tools dense"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--peer-python", default=sys.executable, help="python that has scvi-tools 1.4.2")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "count_training")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    pin_threads()
    if args.one:
        print(json.dumps(run_ours(args.model, args.one, args.epochs, args.seed)))
        return
    about = {"commit": commit(), "machine": machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    for model in args.models:
        folder = args.work / SETS[model]
        prepare(SETS[model], folder)
        rows: list[dict[str, Any]] = []
        for seed in range(args.repeats):
            for way in args.ways:
                run = spawn(way, model, folder, args.epochs, seed, args.peer_python)
                rows.append({"model": model, "epochs": args.epochs, **run, **about})
                print(json.dumps(rows[-1]), flush=True)
        rows.append({**summarise(model, rows), **about})
        print(json.dumps(rows[-1]), flush=True)
        with open(RESULTS, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
