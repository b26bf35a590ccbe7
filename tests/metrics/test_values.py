"""Each metric against published values, another implementation, or its definition written out."""

from __future__ import annotations

import random

import igraph
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, chi2, chisquare, entropy
from sklearn import metrics as sk

from streamx.errors import BadValuesError, BatchError, UsageError
from streamx.metrics import (
    agreement,
    batch_entropy_mixing_score,
    clusters,
    lisi,
    mixing,
    score_latent,
    silhouette,
    silhouette_score,
)
from streamx.neighbors import nearest


@pytest.fixture(scope="module")
def space(golden):
    stored = np.load(golden / "metric_fixture.npz")
    return stored["Z"], stored["b"], (stored["Z"][:, 0] > 0).astype(str)


def test_scarches_values(space):
    latent, batches, labels = space
    scores = score_latent(latent, batches, labels, resolution=1.0)
    assert scores["ebm"] == pytest.approx(0.714548843292098, abs=1e-12)
    assert scores["knn_purity"] == pytest.approx(0.6981951614535884, abs=1e-12)


def test_scalex_value(space):
    """What scalex 1.0.4's function returns for the fixture after numpy.random.seed(0)."""
    latent, batches, _ = space
    assert batch_entropy_mixing_score(latent, batches) == pytest.approx(0.5501432847406738, abs=1e-12)
    assert score_latent(latent, batches)["batch_entropy_mixing"] == pytest.approx(
        0.5501432847406738, abs=1e-12
    )


def test_one_batch_per_cell():
    with pytest.raises(BadValuesError, match="4 batches for 3 cells"):
        batch_entropy_mixing_score(np.zeros((3, 2)), list("abab"))


def test_mixing_of_one_and_of_two_worlds():
    latent = np.random.RandomState(0).randn(600, 8)
    batches = np.repeat(["a", "b"], 300)
    assert batch_entropy_mixing_score(latent, batches) == pytest.approx(np.log(2), abs=0.006)
    latent[300:] += 100
    assert batch_entropy_mixing_score(latent, batches) == pytest.approx(-1e-8, abs=1e-12)
    with pytest.raises(BatchError, match="two batches"):
        batch_entropy_mixing_score(latent, np.repeat("a", 600))


def test_scarches_entropy_is_scipy_s(space):
    latent, batches, _ = space
    codes = np.unique(batches, return_inverse=True)[1]
    around = codes[nearest(latent, n_neighbors=50).indices_nm]
    expected = [entropy(np.bincount(row, minlength=3), base=3) for row in around]
    np.testing.assert_allclose(mixing.batch_entropies(around, 3), expected, atol=1e-12)


def test_lisi_equals_harmonypy(fixtures_dir):
    folder = fixtures_dir / "golden"
    points = pd.read_csv(folder / "harmonypy_lisi_x.tsv.gz", sep="\t").to_numpy()
    labels = pd.read_csv(folder / "harmonypy_lisi_metadata.tsv.gz", sep="\t")
    expected = pd.read_csv(folder / "harmonypy_lisi_lisi.tsv.gz", sep="\t")
    found = nearest(points, n_neighbors=lisi.LISI_NEIGHBORS - 1)
    for name in ("label1", "label2"):
        codes = np.unique(labels[name], return_inverse=True)[1]
        ours = lisi.lisi(found.distances_nm, codes[found.indices_nm], 2)
        np.testing.assert_allclose(ours, expected[name], atol=1e-9)


def test_lisi_of_one_and_of_equal_codes():
    distances = np.sort(np.random.default_rng(0).random((20, 89)), axis=1)
    assert lisi.lisi(distances, np.zeros((20, 89), dtype=int), 3) == pytest.approx(1)
    same = np.tile(np.arange(3), (20, 30))[:, :89]
    assert lisi.lisi(np.ones((20, 89)), same, 3) == pytest.approx(3, abs=2e-3)  # 30, 30 and 29 of 89
    far = lisi.lisi(distances * 1e6, same, 3)
    assert np.isfinite(far).all()


