"""Label transfer: sklearn's 5-NN, scArches' formula written out, and the cells that have no say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from streamx.errors import BadValuesError, EmptyError, StreamxWarning, UsageError
from streamx.labels import encode_labels, unify_labels
from streamx.transfer import kernel_weights, transfer_labels


def cells(seed, n=600, m=250, n_labels=7, d=8):
    rng = np.random.default_rng(seed)
    reference, query = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)
    names = np.array([f"type {chr(110 - i)}" for i in range(n_labels)])
    return reference, names[rng.integers(n_labels, size=n)], query


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 12), n_labels=st.integers(1, 9))
def test_vote_equals_sklearn(seed, k, n_labels):
    reference, labels, query = cells(seed, n_labels=n_labels)
    ours = transfer_labels(reference, labels, query, n_neighbors=k, probabilities=True)
    theirs = KNeighborsClassifier(k).fit(reference, labels)
    np.testing.assert_array_equal(ours.labels_n, theirs.predict(query))
    np.testing.assert_allclose(ours.probabilities_nl, theirs.predict_proba(query), atol=1e-7)
    assert ours.names == list(theirs.classes_)
    np.testing.assert_allclose(ours.uncertainty_n, 1 - theirs.predict_proba(query).max(axis=1), atol=1e-6)


def test_default_is_scalex_5nn():
    reference, labels, query = cells(0)
    ours = transfer_labels(reference, labels, query)
    theirs = KNeighborsClassifier().fit(reference, labels).predict(query)
    np.testing.assert_array_equal(ours.labels_n, theirs)
    assert (ours.voters.method, ours.voters.n_neighbors) == ("vote", 5)
    assert (ours.voters.index.method, ours.voters.recall) == ("exact", 1.0)


def test_vote_equals_sklearn_on_real_cells(fixtures_dir):
    """3,500 blood cells of three donors, 30 principal components; the donor stands in for a label."""
    folder = fixtures_dir / "golden"
    points = pd.read_csv(folder / "harmonypy_pbmc_3500_pcs.tsv.gz", sep="\t").to_numpy(dtype=np.float64)
    donors = pd.read_csv(folder / "harmonypy_pbmc_3500_meta.tsv.gz", sep="\t")["donor"]
    query = np.arange(len(points)) % 3 == 0
    ours = transfer_labels(points[~query], donors[~query], points[query], probabilities=True)
    theirs = KNeighborsClassifier().fit(points[~query], donors[~query])
    np.testing.assert_array_equal(ours.labels_n, theirs.predict(points[query]))
    np.testing.assert_allclose(ours.probabilities_nl, theirs.predict_proba(points[query]), atol=1e-7)


def test_ties_go_to_the_first_label_in_sorted_order():
    reference = np.array([[1.0], [-1.0], [2.0], [-2.0]])
    for labels in (["b", "a", "a", "b"], ["a", "b", "b", "a"]):
        assert transfer_labels(reference, labels, np.array([[0.0]]), n_neighbors=4).labels_n[0] == "a"


def test_weighted_equals_the_formula():
    reference, labels, query = cells(3)
    ours = transfer_labels(reference, labels, query, method="weighted", probabilities=True)
    distances = np.sqrt(((query[:, None].astype(float) - reference[None]) ** 2).sum(axis=2))
    for row, d in enumerate(distances):
        nearest = np.argsort(d)[:50]
        weights = np.exp(-d[nearest] / (2 / d[nearest].std()) ** 2)
        shares = [weights[labels[nearest] == name].sum() / weights.sum() for name in ours.names]
        np.testing.assert_allclose(ours.probabilities_nl[row], shares, atol=1e-6)
        assert ours.labels_n[row] == ours.names[int(np.argmax(shares))]
        np.testing.assert_allclose(ours.uncertainty_n[row], 1 - max(shares), atol=1e-6)


def test_far_and_equal_distances_give_no_nan():
    far = np.array([[1e4, 2e4, 9e4, 9e4], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    weights = kernel_weights(far)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights[1:], 0.25)
    reference, labels, query = cells(4)
    found = transfer_labels(reference * 1e3, labels, query * 1e5, method="weighted", probabilities=True)
    assert np.isfinite(found.uncertainty_n).all()
    np.testing.assert_allclose(found.probabilities_nl.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("method", ["vote", "weighted"])
def test_cells_without_a_latent_are_unknown(method):
    reference, labels, query = cells(5)
    query[[0, 7]] = np.nan
    found = transfer_labels(reference, labels, query, method=method, probabilities=True)
    assert list(found.labels_n[[0, 7]]) == ["Unknown", "Unknown"]
    assert list(found.uncertainty_n[[0, 7]]) == [1, 1]
    assert found.n_unknown == 2
    np.testing.assert_allclose(found.probabilities_nl.sum(axis=1), 1, atol=1e-5)
    rest = np.setdiff1d(np.arange(len(query)), [0, 7])
    alone = transfer_labels(reference, labels, query[rest], method=method)
    np.testing.assert_array_equal(found.labels_n[rest], alone.labels_n)


def test_unlabelled_reference_cells_neither_vote_nor_count():
    reference, labels, query = cells(6)
    rng = np.random.default_rng(6)
    hidden = rng.random(len(labels)) < 0.5
    text = labels.astype(object)
    text[hidden] = rng.choice(np.array(["", "unknown", "Unknown", None, np.nan], dtype=object), hidden.sum())
    expected = KNeighborsClassifier().fit(reference[~hidden], labels[~hidden]).predict(query)
    for given_labels in (text, pd.Series(text), pd.Categorical(text)):
        found = transfer_labels(reference, given_labels, query)
        np.testing.assert_array_equal(found.labels_n, expected)
        assert found.names == sorted(set(labels[~hidden]))
    chosen = transfer_labels(reference, labels, query, unlabeled=("type n",))
    assert "type n" not in chosen.labels_n


def test_reference_cells_without_a_latent_neither_vote_nor_count():
    reference, labels, query = cells(6)
    expected = transfer_labels(reference[5:], labels[5:], query)
    reference[:5] = np.nan
    np.testing.assert_array_equal(transfer_labels(reference, labels, query).labels_n, expected.labels_n)


def test_threshold_is_on_uncertainty():
    reference, labels, query = cells(7)
    free = transfer_labels(reference, labels, query)
    cut = transfer_labels(reference, labels, query, threshold=0.6)
    unsure = free.uncertainty_n > np.float32(0.6)
    assert 0 < unsure.sum() < len(query)
    assert (cut.labels_n[unsure] == "Unknown").all()
    np.testing.assert_array_equal(cut.labels_n[~unsure], free.labels_n[~unsure])
    np.testing.assert_array_equal(cut.uncertainty_n, free.uncertainty_n)
    assert transfer_labels(reference, labels, query, threshold=1.0).n_unknown == 0


def test_chunks_change_nothing(monkeypatch):
    reference, labels, query = cells(8)
    whole = transfer_labels(reference, labels, query, method="weighted")
    monkeypatch.setattr("streamx.transfer.ask.ROWS", 17)
    parts = transfer_labels(reference, labels, query, method="weighted")
    np.testing.assert_array_equal(whole.codes_n, parts.codes_n)
    np.testing.assert_array_equal(whole.uncertainty_n, parts.uncertainty_n)


def test_few_labelled_cells_and_empty_queries():
    with pytest.warns(StreamxWarning, match="only 3 reference cells"):
        found = transfer_labels(np.eye(3), ["a", "a", "b"], np.zeros((2, 3)))
    assert list(found.labels_n) == ["a", "a"]
    assert transfer_labels(np.eye(6), list("aabbcc"), np.empty((0, 6))).labels_n.shape == (0,)


def test_errors_say_what_to_do():
    with pytest.raises(EmptyError, match="fix:"):
        transfer_labels(np.eye(3), ["", None, "unknown"], np.eye(3))
    with pytest.raises(BadValuesError, match="2 labels for 3"):
        transfer_labels(np.eye(3), ["a", "b"], np.eye(3))
    with pytest.raises(UsageError, match="vote, weighted"):
        transfer_labels(np.eye(3), ["a", "b", "c"], np.eye(3), method="svm")
    with pytest.raises(UsageError, match="between 0 and 1"):
        transfer_labels(np.eye(3), ["a", "b", "c"], np.eye(3), n_neighbors=1, threshold=2)


def test_labels_of_any_kind():
    text = encode_labels(["b", "a", "", "b"])
    assert (text.names, list(text.codes_n)) == (["a", "b"], [1, 0, -1, 1])
    assert encode_labels(np.array([2, 10, 2])).names == ["10", "2"]
    mixed = encode_labels(np.array(["1", 1, None, pd.NA], dtype=object))
    assert (mixed.names, list(mixed.codes_n)) == (["1"], [0, 0, -1, -1])
    category = pd.Categorical(["x", None, "y"], categories=["y", "unused", "x"])
    assert encode_labels(category).names == ["x", "y"]
    assert encode_labels(pd.Series([True, False])).names == ["False", "True"]
    assert encode_labels(pd.Series(["a", None], dtype="string")).names == ["a"]
    one, two = unify_labels(encode_labels(["b", ""]), encode_labels(["a", "b"]))
    assert list(one.codes_n) == [1, -1]
    assert list(two.codes_n) == [0, 1]
    assert list(text.take(np.array([2, 3])).text("none")) == ["none", "b"]
