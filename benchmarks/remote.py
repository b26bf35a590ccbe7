"""An epoch from a bucket: requests and bytes against the least that could do, and cells per second.

    python benchmarks/remote.py --cells 60000

Synthetic counts (20,000 genes, about 800 values per cell, preset `remote`) are written to a folder. A small
server in a process of its own, which counts and delays every answer by 0, 20 or 100 ms, offers the folder as
a bucket. Two readers take the same shuffled epoch (blocks of rows, 16,384 rows at a time) of it:

* `streamx`: :class:`streamx.Loader`, CSR minibatches of 256 cells;
* `zarr`: zarr-python's own path (ObjectStore over obstore), which reads the same blocks of indices and data,
  those of a fetch all at once, and does not even put the rows in order.

`ideal` counts one request per run of adjacent chunks of a fetch, and the bytes of these chunks. The second
epoch is measured; `requests_of_ideal_with_opening` is of the first one, with all that opening the store,
metadata and shard indexes take. Runs alternate; one JSON line per reader and latency holds medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ENVIRONMENT = {"AWS_SKIP_SIGNATURE": "true", "AWS_REGION": "us-east-1"}
LOADER = {"minibatch_size": 256, "seed": 0, "output": "scipy", "prefetch": 2, "threads": 2}


# -- the bucket ------------------------------------------------------------------------------------------


def serve(folder: str, answer: Any, latency: Any, counts: Any) -> None:
    """GET (with ranges) and HEAD of the files in a folder, as S3 answers them; runs for ever."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
                if latency.value:
                    await asyncio.sleep(latency.value)
                sent = respond(writer, method, Path(folder, path.split("/", 2)[2]), headers.get("range"))
                counts[0] += 1
                counts[1] += sent
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024)
        answer.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def respond(writer: asyncio.StreamWriter, method: str, path: Path, wanted: str | None) -> int:
    """Write the answer; returns the bytes of its body."""
    if not path.is_file():
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return 0
    size = path.stat().st_size
    low, high, status = 0, size, "200 OK"
    extra = ""
    if wanted:
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        low, high = (size - int(last), size) if not first else (int(first), min(int(last) + 1, size))
        status, extra = "206 Partial Content", f"Content-Range: bytes {low}-{high - 1}/{size}\r\n"
    writer.write(
        f'HTTP/1.1 {status}\r\nContent-Length: {high - low}\r\n{extra}ETag: "{size}"\r\n'
        "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n".encode()
    )
    if method == "HEAD":
        return 0
    with path.open("rb") as file:
        writer.write(os.pread(file.fileno(), high - low, low))
    return high - low


# -- the readers -----------------------------------------------------------------------------------------


def with_streamx(url: str) -> Callable[[int], int]:
    """Epoch number -> cells delivered."""
    import streamx as sx

    loader = sx.Loader(sx.open(url), **LOADER)
    return lambda epoch: sum(len(mb) for mb in loader.at(epoch))


def with_zarr(url: str) -> Callable[[int], int]:
    """The same blocks through zarr-python; the plan and indptr are given for nothing."""
    import zarr
    from obstore.store import S3Store
    from zarr.core.sync import sync
    from zarr.storage import ObjectStore

    import streamx as sx

    view = sx.open(url)
    loader = sx.Loader(view, **LOADER)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = {"allow_http": True}
    starts, arrays, offsets = [0], [], []
    for shard in [shard for part in view.parts for shard in part.shards]:
        store = S3Store(bucket, prefix=f"{prefix}/{shard.path}", client_options=client)
        group = zarr.open_group(ObjectStore(store, read_only=True), mode="r", zarr_format=3)
        arrays.append([group[f"X/{name}"]._async_array for name in ("indices", "data")])
        offsets.append(group["X/indptr"][:])
        starts.append(starts[-1] + shard.n_obs)

    async def read(ranges: list[tuple[int, int]]) -> int:
        tasks = []
        for low, high in ranges:
            while low < high:
                k = int(np.searchsorted(starts, low, side="right")) - 1
                stop = min(high, starts[k + 1])
                values = slice(*(int(offsets[k][row - starts[k]]) for row in (low, stop)))
                tasks += [array.getitem(values) for array in arrays[k]]
                low = stop
        return sum(len(values) for values in await asyncio.gather(*tasks))

    def epoch(number: int) -> int:
        plan = loader.plan(number)
        cells = 0
        for k in range(plan.n_fetches):
            ranges = plan.fetch(k).ranges.tolist()
            sync(read(ranges))
            cells += sum(high - low for low, high in ranges)
        return cells

    return epoch


