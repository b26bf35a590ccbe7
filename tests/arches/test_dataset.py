"""``sx.dataset``: scArches' helpers for labels, dense copies and cells one by one (SA01, SA02, SA04)."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from arches_data import cells
from scipy import sparse

import streamx as sx
from streamx.errors import BatchError, UsageError


def test_sa01_label_encoder() -> None:
    adata = cells("bac", 5)
    codes, encoder = sx.dataset.label_encoder(adata, condition_key="study")
    assert encoder == {"a": 0, "b": 1, "c": 2}
    assert codes.dtype == np.float64
    assert codes.shape == (15, 1)
    assert [list(encoder)[int(code)] for code in codes.ravel()] == adata.obs["study"].tolist()
    given, same = sx.dataset.label_encoder(adata, {"c": 7, "b": 5, "a": 3}, "study")
    assert same == {"c": 7, "b": 5, "a": 3}
    assert set(given.ravel()) == {3.0, 5.0, 7.0}
    with pytest.raises(BatchError, match="without a code: c"):
        sx.dataset.label_encoder(adata, {"a": 0, "b": 1}, "study")
    with pytest.raises(UsageError, match="no obs column 'condition'"):
        sx.dataset.label_encoder(adata)


def test_sa02_remove_sparsity() -> None:
    x_ng = sparse.random(20, 6, 0.4, "csr", np.float32, random_state=0)
    adata = anndata.AnnData(x_ng, obs=pd.DataFrame({"study": ["a"] * 20}, index=[f"c{i}" for i in range(20)]))
    adata.uns["more"] = 1
    dense = sx.dataset.remove_sparsity(adata)
    assert isinstance(dense.X, np.ndarray)
    np.testing.assert_array_equal(dense.X, x_ng.toarray())
    assert dense.obs.equals(adata.obs)
    assert dense.var.equals(adata.var)
    assert dict(dense.uns) == {}
    assert sx.dataset.remove_sparsity(dense) is dense


@pytest.mark.parametrize("dense", [True, False])
def test_sa04_trvae_dataset(dense: bool) -> None:
    adata = cells("ab", 10)
    adata.X = adata.X.toarray() if dense else sparse.csr_matrix(adata.X)
    data = sx.dataset.trVAEDataset(adata, "study", cell_type_key="type")
    counts = adata.to_df().to_numpy()
    assert len(data) == 20
    item = data[7]
    assert sorted(item) == ["batch", "celltype", "sizefactor", "x"]
    np.testing.assert_array_equal(item["x"].numpy(), counts[7])
    assert float(item["sizefactor"]) == counts[7].sum()
    assert int(item["batch"]) == data.condition_encoder[adata.obs["study"].iloc[7]]
    assert int(item["celltype"]) == data.cell_type_encoder[adata.obs["type"].iloc[7]]
    assert sorted(sx.dataset.trVAEDataset(adata)[0]) == ["sizefactor", "x"]
    logs = sx.dataset.trVAEDataset(adata, size_factor="log_sum")
    assert float(logs[7]["sizefactor"]) == pytest.approx(np.log(counts[7].sum()))
    whole = next(iter(torch.utils.data.DataLoader(data, batch_size=20)))  # as torch's loaders take it
    np.testing.assert_array_equal(whole["x"].numpy(), counts)
    with pytest.raises(UsageError, match="sum or log_sum"):
        sx.dataset.trVAEDataset(adata, size_factor="mean")
