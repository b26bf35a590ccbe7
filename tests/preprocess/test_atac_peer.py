"""SCALEX 1.0.4's own preprocessing of ATAC beside ours: same cells, same peaks, same values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix, diags

import streamx as sx

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


def select_var_feature(adata: anndata.AnnData, nb_features: int, show: bool, copy: bool) -> None:
    """What SCALEX asks of episcanpy, which no numpy 2 imports any more: its rule, written out."""
    share = np.asarray(adata.X.sum(axis=0)).ravel() / adata.n_obs
    score = [1 - abs(value - 0.5) for value in share.tolist()]
    least = sorted(score, reverse=True)[nb_features]
    adata._inplace_subset_var(np.array([value >= least for value in score]))


@pytest.fixture
def preprocessing_atac(monkeypatch: pytest.MonkeyPatch) -> Callable[..., anndata.AnnData]:
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    lent = SimpleNamespace(pp=SimpleNamespace(select_var_feature=select_var_feature))
    monkeypatch.setitem(sys.modules, "episcanpy", lent)
    pytest.importorskip("scalex")
    from scalex.data import preprocessing_atac

    return preprocessing_atac


@pytest.mark.parametrize("n_top", [5000, 30_000])
def test_real_peaks(
    preprocessing_atac: Callable[..., anndata.AnnData], data_dir: Path, tmp_path: Path, n_top: int
) -> None:
    """A mouse cortex of 25,734 peaks; the larger number keeps all of them."""
    adata = anndata.read_h5ad(data_dir / "mop_snare_atac.h5ad")
    theirs = preprocessing_atac(adata.copy(), min_features=60, n_top_features=n_top)
    store = sx.convert([adata], tmp_path / "store", batch_key="batch")
    settings = {"min_features": 60, "n_top_features": n_top}
    view = sx.preprocess(store, tmp_path / "view", profile="ATAC", atac="1.0.4", **settings)
    assert set(view.var_names) == set(theirs.var_names)
    names = view.obs_column("_streamx_name").to_numpy()
    assert set(names) == set(theirs.obs_names)
    assert view.n_vars == (n_top + 1 if n_top < adata.n_vars else theirs.n_vars)  # the extra one is kept
    x_ng = view.read(0, view.n_obs).astype(np.float64)
    x_ng = diags(1e4 / view.obs_column("_streamx_total").to_numpy()) @ x_ng
    x_ng.data = np.log1p(x_ng.data)
    x_ng = x_ng @ diags(1 / view.scale_bg[0])
    expected = csr_matrix(theirs[names, list(view.var_names)].X)
    assert x_ng.nnz == expected.nnz
    assert abs(x_ng - expected).max() < 1e-6
