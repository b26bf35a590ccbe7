"""Files -> store -> rows, AnnData, plain anndata: every value as it was."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from store_samples import assert_holds, rows_of, sample, with_names, written

import streamx as sx
from streamx.errors import UsageError
from streamx.store import Collection

PRESETS = ("default", "compact", "remote", "speed")


def inputs() -> dict[str, ad.AnnData]:
    return {
        "a": with_names(sample(53, 31, 0), "a"),
        "b": with_names(sample(1, 31, 1, density=1), "b"),  # a batch of one cell
        "z": with_names(sample(71, 31, 2), "z"),
    }


def joined(shards: list[Path]) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs")  # delta, by plain anndata
        return ad.concat([ad.read_zarr(shard) for shard in shards])


@pytest.mark.parametrize("preset", PRESETS)
def test_files_to_store_and_back(tmp_path: Path, tiny_geometry: None, preset: str) -> None:
    made = inputs()
    files = [written(adata, tmp_path / f"{key}.h5ad") for key, adata in made.items()]
    store = sx.convert(files, tmp_path / "store", shard_rows=37, preset=preset, threads=2)
    assert_holds(store, made)
    assert store.batches == ["a", "b", "z"]
    assert (np.diff(store.batch_codes) >= 0).all()
    shards = sorted((tmp_path / "store" / "shards").iterdir())
    assert [joined([shard]).n_obs for shard in shards] == [37, 37, 37, 14]
    plain = joined(shards)
    np.testing.assert_array_equal(plain.X.toarray(), store.read(0, store.n_obs).toarray())
    assert list(plain.obs_names) == list(store.obs_names)
    for column in store.obs_columns:
        assert list(plain.obs[column]) == list(store.obs_column(column)), column
    for adata in (store.to_anndata(), store.to_anndata(lazy=True)):
        x_ng = adata.X.compute() if hasattr(adata.X, "compute") else adata.X
        np.testing.assert_array_equal(x_ng.toarray(), plain.X.toarray())
        pd.testing.assert_frame_equal(adata.obs, store.obs)


@pytest.mark.parametrize(
    ("high", "dtype"),
    [(250, "uint8"), (60_000, "uint16"), (70_000, "uint32"), (2**31, "uint32"), (2**40, "uint64")],
)
def test_smallest_dtype_that_holds_every_count(tmp_path: Path, high: int, dtype: str) -> None:
    adata = sample(17, 11, 0)
    x_ng = adata.X.toarray().astype(np.float64)
    x_ng[3, 2] = high
    adata.X = sparse.csr_matrix(x_ng)
    store = sx.convert(adata, tmp_path / "store", batch_key="kind")
    assert store.summary()["value_dtype"] == dtype
    assert store.maximum == high
    assert_holds(store, {"adata": adata})
    assert store.read(0, 17, dtype="stored").dtype == dtype
    back = store.to_anndata()
    assert back.X.max() == high  # float32 would round the large ones
    assert back.X.dtype == (np.float32 if high <= 2**24 else np.float64)
    assert store.to_anndata(lazy=True).X.compute().max() == high


def test_normalised_values(tmp_path: Path) -> None:
    adata = sample(29, 13, 0)
    adata.X = adata.X.log1p()
    store = sx.convert(adata, tmp_path / "store", batch_key="kind", allow_float=True)
    assert store.summary()["value_dtype"] == "float32"
    assert_holds(store, {"adata": adata})


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float64])
def test_negative_values_that_were_allowed(tmp_path: Path, dtype: type) -> None:
    adata = sample(29, 13, 0)
    x_ng = adata.X.toarray()
    x_ng[5, 5] = -3
    adata.X = sparse.csr_matrix(x_ng.astype(dtype))
    store = sx.convert(adata, tmp_path / "store", batch_key="kind", allow_float=True)
    assert_holds(store, {"adata": adata})


def test_more_genes_than_uint16(tmp_path: Path) -> None:
    n_genes = (1 << 16) + 7
    x_ng = sparse.random(23, n_genes, 0.0005, format="csr", random_state=0)
    x_ng.data = np.ceil(x_ng.data * 9)
    x_ng = sparse.lil_matrix(x_ng)
    x_ng[4, n_genes - 1] = 5
    adata = sample(23, 2, 0)
    wide = ad.AnnData(x_ng.tocsr(), obs=adata.obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))
    store = sx.convert(wide, tmp_path / "store", batch_key="kind")
    assert store.summary()["index_dtype"] == "uint32"
    assert_holds(store, {"adata": wide})
    exactly = wide[:, : 1 << 16].copy()
    assert sx.convert(exactly, tmp_path / "b", batch_key="kind").summary()["index_dtype"] == "uint16"


def test_matrix_without_a_value(tmp_path: Path, tiny_geometry: None) -> None:
    adata = sample(19, 5, 0)
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    store = sx.convert(adata, tmp_path / "store", batch_key="kind", shard_rows=7)
    assert store.nnz == 0
    assert store.read(3, 17).nnz == 0
    assert store.read(3, 17).shape == (14, 5)
    assert ad.read_zarr(tmp_path / "store/shards/000002.zarr").X.nnz == 0
    assert sx.verify(tmp_path / "store")["ok"]


def test_shards_without_a_value_among_others(tmp_path: Path, tiny_geometry: None) -> None:
    """A shard, its first and last rows, and whole chunks may be empty."""
    adata = sample(40, 9, 3, density=0.9, batch=np.repeat(["a", "b", "c", "d"], 10))
    x_ng = adata.X.toarray()
    x_ng[10:20] = x_ng[30:] = 0
    adata.X = sparse.csr_matrix(x_ng)
    store = sx.convert(adata, tmp_path / "store", shard_rows=5)
    assert_holds(store, {"adata": adata})


def test_rows_in_any_cut(tmp_path: Path, tiny_geometry: None) -> None:
    store = sx.convert(inputs(), tmp_path / "store", shard_rows=37)
    whole = store.read(0, store.n_obs).toarray()
    rng = np.random.default_rng(0)
    for _ in range(25):
        ranges = [sorted(rng.integers(0, store.n_obs + 1, 2)) for _ in range(rng.integers(0, 5))]
        columns = None if rng.random() < 0.5 else rng.permutation(31)[: rng.integers(1, 31)]
        got = store.fetch([(int(a), int(b)) for a, b in ranges], columns)
        got.check_format()
        expected = np.concatenate([whole[a:b] for a, b in ranges] or [whole[:0]])
        np.testing.assert_array_equal(got.toarray(), expected if columns is None else expected[:, columns])
    for ranges in ([(-1, 3)], [(5, 3)], [(0, store.n_obs + 1)]):
        with pytest.raises(UsageError, match="rows"):
            store.fetch(ranges)
        with pytest.raises(UsageError, match="rows"):
            store.obs_column("kind", *ranges[0])
    column = store.obs_column("kind")
    for start, stop in ((0, 5), (30, 90), (124, 125), (125, 125)):
        assert list(store.obs_column("kind", start, stop)) == list(column.iloc[start:stop])


def test_dense_modality_travels_in_the_same_order(tmp_path: Path, tiny_geometry: None) -> None:
    """Proteins that a file lacks are zero, and marked as not measured in its batches."""
    made = inputs()
    rng = np.random.default_rng(0)
    proteins = {"a": ["CD3", "CD4"], "z": ["CD8", "CD3"]}
    for key, names in proteins.items():
        values = rng.integers(1, 99, (made[key].n_obs, 2)).astype(np.float32)
        made[key].obsm["protein_expression"] = pd.DataFrame(values, columns=names, index=made[key].obs_names)
    store = sx.convert(made, tmp_path / "store", shard_rows=37)
    assert store.modalities == {
        "protein_expression": {
            "names": ["CD3", "CD4", "CD8"],
            "measured": {"a": [True, True, False], "b": [False] * 3, "z": [True, False, True]},
        }
    }
    found = pd.DataFrame(store.read_obsm("protein_expression"), columns=["CD3", "CD4", "CD8"])
    for key, names in proteins.items():
        expected = made[key].obsm["protein_expression"]
        rows = rows_of(store, key)
        np.testing.assert_array_equal(found[names].to_numpy()[rows], expected.to_numpy())
        assert (found.drop(columns=names).to_numpy()[rows] == 0).all()
    np.testing.assert_array_equal(store.read_obsm("protein_expression", 30, 80), found.to_numpy()[30:80])
    np.testing.assert_array_equal(store.to_anndata().obsm["protein_expression"], found)
    plain = joined(sorted((tmp_path / "store" / "shards").iterdir()))
    np.testing.assert_array_equal(plain.obsm["protein_expression"], found)
    with pytest.raises(UsageError, match="protein_expression"):
        store.read_obsm("proteins")


def test_one_name_of_a_modality(tmp_path: Path) -> None:
    adata = sample(9, 5, 0)
    adata.obsm["ADT"] = np.ones((9, 2), dtype=np.float32)
    store = sx.convert(adata, tmp_path / "store", batch_key="kind", obsm="ADT")
    assert store.modalities["ADT"]["names"] == ["0", "1"]
    assert sx.convert(adata, tmp_path / "other", batch_key="kind").modalities == {}


def test_a_collection_travels_to_other_processes(tmp_path: Path) -> None:
    store = sx.convert(inputs(), tmp_path / "store")
    expected = store.read(3, 40).toarray()
    other: Collection = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(other.read(3, 40).toarray(), expected)
    assert other.obs.equals(store.obs)


def test_answers_anndata_names(tmp_path: Path) -> None:
    made = inputs()
    sx.convert(made, tmp_path / "store")
    store = sx.open(tmp_path / "store")
    assert (store.n_obs, store.n_vars) == store.shape == (125, 31)
    assert list(store.var_names) == list(made["a"].var_names)
    assert store.obs_names.is_unique
    assert list(store.obs.columns) == store.obs_columns
    info = store.summary()
    assert {
        "n_cells": 125,
        "n_genes": 31,
        "n_batches": 3,
        "n_shards": 1,
        "generation": 1,
    }.items() <= info.items()
    on_disk = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert 0 < info["bytes"] <= on_disk
    assert info["batches"] == {"a": 53, "b": 1, "z": 71}