def ideal(folder: Path, epoch: int) -> tuple[int, int]:
    """Requests and bytes of an epoch, if every run of adjacent chunks were one request and nothing else."""
    import streamx as sx
    from streamx.store.matrix import _tasks
    from streamx.store.read import plan_reads

    view = sx.open(folder)
    loader = sx.Loader(view, **LOADER)
    plan = loader.plan(epoch)
    requests = n_bytes = 0
    for k in range(plan.n_fetches):
        reads = plan_reads([(low, high) for low, high in plan.fetch(k).ranges.tolist()], view._shard_starts)
        offsets = [view._matrix(read.shard).row_offsets(read.start, read.stop) for read in reads]
        start, stop = (np.concatenate([part[w] for part in offsets]) for w in (slice(-1), slice(1, None)))
        for task in _tasks(view._matrix, reads, offsets, start, stop, start):
            assert task.frames is not None
            assert task.matrix.values is not None
            for chunks, frames in zip(task.matrix.values, task.frames, strict=True):
                ranges, _, end = chunks.ranges(frames, 0)
                requests, n_bytes = requests + len(ranges), n_bytes + end
    return requests, n_bytes


# -- measuring -------------------------------------------------------------------------------------------


def make_store(folder: Path, n_cells: int, n_genes: int) -> None:
    from preprocess import write_h5ad

    import streamx as sx

    write_h5ad(folder / "data.h5ad", n_cells, n_genes)
    sx.convert([folder / "data.h5ad"], folder / "store", batch_key="batch", preset="remote")
    (folder / "data.h5ad").unlink()


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    answer, latency, counts = context.Queue(), context.Value("d", 0.0), context.Array("q", 2)
    server = context.Process(target=serve, args=(str(folder), answer, latency, counts), daemon=True)
    server.start()
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{answer.get()}")
    first, least = ideal(folder / "store", 0), ideal(folder / "store", 1)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    opening: dict[str, float] = {}
    readers = {}
    for name, make in (("streamx", with_streamx), ("zarr", with_zarr)):
        counts[:] = [0, 0]
        readers[name] = make("s3://bucket/store")
        readers[name](0)
        opening[name] = counts[0] / first[0]
    for _ in range(args.repeats):
        for milliseconds in args.latency:
            latency.value = milliseconds / 1000
            for name, reader in readers.items():
                counts[:] = [0, 0]
                spent, begun = psutil.Process().cpu_times(), time.perf_counter()
                cells = reader(1)
                seconds, now = time.perf_counter() - begun, psutil.Process().cpu_times()
                cpu = now.user + now.system - spent.user - spent.system
                run = {"seconds": seconds, "cpu_s": cpu, "requests": counts[0], "bytes": counts[1]}
                found.setdefault((name, milliseconds), []).append(run | {"cells": cells})
    latency.value = 0.0
    server.terminate()
    rows = []
    for (name, milliseconds), runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append(
            {
                "benchmark": "remote",
                "reader": name,
                "latency_ms": milliseconds,
                "cells": int(middle["cells"]),
                "cells_per_second": round(middle["cells"] / middle["seconds"]),
                "cells_per_cpu_second": round(middle["cells"] / middle["cpu_s"]),
                "requests": int(middle["requests"]),
                "bytes": int(middle["bytes"]),
                "requests_of_ideal": round(middle["requests"] / least[0], 3),
                "bytes_of_ideal": round(middle["bytes"] / least[1], 3),
                "requests_of_ideal_with_opening": round(opening[name], 3),
                "repeats": len(runs),
                "seconds": [round(run["seconds"], 3) for run in runs],
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "versions": {p: version(p) for p in ("streamx", "zarr", "obstore", "numpy")},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cells", type=int, default=60_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--latency", type=int, nargs="+", default=[0, 20, 100], help="milliseconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the store, kept (default: a temporary one)")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results/remote.jsonl")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "store").exists():
            make_store(folder, args.cells, args.genes)
        rows = measure(folder, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a") as file:
        for row in rows:
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
