import numpy as np
import pytest
from scipy.stats import norm

from streamx.config import DifferentialConfig
from streamx.errors import UsageError
from streamx.posterior import de


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def log_normal(mean_g: np.ndarray, n: int, seed: int, sd: float = 0.2) -> de.Draws:
    """Draws of scales whose log2 is normal around ``mean_g``."""
    noise = rng(seed).normal(0, sd, (n, len(mean_g)))
    return de.Draws(np.exp2(mean_g + noise).astype(np.float32))


@pytest.mark.parametrize("delta", [0.25, 0.5])
def test_probabilities_are_those_of_the_normal_distribution(delta: float) -> None:
    change_g, n = np.array([0.0, 0.3, -0.8, 2.0]), 40_000
    first, second = log_normal(change_g - 12, n, 0), log_normal(np.full(4, -12.0), n, 1)
    got = de.compare(first, second, DifferentialConfig(delta=delta), rng())
    sd = 0.2 * np.sqrt(2)
    up_g, down_g = norm.sf(delta, change_g, sd), norm.cdf(-delta, change_g, sd)
    np.testing.assert_allclose(got["proba_de"], up_g + down_g, atol=0.01)
    np.testing.assert_allclose(got["lfc_mean"], change_g, atol=0.01)
    np.testing.assert_allclose(got["lfc_median"], change_g, atol=0.01)
    np.testing.assert_allclose(got["lfc_std"], sd, atol=0.01)
    np.testing.assert_allclose(got["proba_de"] + got["proba_not_de"], 1)
    three = de.compare(first, second, DifferentialConfig(delta=delta, test_mode="three"), rng())
    np.testing.assert_allclose(three["proba_de"], np.maximum(up_g, down_g), atol=0.01)
    more = de.compare(first, second, DifferentialConfig(mode="vanilla"), rng())
    np.testing.assert_allclose(more["proba_m1"], norm.sf(0, change_g, sd), atol=0.01)


def test_false_discoveries_are_held_and_nothing_is_lost() -> None:
    """20,000 genes, true changes N(0, 1), seen with an error of 0.3: posteriors as Bayes' rule gives them.

    Then the share of calls whose true change is below delta is as asked for, and as many are found as by
    exact probabilities.
    """
    draw, error = rng(), 0.3
    true_g = draw.normal(0, 1, 20_000)
    seen_g = true_g + draw.normal(0, error, 20_000)
    shrunk = 1 / (1 + error**2)
    sd = error * np.sqrt(shrunk)
    first = log_normal(shrunk * seen_g - 12, 500, 1, sd / np.sqrt(2))
    second = log_normal(np.full(20_000, -12.0), 500, 2, sd / np.sqrt(2))
    changed_g = np.abs(true_g) >= 0.25
    exact_g = norm.sf(0.25, shrunk * seen_g, sd) + norm.cdf(-0.25, shrunk * seen_g, sd)
    for target in (0.01, 0.05, 0.1):
        config = DifferentialConfig(fdr_target=target)
        called_g = de.compare(first, second, config, draw)[f"is_de_fdr_{target}"]
        n_false, error_of = (called_g & ~changed_g).sum(), np.sqrt(target / called_g.sum())
        assert abs(n_false / called_g.sum() - target) < 4 * error_of, target
        best_g = de.fdr_calls(exact_g, target)
        assert (called_g & changed_g).sum() >= 0.99 * (best_g & changed_g).sum(), target


def test_fdr_calls_by_hand() -> None:
    proba_g = np.array([0.5, 1.0, 0.9, 0.98, 0.1])
    # sorted: 1, .98, .9, .5, .1 -> means of 1 - p: 0, .01, .04, .155, .304
    assert de.fdr_calls(proba_g, 0.05).tolist() == [False, True, True, True, False]
    assert de.fdr_calls(proba_g, 0.039).tolist() == [False, True, False, True, False]
    assert de.fdr_calls(proba_g, 0.0).tolist() == [False, True, False, False, False]
    assert not de.fdr_calls(np.zeros(3), 0.05).any()


def test_bayes_factors_by_hand() -> None:
    got = de.bayes_factor(np.array([0.5, 0.75, 1.0]))
    np.testing.assert_allclose(got, [0, np.log(3), np.log(1e8)], rtol=1e-6, atol=1e-9)


