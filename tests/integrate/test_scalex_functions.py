"""``sx.scalex``: SCALEX's functions by their documented names (SX02-SX11, SX17, SX25, SX29)."""

from __future__ import annotations

import gzip
import inspect
import logging
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse
from sklearn.neighbors import KNeighborsClassifier
from views import make_counts

import streamx as sx
from streamx.errors import BatchError, UsageError

N_GENES = 30


def cells(sizes: list[int], seed: int = 0) -> anndata.AnnData:
    x_ng, batch_n, type_n = make_counts(sizes, N_GENES, seed=seed)
    obs = pd.DataFrame(
        {"batch": [f"b{b}" for b in batch_n], "celltype": [f"t{t}" for t in type_n]},
        index=[f"cell{i}" for i in range(len(batch_n))],
    )
    return anndata.AnnData(x_ng, obs=obs, var=pd.DataFrame(index=[f"GENE{g}" for g in range(N_GENES)]))


FILTER: dict[str, Any] = {"min_features": 3, "min_cells": 2, "n_top_features": 12}


def by_hand(adata: anndata.AnnData, genes: list[str]) -> np.ndarray:
    """Filtered cells on these genes: 10,000 per cell, log1p, divided by each batch's maxima."""
    x = adata.to_df()
    x = x[(x > 0).sum(axis=1) >= 3]
    x = x.loc[:, (x > 0).sum(axis=0) >= 2]
    x = np.log1p(x.div(x.sum(axis=1), axis=0) * 1e4)[genes]
    largest = x.groupby(adata.obs["batch"]).transform("max").replace(0, 1)
    return (x / largest).to_numpy()


def test_sx02_label_transfer() -> None:
    rng = np.random.default_rng(0)
    ref, query = cells([60, 40]), cells([50], seed=1)
    for adata in (ref, query):
        adata.obsm["latent"] = rng.normal(size=(adata.n_obs, 4)).astype(np.float32)
        adata.obsm["other"] = rng.normal(size=(adata.n_obs, 3)).astype(np.float32)
    assert list(inspect.signature(sx.scalex.label_transfer).parameters) == ["ref", "query", "rep", "label"]
    for rep in ("latent", "other"):
        found = sx.scalex.label_transfer(ref, query, rep)
        votes = KNeighborsClassifier(5).fit(ref.obsm[rep], ref.obs["celltype"])
        share = votes.predict_proba(query.obsm[rep])
        clear = np.sort(share, axis=1)[:, -1] > np.sort(share, axis=1)[:, -2]  # no tie
        assert clear.sum() > 20
        assert (found[clear] == votes.predict(query.obsm[rep])[clear]).all()
    del query.obsm["other"]
    with pytest.raises(UsageError, match=r"query: no obsm matrix 'other'\n  fix: rep, one of: latent"):
        sx.scalex.label_transfer(ref, query, "other")
    with pytest.raises(UsageError, match=r"no obs column 'kind'\n.*celltype"):
        sx.scalex.label_transfer(ref, query, label="kind")


def test_sx03_load_data(tmp_path: Path) -> None:
    paths = []
    for number, name in enumerate(("second", "first")):  # not sorted, on purpose
        adata = cells([70 + 30 * number], seed=number)
        adata.obs_names = [f"{name}-{i}" for i in range(adata.n_obs)]
        del adata.obs["batch"]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        paths.append(tmp_path / f"{name}.h5ad")
    adata, training, inference = sx.scalex.load_data(paths, ["s", "f"], **FILTER, batch_size=16)
    assert adata.shape == (170, 12)
    assert adata.obs["batch"].astype(str).tolist() == ["s"] * 70 + ["f"] * 100
    x = adata.X.toarray()
    assert x.max() == 1
    epochs = [np.concatenate([index for _, _, index in training]) for _ in range(2)]
    assert len(training) == 10  # whole minibatches only
    for rows in epochs:
        assert len(rows) == len(set(rows.tolist())) == 160
    assert not np.array_equal(*epochs)
    seen = []
    for x_ng, y_n, index_n in inference:
        np.testing.assert_allclose(x_ng, x[index_n], rtol=1e-6)
        assert len(set(y_n.tolist())) == 1  # one batch each
        assert adata.obs["batch"].astype(str).iloc[index_n].nunique() == 1
        seen += index_n.tolist()
    assert sorted(seen) == list(range(170))


