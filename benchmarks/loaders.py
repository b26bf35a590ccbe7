"""Shuffled minibatches beside other loaders: cells per CPU-second, same data and same output for all.

    python benchmarks/loaders.py --work build/loaders --width narrow   # makes the data first, then measures
    python benchmarks/loaders.py --work build/loaders --width wide --cells 60000 --repeats 5

Contenders whose packages are missing are left out: annbatch needs Python 3.12 or later (the part of streamx
that reads needs no torch), scDataset and AnnLoader need torch. Run it once in each environment, with the same
``--work``. Runs of all contenders alternate in one process, threads pinned to one; reported are medians. One
JSON line per contender, output and minibatch size, appended to ``results/loaders.jsonl``.

``decode`` is the limit of our layout: every chunk of the store decoded once, its checksum verified, nothing
else. ``scipy in memory`` is a fancy index into a matrix that is already decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from clock import pin_threads  # noqa: E402

pin_threads()

import numpy as np  # noqa: E402
from provenance import commit, machine  # noqa: E402
from scipy import sparse  # noqa: E402

from streamx.loader.loader import Loader  # noqa: E402
from streamx.store import decode  # noqa: E402
from streamx.store.collection import Collection  # noqa: E402

RESULTS = HERE / "results" / "loaders.jsonl"
WIDTHS = {"narrow": (2_000, 230), "wide": (20_000, 1_500)}  # genes, median transcripts
Make = Callable[[int, int], Iterable[Any]]  # (minibatch size, seed) -> minibatches


def make_data(work: Path, n_cells: int, width: str) -> None:
    """The same cells as h5ad files, as our store, and as annbatch's with both dtypes (where it is there)."""
    n_genes, depth = WIDTHS[width]
    h5ad = work / "h5ad"
    if not (work / "store" / "streamx.json").exists():
        import streamx as sx

        sx.simulate(h5ad, n_cells=n_cells, n_genes=n_genes, depth=depth, n_types=24, format="h5ad")
        sx.convert([str(h5ad / "*.h5ad")], work / "store", batch_key="batch")
    for dtype in ("float32", "uint16"):
        target = work / f"annbatch-{dtype}.zarr"
        if not target.exists() and has("annbatch"):
            write_annbatch(sorted(h5ad.glob("*.h5ad")), target, dtype)


def write_annbatch(files: list[Path], target: Path, dtype: str) -> None:
    """annbatch's own store with its own defaults, X as float32 (the common case) or as uint16."""
    import anndata as ad
    from annbatch import DatasetCollection

    def load(path: Any) -> ad.AnnData:
        adata = ad.io.read_h5ad(path)
        adata.X = adata.X.astype(dtype)
        return ad.AnnData(adata.X, obs=adata.obs[["batch"]], var=adata.var[[]])

    DatasetCollection(target, mode="a").add_adatas([str(f) for f in files], load_adata=load)


def has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


# -- contenders: each gives minibatches, as scipy CSR unless its name says otherwise


def ours(store: Collection, output: str, **settings: Any) -> Make:
    """One loader for all epochs, as in training."""
    made = lru_cache(None)(lambda size: Loader(store, size, output=output, **settings))
    return lambda size, seed: (mb.x_ng for mb in made(size).at(seed))


def annbatch(path: Path, *, dense: bool, native: bool = True) -> Make:
    """annbatch with its defaults (512 rows x 32), over its own store or over a shard of ours."""

    @lru_cache(None)
    def made(size: int) -> Any:
        import zarr
        from annbatch import DatasetCollection
        from annbatch import Loader as AnnbatchLoader

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})  # its own advice
        loader = AnnbatchLoader(
            shuffle=True, chunk_size=512, preload_nchunks=32, batch_size=size,
            rng=np.random.default_rng(0), to=None,
        )  # fmt: skip
        if native:
            return loader.use_collection(DatasetCollection(path, mode="r"))
        import anndata as ad

        shards = [zarr.open_group(shard, mode="r")["X"] for shard in sorted((path / "shards").iterdir())]
        return loader.add_datasets([ad.io.sparse_dataset(shard) for shard in shards])

    def make(size: int, seed: int) -> Iterator[Any]:
        for found in made(size):
            x_ng = found["X"]
            yield x_ng.toarray() if dense else x_ng

    return make


