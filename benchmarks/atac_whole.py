"""ATAC over 479,127 peaks from files to latents by the commands; then again, each command killed on the way.

    python benchmarks/atac_whole.py --cells 15000 60000 --folder /somewhere/large

Simulated: 4 batches, about as many open peaks per cell as `--depth`. `convert`, `preprocess --profile ATAC`
(30,000 variable peaks), `train` (some hundred steps) and `project` (the same files as queries) run with
``--memory 1GB`` and one thread: seconds, and the peak of anonymous memory, 50 times a second. Each is then
run to another place, killed with SIGKILL after some shares of those seconds (`--shares`) and run until it
ends: which files differ from the first run's is in its line of ``results/atac_whole.jsonl``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from preprocess import ONE_THREAD  # noqa: E402
from provenance import commit, machine  # noqa: E402
from surgery import anonymous  # noqa: E402

RESULTS = HERE / "results" / "atac_whole.jsonl"
N_TOP, N_BATCHES = 30_000, 4
MEMORY = ["--memory", "1GB", "--threads", "1"]
OUTPUTS = {"convert": "store", "preprocess": "view", "train": "model", "project": "mapped"}
TIMED = ("history.csv",)  # seconds are in it


def commands(folder: Path, steps: int, variant: str, again: str = "") -> dict[str, list[str]]:
    """What is run, by the name of its verb; each reads what the first run of the one before wrote.

    A second output lies beside the first: a view holds the way to its store.
    """
    files = sorted(map(str, (folder / "files").glob("*.h5ad")))
    recipe = ["--profile", "ATAC", "--atac", variant, "--n-top-features", str(N_TOP)]
    training = ["--max-iteration", str(steps), "--checkpoint-seconds", "5"]
    return {
        "convert": [*files, "-o", str(folder / f"store{again}"), "--batch-key", "batch"],
        "preprocess": [str(folder / "store"), "-o", str(folder / f"view{again}"), *recipe],
        "train": [str(folder / "view"), "-o", str(folder / f"model{again}"), *training],
        "project": [
            str(folder / "model"),
            *files,
            "-o",
            str(folder / f"mapped{again}"),
            "--batch-key",
            "batch",
        ],
    }


def run(verb: str, words: list[str], limit: float | None = None) -> dict[str, Any]:
    """One command: its seconds and memory; killed after `limit` seconds, if it is not done by then."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    line = [sys.executable, "-W", "ignore", "-m", "streamx", verb, *words, *MEMORY, "--json"]
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **ONE_THREAD}, text=True
    )
    peak, killed = 0, False
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        if limit is not None and time.monotonic() - begun > limit:
            process.kill()
            killed = True
        time.sleep(0.02)
    said = process.stderr.read() if process.stderr else ""
    if process.returncode and not killed:
        sys.exit(f"streamx {verb}: {process.returncode}\n{said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = {"wall_s": round(time.monotonic() - begun, 2), "cpu_s": round(cpu, 2)}
    return seconds | {"peak_anonymous_bytes": peak, "killed": killed}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMED]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def differing(one: Path, other: Path) -> list[str]:
    found, wanted = digests(one), digests(other)
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def whole_way(folder: Path, n_cells: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import streamx as sx

    if not (folder / "files").exists():
        shape: dict[str, Any] = {"n_cells": n_cells, "n_genes": args.peaks, "n_batches": N_BATCHES}
        writing = folder / "writing"
        sx.simulate(
            writing, features="peaks", format="h5ad", depth=args.depth, threads=1, memory="1GB", **shape
        )
        writing.rename(folder / "files")
    after = commands(folder, args.steps, args.atac, "-again")
    for verb, words in commands(folder, args.steps, args.atac).items():
        name, other = OUTPUTS[verb], f"{OUTPUTS[verb]}-again"
        for place in (name, f"{name}.journal", other, f"{other}.journal"):
            shutil.rmtree(folder / place, ignore_errors=True)
        first = run(verb, words)
        tries = [run(verb, after[verb], share * first["wall_s"]) for share in args.shares]
        tries.append(run(verb, after[verb]))
        row = {"verb": verb} | first | {"kills": sum(one["killed"] for one in tries)}
        row["cpu_s_with_kills"] = round(sum(one["cpu_s"] for one in tries), 2)
        row["peak_with_kills"] = max(one["peak_anonymous_bytes"] for one in tries)
        row["n_files"] = len(digests(folder / name))
        yield row | {"differ": differing(folder / name, folder / other)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, nargs="*", default=[15_000, 60_000])
    parser.add_argument("--peaks", type=int, default=479_127)
    parser.add_argument("--depth", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.3, 0.6, 0.9], help="when to kill")
    parser.add_argument("--atac", default="1.0.4", help="which recipe")
    parser.add_argument("--folder", type=Path, help="where data stay for the next time (default: removed)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for n_cells in args.cells:
            folder = (args.folder or Path(temporary)) / str(n_cells)
            folder.mkdir(parents=True, exist_ok=True)
            for told in whole_way(folder, n_cells, args):
                row = {"n_cells": n_cells, "n_peaks": args.peaks, "depth": args.depth, "steps": args.steps}
                row |= {"atac": args.atac} | told | {"commit": commit(), "machine": machine()}
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