@pytest.mark.parametrize("rows", [None, [5, 0, 250, 599]])
def test_silhouette_equals_sklearn(space, rows):
    latent, batches, _ = space
    rows = None if rows is None else np.array(rows)
    codes = np.unique(batches, return_inverse=True)[1].copy()
    codes[17] = 3  # a label with one cell
    expected = sk.silhouette_samples(latent, codes)[slice(None) if rows is None else rows]
    np.testing.assert_allclose(silhouette.silhouette_samples(latent, codes, rows), expected, atol=1e-7)
    assert silhouette_score(latent, codes) == pytest.approx(sk.silhouette_score(latent, codes), abs=1e-8)


def test_silhouette_of_a_sample_and_of_too_few_labels(space):
    latent, batches, _ = space
    sampled = silhouette_score(latent, batches, sample_size=300, seed=1)
    assert sampled == pytest.approx(sk.silhouette_score(latent, batches), abs=0.03)
    with pytest.raises(UsageError, match="needs 2 to"):
        silhouette_score(latent, np.repeat("x", 600))


def test_asw_as_scarches_defines_it(space):
    latent, batches, labels = space
    scores = score_latent(latent, batches, labels, resolution=1.0)
    assert scores["asw_label"] == pytest.approx((sk.silhouette_score(latent, labels) + 1) / 2, abs=1e-8)
    per_label = [
        np.mean(1 - np.abs(sk.silhouette_samples(latent[labels == label], batches[labels == label])))
        for label in np.unique(labels)
    ]
    assert scores["asw_batch"] == pytest.approx(np.mean(per_label), abs=1e-8)


def test_kbet_of_one_and_of_two_worlds():
    """Mixed: 1 + a binomial number of 49 others lies between the limits of the chi-squared test."""
    rng = np.random.default_rng(0)
    latent, codes, share_b = rng.normal(size=(2000, 5)), np.repeat([0, 1], [800, 1200]), np.array([0.4, 0.6])
    limit = np.sqrt(chi2.isf(0.05, 1) * 50 * 0.4 * 0.6)
    inside = [
        binom.cdf(np.floor(50 * p + limit) - 1, 49, p) - binom.cdf(np.ceil(50 * p - limit) - 2, 49, p)
        for p in share_b
    ]
    around = nearest(latent, n_neighbors=49).indices_nm
    found = []
    for _ in range(60):
        rng.shuffle(codes)
        found.append(mixing.kbet(codes[around], codes, share_b, True, 0))
    assert np.mean([one.value for one in found]) == pytest.approx(inside @ share_b, abs=0.01)
    assert inside @ share_b == pytest.approx(0.95, abs=0.01)
    assert np.mean([one.extra["mean_p_value"] for one in found]) == pytest.approx(0.5, abs=0.03)
    batches = np.repeat(["a", "b"], 1000)
    latent[:1000] += 100
    assert score_latent(latent, batches)["kbet"] == 0
    apart = score_latent(latent, batches, max_cells=500).measures["kbet"]
    assert apart.value == 0
    assert 0 < apart.ci95[1] < 0.01  # no hit of 500 doesn't mean that there is none


def test_batch_tests_written_out():
    codes = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    statistics, p_values = mixing.batch_tests(codes, np.array([0.6, 0.4]))
    expected = [chisquare(np.bincount(row, minlength=2), [3, 2]) for row in codes]
    np.testing.assert_allclose(statistics, [test.statistic for test in expected])
    np.testing.assert_allclose(p_values, [test.pvalue for test in expected])


def test_sampled_silhouettes_of_all_cells_are_exact(space):
    latent, batches, labels = space
    codes, batch = (np.unique(values, return_inverse=True)[1] for values in (labels, batches))
    codes = codes.copy()
    codes[17] = 2  # a label with one cell
    sizes = {"n_rows": 600, "n_references": 10**6, "repeats": 3}
    exact = silhouette.silhouette_samples(latent, codes)
    means = silhouette.sampled_label_silhouettes(latent, codes, **sizes)
    assert means.mean() == pytest.approx(exact.mean(), abs=1e-12)
    scores, owners = silhouette.batch_silhouettes(latent, codes, batch)
    per_label = [scores[owners == label].mean() for label in np.unique(owners)]
    means, _ = silhouette.sampled_batch_silhouettes(latent, codes, batch, **{**sizes, "n_rows": 10**6})
    np.testing.assert_allclose(means, np.mean(per_label), atol=1e-12)


