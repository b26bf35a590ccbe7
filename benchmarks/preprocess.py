"""How long preprocessing takes and how much memory, ours out of core beside scanpy in memory.

    python benchmarks/preprocess.py --cells 20000 100000 400000

Synthetic counts (8 batches, 24 types, 20,000 genes, about 800 stored values per cell) are written once as
h5ad, for scanpy, and converted to a store, for us. Every run is a process of its own with one thread: cells
and genes filtered, variable genes ranked by batch, maxima taken. scanpy does so in memory, `statistics` out
of core; `streamx` is our whole command, which also writes the view. Runs alternate; each prints one JSON
line, and a last line per size gives medians and ratios. CPU seconds (user + system) are what to compare on a
shared machine. `peak_anonymous_bytes` leaves file pages out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
ONE_THREAD = dict.fromkeys(POOLS, "1")
MIN_FEATURES, MIN_CELLS, N_TOP = 300, 3, 2000
N_BATCHES, N_TYPES = 8, 24
SCANPY_BYTES_PER_VALUE = 40  # measured; a run that the machine cannot hold is left out


# -- data ------------------------------------------------------------------------------------------------


def blocks(n_cells: int, n_genes: int, rows: int = 2048, seed: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
    """indptr, indices, data, batch of consecutive cells: counts drawn from a profile per batch and type."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 2.2, n_genes)
    kind = base * np.where(rng.random((N_TYPES, n_genes)) < 0.1, rng.lognormal(1, 1, (N_TYPES, n_genes)), 1)
    effect = rng.lognormal(0, 0.3, (N_BATCHES, n_genes))
    cumulative = np.cumsum(kind[None] * effect[:, None], axis=2)
    cumulative /= cumulative[:, :, -1:]
    for start in range(0, n_cells, rows):
        n = min(rows, n_cells - start)
        batch = (np.arange(start, start + n) * N_BATCHES) // n_cells
        depth = np.clip(rng.lognormal(7.2, 0.5, n), 300, 20_000).astype(np.int64)
        keys = []
        for i in range(n):
            profile = cumulative[batch[i], rng.integers(N_TYPES)]
            genes = np.searchsorted(profile, rng.random(depth[i])).clip(max=n_genes - 1)
            keys.append(genes + i * n_genes)
        key, data = np.unique(np.concatenate(keys), return_counts=True)
        indptr = np.searchsorted(key, np.arange(n + 1) * n_genes)
        yield indptr, (key % n_genes).astype(np.int32), data.astype(np.float32), batch


def write_h5ad(path: Path, n_cells: int, n_genes: int) -> None:
    """The counts as h5ad, written block by block."""
    import anndata
    import h5py
    import pandas as pd

    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = file.create_group("X")
        x.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, n_genes]}
        )
        for name, dtype in (("data", "f4"), ("indices", "i4")):
            x.create_dataset(name, shape=(0,), maxshape=(None,), dtype=dtype, chunks=(1 << 18,))
        starts, batches = [np.zeros(1, np.int64)], []
        for indptr, indices, data, batch in blocks(n_cells, n_genes):
            done = int(starts[-1][-1])
            for name, values in (("data", data), ("indices", indices)):
                x[name].resize((done + len(values),))
                x[name][done:] = values
            starts.append(done + indptr[1:])
            batches.append(batch)
        x.create_dataset("indptr", data=np.concatenate(starts))
        codes = np.concatenate(batches)
        obs = pd.DataFrame(
            {"batch": pd.Categorical.from_codes(codes, [f"batch{b}" for b in range(N_BATCHES)])},
            index=[f"cell{i}" for i in range(n_cells)],
        )
        anndata.io.write_elem(file, "obs", obs)
        anndata.io.write_elem(file, "var", pd.DataFrame(index=[f"gene{g}" for g in range(n_genes)]))


# -- the two ways ----------------------------------------------------------------------------------------


def with_scanpy(folder: Path, flavor: str) -> tuple[set[str], dict[str, float]]:
    """What SCALEX does by scanpy, all in memory."""
    import anndata
    import scanpy as sc
    from sklearn.preprocessing import MaxAbsScaler

    clock = Clock()
    adata = anndata.read_h5ad(folder / "data.h5ad")
    clock.stop("read")
    sc.pp.filter_cells(adata, min_genes=MIN_FEATURES)
    sc.pp.filter_genes(adata, min_cells=MIN_CELLS)
    clock.stop("filter")
    rank = {"flavor": flavor, "n_top_genes": N_TOP, "batch_key": "batch"}
    if flavor == "seurat_v3":
        sc.pp.highly_variable_genes(adata, **rank)
        clock.stop("rank")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    clock.stop("normalise")
    if flavor != "seurat_v3":
        sc.pp.highly_variable_genes(adata, **rank)
        clock.stop("rank")
    narrow = adata[:, adata.var["highly_variable"]].copy()
    for batch in narrow.obs["batch"].cat.categories:
        MaxAbsScaler().fit(narrow.X[(narrow.obs["batch"] == batch).to_numpy()])
    clock.stop("maxima")
    return set(narrow.var_names), clock.seconds


