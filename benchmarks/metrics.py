"""Every metric of a latent space of up to millions of cells: seconds, memory, and whether intervals hold.

    python benchmarks/metrics.py --sizes 100000 1000000 5000000 --dims 10 30 --folder /somewhere/large
    python benchmarks/metrics.py --sizes 100000 --dims 10 --stages peer_scib peer_sklearn peer_scalex \\
        --peer-python /an/environment/with/scib-metrics/and/scalex/bin/python
    python benchmarks/metrics.py --sizes 100000 --dims 10 --stages coverage --max-cells 50000 10000

Latents are simulated: 20 labels of .07 to 27 % of the cells, overlapping, 8 batches of unequal size with
shifts of their own and in each label. Each stage is a process of its own and prints one JSON line. `coverage`
computes the metrics of neighbours and silhouettes over all cells, then from samples with ten seeds, and
counts the 95 % intervals that hold the former; `sketches` does so for clusters. `recall` compares metrics of
neighbours found exactly and with the recall that metrics ask for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent / "peers"))

from clock import clock, peak_rss_mb, since
from provenance import commit, machine

RESULTS = Path(__file__).parent / "results" / "metrics.jsonl"
N_LABELS, N_BATCHES, SEEDS = 20, 8, 10
PIECE = 1 << 16
Cells = tuple[np.ndarray, np.ndarray, np.ndarray]


def simulate(folder: Path, n: int, d: int) -> None:
    """latent.npy, batch.npy and label.npy (text is made of codes when they are read)."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    share_l = np.geomspace(400, 1, N_LABELS)
    share_b = np.linspace(1, 3, N_BATCHES)
    label = rng.choice(N_LABELS, n, p=share_l / share_l.sum()).astype(np.int32)
    batch = rng.choice(N_BATCHES, n, p=share_b / share_b.sum()).astype(np.int32)
    center_ld = rng.normal(size=(N_LABELS, d)) * 4 / np.sqrt(2 * d)  # about 4 standard deviations apart
    shift_lbd = rng.normal(size=(1, N_BATCHES, d)) * 0.9 / np.sqrt(d)
    shift_lbd = shift_lbd + rng.normal(size=(N_LABELS, N_BATCHES, d)) * 0.6 / np.sqrt(d)
    latent = np.lib.format.open_memmap(folder / "latent.npy", "w+", np.float32, (n, d))
    for low in range(0, n, PIECE):
        some = slice(low, min(low + PIECE, n))
        latent[some] = center_ld[label[some]] + shift_lbd[label[some], batch[some]]
        latent[some] += rng.normal(size=latent[some].shape)
    np.save(folder / "label.npy", label)
    np.save(folder / "batch.npy", batch)


def read(folder: Path) -> Cells:
    latent = np.load(folder / "latent.npy", mmap_mode="r")
    return latent, np.load(folder / "batch.npy"), np.load(folder / "label.npy")


@contextmanager
def parts() -> Iterator[dict[str, dict[str, float]]]:
    """CPU and wall seconds of the parts of score_latent (the index's building is in the batches').

    Each is told on stderr as it ends: a run of millions takes minutes.
    """
    from streamx.metrics import score

    names = ("_batch_measures", "_purity", "_asw_batch", "_silhouettes", "_connectivity", "_of_sketches")
    spent: dict[str, dict[str, float]] = {}
    originals = {name: getattr(score, name) for name in names}

    def timed(name: str) -> Any:
        def call(*args: Any) -> Any:
            start = clock()
            found = originals[name](*args)
            spent[name.strip("_")] = since(start)
            told = found[0] if isinstance(found, tuple) else found
            print(name, spent[name.strip("_")], peak_rss_mb(), told, file=sys.stderr, flush=True)
            return found

        return call

    for name in names:
        setattr(score, name, timed(name))
    yield spent
    for name, original in originals.items():
        setattr(score, name, original)