def test_draws_of_a_batch_meet_draws_of_that_batch() -> None:
    batch_s = np.repeat([3, 7], 50)
    first = de.Draws(np.where(batch_s == 3, 1.0, 100.0)[:, None], batch_s)
    second = de.Draws(np.where(batch_s == 3, 2.0, 200.0)[::-1][:, None], batch_s[::-1])
    for m_permutation in (None, 400):
        one, two = de.pairs(first, second, rng(), m_permutation)
        assert len(one) == (m_permutation or 100)
        assert (two == 2 * one).all()
    other = de.Draws(second.scale_sg, np.where(batch_s == 3, 3, 8))
    one, two = de.pairs(first, other, rng(), 400)
    assert len(one) == 400
    assert (two != 2 * one).any()
    one, two = de.pairs(first, de.Draws(second.scale_sg[:60]), rng())
    assert len(one) == len(two) == 100


def test_drawing_cells() -> None:
    asked: list[np.ndarray] = []

    def sampler(row_n: np.ndarray, batch: int | None) -> np.ndarray:
        asked.append(row_n)
        return np.stack([row_n, np.full(len(row_n), -1 if batch is None else batch)], axis=1)

    row_n = np.array([5, 8, 13])
    drawn = de.draw(sampler, row_n, 3000, rng())
    rows, counts = np.unique(drawn.scale_sg[:, 0], return_counts=True)
    assert rows.tolist() == [5, 8, 13]
    assert (abs(counts - 1000) < 150).all()
    assert (np.diff(asked[0]) >= 0).all(), "rows are asked for in ascending order"
    assert (np.diff(drawn.scale_sg[:, 0]) < 0).any(), "but draws are not in that order, for pairs are random"
    drawn = de.draw(sampler, row_n, 100, rng(), batches=[1, 4])
    assert drawn.batch_s is not None
    assert np.array_equal(drawn.scale_sg[:, 1], drawn.batch_s)
    assert np.bincount(drawn.batch_s).tolist() == [0, 50, 0, 0, 50]
    with pytest.raises(UsageError, match="no cells"):
        de.draw(sampler, row_n[:0], 10, rng())


def test_draws_that_are_means_of_cells() -> None:
    """They spread as means do, within each batch; of more cells than a group has, as its own mean does."""

    def sampler(row_n: np.ndarray, batch: int | None) -> np.ndarray:
        noise = rng(batch or 0).normal(0, 1, (len(row_n), 3))
        return (noise + (100 if batch == 4 else 0)).astype(np.float32)

    for n_cells, n_group in ((25, 1000), (100, 25)):
        drawn = de.draw(sampler, np.arange(n_group), 8000, rng(), [1, 4], cells_per_draw=n_cells)
        assert drawn.scale_sg.shape == (8000, 3)
        assert drawn.scale_sg.dtype == np.float32
        for batch, level in ((1, 0), (4, 100)):
            of_batch = drawn.scale_sg[drawn.batch_s == batch]
            np.testing.assert_allclose(of_batch.mean(0), level, atol=0.05)
            np.testing.assert_allclose(of_batch.std(0), 1 / 5, rtol=0.05)
    one = de.draw(sampler, np.arange(50), 100, rng(), cells_per_draw=1)
    np.testing.assert_array_equal(one.scale_sg, de.draw(sampler, np.arange(50), 100, rng()).scale_sg)


def test_relative_to_the_median_gene() -> None:
    """A third of the genes rises fourfold: shares of the others fall; relative to the median they stay."""
    share_g = np.full(30, 1 / 30)
    risen_g = np.where(np.arange(30) < 10, 4 * share_g, share_g)
    one, two = (np.tile(s_g / s_g.sum(), (50, 1)) for s_g in (risen_g, share_g))
    by_total = de.compare(de.Draws(one), de.Draws(two), DifferentialConfig(), rng())
    np.testing.assert_allclose(by_total["lfc_mean"], [1] * 10 + [-1] * 20)
    assert by_total["proba_de"].tolist() == [1] * 30
    median = DifferentialConfig(relative_to="median")
    found = de.compare(de.Draws(one), de.Draws(two), median, rng())
    np.testing.assert_allclose(found["lfc_mean"], [2] * 10 + [0] * 20, atol=1e-12)
    assert found["is_de_fdr_0.05"].tolist() == [True] * 10 + [False] * 20
    np.testing.assert_allclose(found["scale2"], 1 / 30, err_msg="what is told of the groups stays")
    more = de.compare(
        de.Draws(one), de.Draws(two), DifferentialConfig(mode="vanilla", relative_to="median"), rng()
    )
    assert (more["proba_m1"][:10] == 1).all()
    with_protein = [np.concatenate([s_mg, np.full((50, 1), 7.0)], axis=1) for s_mg in (one, two)]
    found = de.compare(*map(de.Draws, with_protein), median, rng(), n_shares=30)
    assert found["lfc_mean"][30] == 0


