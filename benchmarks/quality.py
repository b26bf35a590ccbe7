"""Quality of streamx's models beside the packages that they come from, and PCA: same cells, split, scoring.

    python benchmarks/quality.py                                  # everything: hours on two cores
    python benchmarks/quality.py --sets symphony_map --seeds 0    # one set, one seed
    python benchmarks/quality.py --methods scVI "streamx scVI"    # one model

Every run is printed as one JSON line on stdout and appended to ``results/quality.jsonl``; a table and the
pass criteria follow. SCALEX, scVI and scANVI (scvi-tools) need the extra ``peer``, or ``--peer-python`` of
an environment that has it; trVAE needs scArches there (``peers/trvae_peer.py``). Count models: ``arches.py``.
A row that was computed before with the same data, settings and versions is not computed again, and says
``cached``; for streamx "version" means the source files that compute latents. Every run is a process of its
own with one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

import arches  # noqa: E402
import numpy as np  # noqa: E402
from clock import clock, pin_threads, since  # noqa: E402
from provenance import commit, machine  # noqa: E402
from report import criteria, table  # noqa: E402
from sets import SETS, BenchSet, checksum, data_dir, write_inputs  # noqa: E402

RESULTS = HERE / "results" / "quality.jsonl"
METHODS = ("PCA", "SCALEX", "streamx", *arches.METHODS)
SCALEX_VERSION = "1.0.4"
ITERATIONS = 30_000  # SCALEX's own default, and streamx's
# Parts of streamx that no latent passes through.
BYSTANDERS = (
    "arches",
    "cli",
    "demo",
    "errors.py",
    "figures.py",
    "integrate",
    "interop",
    "labels.py",
    "mapping",
)
BYSTANDERS += ("metrics", "neighbors", "plots", "posterior", "simulate", "store", "threads.py", "transfer.py")
BYSTANDERS += ("verify.py",)


def source_crc() -> str:
    """crc32 over the source files of streamx that can change a latent."""
    root, crc = HERE.parent / "streamx", 0
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in BYSTANDERS:
            crc = zlib.crc32(path.read_bytes(), crc)
    return f"{crc:08x}"


def key_of(bench: BenchSet, method: str, seed: int, iterations: int | None, data: str) -> dict[str, Any]:
    """What a result of SCALEX, ours or theirs, or of PCA depends on, but for the versions of packages."""
    key: dict[str, Any] = {
        "set": bench.name,
        "method": method,
        "seed": seed,
        "max_iteration": iterations,
        "min_features": 1,
        "data_crc": data,
    }
    if method == "SCALEX":
        key["scalex"] = SCALEX_VERSION
    if method == "streamx":
        key["source_crc"] = source_crc()
    return key


def find_cached(key: dict[str, Any]) -> dict[str, Any] | None:
    """The newest row with this key."""
    if not RESULTS.exists():
        return None
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines() if line.strip()]
    return next((row for row in reversed(rows) if row["key"] == key), None)


def run_apart(command: list[str], paths: dict[str, Path], key: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run a method in its own process, unless its latents are there: its ``run.json``."""
    done = out / "run.json"
    if not done.exists():
        command = [*command, "--reference", str(paths["reference"]), "--out", str(out)]
        command.append(f"--seed={key['seed']}")
        for name, path in paths.items():
            if name != "reference":
                command += ["--query", f"{name}={path}"]
        out.mkdir(parents=True, exist_ok=True)
        log = out.with_name(f"{out.name}.log")
        with open(log, "w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            tail = log.read_text()[-2000:]
            raise SystemExit(f"{key['method']} on {key['set']} ended with code {code}:\n{tail}")
    return json.loads(done.read_text())


def run_scalex(
    paths: dict[str, Path], key: dict[str, Any], out: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """SCALEX in the peer's environment, of the one version that the comparison is with."""
    command = [args.peer_python, "-W", "ignore", str(HERE / "peers" / "scalex_peer.py")]
    ran = run_apart([*command, f"--max-iteration={key['max_iteration']}"], paths, key, out)
    if ran["versions"]["scalex"] != SCALEX_VERSION:
        raise SystemExit(f"scalex {ran['versions']['scalex']} is installed, not {SCALEX_VERSION}")
    return ran


def models_of(bench: BenchSet, args: argparse.Namespace) -> Path:
    """Folder of streamx's store, view and models of a data set."""
    return (args.models or args.work / "models" / source_crc()) / bench.name


def run_ours(
    bench: BenchSet, paths: dict[str, Path], key: dict[str, Any], out: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """streamx; models that are there already are used."""
    command = [sys.executable, "-W", "ignore", str(HERE / "ours.py")]
    command.append(f"--max-iteration={key['max_iteration']}")
    return run_apart([*command, "--models", str(models_of(bench, args))], paths, key, out)


def run_counts(
    bench: BenchSet, paths: dict[str, Path], key: dict[str, Any], out: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """A count model, ours or a peer's of the one version that the comparison is with."""
    asked = arches.arguments(key, args.work / "data" / bench.name / arches.GENES)
    if "source_crc" in key:
        command = [sys.executable, "-W", "ignore", str(HERE / "ours_counts.py")]
        return run_apart([*command, *asked, "--models", str(models_of(bench, args))], paths, key, out)
    command = [args.peer_python, "-W", "ignore", str(HERE / "peers" / arches.script(key["method"]))]
    models = args.work / "models" / "peers" / bench.name
    ran = run_apart([*command, *asked, "--models", str(models)], paths, key, out)
    arches.check_versions(ran["versions"])
    return ran


def read_latents(out: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Latents, batches, labels and cells of the reference and then each query."""
    parts = [np.load(out / f"{name}.npz") for name in names]
    return {field: np.concatenate([part[field] for part in parts]) for field in parts[0].files}


def run_pca(paths: dict[str, Path], out: Path) -> dict[str, Any]:
    """Embed by PCA in this process; latents are written as the other methods do."""
    import anndata as ad
    from peers import pca

    out.mkdir(parents=True, exist_ok=True)
    start = clock()
    found = pca.embed(paths)
    times = {"reference": since(start)}
    counts = {}
    for name, latent in found.items():
        obs = ad.read_h5ad(paths[name]).obs
        columns = {field: obs[field].to_numpy(dtype=str) for field in ("batch", "cell_type")}
        np.savez_compressed(out / f"{name}.npz", latent=latent, cell=obs.index.to_numpy(dtype=str), **columns)
        counts[name] = len(obs)
    return {"steps": 0, "n_cells": counts, "times": times}


def run(
    bench: BenchSet, method: str, seed: int, iterations: int | None, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: its key, provenance, cost, and scores of all queries together and each alone."""
    from scoring import score

    data = checksum([data_dir() / file for file in bench.files])
    paths = write_inputs(bench, args.work / "data" / bench.name)
    if method in arches.METHODS:
        genes = arches.genes_of(paths["reference"], args.work / "data" / bench.name)
        key = arches.key_of(bench, method, seed, data, genes, source_crc())
    else:
        key = key_of(bench, method, seed, iterations, data)
    cached = None if args.fresh else find_cached(key)
    if cached:
        return cached | {"cached": True}
    length = f"i{iterations}" if "epochs" not in key else "e" + "-".join(map(str, key["epochs"]))
    out = args.work / method / f"{bench.name}-s{seed}-{length}"
    if "source_crc" in key:
        out = out.with_name(f"{out.name}-{key['source_crc']}")
    if method == "PCA":
        ran = run_pca(paths, out)
    else:
        runner = {"SCALEX": run_scalex, "streamx": run_ours}.get(method, run_counts)
        ran = runner(bench, paths, key, out, args)
    cells = read_latents(out, list(paths))
    names = "\n".join(
        sorted(f"{b} {n.removeprefix(b + ':')}" for b, n in zip(cells["batch"], cells["cell"], strict=True))
    )
    return {
        "key": key,
        "commit": commit(),
        "machine": machine(),
        **ran,
        "cells_crc": f"{zlib.crc32(names.encode()):08x}",
        "scores": score(cells["latent"], cells["batch"], cells["cell_type"], bench.queries),
        "cached": False,
    }


def methods_of(bench: BenchSet) -> tuple[str, ...]:
    """Count models map by surgery; the two that SCALEX is not compared on are for them alone."""
    return tuple(
        method
        for method in METHODS
        if (bench.epochs if method in arches.METHODS else method == "PCA" or bench.scalex)
    )


def keep(row: dict[str, Any]) -> None:
    """Append a row that was computed now to the results."""
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--max-iteration", type=int, default=ITERATIONS, help="of SCALEX and of streamx")
    parser.add_argument("--peer-python", default=sys.executable, help="python that has scalex 1.0.4")
    parser.add_argument(
        "--work", type=Path, default=HERE.parent / "build" / "quality", help="latents, models"
    )
    parser.add_argument("--models", type=Path, help="use streamx's views and models of this folder")
    parser.add_argument("--fresh", action="store_true", help="use no row that was computed before")
    args = parser.parse_args()
    pin_threads()
    rows = []
    for name in args.sets:
        for method in args.methods:
            if method not in methods_of(SETS[name]):
                continue
            for seed in args.seeds if method != "PCA" else [0]:
                row = run(SETS[name], method, seed, None if method == "PCA" else args.max_iteration, args)
                rows.append(row)
                if not row["cached"]:
                    keep(row)
                print(json.dumps(row), flush=True)
    print("\n" + table(rows))
    lines, passed = criteria(rows, {"streamx": "SCALEX"} | arches.PEERS)
    print("\n" + "\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