def ours(cells: Cells, max_cells: int, threads: int) -> dict[str, Any]:
    from streamx.metrics import score_latent

    with parts() as spent:
        found = score_latent(*cells, max_cells=max_cells, threads=threads).to_json()
    details = found["details"]
    half = {
        name: round((how["ci95"][1] - how["ci95"][0]) / 2, 5)
        for name, how in details.items()
        if "ci95" in how
    }
    values = {name: round(found[name], 4) for name in details}
    return {"max_cells": max_cells, "parts": spent, "values": values, "half_widths": half}


@contextmanager
def without(name: str, instead: Any = None) -> Iterator[None]:
    """score_latent without one of its parts."""
    from streamx.metrics import score

    original = getattr(score, name)
    setattr(score, name, lambda *rest: instead or {})
    yield
    setattr(score, name, original)


def over_all_cells(cells: Cells, threads: int) -> dict[str, float]:
    """Metrics of neighbours and silhouettes over all cells; the entropies without their draws."""
    from streamx.metrics import mixing, score_latent
    from streamx.neighbors import nearest

    latent, batch, _ = cells
    found = score_latent(*cells, max_cells=len(latent), threads=threads).values
    around = batch[nearest(latent, n_neighbors=mixing.BEM_NEIGHBORS, method="exact").indices_nm]
    n_batches = int(batch.max()) + 1
    scalex = mixing.mixing_entropies(around, np.bincount(batch) / len(batch))
    few = mixing.batch_entropies(around[:, : mixing.EBM_NEIGHBORS], n_batches)
    return found | {"batch_entropy_mixing": scalex.mean() / np.log2(n_batches), "ebm": few.mean()}


def held(cells: Cells, truth: dict[str, float], max_cells: int, threads: int) -> dict[str, Any]:
    """How many intervals of ten hold the truth, the mean error, and the widest interval's half."""
    from streamx.metrics import score_latent

    holds = dict.fromkeys(truth, 0)
    error: dict[str, list[float]] = {name: [] for name in truth}
    half = dict.fromkeys(truth, 0.0)
    for seed in range(SEEDS):
        found = score_latent(*cells, max_cells=max_cells, resolution=1.0, seed=seed, threads=threads)
        for name, exact in truth.items():
            measure = found.measures[name]
            low, high = measure.ci95 or (measure.value, measure.value)
            holds[name] += bool(low - 1e-9 <= exact <= high + 1e-9)
            error[name].append(measure.value - exact)
            half[name] = max(half[name], round((high - low) / 2, 5))
    bias = {name: round(float(np.mean(values)), 5) for name, values in error.items()}
    return {
        "max_cells": max_cells,
        "exact": {name: round(float(value), 5) for name, value in truth.items()},
        "held_of_10": holds,
        "mean_error": bias,
        "half_widths": half,
    }


def coverage(cells: Cells, max_cells: int, threads: int) -> dict[str, Any]:
    with without("_cluster_measures"):
        return held(cells, over_all_cells(cells, threads), max_cells, threads)


def sketches(cells: Cells, max_cells: int, threads: int) -> dict[str, Any]:
    from streamx.metrics import score_latent

    with without("_silhouettes"):
        found = score_latent(*cells, max_cells=len(cells[0]), resolution=1.0, threads=threads)
        names = ("nmi", "ari")
        return held(cells, {name: found.values[name] for name in names}, max_cells, threads)


def peer_scib(cells: Cells, max_cells: int, threads: int) -> dict[str, Any]:
    """scib-metrics: its search (pynndescent, 90 neighbours), then the same metrics but Leiden's."""
    import scib_metrics as scib
    from scib_metrics.nearest_neighbors import pynndescent

    latent, batch, label = cells
    latent = np.asarray(latent)
    spent: dict[str, dict[str, float]] = {}
    values: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        start = clock()
        found = call()
        spent[name] = since(start)
        return found

    graph = timed("search", lambda: pynndescent(latent, n_neighbors=90, n_jobs=max(threads, 1)))
    values["ilisi"] = timed("ilisi", lambda: float(scib.ilisi_knn(graph, batch)))
    values["clisi"] = timed("clisi", lambda: float(scib.clisi_knn(graph, label)))
    values["kbet"] = timed("kbet", lambda: float(scib.kbet(graph.subset_neighbors(50), batch)[0]))
    few = graph.subset_neighbors(15)
    values["graph_connectivity"] = timed(
        "graph_connectivity", lambda: float(scib.graph_connectivity(few, label))
    )
    if len(latent) <= 100_000:
        values["asw_label"] = timed("asw_label", lambda: float(scib.silhouette_label(latent, label)))
        values["asw_batch"] = timed("asw_batch", lambda: float(scib.silhouette_batch(latent, label, batch)))
    return {"parts": spent, "values": values}