def test_sx04_concat_data(tmp_path: Path) -> None:
    one, two = cells([20]), cells([30], seed=1)[:, 5:].copy()
    two.obs_names = [f"other{i}" for i in range(30)]
    one.write_h5ad(tmp_path / "one.h5ad")
    both = sx.scalex.concat_data([tmp_path / "one.h5ad", two], save=tmp_path / "both.h5ad")
    assert both.shape == (50, N_GENES - 5)
    assert both.obs["batch"].tolist() == ["0"] * 20 + ["1"] * 30
    assert anndata.read_h5ad(tmp_path / "both.h5ad").shape == both.shape
    more = {"join": "outer", "batch_key": "study", "index_unique": "-"}
    outer = sx.scalex.concat_data([one, two], ["x", "y"], **more)
    assert outer.obs["study"].tolist() == ["x"] * 20 + ["y"] * 30
    assert outer.obs_names[0] == "cell0-x"
    assert outer[20:, one.var_names[:5]].X.sum() == 0  # absent genes
    assert sx.scalex.concat_data(one) is one
    with pytest.raises(UsageError, match="2 items, 1 different"):
        sx.scalex.concat_data([one, two], ["x", "x"])


def write_formats(folder: Path, adata: anndata.AnnData) -> dict[str, Path]:
    table = adata.to_df().T.astype(int)
    (folder / "mtx").mkdir()
    io.mmwrite(folder / "mtx" / "matrix.mtx", sparse.coo_matrix(adata.X.T.astype(int)))
    pd.Series(adata.obs_names).to_csv(folder / "mtx" / "barcodes.tsv", header=False, index=False)
    features = pd.DataFrame({"id": [f"ENS{g}" for g in range(N_GENES)], "name": adata.var_names})
    features.to_csv(folder / "mtx" / "features.tsv", sep="\t", header=False, index=False)
    table.to_csv(folder / "a.csv")
    with gzip.open(folder / "a.txt.gz", "wt") as out:
        out.write(table.to_csv(sep="\t"))
    adata.write_h5ad(folder / "a.h5ad")
    return {name: folder / name for name in ("mtx", "a.csv", "a.txt.gz", "a.h5ad")}


def test_sx05_files_of_every_format(tmp_path: Path) -> None:
    adata = cells([25])
    for path in write_formats(tmp_path, adata).values():
        found = sx.scalex.load_file(path)
        assert sparse.issparse(found.X)
        assert found.X.format == "csr"
        assert found.obs_names.tolist() == adata.obs_names.tolist()
        assert found.var_names.tolist() == adata.var_names.tolist()
        np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(sx.scalex.read_mtx(tmp_path / "mtx").X.toarray(), adata.X.toarray())
    (tmp_path / "many").mkdir()
    for name in ("p", "q"):
        adata.obs_names = [f"{name}{i}" for i in range(adata.n_obs)]
        adata.write_h5ad(tmp_path / "many" / f"{name}.h5ad")
    many = sx.scalex.load_files(tmp_path / "many" / "*")
    assert many.obs["sub_batch"].tolist() == ["p.h5ad"] * 25 + ["q.h5ad"] * 25
    assert sx.scalex.load_files(tmp_path / "a.csv").shape == adata.shape
    with pytest.raises(UsageError, match="no such file"):
        sx.scalex.load_file(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="nothing matches"):
        sx.scalex.load_files(tmp_path / "nowhere" / "*")


@pytest.mark.parametrize("name", ["preprocessing", "preprocessing_rna"])
def test_sx06_sx07_preprocessing_of_genes(name: str) -> None:
    adata = cells([80, 60])
    before = adata.X.copy()
    found = getattr(sx.scalex, name)(adata, **FILTER)
    want = by_hand(adata, list(found.var_names))
    assert found.shape == want.shape == (139, 12)  # one cell has too few genes
    np.testing.assert_allclose(found.X.toarray(), want, rtol=2e-5)
    assert (before != adata.X).nnz == 0  # what was given stays
    chosen = getattr(sx.scalex, name)(adata, **FILTER | {"n_top_features": ["GENE3", "GENE1"]})
    assert chosen.var_names.tolist() == ["GENE3", "GENE1"]


def test_sx06_another_profile() -> None:
    with pytest.raises(UsageError, match="profile"):
        sx.scalex.preprocessing(cells([20]), "protein")


