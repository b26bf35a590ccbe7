"""Limits that are promised: memory while converting, files per store, columns read by an opened store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from store_samples import sample

import streamx as sx
from streamx.store import layout
from streamx.store.strict import StrictStore

MEASURE = """
import json, os, sys, threading, time
os.sync = lambda: None

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

import anndata, h5py, pandas, zarr, streamx as sx
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
store = sx.convert(sys.argv[1], sys.argv[2], batch_key="batch", memory=sys.argv[3], threads=2)
done.set(), watcher.join()
print(json.dumps({"growth": peak[0] - before, "n_obs": store.n_obs, "nnz": store.nnz}))
"""


def write_synthetic(path: Path, n: int, n_genes: int, per_cell: int) -> None:
    """An h5ad of counts, written block by block: it needs no memory itself."""
    rng = np.random.default_rng(0)
    text = h5py.string_dtype()

    def frame(file: h5py.File, name: str, names: list[str], columns: list[str]) -> h5py.Group:
        group = file.create_group(name)
        group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        group.attrs["column-order"] = np.array(columns, dtype=text)
        index = group.create_dataset("_index", data=np.array(names, dtype=object), dtype=text)
        index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        return group

    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x_ng = file.create_group("X")
        x_ng.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n, n_genes]})
        x_ng["indptr"] = np.arange(n + 1, dtype=np.int64) * per_cell
        indices = x_ng.create_dataset("indices", (n * per_cell,), "i4", chunks=(1 << 16,))
        data = x_ng.create_dataset("data", (n * per_cell,), "f4", chunks=(1 << 16,))
        for low in range(0, n, 10_000):
            high = min(low + 10_000, n)
            steps = rng.integers(1, n_genes // per_cell, (high - low, per_cell))
            indices[low * per_cell : high * per_cell] = (np.cumsum(steps, axis=1) - 1).ravel()
            data[low * per_cell : high * per_cell] = rng.geometric(0.4, (high - low) * per_cell)
        obs = frame(file, "obs", [f"cell{i}" for i in range(n)], ["batch"])
        obs["batch"] = rng.integers(0, 8, n)
        obs["batch"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        frame(file, "var", [f"gene{i}" for i in range(n_genes)], [])


def growth(folder: Path, n: int, n_genes: int, per_cell: int, memory: str) -> int:
    """Anonymous memory that a conversion needs at its peak, above what its imports need."""
    write_synthetic(folder / "data.h5ad", n, n_genes, per_cell)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder / "data.h5ad"), str(folder / "store"), memory],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(run.stdout.splitlines()[-1])
    assert (report["n_obs"], report["nnz"]) == (n, n * per_cell)
    return report["growth"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory(tmp_path: Path) -> None:
    """36 million values (288 MB as CSR) with a limit of 50 MB; a zarr shard of 16 million is packed whole."""
    assert growth(tmp_path, 60_000, 5_000, 600, "50MB") < 50e6 + 160e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_a_larger_file(tmp_path: Path) -> None:
    """120 million values (960 MB as CSR) with a limit of 200 MB, and the same with half of the cells."""
    half, whole = tmp_path / "half", tmp_path / "whole"
    half.mkdir(), whole.mkdir()
    first = growth(half, 100_000, 20_000, 600, "200MB")
    second = growth(whole, 200_000, 20_000, 600, "200MB")
    assert second < 200e6 + 100e6
    assert second < first * 1.25


def test_files_per_store(tmp_path: Path) -> None:
    """R22, the obs of each commit counted as one more shard."""
    adata = sample(
        101,
        13,
        0,
        batch=["a"] * 101,
        text=[f"t{i % 7}" for i in range(101)],
        number=np.arange(101),
        nullable=pd.array([None, *range(100)], dtype="Int64"),
        flag=[True] * 101,
    )
    store = sx.convert(adata, tmp_path / "store", shard_rows=30)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    info = store.summary()
    target = layout.MAX_SHARD_VALUES
    assert len(files) <= 2 * max(1, info["bytes"] / target) * 4 + 5 * (25 + 6 * len(store.obs_columns))


def test_opens_fast_and_reads_only_the_columns_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R21 in small: 200 columns."""
    adata = sample(53, 13, 0, batch=["a"] * 53, **{f"column{i}": np.arange(53) for i in range(200)})
    sx.convert(adata, tmp_path / "store")
    read: list[str] = []
    original = StrictStore.get

    async def get(self: StrictStore, key: str, *args: Any, **kwargs: Any) -> Any:
        read.append(key)
        return await original(self, key, *args, **kwargs)

    monkeypatch.setattr(StrictStore, "get", get)
    begun = time.perf_counter()
    store = sx.open(tmp_path / "store")
    assert time.perf_counter() - begun < 1
    assert read == []
    assert sorted(store.obs_column("column7")) == list(range(53))
    assert {key.split("/")[0] for key in read if "/" in key} == {"column7"}
    assert len(read) < 10