def in_memory(x_ng: sparse.csr_matrix) -> Make:
    def make(size: int, seed: int) -> Iterator[Any]:
        order = np.random.default_rng(seed).permutation(x_ng.shape[0])
        return (x_ng[order[low : low + size]] for low in range(0, len(order), size))

    return make


def backed_h5ad(path: Path) -> Make:
    """Random rows of a backed file, as a user without a loader would read them."""

    def make(size: int, seed: int) -> Iterator[Any]:
        import anndata as ad

        adata = ad.io.read_h5ad(path, backed="r") if hasattr(ad, "io") else ad.read_h5ad(path, backed="r")
        order = np.random.default_rng(seed).permutation(adata.n_obs)
        for low in range(0, len(order), size):
            yield adata.X[np.sort(order[low : low + size])]

    return make


def scdataset(path: Path) -> Make:
    """scDataset over the backed file, blocks of 64 rows, 64 minibatches per fetch."""

    def make(size: int, seed: int) -> Iterator[Any]:
        import anndata as ad
        from scdataset import BlockShuffling, scDataset

        matrix = ad.read_h5ad(path, backed="r").X
        cells = type(
            "Cells", (), {"__len__": lambda _: matrix.shape[0], "__getitem__": lambda _, i: matrix[i]}
        )
        dataset = scDataset(cells(), BlockShuffling(block_size=64), batch_size=size, fetch_factor=64)
        return iter(dataset)

    return make


def annloader(path: Path) -> Make:
    """AnnLoader in memory; gives dense tensors."""
    import anndata as ad

    adata = ad.read_h5ad(path)

    def make(size: int, seed: int) -> Iterator[Any]:
        from anndata.experimental import AnnLoader

        return (found.X for found in AnnLoader(adata, batch_size=size, shuffle=True))

    return make


