"""What grows with the number of cells: seconds, memory and disk of each stage at several sizes.

    python benchmarks/scale.py --sizes 100000 1000000 --folder /somewhere/large

Per size: a synthetic atlas is written as h5ad files (one per batch, 16 batches), converted,
preprocessed, read for one epoch, and mapped onto a model; all with ``--memory 1GB``. `peer_concat` joins
the files by anndata's ``concat_on_disk``, `peer_scanpy` preprocesses them in memory. Every stage is a process
of its own; each appends one JSON line to results/scale.jsonl. Anonymous memory (what can't be given back)
and mapped files (what can) are sampled apart, 50 times a second (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocess import environment

MEMORY, SEED, N_BATCHES = "1GB", 0, 16
RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
PEER_BYTES_PER_CELL = 7_000  # that scanpy takes in memory, measured; a run that can't fit is left out


def files_of(folder: Path) -> list[str]:
    return sorted(map(str, (folder / "files").glob("*.h5ad")))


@contextmanager
def disk() -> Iterator[list[int]]:
    """Bytes of all that a run has laid down, at its end, when nothing is removed yet."""
    from streamx.store.journal import Journal

    found: list[int] = []
    original = Journal.remove

    def remove(journal: Journal) -> None:
        found.append(journal.laid_down())
        original(journal)

    Journal.remove = remove  # type: ignore[method-assign]
    yield found
    Journal.remove = original  # type: ignore[method-assign]


# -- stages: each gives what is to be told besides the time ------------------------------------------------


def simulate(folder: Path, n: int) -> dict[str, Any]:
    import streamx as sx

    made = sx.simulate(
        folder / "files",
        format="h5ad",
        n_cells=n,
        n_batches=N_BATCHES,
        seed=SEED,
        memory=MEMORY,
    )
    return {"bytes": sum(path.stat().st_size for path in made)}


def convert(folder: Path, n: int) -> dict[str, Any]:
    from streamx.store.convert import convert_files

    with disk() as laid:
        done = convert_files(files_of(folder), folder / "store", batch_key="batch", memory=MEMORY)
    assert done.needs is not None
    store = done.collection
    about = {"bytes": store.summary()["bytes"], "nnz": store.nnz, "disk_bytes": max(laid)}
    return about | {"predicted": asdict(done.needs)}


def preprocess(folder: Path, n: int) -> dict[str, Any]:
    from streamx.preprocess.run import preprocess_store

    settings = {"min_features": 20, "n_top_features": 0, "memory": MEMORY}
    with disk() as laid:
        view, needs = preprocess_store(folder / "store", folder / "view", **settings)
    assert needs is not None
    about = {"bytes": view.summary()["bytes"], "nnz": view.nnz, "disk_bytes": max(laid)}
    return about | {"predicted": asdict(needs)}


def epoch(folder: Path, n: int) -> dict[str, Any]:
    import streamx as sx

    loader, n_read = sx.Loader(sx.open(folder / "view"), 4096, seed=SEED, memory=MEMORY), 0
    for number, minibatch in enumerate(loader.at(0)):
        n_read += len(minibatch.row_n)
        if number in (1, 2, 3):  # as a slow model: all that may wait waits, at any size
            time.sleep(1)
    return {"n_read": n_read}


def train(folder: Path, n: int) -> dict[str, Any]:
    import streamx as sx

    done = sx.train(folder / "view", folder / "model", max_iteration=100, memory=MEMORY, minibatch_size=256)
    return {"steps": done.steps}


def project(folder: Path, n: int) -> dict[str, Any]:
    import streamx as sx

    (report,) = sx.project(
        folder.parent / "model", {"all": files_of(folder)}, folder / "mapped", memory=MEMORY, progress=False
    )
    return {"n_passed": report["n_passed"]}


def opens(folder: Path, n: int) -> dict[str, Any]:
    """Opening a store of 200 columns, and reading one of them."""
    from streamx.store.collection import open_collection

    start = time.perf_counter()
    store = open_collection(folder / "columns")
    opened = time.perf_counter() - start
    column = store.obs_column("extra7")
    return {
        "open_seconds": round(opened, 4),
        "column_seconds": round(time.perf_counter() - start - opened, 4),
        "n_columns": len(store.obs_columns),
        "n_rows": len(column),
        "n_files": sum(len(names) for _, _, names in os.walk(folder / "columns")),
    }


def columns(folder: Path, n: int) -> dict[str, Any]:
    """A store of 200 obs columns, few genes."""
    import streamx as sx

    store = sx.simulate(
        folder / "columns",
        n_cells=n,
        n_genes=50,
        depth=5,
        n_batches=8,
        n_columns=197,
        memory=MEMORY,
        seed=SEED,
    )
    return {"bytes": store.summary()["bytes"]}


def peer_concat(folder: Path, n: int) -> dict[str, Any]:
    from anndata.experimental import concat_on_disk

    concat_on_disk(files_of(folder), folder / "joined.h5ad", index_unique="-")
    return {"bytes": (folder / "joined.h5ad").stat().st_size}


def peer_scanpy(folder: Path, n: int) -> dict[str, Any]:
    import anndata
    import scanpy as sc

    adata = anndata.read_h5ad(folder / "joined.h5ad")
    sc.pp.filter_cells(adata, min_genes=20)
    sc.pp.filter_genes(adata, min_cells=3)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=1000, batch_key="batch")
    return {"n_genes": int(adata.var["highly_variable"].sum())}


STAGES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "simulate": simulate,
    "convert": convert,
    "preprocess": preprocess,
    "epoch": epoch,
    "train": train,
    "project": project,
    "columns": columns,
    "opens": opens,
    "peer_concat": peer_concat,
    "peer_scanpy": peer_scanpy,
}
OUR_OUTPUT = {"convert": "store", "preprocess": "view", "project": "mapped", "columns": "columns"}


# -- measuring -------------------------------------------------------------------------------------------


class Sampler(threading.Thread):
    """Peaks of anonymous and of file-backed memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self.over = False

    def run(self) -> None:
        status = Path("/proc/self/status")
        while not self.over and status.exists():
            for line in status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peaks:
                    self.peaks[name] = max(self.peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)