def peer_sklearn(cells: Cells, max_cells: int, threads: int) -> dict[str, Any]:
    """sklearn's silhouette over all cells."""
    from sklearn.metrics import silhouette_score

    latent, _, label = cells
    return {"values": {"silhouette": float(silhouette_score(np.asarray(latent), label))}}


def peer_scalex(cells: Cells, max_cells: int, threads: int) -> dict[str, Any]:
    """SCALEX's batch entropy mixing score, which searches for all cells."""
    import importlib.util

    spec = importlib.util.find_spec("scalex")
    path = f"{spec.submodule_search_locations[0]}/metrics.py"  # the package itself fails on new numpy
    loaded = importlib.util.spec_from_file_location("scalex_metrics", path)
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    np.random.seed(0)  # noqa: NPY002
    latent, batch, _ = cells
    value = module.batch_entropy_mixing_score(np.asarray(latent), batch.astype(str))
    return {"values": {"batch_entropy_mixing": float(value)}}


def recall(cells: Cells, max_cells: int, threads: int) -> dict[str, Any]:
    """What neighbours missed by a search of recall .99 do to each metric over all cells."""
    from streamx.metrics import score_latent, space
    from streamx.metrics.measure import undefined

    def scored(method: str) -> Any:
        original = space.build_index
        space.build_index = lambda *args, **options: original(*args, **{**options, "method": method})
        with without("_silhouettes"), without("_asw_batch", undefined("has no neighbours")):
            found = score_latent(*cells, max_cells=len(cells[0]), resolution=1.0, threads=threads)
        space.build_index = original
        return found

    exact, missing = scored("exact"), scored("ivf")
    values = {name: value for name, value in exact.values.items() if value is not None}
    shift = {name: round(missing.values[name] - value, 6) for name, value in values.items()}
    return {"knn_recall": missing.notes["knn_recall"], "values": values, "shift": shift}


STAGES = {
    stage.__name__: stage
    for stage in (ours, coverage, sketches, recall, peer_scib, peer_sklearn, peer_scalex)
}


def run_one(stage: str, folder: Path, max_cells: int, threads: int) -> dict[str, Any]:
    cells = read(folder)
    start = clock()
    told = STAGES[stage](cells, max_cells, threads)
    return {**since(start), "peak_rss_mb": peak_rss_mb(), **told}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["ours"])
    parser.add_argument("--max-cells", type=int, nargs="+", default=[50_000], help="of each run of ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where data stay for the next time (default: removed)")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--no-record", action="store_true", help="print lines only")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.folder, args.max_cells[0], args.threads)))
        return
    about = {"commit": commit(), "machine": machine(), "time": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as temporary:
        for n, d in ((n, d) for n in args.sizes for d in args.dims):
            folder = (args.folder or Path(temporary)) / f"{n}x{d}"
            if not (folder / "batch.npy").exists():
                simulate(folder, n, d)
            for stage in args.stages:
                peer = stage.startswith("peer")
                for max_cells in args.max_cells[: 1 if peer else None]:
                    command = [args.peer_python if peer else sys.executable, "-W", "ignore", __file__]
                    command += ["--one", stage, "--folder", str(folder), "--threads", str(args.threads)]
                    command += ["--max-cells", str(max_cells)]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                    told = {"failed": done.returncode} if done.returncode else json.loads(done.stdout)
                    line = {"stage": stage, "n_cells": n, "dimensions": d, **told, **about}
                    print(json.dumps(line), flush=True)
                    if not args.no_record:
                        with RESULTS.open("a") as stream:
                            stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
