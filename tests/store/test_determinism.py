"""Memory, slabs, threads, order of files and their format decide nothing in a store.

Of formats that hold the same names and values, all objects are the same bytes but the manifests, which hold
the checksums of the inputs. Text has no obs, 10x files have gene ids: what they lack or add differs, rows and
values do not.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
from scipy import sparse
from store_samples import FILE, sample, tree, with_names, written

import streamx as sx
from streamx.store import Collection


def inputs() -> dict[str, ad.AnnData]:
    made = {key: with_names(sample(90 + 7 * i, 23, i), key) for i, key in enumerate("abc")}
    for adata in made.values():
        adata.obsm["protein_expression"] = adata.X[:, :3].toarray()
    return made


@pytest.fixture
def slabs_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamx.store.slabs.MIN_SLAB_ROWS", 3)


@pytest.mark.parametrize("preset", ["default", pytest.param("remote", marks=pytest.mark.slow)])
def test_memory_slabs_threads_order(
    tmp_path: Path, tiny_geometry: None, slabs_of_few: None, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    files = [written(adata, tmp_path / f"{key}.h5ad") for key, adata in inputs().items()]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = [shutil.copy(file, elsewhere) for file in files]
    ways: list[tuple[Any, dict[str, Any]]] = [
        (files, {"memory": "4GB", "threads": 1}),
        (files, {"memory": "30KB", "threads": 3}),
        (files[::-1], {"memory": "300KB", "threads": 8}),
        (str(elsewhere / "*.h5ad"), {"memory": "100KB"}),
        ([moved[1], files[0], moved[2]], {}),
    ]
    trees = []
    for i, (listed, settings) in enumerate(ways):
        sx.convert(listed, tmp_path / str(i), shard_rows=101, preset=preset, **settings)
        trees.append(tree(tmp_path / str(i)))
    assert all(other == trees[0] for other in trees)
    text = b"".join(data for key, data in trees[0].items() if key.endswith(".json"))
    assert str(tmp_path).encode() not in text
    assert b"elsewhere" not in text
    with monkeypatch.context() as patch:
        patch.setattr("streamx.store.slabs.MAX_SLAB_ROWS", 5)
        sx.convert(files, tmp_path / "slabs", shard_rows=101, preset=preset)
    assert tree(tmp_path / "slabs") == trees[0]


def write_10x(adata: ad.AnnData, path: Path) -> Path:
    x_ng = sparse.csr_matrix(adata.X)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array([name.encode() for name in adata.obs_names])
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(x_ng, part).astype(np.int64)
        group["shape"] = np.array(x_ng.shape[::-1])
        group["features/id"] = group["features/name"] = np.array([name.encode() for name in adata.var_names])
        group["features/feature_type"] = np.array([b"Gene Expression"] * adata.n_vars)
    return path


def write_mtx(adata: ad.AnnData, folder: Path) -> Path:
    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", adata.X.T.astype(np.int64), field="integer")
    (folder / "genes.tsv").write_text("".join(f"{name}\t{name}\n" for name in adata.var_names))
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
    return folder


def write_csv(adata: ad.AnnData, path: Path) -> Path:
    """Genes in rows, as most tables of counts are."""
    pd.DataFrame(adata.X.T.toarray().astype(int), index=adata.var_names, columns=adata.obs_names).to_csv(path)
    return path


def of_format(adata: ad.AnnData, folder: Path, kind: str) -> Any:
    x_ng = adata.X
    if kind == "object":
        return {"data": adata}
    if kind.startswith("zarr"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ad.settings.zarr_write_format = int(kind[-1])
            adata.write_zarr(folder / "data.zarr")
            ad.settings.reset("zarr_write_format")
        return folder / "data.zarr"
    forms = {
        "csr": x_ng,
        "csc": sparse.csc_matrix(x_ng),
        "dense": x_ng.toarray(),
        "csr int64": x_ng.astype(np.int64),
        "csr uint8": x_ng.astype(np.uint8),
        "csr float64": x_ng.astype(np.float64),
    }
    if kind in forms:
        adata.X = forms[kind]
        return written(adata, folder / "data.h5ad")
    if kind == "layer":
        adata.layers["counts"] = x_ng.copy()
        adata.X = x_ng.log1p()
        return written(adata, folder / "data.h5ad")
    return {"10x": write_10x, "mtx": write_mtx, "csv": write_csv}[kind](
        adata, folder / {"10x": "data.h5", "mtx": "data", "csv": "data.csv"}[kind]
    )


SAME_BYTES = (
    "csc", "dense", "csr int64", "csr uint8", "csr float64", "zarr2", "zarr3", "object", "layer"
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collection, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("reference")
    store = sx.convert(of_format(one(), folder, "csr"), folder / "store", batch_key="kind", shard_rows=61)
    return store, tree(store.path)


def one() -> ad.AnnData:
    return with_names(sample(151, 19, 4), "cell-")


@pytest.mark.parametrize("kind", SAME_BYTES)
def test_formats_with_obs(
    tmp_path: Path, reference: tuple[Collection, dict[str, bytes]], slabs_of_few: None, kind: str
) -> None:
    given = of_format(one(), tmp_path, kind)
    settings: dict[str, Any] = {"layer": "counts"} if kind == "layer" else {}
    sx.convert(given, tmp_path / "store", batch_key="kind", shard_rows=61, memory="200KB", **settings)
    made = tree(tmp_path / "store")
    assert made.keys() == reference[1].keys()
    differ = {key for key in made if made[key] != reference[1][key]}
    assert differ <= {"/streamx.json", "/generations/000001.json", "/parts/000001.json"}


@pytest.mark.parametrize("kind", ["10x", "mtx", "csv"])
def test_formats_without_obs(
    tmp_path: Path, reference: tuple[Collection, dict[str, bytes]], slabs_of_few: None, kind: str
) -> None:
    """One batch, then: the order of rows, the values and the layout are those of an h5ad without obs."""
    bare = one()
    bare.obs = bare.obs[[]]
    expected = sx.convert([of_format(bare, tmp_path, "csr")], tmp_path / "a", batch_key=FILE)
    (tmp_path / "data.h5ad").unlink()
    store = sx.convert([of_format(one(), tmp_path, kind)], tmp_path / "b", memory="200KB", batch_key=FILE)
    assert list(store.obs_names) == list(expected.obs_names)
    assert list(store.var_names) == list(expected.var_names)
    for part in ("X/data/c", "X/indices/c", "X/indptr", "obs"):
        first, second = (tree(tmp_path / x / "shards" / "000000.zarr" / part) for x in "ab")
        assert first == second


def test_backed_anndata(tmp_path: Path, reference: tuple[Collection, dict[str, bytes]]) -> None:
    path = of_format(one(), tmp_path, "csr")
    backed = ad.read_h5ad(path, backed="r")
    store = sx.convert({"data": backed}, tmp_path / "store", batch_key="kind", shard_rows=61)
    backed.file.close()
    differ = {key for key, data in tree(store.path).items() if data != reference[1][key]}
    assert differ <= {"/streamx.json", "/generations/000001.json", "/parts/000001.json"}


def test_nothing_of_the_machine(tmp_path: Path) -> None:
    """No time, host, path or user in any object: the same files give the same bytes anywhere."""
    import getpass
    import socket
    import time

    file = written(one(), tmp_path / "data.h5ad")
    first = sx.convert(file, tmp_path / "a", batch_key="kind")
    time.sleep(1.1)
    second = sx.convert(file, tmp_path / "deep" / "b", batch_key="kind")
    assert tree(first.path) == tree(second.path)
    words = [socket.gethostname(), str(tmp_path), time.strftime("%Y-%m-%d")]
    text = b"\n".join(data for key, data in tree(first.path).items() if key.endswith("json")).decode()
    assert not [word for word in words if word in text]
    assert f'"{getpass.getuser()}"' not in text