def run_one(stage: str, folder: Path, n: int) -> dict[str, Any]:
    sampler = Sampler()
    sampler.start()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = STAGES[stage](folder, n)
    seconds = time.perf_counter() - start
    sampler.over = True
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    return {
        "stage": stage,
        "n_cells": n,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),  # imports included
        "cells_per_second": round(n / seconds),
        "cells_per_cpu_second": round(n / cpu),
        "peak_anonymous_bytes": sampler.peaks["RssAnon"],
        "peak_file_bytes": sampler.peaks["RssFile"],
        **told,
    }


def spawn(stage: str, folder: Path, n: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", stage, "--folder", str(folder), "--sizes", str(n)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"stage": stage, "n_cells": n, "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def fits(stage: str, n: int) -> bool:
    import psutil

    return stage != "peer_scanpy" or n * PEER_BYTES_PER_CELL < 0.8 * psutil.virtual_memory().available


def run_size(folder: Path, n: int, stages: list[str], about: dict[str, Any], results: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        output = folder / OUR_OUTPUT.get(stage, "nothing")
        shutil.rmtree(output, ignore_errors=True)
        if stage == "simulate":
            shutil.rmtree(folder / "files", ignore_errors=True)
        if stage == "train" and (folder.parent / "model").exists():
            continue
        line = (
            spawn(stage, folder, n) if fits(stage, n) else {"stage": stage, "n_cells": n, "failed": "memory"}
        )
        if stage == "train":
            os.replace(folder / "model", folder.parent / "model")
        line = {**line, "memory": MEMORY, **about}
        print(json.dumps(line), flush=True)
        if results is not None:
            with results.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--folder", type=Path, help="where data stay for the next time (default: removed)")
    parser.add_argument("--no-record", action="store_true", help="print lines only")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.folder, args.sizes[0])))
        return
    about = environment()
    with tempfile.TemporaryDirectory() as temporary:
        for n in args.sizes:
            folder = (args.folder or Path(temporary)) / str(n)
            run_size(folder, n, args.stages, about, None if args.no_record else RESULTS)


if __name__ == "__main__":
    main()
