"""A mapping job of many queries: killed, spread over workers, a dask cluster and a bucket.

    STREAMX_DATA=... python benchmarks/jobs.py --queries 100 --kills 20

Two samples of kang_muscat are the reference (SCALEX); half of the queries are 200 cells of the other two,
half are simulated: Poisson counts of the reference's types under a batch effect of their own. `streamx map`
runs with one worker, two and eight (CPU seconds of all processes, wall, load of the machine before), on a
local dask cluster and with everything in a bucket (moto); and on two workers, of which one or the coordinator
is killed with SIGKILL at random moments, and the command run again until it ends. Each must leave the bytes
of the first. One JSON line each, appended to results/jobs.jsonl. What workers use after the death of their
coordinator is missing in the CPU seconds. A folder keeps the inputs and the first run for the other ways.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from provenance import commit, machine

RESULTS = Path(__file__).parent / "results" / "jobs.jsonl"
CLI = [sys.executable, "-m", "streamx"]
SETTINGS = ["--label-key", "cell_type", "--truth-key", "cell_type", "--min-query-cells", "100"]
METRICS = ["--max-cells", "1000", "--resolution", "1"]
WAYS = {
    "2 workers, killed": ["--workers", "2"],
    "2 workers": ["--workers", "2"],
    "8 workers": ["--workers", "8"],
    "dask local:2": ["--dask", "local:2"],
    "bucket": [],
}


def prepare(folder: Path, queries: int, seed: int) -> None:
    """The reference model, and the query files."""
    import anndata as ad
    import numpy as np
    import pandas as pd

    import streamx as sx

    cells = ad.read_h5ad(Path(os.environ["STREAMX_DATA"]) / "kang_muscat_4samples.h5ad")
    samples = sorted(cells.obs["batch"].unique())
    known = cells[cells.obs["batch"].isin(samples[:2])].copy()
    new = cells[cells.obs["batch"].isin(samples[2:])].copy()
    sx.convert({"known": known}, folder / "store", batch_key="batch", threads=1)
    sx.preprocess(folder / "store", folder / "view", min_features=20, n_top_features=800, threads=1)
    sx.train(folder / "view", folder / "model", max_iteration=300, device="cpu", threads=1, progress=False)
    (folder / "queries").mkdir()
    rng = np.random.default_rng(seed)
    types = sorted(known.obs["cell_type"].unique())
    profile_tg = np.stack(
        [np.asarray(known.X[(known.obs["cell_type"] == t).to_numpy()].mean(0)).ravel() for t in types]
    )
    for number in range(queries):
        if number % 2 == 0:
            some = new[np.sort(rng.choice(new.n_obs, 200, replace=False))].copy()
        else:
            type_n = rng.integers(len(types), size=200)
            effect_g = rng.lognormal(0, 0.3, known.n_vars)
            x_ng = rng.poisson(profile_tg[type_n] * effect_g * rng.lognormal(0, 0.3, (200, 1)))
            obs = pd.DataFrame(
                {"cell_type": np.array(types)[type_n]}, index=[f"s{number}-{i}" for i in range(200)]
            )
            some = ad.AnnData(x_ng.astype(np.float32), obs=obs, var=known.var[[]].copy())
        some.write_h5ad(folder / "queries" / f"q{number:03d}.h5ad")


def digests(out: Path) -> dict[str, str]:
    """Of every file but the timings."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    named = {path.relative_to(out).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not name.startswith("timings/")
    }