def with_statistics(folder: Path, flavor: str) -> tuple[set[str], dict[str, float]]:
    """What scanpy's run gives, and no more: masks, variable genes and maxima, out of core."""
    import streamx as sx
    from streamx.config import PreprocessConfig
    from streamx.preprocess.cells import Cells
    from streamx.preprocess.features import select_features
    from streamx.preprocess.passes import plan_resources
    from streamx.preprocess.recipe import make_recipe
    from streamx.preprocess.rows import rows_of

    clock = Clock()
    store = sx.open(folder / "store")
    chosen = select_features(
        rows_of(store),
        list(store.var_names),
        Cells(store.batch_codes, np.ones(store.n_obs, bool), store.batches),
        make_recipe(
            PreprocessConfig(
                flavor=flavor, min_features=MIN_FEATURES, min_cells=MIN_CELLS, n_top_features=N_TOP
            )
        ),
        resources=plan_resources(
            store.nnz / store.n_obs, store.n_vars, len(store.batches), memory=500_000_000, threads=1
        ),
    )
    clock.stop("all")
    return set(chosen.names), clock.seconds


def with_streamx(folder: Path, flavor: str) -> tuple[set[str], dict[str, float]]:
    """The same out of core, and the view written."""
    import shutil

    import streamx as sx

    clock = Clock()
    shutil.rmtree(folder / "view", ignore_errors=True)
    view = sx.preprocess(
        folder / "store",
        folder / "view",
        flavor=flavor,
        min_features=MIN_FEATURES,
        min_cells=MIN_CELLS,
        n_top_features=N_TOP,
        threads=1,
        memory="500MB",
    )
    clock.stop("all")
    return set(view.var_names), clock.seconds


WAYS = {"scanpy": with_scanpy, "statistics": with_statistics, "streamx": with_streamx}


class Clock:
    """CPU seconds between stops."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def stop(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


class Memory(threading.Thread):
    """Peak of anonymous memory, sampled 50 times a second (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        status = Path("/proc/self/status")
        while status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)


def run_one(way: str, folder: Path, flavor: str) -> dict[str, Any]:
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        genes, stages = WAYS[way](folder, flavor)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "way": way,
        "flavor": flavor,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),  # imports included
        "peak_rss_bytes": used.ru_maxrss * 1024,
        "peak_anonymous_bytes": memory.peak,
        "stages_cpu_seconds": stages,
        "genes": sorted(genes),
    }


# -- many runs -------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions and machine."""
    packages = ("streamx", "scanpy", "anndata", "numpy", "scipy", "numba", "zarr", "dask")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "cpu": model,
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in packages},
    }


def prepare(folder: Path, n_cells: int, n_genes: int) -> dict[str, Any]:
    """Data and store, unless they are there already."""
    import streamx as sx

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.h5ad").exists():
        write_h5ad(folder / "partial.h5ad", n_cells, n_genes)
        (folder / "partial.h5ad").rename(folder / "data.h5ad")
    store = sx.convert(folder / "data.h5ad", folder / "store", batch_key="batch", threads=1)
    return {"nnz": store.nnz, "store_bytes": store.summary()["bytes"]}


def spawn(way: str, folder: Path, flavor: str, nnz: int) -> dict[str, Any]:
    import psutil

    needed = nnz * SCANPY_BYTES_PER_VALUE
    if way == "scanpy" and needed > 0.8 * psutil.virtual_memory().available:
        return {"way": way, "flavor": flavor, "failed": f"would need {needed / 1e9:.0f} GB of memory"}
    command = [sys.executable, __file__, "--one", way, "--folder", str(folder), "--flavor", flavor]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"way": way, "flavor": flavor, "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, n_cells: int, n_genes: int, flavors: list[str], repeats: int) -> None:
    data = {"n_cells": n_cells, "n_genes": n_genes, **prepare(folder, n_cells, n_genes)}
    about = environment()
    for flavor in flavors:
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                runs[way].append(spawn(way, folder, flavor, data["nnz"]))
                shown = {key: value for key, value in runs[way][-1].items() if key != "genes"}
                print(json.dumps({**data, **shown, **about}), flush=True)
        summary: dict[str, Any] = {"summary": flavor, **data, "repeats": repeats}
        keys = ("cpu_seconds", "seconds", "peak_rss_bytes", "peak_anonymous_bytes")
        done = {way: [run for run in found if "failed" not in run] for way, found in runs.items()}
        for way, found in done.items():
            summary[way] = (
                {k: statistics.median(run[k] for run in found) for k in keys} if found else "failed"
            )
        if all(done.values()):
            summary["same_genes"] = all(
                run["genes"] == done["scanpy"][0]["genes"] for found in done.values() for run in found
            )
            for way in ("statistics", "streamx"):
                ratios = {key: round(summary["scanpy"][key] / summary[way][key], 2) for key in keys}
                summary[f"scanpy_over_{way}"] = ratios
        print(json.dumps({**summary, **about}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000])
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--flavor", nargs="+", default=["seurat", "seurat_v3"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where data stay for the next time (default: removed)")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.folder, args.flavor[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for n_cells in args.cells:
            folder = (args.folder or Path(temporary)) / f"{n_cells}x{args.genes}"
            compare(folder, n_cells, args.genes, args.flavor, args.repeats)


if __name__ == "__main__":
    main()