def test_moments_take_most_of_the_noise_out_of_sampled_silhouettes():
    rng = np.random.default_rng(0)
    codes = rng.integers(3, size=3000)
    latent = rng.normal(size=(3000, 10)) + 2 * np.eye(3, 10)[codes]
    rows = np.arange(0, 3000, 10)
    exact = silhouette.silhouette_samples(latent, codes, rows)
    groups = silhouette.group_cells(latent, codes)
    ours, plain = [], []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        found = silhouette.sampled_silhouettes(
            latent, groups, np.arange(3), rows, codes[rows], per_group=100, rng=draw
        )
        ours.append(found - exact)
        some = np.sort(np.concatenate([rows, draw.choice(np.setdiff1d(np.arange(3000), rows), 300, False)]))
        found = silhouette.silhouette_samples(latent[some], codes[some], np.searchsorted(some, rows))
        plain.append(found - exact)
    assert np.std(ours) < np.std(plain) / 2  # though the plain one has twice as many references
    assert abs(np.mean(ours)) < 1e-3


def test_graph_connectivity_written_out():
    # 0 <-> 1, 2 -> 1 only: label a falls apart into {0, 1} and {2}; b = {3, 4} is one piece
    indices = np.array([[1], [0], [1], [4], [3]])
    assert clusters.graph_connectivity(indices, np.array([0, 0, 0, 1, 1])) == pytest.approx((2 / 3 + 1) / 2)


def test_leiden_is_seeded_and_gives_the_generator_back(space):
    latent, _, _ = space
    found = nearest(latent, n_neighbors=14)
    graph = clusters.fuzzy_graph(found.indices_nm, found.distances_nm)
    assert abs(graph - graph.T).max() == 0
    assert 0 < graph.data.min() <= graph.data.max() <= 1
    np.testing.assert_array_equal(clusters.leiden(graph, seed=3), clusters.leiden(graph, seed=3))
    random.seed(1)
    first = igraph.Graph.Erdos_Renyi(30, 0.2).get_edgelist()
    clusters.leiden(graph, seed=3)
    random.seed(1)
    assert igraph.Graph.Erdos_Renyi(30, 0.2).get_edgelist() == first


def test_clusters_find_clear_labels():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 100)
    latent = rng.normal(size=(300, 5)) + np.repeat(np.eye(3, 5) * 40, 100, axis=0)
    scores = score_latent(latent, np.tile(["x", "y"], 150), labels)
    for name in ("nmi", "ari", "knn_purity", "clisi"):
        assert scores[name] == pytest.approx(1), name
    assert scores["graph_connectivity"] > 0.98  # a few cells are nobody's neighbour
    assert scores["silhouette"] > 0.9
    fixed = score_latent(latent, None, labels, resolution=1.5)
    assert fixed.measures["nmi"].extra["resolution"] == 1.5
    assert fixed["nmi"] < scores["nmi"]


@pytest.mark.slow
def test_fuzzy_graph_equals_umap():
    umap = pytest.importorskip("umap.umap_")
    points = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    points[:4] = points[0]  # duplicates
    found = nearest(points, n_neighbors=14)
    indices, distances = clusters.with_self(found.indices_nm, found.distances_nm)
    expected, *_ = umap.fuzzy_simplicial_set(
        points,
        n_neighbors=15,
        random_state=None,
        metric=None,
        knn_indices=indices,
        knn_dists=distances.astype(np.float32),
    )
    ours = clusters.fuzzy_graph(found.indices_nm, found.distances_nm)
    assert abs(ours - expected).max() < 1e-4


def test_agreement_equals_sklearn():
    rng = np.random.default_rng(0)
    truth = rng.choice(list("abcd"), 300)
    guess = np.where(rng.random(300) < 0.7, truth, rng.choice(["a", "b", "c", "e", "Unknown"], 300))
    found = agreement(truth, guess)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, guess))
    expected = sk.f1_score(truth, guess, labels=np.unique(truth), average="macro")
    assert found["macro_f1"] == pytest.approx(expected)
    assert found["n_scored"] == 300


def test_agreement_leaves_out_cells_without_truth():
    found = agreement(["a", "", None, "b"], ["a", "a", "b", "Unknown"])
    assert (found["accuracy"], found["n_scored"]) == (0.5, 2)
    assert found["recall"] == {"a": 1.0, "b": 0.0}
    assert agreement(["", None], ["a", "b"])["accuracy"] is None
    with pytest.raises(BadValuesError, match="2 true labels for 1"):
        agreement(["a", "b"], ["a"])
