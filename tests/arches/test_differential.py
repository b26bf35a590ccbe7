"""Differential expression on data: who is compared, raw statistics, and what is found on known changes."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from arches_data import N_GENES, QUICK, cells
from test_models import trained

import streamx as sx
from streamx.arches.data import open_data
from streamx.arches.differential import group_sums
from streamx.errors import UsageError

FEW: dict[str, Any] = {"n_samples": 60}


@pytest.mark.parametrize("kind", ["scvi", "totalvi"])
def test_raw_statistics_by_hand(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("streamx.query.BLOCK_ROWS", 13)
    model, adata = trained(kind), cells()
    rng = np.random.default_rng(0)
    groups = [rng.permutation(120)[:40], np.array([7]), rng.permutation(120)[:100]]
    with open_data(model.state.model, adata, model.state.keys) as found:
        sums = group_sums(model.state.model, found, groups)
    x_ng = adata.X.toarray().astype(np.float64)
    scaled_ng = 1e4 * x_ng / x_ng.sum(1, keepdims=True)
    y_np = adata.obsm["adt"].to_numpy()
    for rows, got in zip(groups, sums, strict=True):
        assert got.n_cells == len(rows)
        np.testing.assert_allclose(got.sum_g[:N_GENES], x_ng[rows].sum(0))
        np.testing.assert_allclose(got.nonzero_g[:N_GENES], (x_ng[rows] > 0).sum(0))
        np.testing.assert_allclose(got.normalized_g[:N_GENES], scaled_ng[rows].sum(0))
        if kind == "totalvi":
            np.testing.assert_allclose(got.sum_g[N_GENES:], y_np[rows].sum(0))
            np.testing.assert_allclose(got.nonzero_g[N_GENES:], (y_np[rows] > 0).sum(0))
            assert np.isnan(got.normalized_g[N_GENES:]).all()


def test_groups_by_a_column() -> None:
    model = trained("scvi")
    table = model.differential_expression(groupby="type", **FEW)
    assert list(table["comparison"].unique()) == ["B vs Rest", "Mono vs Rest", "NK vs Rest", "T vs Rest"]
    assert (table.groupby("group1", observed=True).size() == N_GENES).all()
    adata = cells()
    is_b = (adata.obs["type"] == "B").to_numpy()
    of_b = table[table["group1"] == "B"].loc[list(adata.var_names)]
    np.testing.assert_allclose(of_b["raw_mean1"], np.asarray(adata.X[is_b].mean(0)).ravel(), rtol=1e-6)
    np.testing.assert_allclose(of_b["raw_mean2"], np.asarray(adata.X[~is_b].mean(0)).ravel(), rtol=1e-6)
    pair = model.differential_expression(groupby="type", group1=["T", "B"], group2="NK", **FEW)
    assert list(pair["comparison"].unique()) == ["T vs NK", "B vs NK"]
    assert pair.loc[pair["group1"] == "T", "proba_de"].is_monotonic_decreasing


def test_groups_by_rows() -> None:
    model, obs = trained("scvi"), cells().obs
    mask = (obs["study"] == "a").to_numpy()
    tables = [
        model.differential_expression(idx1=idx1, idx2=idx2, mode="vanilla", all_stats=False, **FEW)
        for idx1, idx2 in (
            (mask, None),
            (np.flatnonzero(mask), ~mask),
            ("study == 'a'", "study == 'b' and age > -100"),
        )
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    assert "raw_mean1" not in tables[0]
    assert tables[0]["bayes_factor"].is_monotonic_decreasing
    corrected = model.differential_expression(idx1=mask, batch_correction=True, **FEW)
    same = model.differential_expression(
        idx1=mask, batch_correction=True, batchid1=["a"], batchid2=["b"], **FEW
    )
    pd.testing.assert_frame_equal(corrected, same)
    other = model.differential_expression(
        idx1=mask, batch_correction=True, batchid1=["b"], batchid2=["b"], **FEW
    )
    assert not np.allclose(other["scale1"].loc[corrected.index], corrected["scale1"])


def test_settings_of_scvi_tools() -> None:
    model = trained("totalvi")
    table = model.differential_expression(
        groupby="study", group1="a", pseudocounts=1e-5, cred_interval_lvls=[0.5], fdr_target=0.1, **FEW
    )
    assert len(table) == N_GENES + 5
    wanted = {"lfc_confidence_interval_0.5_min", "is_de_fdr_0.1", "pseudocounts", "proba_de"}
    assert wanted < set(table.columns)
    assert (table["pseudocounts"] == 1e-5).all()
    some = model.differential_expression(
        groupby="study", group1="a", pseudocounts=None, all_stats=False, **FEW
    )
    assert "raw_mean1" not in some
    assert (some["pseudocounts"] > 0).all()
    asked = {"groupby": "study", "group1": "a", "cells_per_draw": 5}
    median = model.differential_expression(**asked, relative_to="median", **FEW).loc[table.index]
    total = model.differential_expression(**asked, **FEW).loc[table.index]
    is_gene = table.index.str.startswith("g")
    assert abs(median.loc[is_gene, "lfc_median"].median()) < abs(total.loc[is_gene, "lfc_median"].median())
    same = median.loc[~is_gene, "lfc_mean"], total.loc[~is_gene, "lfc_mean"]
    np.testing.assert_allclose(*same, rtol=1e-5, err_msg="proteins are no shares of a total")


def test_what_is_wrong() -> None:
    model = trained("scvi")
    for settings, match in (
        ({}, "no groups"),
        ({"groupby": "type", "group1": "X"}, "no cell has type 'X'"),
        ({"groupby": "absent"}, "absent.*\n  fix: one of: study, type"),
        ({"idx1": [1], "mode": "other"}, "mode"),
        ({"idx1": []}, "group of no cells"),
        ({"idx1": [1], "n_sample": 3}, "unknown setting"),
    ):
        with pytest.raises(UsageError, match=match):
            model.differential_expression(**settings)


def test_sa12_known_changes_are_found_and_few_others() -> None:
    """10 of 200 genes rise twofold and 10 fourfold, in two batches.

    True is a change of a gene's share, relative to the median gene's, of at least delta. Means of cells find
    all 20 and at most one other, as a rate of .05 allows; ``benchmarks/de.py`` has other sizes and ways.
    """
    rng = np.random.default_rng(1)
    n, n_genes = 1000, 200
    group_n, batch_n = rng.integers(2, size=(2, n))
    rise_g = np.repeat([0.0, 1.0, 2.0], [180, 10, 10])[rng.permutation(n_genes)]
    mean_bg = (rng.gamma(2, 2, n_genes) + 0.5) * rng.lognormal(0, 0.3, (2, n_genes))
    mu_ng = mean_bg[batch_n] * 2.0 ** (rise_g * group_n[:, None]) * rng.lognormal(0, 0.2, n)[:, None]
    x_ng = rng.poisson(mu_ng * rng.gamma(5, 1 / 5, mu_ng.shape)).astype(np.float32)
    obs = pd.DataFrame({"study": batch_n.astype(str), "group": np.array(["x", "y"])[group_n]})
    obs.index = [f"cell{i}" for i in range(n)]
    adata = anndata.AnnData(x_ng, obs, pd.DataFrame(index=[f"g{g}" for g in range(n_genes)]))
    model = sx.SCVI(adata, batch_key="study", gene_likelihood="nb", n_hidden=64, n_latent=5)
    model.train(150, lr=2e-3, n_epochs_kl_warmup=50, **QUICK)
    asked = {"groupby": "group", "group1": "y", "group2": "x", "batch_correction": True, "delta": 0.5}
    table = model.differential_expression(**asked, cells_per_draw=100, relative_to="median")
    table = table.loc[adata.var_names]
    called = table["is_de_fdr_0.05"].to_numpy()
    shares = [mean_bg * 2.0**r_g / (mean_bg * 2.0**r_g).sum(1, keepdims=True) for r_g in (0 * rise_g, rise_g)]
    share_g = np.log2(shares[1] / shares[0]).mean(0)
    assert np.median(share_g) < -0.2, "shares of unchanged genes fall"
    changed = np.abs(share_g - np.median(share_g)) >= 0.5
    assert (called & ~changed).sum() <= 0.05 * called.sum()
    assert called[rise_g == 2].mean() == 1
    assert called[rise_g == 1].mean() >= 0.9
    assert (table["lfc_mean"][rise_g > 0] > 0).all()
    by_cells = model.differential_expression(**asked).loc[adata.var_names]
    assert by_cells["lfc_mean"][rise_g == 0].median() < -0.1 < table["lfc_mean"][rise_g == 0].median()
    assert by_cells["proba_de"][rise_g == 1].max() < 0.95, "which no number of cells changes"