def test_a_pseudocount_from_silent_genes() -> None:
    one_mg, two_mg = np.full((10, 4), 1e-5), np.full((10, 4), 1e-5)
    one_mg[3], two_mg[5] = [4e-4, 8e-4, 1, 1], [2e-3, 6e-3, 1, 1]
    silent = np.array([[True, True, False, False], [True, False, False, False]])
    # The first group's: 0.9 quantile of 4e-4 and 8e-4; the second's: 2e-3. The larger, over four genes.
    assert de.estimated_pseudocount(one_mg, two_mg, *silent) == pytest.approx(2e-3 / 4)
    assert de.estimated_pseudocount(one_mg, two_mg, *(silent & False)) == 1e-10
    first, second, config = de.Draws(one_mg), de.Draws(two_mg), DifferentialConfig(pseudocount=None)
    with pytest.raises(UsageError, match="raw counts"):
        de.compare(first, second, config, rng())
    one, two = (de.GroupSums(100, np.where(s, 0.5, 50.0), 1.0 * s, 2.0 * s) for s in silent)
    result = de.compare(first, second, config, rng(), (one, two))
    assert result["pseudocounts"] == pytest.approx(2e-3 / 4)
    np.testing.assert_allclose(result["raw_mean1"], [0.005, 0.005, 0.5, 0.5])
    np.testing.assert_allclose(result["non_zeros_proportion2"], [0.01, 0, 0, 0])
    np.testing.assert_allclose(result["raw_normalized_mean1"], [0.02, 0.02, 0, 0])


def test_delta_from_the_changes() -> None:
    draw = rng()
    change_g = np.concatenate([draw.normal(m, 0.05, n) for m, n in ((0, 500), (2, 60), (-3, 60))])
    assert de.estimated_delta(change_g) == pytest.approx(0.6 * 2.5, rel=0.02)
    assert de.estimated_delta(draw.normal(0, 1e-3, 500)) == 0.1
    shifted = de.Draws(np.exp2(np.tile(change_g - 12, (20, 1))))
    result = de.compare(shifted, de.Draws(np.full((20, 620), 2.0**-12)), DifferentialConfig(delta=None), draw)
    assert result["delta"] == pytest.approx(0.6 * 2.5, rel=0.02)
    assert result["proba_de"].sum() == 120


def test_the_densest_interval() -> None:
    values = np.concatenate([np.zeros(90), np.linspace(5, 50, 10)])[:, None]
    low, high = de.densest_interval(values, 0.85)
    assert (low[0], high[0]) == (0, 0)
    normal = rng().normal(3, 2, (50_000, 1))
    low, high = de.densest_interval(normal, 0.95)
    np.testing.assert_allclose([low[0], high[0]], [3 - 1.96 * 2, 3 + 1.96 * 2], atol=0.2)
    with pytest.raises(UsageError):
        de.densest_interval(normal, 1.0)
    result = de.compare(*[de.Draws(np.exp2(normal))] * 2, DifferentialConfig(intervals=(0.5,)), rng())
    assert result["lfc_confidence_interval_0.5_max"] == 0


def test_two_zeros_are_no_change() -> None:
    zeros = de.Draws(np.zeros((5, 2), np.float32))
    result = de.compare(zeros, zeros, DifferentialConfig(), rng())
    assert result["proba_de"].tolist() == [0, 0]
    assert result["lfc_mean"].tolist() == [0, 0]


def test_order_of_a_table() -> None:
    assert de.ranked({"proba_de": np.array([0.1, 0.9, 0.5])}).tolist() == [1, 2, 0]
    assert de.ranked({"bayes_factor": np.array([0.1, -0.9, 0.5])}).tolist() == [2, 0, 1]
