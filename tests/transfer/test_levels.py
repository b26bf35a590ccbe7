"""Labels of several levels, thresholds that held-out cells set, novelty, and scores per label."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from streamx.errors import BadValuesError, StreamxWarning, UsageError
from streamx.labels import encode_labels
from streamx.neighbors import nearest
from streamx.transfer import (
    HeldOut,
    gather,
    hold_out,
    kernel_weights,
    score_labels,
    threshold_for,
    transfer_labels,
    transfer_levels,
    vote,
)

LINEAGE = {"CD4": "T", "CD8": "T", "naive B": "B", "memory B": "B", "CD14": "mono"}


def cells(seed, n=900, d=6, scatter=1.4):
    """Cells of five types in three lineages, which overlap; (latents, lineages, types)."""
    rng = np.random.default_rng(seed)
    names = np.array(list(LINEAGE))
    kind = rng.integers(len(names), size=n)
    latent = (3 * np.eye(len(names), d)[kind] + scatter * rng.normal(size=(n, d))).astype(np.float32)
    fine = names[kind].astype(object)
    return latent, np.array([LINEAGE[name] for name in fine], dtype=object), fine


@pytest.mark.parametrize("method", ["vote", "weighted"])
def test_a_label_lies_within_the_coarser_one(method):
    reference, coarse, fine = cells(0)
    fine[np.random.default_rng(0).random(len(fine)) < 0.3] = None  # not every cell was looked at closely
    query = cells(1, 300)[0]
    query[7] = np.nan
    options = {"method": method, "n_neighbors": 20}
    lineage, kind = transfer_levels(reference, [coarse, fine], query, probabilities=True, **options)
    found = nearest(reference, query, 20, method="exact")
    for row in np.setdiff1d(np.arange(300), [7]):
        near = found.indices_nm[row]
        weights = np.full(20, 1 / 20)
        if method == "weighted":
            weights = kernel_weights(found.distances_nm[row : row + 1])[0]
        share = {name: weights[coarse[near] == name].sum() for name in ("B", "T", "mono")}
        best = max(share, key=share.get)
        assert share[lineage.labels_n[row]] == pytest.approx(share[best])
        chosen = lineage.labels_n[row]
        inside = {name: weights[fine[near] == name].sum() for name in LINEAGE if LINEAGE[name] == chosen}
        most = max(inside.values())
        if most == 0:
            assert kind.labels_n[row] == "Unknown"
        else:
            assert inside[kind.labels_n[row]] == pytest.approx(most)
        assert kind.uncertainty_n[row] == pytest.approx(1 - most, abs=1e-6)
        assert kind.probabilities_nl[row].sum() == pytest.approx(
            weights[np.array([name is not None for name in fine[near]])].sum(), abs=1e-5
        )
    assert (kind.uncertainty_n >= lineage.uncertainty_n - 1e-6).all()
    assert lineage.labels_n[7] == kind.labels_n[7] == "Unknown"
    alone = transfer_labels(reference, coarse, query, **options)
    np.testing.assert_array_equal(lineage.codes_n, alone.codes_n)


def test_unknown_above_is_unknown_below():
    reference, coarse, fine = cells(0)
    query = cells(1, 300)[0]
    lineage, kind = transfer_levels(reference, [coarse, fine], query, thresholds=[0.0, 1.0])
    assert 0 < lineage.n_unknown < 300
    assert (kind.codes_n[lineage.codes_n < 0] == -1).all()
    assert kind.n_unknown == lineage.n_unknown
    loose, strict = transfer_levels(reference, [coarse, fine], query, thresholds=[1.0, 0.0])
    assert loose.n_unknown == 0
    assert strict.n_unknown > lineage.n_unknown


def test_what_is_no_tree_is_named():
    reference, coarse, fine = cells(0)
    fine[np.flatnonzero(coarse == "B")[3]] = "CD8"
    with pytest.raises(BadValuesError, match="'CD8' lies within both 'B' and 'T'"):
        transfer_levels(reference, [coarse, fine], reference[:5])
    with pytest.raises(BadValuesError, match="2 labels for 900"):
        transfer_levels(reference, [coarse, fine[:2]], reference[:5])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 80),
    keep=st.floats(0, 1),
    steps=st.integers(1, 12),
)
def test_thresholds_do_what_was_asked(seed, n, keep, steps):
    rng = np.random.default_rng(seed)
    uncertainty = (rng.integers(steps, size=n) / steps).astype(np.float32)
    wrong = rng.random(n) < uncertainty
    held = HeldOut((np.zeros(n, int),), (wrong.astype(int),), (uncertainty,), np.zeros(n))
    found = threshold_for(held, keep=keep)
    kept = uncertainty <= np.float32(found.value)
    assert found.kept == pytest.approx(kept.mean())
    assert found.kept >= keep
    assert found.error == pytest.approx(wrong[kept].mean())
    assert (uncertainty < np.float32(found.value)).mean() <= keep  # no smaller one would do
    rates = {value: wrong[uncertainty <= value].mean() for value in np.unique(uncertainty)}
    if min(rates.values()) <= keep:
        found = threshold_for(held, max_error=keep)
        assert found.error <= keep
        assert found.value == max(value for value, rate in rates.items() if rate <= keep)
    else:
        with pytest.warns(StreamxWarning, match="most certain labels"):
            assert threshold_for(held, max_error=keep).value == uncertainty.min()


def test_thresholds_from_the_reference_hold_for_a_query_like_it():
    reference, _, fine = cells(0, 3000, scatter=1.8)
    query, _, truth = cells(1, 3000, scatter=1.8)
    voters = gather(reference, [fine], query, n_neighbors=15)
    held = hold_out(voters)
    keep, error = threshold_for(held, keep=0.8), threshold_for(held, max_error=0.03)
    assert keep.n_cells == 3000
    (found,) = vote(voters, query, thresholds=[keep.value])
    assert 1 - found.n_unknown / 3000 == pytest.approx(keep.kept, abs=0.03)
    assert keep.kept >= 0.8
    (found,) = vote(voters, query, thresholds=[error.value])
    known = found.codes_n >= 0
    assert np.mean(found.labels_n[known] != truth[known]) == pytest.approx(0.03, abs=0.015)


def test_settings_of_thresholds_that_cannot_be():
    reference, _, fine = cells(0, 200)
    held = hold_out(gather(reference, [fine], reference))
    for bad in ({}, {"keep": 0.9, "max_error": 0.1}, {"keep": 1.5}, {"max_error": -0.1}):
        with pytest.raises(UsageError, match="fix:"):
            threshold_for(held, **bad)
    with pytest.raises(UsageError, match="too few"):
        hold_out(gather(reference[:1], [fine[:1]], reference, n_neighbors=1))


def test_novelty_of_usual_and_strange_cells():
    rng = np.random.default_rng(0)
    tight, wide = rng.normal(size=(2000, 6)) * 0.2, rng.normal(size=(2000, 6)) * 2 + 30
    reference = np.concatenate([tight, wide]).astype(np.float32)
    labels = np.repeat(["tight", "wide"], 2000)
    query = np.concatenate(
        [rng.normal(size=(1000, 6)) * 0.2, rng.normal(size=(1000, 6)) * 2 + 30, rng.normal(size=(50, 6)) + 12]
    ).astype(np.float32)
    query[5] = np.nan
    voters = gather(reference, [labels], query)
    (found,) = vote(voters, query, held=hold_out(voters))
    assert found.novelty_n.dtype == np.float32
    assert ((found.novelty_n >= 0) & (found.novelty_n <= 1)).all()
    assert np.isfinite(found.novelty_n).all()
    for usual in (slice(10, 1000), slice(1000, 2000)):  # each by the distances of its own type
        assert np.mean(found.novelty_n[usual] > 0.95) == pytest.approx(0.05, abs=0.03)
        assert np.mean(found.novelty_n[usual]) == pytest.approx(0.5, abs=0.05)
    assert (found.novelty_n[2000:] == 1).all()
    assert found.novelty_n[5] == 1
    assert vote(voters, query)[0].novelty_n is None


def test_scores_per_label_equal_sklearn():
    rng = np.random.default_rng(0)
    truth = rng.choice(["a", "b", "c", ""], 400).astype(object)
    guess = np.where(rng.random(400) < 0.6, truth, rng.choice(["a", "b", "d"], 400)).astype(object)
    found = score_labels(encode_labels(truth), encode_labels(guess))
    known = truth != ""
    names = ["a", "b", "c"]
    precision, recall, f1, support = precision_recall_fscore_support(
        truth[known], guess[known], labels=names, zero_division=np.nan
    )
    assert list(found) == names
    for i, name in enumerate(names):
        assert found[name]["precision"] == pytest.approx(precision[i])
        assert found[name]["recall"] == pytest.approx(recall[i])
        assert found[name]["f1"] == pytest.approx(f1[i])
        assert found[name]["n"] == support[i]
    assert score_labels(encode_labels(["x", "y"]), encode_labels(["y", "y"]))["x"]["precision"] is None
