"""Preprocessing of ATAC over 479,127 peaks, ours out of core beside SCALEX's steps in memory.

    python benchmarks/atac.py --cells 5000 20000

A mouse brain's width (SCALEX's documentation), simulated: 4 batches, about 4,900 peaks per cell, written once
as h5ad and converted to a store. Every run is a process of its own with one thread. `memory`: what SCALEX
1.0.4 does, step by step with scanpy (episcanpy's rule for variable peaks written out, as no current numpy
imports it); `streamx`: the whole command for each of the three documented recipes, the view of 30,000 peaks
written. One JSON line per run on stdout and in ``results/atac.jsonl``. ``--largest`` sizes are too large for
memory, and ours alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
from preprocess import ONE_THREAD, Memory, environment  # noqa: E402
from provenance import commit, machine  # noqa: E402

RESULTS = HERE / "results" / "atac.jsonl"
N_PEAKS, N_TOP, DEPTH = 479_127, 30_000, 5_000
WAYS = ("memory 1.0.4", "streamx 1.0.4", "streamx 1.0.2", "streamx 0.2.0")


def in_memory(folder: Path) -> set[str]:
    """SCALEX 1.0.4's order: normalise, logarithms, cells, peaks, variable peaks, maxima."""
    import anndata
    import scanpy as sc
    from sklearn.preprocessing import MaxAbsScaler

    files = sorted((folder / "files").glob("*.h5ad"))
    adata = anndata.concat([anndata.read_h5ad(path) for path in files])
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.filter_cells(adata, min_genes=100)
    sc.pp.filter_genes(adata, min_cells=3)
    score = 1 - np.abs(np.asarray(adata.X.sum(axis=0)).ravel() / adata.n_obs - 0.5)
    adata = adata[:, score >= np.sort(score)[::-1][N_TOP]].copy()
    adata.X = MaxAbsScaler().fit_transform(adata.X)
    return set(adata.var_names)


def out_of_core(folder: Path, variant: str) -> set[str]:
    import streamx as sx

    view = folder / f"view-{variant}"
    shutil.rmtree(view, ignore_errors=True)
    settings: dict[str, Any] = {"profile": "ATAC", "atac": variant, "n_top_features": N_TOP}
    return set(sx.preprocess(folder / "store", view, threads=1, memory="1GB", **settings).var_names)


def run_one(way: str, folder: Path) -> dict[str, Any]:
    memory = Memory()
    memory.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind, variant = way.split()
        peaks = in_memory(folder) if kind == "memory" else out_of_core(folder, variant)
    return {
        "way": way,
        "cpu_seconds": round(time.process_time(), 2),
        "peak_anonymous_bytes": memory.peak,
        "peaks": sorted(peaks),
    }


def prepare(folder: Path, n_cells: int) -> None:
    """Files, and the store of them, unless they are there."""
    import streamx as sx

    if not (folder / "files").exists():
        settings: dict[str, Any] = {
            "n_cells": n_cells,
            "n_genes": N_PEAKS,
            "features": "peaks",
            "n_batches": 4,
        }
        sx.simulate(folder / "writing", format="h5ad", depth=DEPTH, threads=1, memory="2GB", **settings)
        (folder / "writing").rename(folder / "files")
    sx.convert(folder / "files", folder / "store", batch_key="batch", threads=1, memory="2GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, nargs="*", default=[5000, 20_000])
    parser.add_argument("--largest", type=int, nargs="*", default=[], help="sizes that only streamx runs")
    parser.add_argument("--folder", type=Path, help="where data stay for the next time (default: removed)")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for n_cells in [*args.cells, *args.largest]:
            folder = (args.folder or Path(temporary)) / str(n_cells)
            folder.mkdir(parents=True, exist_ok=True)
            prepare(folder, n_cells)
            theirs = None
            for way in WAYS if n_cells in args.cells else WAYS[1:]:
                command = [sys.executable, __file__, "--one", way, "--folder", str(folder)]
                done = subprocess.run(
                    command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True
                )
                row = json.loads(done.stdout.splitlines()[-1])
                peaks = row.pop("peaks")
                theirs = set(peaks) if way == "memory 1.0.4" else theirs
                shared = len(theirs & set(peaks)) if way == "streamx 1.0.4" and theirs is not None else None
                row |= {"n_cells": n_cells, "n_peaks": N_PEAKS, "n_chosen": len(peaks), "n_shared": shared}
                row |= {"commit": commit(), "machine": machine(), "packages": environment()["packages"]}
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
