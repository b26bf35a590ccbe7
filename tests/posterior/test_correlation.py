from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from count_models import N_GENES, N_PROTEINS, repeated, scvi, seed, some_cells, totalvi
from scipy.stats import spearmanr

from streamx.errors import UsageError
from streamx.posterior.correlation import CrossProducts, RankSample, feature_correlation
from streamx.posterior.draws import decoded, latents


def mixed(n: int = 3000) -> np.ndarray:
    """Correlated columns of very different size, with ties and a constant one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5)) @ rng.normal(size=(5, 5))
    x[:, 1] = 1e6 + x[:, 1]
    x[:, 2] = np.round(x[:, 2])
    x[:, 3] = 7
    return x


def test_cross_products_are_exact() -> None:
    x, sums = mixed(), CrossProducts()
    for part in np.array_split(x, 13):
        sums.add(part)
    got = sums.correlation()
    varies = [0, 1, 2, 4]
    np.testing.assert_allclose(got.matrix_ff[np.ix_(varies, varies)], np.corrcoef(x[:, varies].T), atol=1e-9)
    assert np.isnan(got.matrix_ff[3]).all()
    assert (got.n_rows, got.n_used) == (3000, 3000)


def test_ranks_of_all_rows_and_of_a_sample() -> None:
    x = mixed()[:, [0, 1, 2, 4]]
    every, sample = RankSample(3000, np.random.default_rng(0)), RankSample(1000, np.random.default_rng(0))
    for part in np.array_split(x, 13):
        every.add(part)
        sample.add(part)
    want = spearmanr(x).statistic
    np.testing.assert_allclose(every.correlation().matrix_ff, want, atol=1e-9)
    assert every.correlation().n_used == 3000
    got = sample.correlation()
    assert (got.n_rows, got.n_used) == (3000, 1000)
    assert 0.001 < np.abs(got.matrix_ff - want).max() < 5 / 1000**0.5


def test_the_sample_is_uniform() -> None:
    counts = np.zeros(60)
    for number in range(1500):
        sample = RankSample(6, np.random.default_rng(number))
        for part in np.array_split(np.arange(60.0)[:, None], 7):
            sample.add(part)
        counts[sample._kept_rf[:, 0].astype(int)] += 1
    assert np.abs(counts - 150).max() < 5 * np.sqrt(150 * 0.9)


@pytest.mark.parametrize("make", [scvi, totalvi])
@pytest.mark.parametrize("log_transform", [False, True])
def test_sa14_denoised_correlation_is_that_of_its_draws(make: Any, log_transform: bool) -> None:
    """Against draws that torch's own distributions make, within the error of both."""
    module, cells = make().eval(), repeated(some_cells(), 2000)
    settings: dict[str, Any] = {"kind": "pearson", "n_samples": 1, "log_transform": log_transform}
    got = feature_correlation(module, [cells], batches=(1,), generator=seed(), **settings)
    with torch.no_grad():
        ((z_nk, library_n),) = latents(module, cells, 1, seed(1))
        genes, proteins = decoded(module, z_nk, library_n, cells, 1, seed(2))
        torch.manual_seed(0)
        drawn = torch.distributions.Gamma(genes.theta, genes.theta / (1000 * genes.scale_ng)).sample()
        drawn = (drawn + 1e-8).log() if log_transform else drawn
        if proteins is not None:
            y = torch.distributions.Gamma(proteins.theta, proteins.theta / proteins.rate_fore_np).sample()
            y = y * torch.bernoulli(torch.sigmoid(-proteins.mixing_np))
            drawn = torch.cat([drawn, y.log1p() if log_transform else y], 1)
    n_features = N_GENES + (N_PROTEINS if make is totalvi else 0)
    assert got.matrix_ff.shape == (n_features, n_features)
    want = np.corrcoef(drawn.numpy().T)
    # Heavy tails make the error of a correlation larger than 1 / sqrt(n).
    assert np.abs(got.matrix_ff - want).max() < 12 / len(cells) ** 0.5
    assert got.n_rows == len(cells)


def test_batches_are_correlated_apart_and_averaged() -> None:
    module, cells = scvi(), [some_cells(), some_cells(11, 1)]
    both = feature_correlation(
        module, cells, batches=(0, None), n_samples=3, kind="pearson", generator=seed()
    )
    assert both.n_rows == 31 * 3
    np.testing.assert_array_equal(np.diag(both.matrix_ff), 1)
    np.testing.assert_array_equal(both.matrix_ff, both.matrix_ff.T)
    ranks = feature_correlation(module, cells, n_samples=3, max_rows=50, generator=seed())
    assert (ranks.n_rows, ranks.n_used) == (93, 50)
    again = feature_correlation(module, cells, n_samples=3, max_rows=50, generator=seed())
    np.testing.assert_array_equal(again.matrix_ff, ranks.matrix_ff)


def test_what_can_not_be_asked() -> None:
    for module, settings in (
        (scvi(), {"kind": "kendall"}),
        (scvi(), {"n_samples": 0}),
        (scvi(), {"batches": ()}),
        (scvi(gene_likelihood="poisson"), {}),
    ):
        with pytest.raises(UsageError):
            feature_correlation(module, [some_cells()], **settings)
    with pytest.raises(UsageError, match="no cells"):
        feature_correlation(scvi(), [])