def decode_only(store: Collection) -> Make:
    """Every chunk once; a "minibatch" is what 16,384 rows take."""

    def make(size: int, seed: int) -> Iterator[Any]:
        none = np.zeros(0, np.int64)
        for low in range(0, store.n_obs, 16_384):
            matrix = store._matrix(0)
            columns, values = matrix.values or (None, None)
            assert columns is not None
            assert values is not None
            offsets = matrix.row_offsets(low, min(low + 16_384, store.n_obs))
            number_k = np.arange(offsets[0] // columns.chunk, -(-offsets[-1] // columns.chunk))
            frames = [chunks.frames(number_k) for chunks in (columns, values)]
            answer = decode.place_chunks(
                number_k, frames[0].frame_k3, frames[1].frame_k3, np.zeros(0, np.uint8), decode.READ_AHEAD,
                columns.chunk, columns.coding, values.coding, True, none, none, none,
                np.empty(columns.chunk, columns.dtype), np.empty(values.chunk, values.dtype),
                np.zeros(0, np.int32), np.zeros(0, np.float32), (False, False),
            )  # fmt: skip
            assert answer == 0
            yield np.empty((len(offsets) - 1, 0))

    return make


def contenders(work: Path) -> dict[str, Make]:
    """Name -> contender, those that this environment can run."""
    store = Collection(work / "store")
    files = sorted((work / "h5ad").glob("*.h5ad"))
    found: dict[str, Make] = {
        "decode": decode_only(store),
        "streamx scipy": ours(store, "scipy"),
        "streamx scipy, no checksums": ours(Collection(work / "store", verify=False), "scipy"),
        "streamx compact": ours(store, "compact"),
        "streamx dense": ours(store, "dense"),
        "scipy in memory": in_memory(store.read(0, store.n_obs)),
        "backed h5ad": backed_h5ad(files[0]),
    }
    if has("annbatch"):
        found["annbatch float32 scipy"] = annbatch(work / "annbatch-float32.zarr", dense=False)
        found["annbatch uint16 scipy"] = annbatch(work / "annbatch-uint16.zarr", dense=False)
        found["annbatch float32 dense"] = annbatch(work / "annbatch-float32.zarr", dense=True)
        found["annbatch on our store, scipy"] = annbatch(work / "store", dense=False, native=False)
    if has("scDataset") and has("torch"):
        found["scDataset scipy"] = scdataset(files[0])
    if has("torch"):
        found["AnnLoader dense"] = annloader(files[0])
    return found


# -- measuring -----------------------------------------------------------------------------------------------


def drop_cache(work: Path) -> None:
    """Ask the system to forget the files' pages, so that the next run reads the disk."""
    for path in work.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(make: Make, size: int, seed: int, seconds: float) -> tuple[float, float]:
    """Cells per CPU-second and per second, over an epoch or for so many seconds."""
    cells = 0
    cpu, wall = time.process_time(), time.perf_counter()
    for x_ng in make(size, seed):
        cells += x_ng.shape[0]
        if time.perf_counter() - wall > seconds:
            break
    del x_ng
    return cells / (time.process_time() - cpu), cells / (time.perf_counter() - wall)


def stall(make: Make, size: int, step: float, n_steps: int = 300) -> float:
    """Share of the time that a loop waits for minibatches; its steps take so long off the processor."""
    minibatches = iter(make(size, 0))
    next(minibatches)
    waited, begun = 0.0, time.perf_counter()
    for _ in range(n_steps):
        time.sleep(step)
        before = time.perf_counter()
        if next(minibatches, None) is None:
            break
        waited += time.perf_counter() - before
    return waited / (time.perf_counter() - begun)


def shuffle_quality(store: Collection, size: int) -> dict[str, float]:
    """chi2 per degree of freedom of the batch over minibatches (1: iid), and how much likelier than by chance
    rows that are neighbours in the store meet in a minibatch."""
    share = store.batch_sizes / store.n_obs
    chi2, pairs, n = [], 0, 0
    for mb in Loader(store, size, output="compact", seed=0, drop_last=True):
        expected = share * size
        seen = np.bincount(mb.batch_n, minlength=len(share))
        chi2.append(((seen - expected) ** 2 / expected).sum() / (len(share) - 1))
        pairs += int((np.diff(np.sort(mb.row_n)) == 1).sum())
        n += size
    by_chance = n * (size - 1) / store.n_obs
    return {"chi2_per_df": float(np.mean(chi2)), "pair_factor": pairs / by_chance}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, tens of GB when wide")
    parser.add_argument("--width", choices=list(WIDTHS), default="narrow")
    parser.add_argument("--cells", type=int, default=300_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 4096], help="minibatch sizes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one run, at most")
    parser.add_argument("--only", nargs="+", help="contenders whose names begin so")
    parser.add_argument("--cold", action="store_true", help="forget the files' pages before each run")
    args = parser.parse_args()
    work = args.work / f"{args.width}-{args.cells}"
    make_data(work, args.cells, args.width)
    found = contenders(work)
    if args.only:
        found = {name: make for name, make in found.items() if name.startswith(tuple(args.only))}
    store = Collection(work / "store")
    packages = ("zarr", "zarrs", "numcodecs", "anndata", "annbatch", "scDataset", "torch")
    about = {
        "width": args.width,
        "n_cells": store.n_obs,
        "cold": args.cold,
        "commit": commit(),
        "machine": machine(),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages if has(name)},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as results:

        def tell(row: dict[str, Any]) -> None:
            line = json.dumps(row | about)
            print(line, flush=True)
            results.write(line + "\n")

        for size in args.sizes:
            rates: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
            for repeat in range(-1, args.repeats):
                for name, make in found.items():
                    if args.cold:
                        drop_cache(work)
                    rate = run(make, size, max(repeat, 0), args.seconds if repeat >= 0 else 1.0)
                    if repeat >= 0:  # the first one compiles and warms the cache
                        rates[name].append(rate)
            for name, values in rates.items():
                cpu, wall = np.median(values, axis=0)
                tell({"contender": name, "minibatch_size": size, "cells_per_cpu_s": round(float(cpu)),
                      "cells_per_s": round(float(wall)), "repeats": args.repeats})  # fmt: skip
        watched = ("streamx scipy", "streamx dense", "annbatch float32 scipy")
        for name in [name for name in found if name in watched]:
            for step in (0.0003, 0.001):
                share = stall(found[name], 256, step)
                tell({"contender": name, "minibatch_size": 256, "step_s": step, "stall": round(share, 4)})
        tell({"contender": "streamx", "minibatch_size": 256} | shuffle_quality(store, 256))
        for name in ("store", "annbatch-float32.zarr", "annbatch-uint16.zarr"):
            if (work / name).exists():
                size = sum(p.stat().st_size for p in (work / name).rglob("*") if p.is_file())
                tell({"store": name, "bytes_per_cell": round(size / store.n_obs, 1)})


if __name__ == "__main__":
    main()
