"""Surgery on a stream of query files: seconds and memory per file, by the size of the reference; and kills.

    python benchmarks/surgery.py --references 20000 200000 --queries 10 --cells 5000

A synthetic reference of each size, and query files of one new batch each. `streamx surgery` learns the files
one by one in processes of their own (CPU seconds and anonymous peak each: neither may grow with the
reference, nor with the files before), then all in one process that is killed with SIGKILL at random moments,
in CPU seconds, and run again until it is done: its folder must hold the same bytes. One JSON line each,
appended to results/surgery.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import commit, machine

RESULTS = Path(__file__).parent / "results" / "surgery.jsonl"
KILLS = 20
CLI = [sys.executable, "-m", "streamx"]
SETTINGS = [
    "--batch-key",
    "batch",
    "--max-epochs",
    "5",
    "--min-features",
    "0",
    "--memory",
    "1GB",
    "--device",
    "cpu",
]


def run(*words: str) -> dict[str, Any]:
    """One command line: its result, with CPU seconds and the peak of its anonymous memory."""
    process = subprocess.Popen(
        [*CLI, *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    peak, before, begun = 0, cpu_of_children(), time.monotonic()
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    assert process.stdout is not None
    result = json.loads(process.stdout.read())
    if process.returncode:
        sys.exit(f"streamx {' '.join(words)}: {result}")
    spent = {"wall_s": time.monotonic() - begun, "cpu_s": cpu_of_children() - before}
    return result | {name: round(value, 2) for name, value in spent.items()} | {"anonymous_peak_bytes": peak}


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def digests(folder: Path) -> dict[str, str]:
    """Of every file but zarr's metadata, which name when they were written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def prepare(folder: Path, n_reference: int, queries: int, cells: int, seed: int) -> list[Path]:
    """A reference model of n cells in four batches, and query files of one batch each."""
    import anndata as ad

    import streamx as sx

    sx.simulate(folder / "parts", format="h5ad", n_cells=n_reference, n_batches=4, n_genes=1000, seed=seed)
    sx.convert(
        [str(path) for path in sorted((folder / "parts").glob("*.h5ad"))], folder / "store", batch_key="batch"
    )
    sx.preprocess(folder / "store", folder / "view", profile="counts", n_top_features=0, min_features=0)
    sx.train(folder / "view", folder / "model", model="scvi", arches=True, max_iteration=300, device="cpu")
    made = sx.simulate(
        folder / "new", format="h5ad", n_cells=queries * cells, n_batches=queries, n_genes=1000, seed=seed
    )
    files = []
    for number, path in enumerate(made):
        cells_of = ad.read_h5ad(path)
        cells_of.obs["batch"] = f"query{number:02d}"
        cells_of.write_h5ad(folder / f"query{number:02d}.h5ad")
        files.append(folder / f"query{number:02d}.h5ad")
    return files


def killed(folder: Path, files: list[Path], updated: Path, rng: random.Random) -> int:
    """The whole stream in one process that is killed and run again until it ends: how often it was killed."""
    words = ["surgery", str(folder / "model"), *map(str, files), "-o", str(updated), *SETTINGS]
    kills = 0
    while True:
        process = subprocess.Popen(
            [*CLI, *words, "--checkpoint-seconds", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        limit = rng.uniform(2, 6) if kills < KILLS else float("inf")
        while process.poll() is None and cpu_of(process.pid) < limit:
            time.sleep(0.02)
        if process.returncode is not None:
            return kills
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1


def cpu_of(pid: int) -> float:
    """CPU seconds of a running process."""
    try:
        spent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return sum(map(int, spent)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--references", type=int, nargs="+", default=[20_000, 200_000], metavar="N")
    parser.add_argument("--queries", type=int, default=10, metavar="N")
    parser.add_argument("--cells", type=int, default=5_000, metavar="N", help="of each query")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    about = {"benchmark": "surgery", "commit": commit(), "machine": machine(), "cells": args.cells}
    for n in args.references:
        with tempfile.TemporaryDirectory() as place:
            folder, rows = Path(place), []
            files = prepare(folder, n, args.queries, args.cells, args.seed)
            for number, path in enumerate(files):
                found = run("surgery", str(folder / "model"), str(path), "-o", str(folder / "u"), *SETTINGS)
                names = ("wall_s", "cpu_s", "anonymous_peak_bytes")
                rows.append(about | {"reference": n, "file": number} | {name: found[name] for name in names})
            kills = killed(folder, files, folder / "killed", random.Random(args.seed))
            same = digests(folder / "killed") == digests(folder / "u")
            rows.append(about | {"reference": n, "kills": kills, "same_bytes": same})
        with args.out.open("a") as out:
            for row in rows:
                print(json.dumps(row), flush=True)
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
