"""Nearest neighbours at size, beside faiss, hnswlib, pynndescent and scikit-learn; and label transfer.

    python benchmarks/neighbours.py --peers PYTHON --sizes 100000 1000000 --dims 10 30 --neighbors 15 50

Cells are drawn from 60 stretched Gaussians of unequal size, queries from the same. Every (method, size,
dimensions) runs in a process of its own, on one thread: a first call on 2,000 cells (compilers), then it
builds its index and asks 50,000 queries with the least effort of its ladder at which 1,000 of them reach a
recall of .95 against the exact answer. Seconds and CPU seconds, recall, anonymous peak, and the index on
disk, one JSON line each, appended to results/neighbours.jsonl. `--peers` is the interpreter that has the
peers; without it streamx runs alone.
`--graph N ...` also makes the graph of all cells with itself, in files, and `--transfer N ...` moves labels
from N cells to N others, both from and to files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "neighbours.jsonl"
TARGET = 0.95
QUERIES, SCORED = 50_000, 1_000
NPROBE = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
OURS, PEERS = ("ivf", "exact"), ("faiss", "hnswlib", "pynndescent", "sklearn")
# Cells up to which a method is asked; what is left out would take a quarter of an hour and more.
MOST = {"exact": 1_000_000, "pynndescent": 1_000_000, "sklearn": 1_000_000}
MOST_WIDE = {"hnswlib": 1_000_000, "sklearn": 100_000}  # in 30 dimensions

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def write_cells(path: Path, n: int, d: int, seed: int) -> None:
    """(n, d) float32 from the mixture, block by block."""
    shape = np.random.default_rng(0)
    centers, scale = shape.normal(size=(60, d)) * 2, shape.uniform(0.6, 2, size=60)
    axes = shape.normal(size=(60, d, d)) * np.exp(-np.arange(d) / max(3, d / 3))[:, None] / np.sqrt(d)
    share = shape.dirichlet(np.full(60, 0.7))
    rng = np.random.default_rng(seed)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    for low in range(0, n, 500_000):
        cluster = rng.choice(60, size=min(500_000, n - low), p=share)
        noise = rng.normal(size=(len(cluster), d))
        for g in range(60):
            rows = np.flatnonzero(cluster == g)
            out[low + rows] = centers[g] + scale[g] * (noise[rows] @ axes[g])
    out.flush()


def build(
    method: str, points: np.ndarray, k: int
) -> tuple[Any, Search, tuple[Any, ...], Callable[[Any], None]]:
    """(index, search, ladder of efforts, how to set one)."""
    n, d = points.shape
    if method in OURS:
        from streamx.neighbors import build_index

        index = build_index(points, QUERIES, method=method, threads=1)
        return index, index.search, index.efforts, lambda effort: setattr(index, "effort", effort)
    if method == "faiss":
        import faiss

        faiss.omp_set_num_threads(1)
        ivf = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, int(4 * np.sqrt(n)))
        ivf.train(points)
        ivf.add(points)
        root = lambda q, k: (lambda far, near: (near, np.sqrt(far)))(*ivf.search(q, k))  # noqa: E731
        return ivf, root, NPROBE, lambda effort: setattr(ivf, "nprobe", effort)
    if method == "hnswlib":
        import hnswlib

        hnsw = hnswlib.Index("l2", d)
        hnsw.init_index(n, M=16, ef_construction=100, random_seed=0)
        hnsw.set_num_threads(1)
        hnsw.add_items(points)
        root = lambda q, k: (lambda near, far: (near, np.sqrt(far)))(*hnsw.knn_query(q, k))  # noqa: E731
        return hnsw, root, tuple(max(k + 1, ef) for ef in (16, 32, 64, 128, 256)), hnsw.set_ef
    if method == "pynndescent":
        import pynndescent

        nnd = pynndescent.NNDescent(points, n_neighbors=30, random_state=0, n_jobs=1)
        nnd.prepare()
        setting = {"epsilon": 0.1}
        search = lambda q, k: nnd.query(q, k, **setting)  # noqa: E731
        return nnd, search, (0.1, 0.2, 0.3, 0.5), lambda effort: setting.update(epsilon=effort)
    from sklearn.neighbors import NearestNeighbors

    tree = NearestNeighbors(algorithm="kd_tree").fit(points)
    return tree, lambda q, k: tree.kneighbors(q, k)[::-1], (0,), lambda effort: None


def index_bytes(method: str, index: Any, folder: Path) -> int | None:
    """Bytes of the index on disk, as its own package writes it; None where it writes none."""
    place = folder / "saved"
    if method in OURS:
        return sum(values.nbytes for values in index.arrays().values())
    if method == "faiss":
        import faiss

        faiss.write_index(index, str(place))
    elif method == "hnswlib":
        index.save_index(str(place))
    else:
        import pickle

        place.write_bytes(pickle.dumps(index))
    return place.stat().st_size


def spent() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    begun, before = time.monotonic(), spent()
    found = work()
    return found, {"s": round(time.monotonic() - begun, 2), "cpu_s": round(spent() - before, 2)}


def one(method: str, folder: Path, ks: list[int]) -> list[dict[str, Any]]:
    """Rows of one method, in this process."""
    points, queries = np.load(folder / "cells.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    _, compiling = timed(lambda: build(method, points[:2000], max(ks))[1](queries[:10], 5))
    made, building = timed(lambda: build(method, points, max(ks)))
    index, search, efforts, set_effort = made
    rows = []
    for k in ks:
        limit = np.load(folder / f"limit-{k}.npy")
        for effort in efforts:
            set_effort(effort)
            recall = float(np.mean(search(queries[:SCORED], k)[1] <= limit[:, None] * (1 + 1e-5)))
            if recall >= TARGET:
                break
        _, asking = timed(lambda k=k: search(queries, k))  # type: ignore[misc]
        rows.append(
            {"k": k, "effort": effort, "recall": round(recall, 4)}
            | {f"first_call_{name}": value for name, value in compiling.items()}
            | {f"build_{name}": value for name, value in building.items()}
            | {f"query_{name}": value for name, value in asking.items()}
        )
    size = index_bytes(method, index, folder)
    return [{**row, "index_bytes": size} for row in rows]


def graph(folder: Path, k: int) -> list[dict[str, Any]]:
    """The graph of all cells, from a file and into files."""
    from streamx.neighbors import nearest

    points = np.load(folder / "cells.npy", mmap_mode="r")
    found, took = timed(lambda: nearest(points, n_neighbors=k, threads=1, out=folder / "graph"))
    return [{"k": k, "recall": round(found.recall, 4), "method_chosen": found.method, **took}]


def transfer(folder: Path) -> list[dict[str, Any]]:
    """Labels of all cells to as many others, 20 types; the vote of five."""
    from streamx.labels import Labels
    from streamx.transfer import gather, vote

    points = np.load(folder / "cells.npy", mmap_mode="r")
    asked = np.load(folder / "others.npy", mmap_mode="r")
    cut = np.quantile(points[:100_000, 0], np.linspace(0, 1, 21)[1:-1])
    codes_n = np.searchsorted(cut, points[:, 0]).astype(np.int32)
    labels = Labels(codes_n, [f"type {i:02d}" for i in range(20)])

    def work() -> Any:
        voters = gather(points, [labels], asked, threads=1)
        return vote(voters, asked)[0], voters.recall

    (found, recall), took = timed(work)
    right = float(np.mean(found.codes_n == np.searchsorted(cut, asked[:, 0])))
    return [{"k": 5, "recall": round(recall, 4), "accuracy": round(right, 4), **took}]


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0


def measure(python: str, what: str, folder: Path, ks: list[int]) -> list[dict[str, Any]]:
    """Rows of one method from a process of its own, with the peak of its anonymous memory."""
    words = [python, __file__, "--one", what, "--folder", str(folder), "--neighbors", *map(str, ks)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode:
        return [{"failed": process.returncode}]
    return [{**row, "anonymous_peak_bytes": peak} for row in json.loads(text)]


def prepare(folder: Path, n: int, d: int, ks: list[int], others: bool) -> None:
    from streamx.neighbors.exact import ExactIndex

    write_cells(folder / "cells.npy", n, d, 1)
    write_cells(folder / "queries.npy", QUERIES, d, 2)
    if others:
        write_cells(folder / "others.npy", n, d, 3)
    if ks:
        points, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("cells", "queries"))
        _, far = ExactIndex(points, threads=1, memory="1GB").search(queries[:SCORED], max(ks))
        for k in ks:
            np.save(folder / f"limit-{k}.npy", far[:, k - 1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000, 5_000_000], metavar="N")
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 30], metavar="D")
    parser.add_argument("--neighbors", type=int, nargs="+", default=[15, 50], metavar="K")
    parser.add_argument("--graph", type=int, nargs="*", default=[], metavar="N")
    parser.add_argument("--transfer", type=int, nargs="*", default=[], metavar="N")
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = "1"
    if args.one:
        special = {
            "graph": lambda: graph(args.folder, args.neighbors[0]),
            "transfer": lambda: transfer(args.folder),
        }
        print(json.dumps(special.get(args.one, lambda: one(args.one, args.folder, args.neighbors))()))
        return
    from provenance import commit, machine

    about = {"benchmark": "neighbours", "commit": commit(), "machine": machine()}
    tasks = [(n, d, m) for n in args.sizes for d in args.dims for m in args.methods]
    tasks += [(n, d, "graph") for n in args.graph for d in args.dims]
    tasks += [(n, d, "transfer") for n in args.transfer for d in args.dims]
    for n, d in dict.fromkeys(task[:2] for task in tasks):
        mine = [method for *size, method in tasks if size == [n, d]]
        with tempfile.TemporaryDirectory() as place:
            prepare(Path(place), n, d, args.neighbors if n in args.sizes else [], "transfer" in mine)
            for method in mine:
                most = MOST.get(method, n) if d <= 10 else MOST_WIDE.get(method, MOST.get(method, n))
                python = args.peers if method in PEERS else sys.executable
                if n > most or python is None:
                    continue
                for row in measure(python, method, Path(place), args.neighbors):
                    line = json.dumps({**about, "method": method, "n": n, "d": d, **row})
                    print(line, flush=True)
                    with args.out.open("a") as stream:
                        stream.write(line + "\n")


if __name__ == "__main__":
    main()
