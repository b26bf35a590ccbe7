"""A view of a billion cells without a count: what is read to open it and to plan an epoch, as files.

Twenty parts of 48 shards; manifests name every object that such a view has (15,360 zarr shards each of
indices and data). Of obs the arrays are there without chunks, which reads as zeros; of the matrix nothing is.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from streamx.store.draft import Draft
from streamx.store.location import Location, crc32c, describe, open_location
from streamx.store.manifest import MARKER, Generation, Part, Shard, _marker, dump, dump_part

N_PARTS, N_SHARDS, ZARR_SHARDS = 20, 48, 16
N_GENES, N_BATCHES, NNZ_PER_CELL = 2000, 70, 180
TYPES = [f"type{k}" for k in range(30)]
SHARD_OBJECTS = (
    "zarr.json", "X/indptr/c/0",
    *(f"obs/{name}/c/0" for name in ("_index", "batch/codes", "cell_type/codes", "_streamx_total")),
    *(f"X/{name}/zarr.json" for name in ("data", "indices", "indptr")),
    *(f"X/{name}/c/{k}" for name in ("data", "indices") for k in range(ZARR_SHARDS)),
    *(f"var/x{k}/c/0" for k in range(10)),
)  # fmt: skip


def write_billion(folder: Path, n_cells: int = 10**9) -> int:
    """Write the view; gives its number of rows."""
    location = open_location(folder)
    batches = [f"batch{k:03d}" for k in range(N_BATCHES)]
    schema: dict[str, Any] = {
        "batch": {"dtype": "category", "categories": batches},
        "cell_type": {"dtype": "category", "categories": TYPES},
        "_streamx_total": {"dtype": "float64"},
    }
    rng = np.random.default_rng(0)
    entries = []
    for number in range(1, N_PARTS + 1):
        share = rng.dirichlet(np.full(N_BATCHES, 0.5))
        rows_b = np.maximum(1, (share * (n_cells // N_PARTS)).astype(np.int64))
        entries.append(_write_part(location, number, rows_b, batches, schema))
    generation = Generation(
        kind="view", number=N_PARTS, n_vars=N_GENES, batch_key="batch", obs_schema=schema,
        parts=tuple(entries), fingerprint={},
        view={"transform": {"target_sum": 1e4, "total": "view_total", "log1p": True}},
    )  # fmt: skip
    data = dump(asdict(generation))
    location.write(generation.path, data)
    location.write(MARKER, _marker(generation, data))
    return generation.n_obs


def _write_part(
    location: Location, number: int, rows_b: np.ndarray, batches: list[str], schema: dict[str, Any]
) -> dict[str, Any]:
    n_obs = int(rows_b.sum())
    cuts = np.linspace(0, n_obs, N_SHARDS + 1).astype(int)
    paths = [f"shards/{(number - 1) * N_SHARDS + k:06d}.zarr" for k in range(N_SHARDS)]
    shards = tuple(
        Shard(path, int(b - a), int(b - a) * NNZ_PER_CELL)
        for path, a, b in zip(paths, cuts[:-1], cuts[1:], strict=True)
    )
    objects = {f"{path}/{name}": [1_000_000, "00000000"] for path in paths for name in SHARD_OBJECTS}
    for key, data in _obs(n_obs, batches).items():
        location.write(f"obs/{number:06d}.zarr/{key}", data)
        objects[f"obs/{number:06d}.zarr/{key}"] = describe(data)
    measured = "0" * (N_GENES // 4)
    source = {"key": f"file{number}", "n_obs": n_obs, "n_genes": N_GENES, "measured": measured}
    runs = tuple(zip(batches, rows_b.tolist(), strict=True))
    part = Part(number, n_obs, n_obs * NNZ_PER_CELL, shards, runs, (source,), objects)
    path, data = dump_part(part)
    location.write(path, data)
    entry = {"path": path, "bytes": len(data), "crc32c": crc32c(data), "n_obs": n_obs, "nnz": part.nnz}
    return entry | {"n_shards": N_SHARDS, "maximum": 200, "dtype": "uint8"}


def _obs(n_obs: int, batches: list[str]) -> dict[str, bytes]:
    """Metadata of an obs group, categories, and no chunk of a cell."""
    draft = Draft()
    order = ["batch", "cell_type", "_streamx_total"]
    draft.group("", {"encoding-type": "dataframe", "_index": "_index", "column-order": order})
    draft.empty("_index", (n_obs,), str)
    for name, categories in (("batch", batches), ("cell_type", TYPES)):
        draft.group(name, {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        draft.empty(f"{name}/codes", (n_obs,), np.int8)
        draft.strings(f"{name}/categories", categories)
    draft.empty("_streamx_total", (n_obs,), np.float64)
    return draft.take()