def test_sx08_preprocessing_of_peaks() -> None:
    adata = cells([80, 60])
    found = sx.scalex.preprocessing_atac(adata, **FILTER)
    view = sx.scalex.preprocessing(adata, "ATAC", **FILTER)
    assert (found.X != view.X).nnz == 0
    share_g = pd.Series(np.asarray((adata.X > 0).mean(axis=0)).ravel(), adata.var_names)
    # those whose share of open cells is nearest to one half, and ties
    worst = (share_g[found.var_names] - 0.5).abs().max()
    assert (share_g.drop(found.var_names) - 0.5).abs().min() >= worst
    assert found.n_vars >= 12
    assert found.X.max() == 1


def test_sx09_batch_scale() -> None:
    adata = cells([30, 20])
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(N_GENES) != 4))
    want = adata.to_df() / adata.to_df().groupby(adata.obs["batch"]).transform("max").replace(0, 1)
    assert sx.scalex.batch_scale(adata) is adata
    np.testing.assert_allclose(adata.X.toarray(), want.to_numpy(), rtol=1e-6)
    del adata.obs["batch"]
    with pytest.raises(BatchError, match="no column 'batch'"):
        sx.scalex.batch_scale(adata)


@pytest.mark.parametrize(
    ("genes", "n_found"),
    [(["X1", "X2"], 0), (["GENE7", "X", "GENE2", "Y"], 2), ([f"GENE{g}" for g in range(29, -1, -1)], 30)],
)
@pytest.mark.parametrize("dense", [True, False])
def test_sx10_reindex(genes: list[str], n_found: int, dense: bool) -> None:
    adata = cells([15])
    adata.X = adata.X.toarray() if dense else adata.X
    found = sx.scalex.reindex(adata, genes)
    assert found.var_names.tolist() == genes
    assert found.obs.equals(adata.obs)
    assert found.uns["reindex"] == {"found": n_found, "asked": len(genes)}
    want = adata.to_df().reindex(columns=genes, fill_value=0).to_numpy()
    np.testing.assert_array_equal(found.X.toarray(), want)


def test_sx11_dataset_and_sampler() -> None:
    adata = cells([23, 10, 1])
    adata.layers["twice"] = adata.X * 2
    data = sx.scalex.SingleCellDataset(adata)
    assert len(data) == 34
    assert data.shape == (34, N_GENES)
    x_g, batch, row = data[25]
    np.testing.assert_array_equal(x_g, adata.X[25].toarray().ravel())
    assert (batch, row, x_g.dtype) == (1, 25, np.float32)
    np.testing.assert_array_equal(sx.scalex.SingleCellDataset(adata, "twice")[25][0], 2 * x_g)
    with pytest.raises(UsageError, match="no layer or obsm"):
        sx.scalex.SingleCellDataset(adata, "none")
    codes = np.array([batch for _, batch, _ in map(data.__getitem__, range(34))])
    sampler = sx.scalex.BatchSampler(8, codes)
    first, second = list(sampler), list(sampler)
    assert first != second  # drawn anew
    assert sorted(row for rows in first for row in rows) == list(range(34))
    assert all(len(set(codes[rows])) == 1 for rows in first)
    assert sorted(map(len, first)) == [1, 2, 7, 8, 8, 8]
    assert len(sampler) == 5  # as if there were one batch
    whole = sx.scalex.BatchSampler(8, codes, drop_last=True)
    assert [len(rows) for rows in whole] == [8, 8, 8]
    assert len(whole) == 4


def test_sx17_onehot() -> None:
    np.testing.assert_array_equal(sx.scalex.onehot([2, 0], 3), [[0, 0, 1], [1, 0, 0]])
    assert sx.scalex.onehot(None, 3) is None
    assert sx.scalex.onehot([0, 0], 1) is None
    with pytest.raises(UsageError, match="codes up to 3"):
        sx.scalex.onehot([3], 3)


def test_sx25_create_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.txt"
    logger = sx.scalex.create_logger("streamx-test", fh=path)
    try:
        assert sx.scalex.create_logger("streamx-test", fh=path) is logger
        logger.info("hello")
        logger.debug("detail")
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == 1  # once, whatever was called twice; no detail on the terminal
        assert shown[0].endswith("- streamx-test - INFO - hello")
        assert [line.rsplit(" - ", 1)[1] for line in path.read_text().splitlines()] == ["hello", "detail"]
        loud = sx.scalex.create_logger("streamx-test", levelname=logging.WARNING, overwrite=True)
        loud.info("hushed")
        assert capsys.readouterr().err == ""
        assert len(loud.handlers) == 1
    finally:
        sx.scalex.create_logger("streamx-test", ch=False, overwrite=True)