def measured(words: list[str], interrupt: Callable[[subprocess.Popen[bytes]], bool] | None = None) -> Any:
    """A command line, begun anew whenever `interrupt` ends it: its cost, kills and starts."""
    before, begun, kills, starts = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0, 0
    load = round(os.getloadavg()[0], 1)
    while True:
        starts += 1
        process = subprocess.Popen(
            [*CLI, *words, "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while interrupt is not None and process.poll() is None and interrupt(process):
            kills += 1
        if process.wait() == 0:
            break
        if process.returncode not in (-signal.SIGKILL, 0):
            sys.exit(f"streamx {' '.join(words)}: {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"wall_s": round(time.monotonic() - begun, 1), "cpu_s": round(cpu, 1), "load": load}
    return found | {"kills": kills, "starts": starts}


def records(out: Path) -> int:
    return len(list(out.glob("records/*.json")))


def killer(out: Path, wanted: int, seed: int) -> Callable[[subprocess.Popen[bytes]], bool]:
    """Kills a worker or the coordinator, at random moments after one more query was recorded."""
    rng, done = random.Random(seed), [0]

    def interrupt(process: subprocess.Popen[bytes]) -> bool:
        if done[0] == wanted:
            process.wait()
            return False
        before = records(out)
        while process.poll() is None and records(out) == before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        if process.poll() is not None:
            return False
        coordinator = psutil.Process(process.pid)
        rng.choice([coordinator, *coordinator.children()]).send_signal(signal.SIGKILL)
        done[0] += 1
        time.sleep(0.1)
        return True

    return interrupt


def in_a_bucket(folder: Path, words: Callable[[str, list[str], str], list[str]], out: Path) -> Any:
    """The job with reference, queries and output in a bucket; its objects are copied to `out`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "STREAMX_SCRATCH": str(folder / "scratch"),
    }
    import boto3

    from streamx.store.location import open_location

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="cells")
    place = open_location("s3://cells/job")
    for path in [*(folder / "model").rglob("*"), *(folder / "queries").iterdir()]:
        if path.is_file():
            place.write(path.relative_to(folder).as_posix(), path.read_bytes())
    found = measured(words("s3://cells/job/model", ["s3://cells/job/queries/*.h5ad"], "s3://cells/job/out"))
    for key in place.below("out").list():
        target = out / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(place.below("out").read(key))
    server.stop()
    return found


def without_places(out: Path) -> dict[str, str]:
    """Digests of a job's output but for what names where its inputs lay."""
    found = {name: digest for name, digest in digests(out).items() if name != "map.json"}
    for path in out.glob("records/*.json"):
        record = json.loads(path.read_text()) | {"source": None}
        found[f"records/{path.name}"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=100, metavar="N")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--no-metrics", action="store_true", help="labels only, for a third of the work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; for one seed, number and setting")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    about = {
        "benchmark": "jobs",
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "zarr", "distributed")},
        "queries": args.queries,
        "metrics": not args.no_metrics,
    }
    with tempfile.TemporaryDirectory() as place, args.out.open("a") as lines:

        def say(way: str, found: dict[str, Any], same: bool | None) -> None:
            row = about | {"way": way, "same_bytes": same} | found
            print(json.dumps(row), flush=True)
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        every_way(args, args.folder or Path(place), say)


def every_way(args: argparse.Namespace, folder: Path, say: Callable[..., None]) -> None:
    if not (folder / "queries").exists():
        prepare(folder, args.queries, args.seed)
    files = [str(path) for path in sorted((folder / "queries").iterdir())]
    assert len(files) == args.queries
    settings = [*SETTINGS, *(["--no-metrics"] if args.no_metrics else METRICS)]

    def words(model: str, queries: list[str], out: str, *more: str) -> list[str]:
        return ["map", model, *queries, "-o", out, *settings, *more]

    model, whole = str(folder / "model"), folder / "whole"
    if not whole.exists():
        say("1 worker", measured(words(model, files, str(whole))), None)
    for way in args.ways:
        other = folder / "other"
        if way == "bucket":
            found = in_a_bucket(folder, words, other)
            theirs, ours = without_places(other), without_places(whole)
        else:
            interrupt = killer(other, args.kills, args.seed) if "killed" in way else None
            found = measured(words(model, files, str(other), *WAYS[way]), interrupt)
            theirs, ours = digests(other), digests(whole)
        say(way, found | {"files": len(ours)}, theirs == ours)
        shutil.rmtree(other)


if __name__ == "__main__":
    main()
