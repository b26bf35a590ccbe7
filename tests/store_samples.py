"""Small data with awkward shapes, and what a store made of them must hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from streamx.store import Collection, decode
from streamx.store.chunks import Chunks

FILE, FILE_ROW, NAME = "_streamx_file", "_streamx_file_row", "_streamx_name"


def counts(n: int, g: int, seed: int, *, high: int = 40, density: float = 0.3) -> sparse.csr_matrix:
    """Counts below `high` as float32, with an empty first, last and middle row and an all-zero gene."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, high, (n, g)) * (rng.random((n, g)) < density)
    if n > 3:
        dense[[0, n // 2, n - 1]] = 0
    dense[:, g // 2] = 0
    return sparse.csr_matrix(dense.astype(np.float32))


def sample(
    n: int, genes: int | list[str], seed: int, *, high: int = 40, density: float = 0.3, **obs: Any
) -> ad.AnnData:
    """An AnnData of counts; without `obs` it has a column `kind`."""
    names = [f"g{i}" for i in range(genes)] if isinstance(genes, int) else genes
    rng = np.random.default_rng(seed + 1000)
    table = pd.DataFrame(obs or {"kind": rng.choice(["T", "B", "NK"], n)})
    table.index = pd.Index([f"c{i}" for i in range(n)], dtype=object)
    x_ng = counts(n, len(names), seed, high=high, density=density)
    return ad.AnnData(x_ng, obs=table, var=pd.DataFrame(index=pd.Index(names, dtype=object)))


def with_names(adata: ad.AnnData, prefix: str) -> ad.AnnData:
    adata.obs_names = [f"{prefix}{i}" for i in range(adata.n_obs)]
    return adata


def written(adata: ad.AnnData, path: Path) -> Path:
    adata.write_h5ad(path)
    return path


def tree(*folders: Path) -> dict[str, bytes]:
    """Every file below the folders, by its path within."""
    return {
        f"{folder.suffix}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_of(collection: Collection, key: str) -> np.ndarray:
    """Rows of the collection that come from a file, in the file's order."""
    mine = np.flatnonzero((collection.obs_column(FILE) == key).to_numpy())
    return mine[np.argsort(collection.obs_column(FILE_ROW).to_numpy()[mine])]


def assert_holds(collection: Collection, inputs: Mapping[str, ad.AnnData]) -> None:
    """Every value, name and obs value of the inputs, and nothing else, whatever the order of rows."""
    assert collection.n_obs == sum(adata.n_obs for adata in inputs.values())
    x_ng = collection.read(0, collection.n_obs, dtype=np.float64)
    x_ng.check_format()
    assert (x_ng.data != 0).all()
    for key, adata in inputs.items():
        rows = rows_of(collection, key)
        mine = collection.var_names.isin(adata.var_names)
        there = collection.var_names[mine]
        expected = np.asarray(adata[:, there].X.todense(), dtype=np.float64)
        np.testing.assert_array_equal(x_ng[rows][:, mine].toarray(), expected)
        assert x_ng[rows][:, ~mine].nnz == 0
        assert list(collection.obs_column(NAME).iloc[rows]) == list(adata.obs_names)
        for column in adata.obs.columns:
            found = collection.obs_column(column).iloc[rows].to_numpy(dtype=object)
            wanted = adata.obs[column].to_numpy(dtype=object)
            missing = pd.isna(wanted)
            assert pd.isna(found[missing]).all(), column
            if collection.manifest.obs_schema[column]["dtype"] in ("category", "string"):
                wanted = wanted.astype(str)
            assert list(found[~missing]) == list(wanted[~missing]), column


def read_values(chunks: Chunks, low: int, high: int) -> np.ndarray:
    """Values low..high, decoded chunk by chunk, from the file and from a buffer alike."""
    assert decode.available()
    number_k = np.arange(low // chunks.chunk, -(-high // chunks.chunk))
    frames = chunks.frames(number_k)
    start, stop, at = (np.array([value]) for value in (low, high, 0))
    ranges, given_k3, end = chunks.ranges(frames, 0)
    given = np.empty(end, np.uint8)
    chunks.location.read_ranges(ranges, given)
    results = []
    for frame_k3, straight in ((frames.frame_k3, (True, True)), (given_k3, (False, False))):
        scratch, out = np.empty(chunks.chunk, chunks.dtype), np.empty(high - low, chunks.dtype)
        answer = decode.place_chunks(
            number_k, frame_k3, frame_k3, given, 1 << 18, chunks.chunk, chunks.coding, chunks.coding, True,
            start, stop, at, scratch, scratch.copy(), np.empty_like(out), out, straight,
        )  # fmt: skip
        if answer:
            raise chunks.damaged(0, decode.WHAT[answer % decode.N_ERRORS])
        results.append(out)
    np.testing.assert_array_equal(*results)
    return results[0]
