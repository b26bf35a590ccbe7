"""All metrics of one latent space: samples that say so, and sets of cells that have no such metric."""

from __future__ import annotations

import json

import numpy as np
import pytest

from streamx.errors import BadValuesError, EmptyError
from streamx.metrics import BATCH_METRICS, LABEL_METRICS, score_latent


def cells(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    labels, batches = rng.integers(5, size=n), rng.choice(3, size=n, p=[0.5, 0.3, 0.2])
    latent = rng.normal(size=(n, 6)) + 1.5 * np.eye(5, 6)[labels] + 0.7 * np.eye(3, 6, k=3)[batches]
    return latent.astype(np.float32), batches.astype(str), labels.astype(str)


def test_small_sets_are_exact_and_large_ones_sampled_with_an_interval():
    latent, batches, labels = cells()
    exact = score_latent(latent, batches, labels, resolution=1.0)
    sampled = score_latent(latent, batches, labels, resolution=1.0, max_cells=2500, seed=7)
    drawn = {"batch_entropy_mixing", "ebm"}  # defined by draws
    for name in (*BATCH_METRICS, *LABEL_METRICS):
        assert exact.measures[name].exact == (name not in drawn), name
        one, other = exact.measures[name], sampled.measures[name]
        assert not other.exact
        assert other.seed == 7
        low, high = other.ci95
        assert low <= other.value <= high
        if name not in ("nmi", "ari", "graph_connectivity"):  # a sample's graph is another graph
            assert low - (high - low) <= one.value <= high + (high - low), name


def test_intervals_cover():
    """95 % intervals of sampled silhouettes, purities and mixing hold the exact value about as often."""
    latent, batches, labels = cells(1500, seed=3)
    exact = score_latent(latent, batches, labels, resolution=1.0)
    from streamx.metrics import score

    hits = dict.fromkeys(("silhouette", "clisi", "knn_purity", "asw_batch"), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "SAMPLED_SILHOUETTES", 200)
        patch.setattr(score, "SAMPLED_PER_LABEL", 60)
        patch.setattr(score, "CLUSTERED_SAMPLES", 2)
        patch.setattr(score.mixing, "BEM_POOLS", 3)
        for seed in range(25):
            found = score_latent(latent, batches, labels, resolution=1.0, max_cells=1499, seed=seed)
            for name in hits:
                low, high = found.measures[name].ci95
                hits[name] += low <= exact[name] <= high
    assert all(count >= 20 for count in hits.values()), hits


def test_json_has_one_number_per_metric():
    latent, batches, labels = cells(300)
    found = json.loads(json.dumps(score_latent(latent, batches, labels).to_json(), allow_nan=False))
    for name in (*BATCH_METRICS, *LABEL_METRICS):
        assert isinstance(found[name], float), name
        assert {"exact", "n"} <= set(found["details"][name])
    assert found["n_cells"] == 300


def test_cells_without_a_latent_are_left_out_and_counted():
    latent, batches, labels = cells(400)
    holes = latent.copy()
    holes[::10] = np.nan
    keep = np.arange(400) % 10 != 0
    found, expected = (
        score_latent(holes, batches, labels),
        score_latent(latent[keep], batches[keep], labels[keep]),
    )
    assert found.notes["n_without_latent"] == 40
    assert found.values == expected.values


def test_unlabelled_cells_count_for_batches_only():
    latent, batches, labels = cells(400)
    some = labels.astype(object)
    some[::4] = "unknown"
    some[1::4] = None
    keep = np.arange(400) % 4 > 1
    found, whole = score_latent(latent, batches, some), score_latent(latent, batches, labels)
    part = score_latent(latent[keep], batches[keep], labels[keep])
    assert found["ilisi"] == whole["ilisi"]
    for name in (*LABEL_METRICS, "asw_batch"):
        assert found[name] == part[name], name


@pytest.mark.parametrize(
    ("n", "batches", "labels"),
    [
        (40, "one", "one"),
        (40, "one", "two"),
        (40, "single cell", "single cell"),
        (40, "each", "each"),
        (40, None, None),
        (3, "two", "two"),
        (2, "two", "two"),
        (1, "one", "one"),
        (40, "two", "none"),
    ],
)
def test_sets_without_a_metric_say_why(n, batches, labels):
    kinds = {
        None: None,
        "one": ["a"] * n,
        "two": (["a", "b"] * n)[:n],
        "single cell": ["lone", *(["a", "b"] * n)[: n - 1]],
        "each": [f"c{i}" for i in range(n)],
        "none": [""] * n,
    }
    latent = np.random.default_rng(0).normal(size=(n, 4))
    found = score_latent(latent, kinds[batches], kinds[labels])
    for name in (*BATCH_METRICS, *LABEL_METRICS):
        measure = found.measures[name]
        assert (measure.value is None) == (measure.reason is not None), name
        assert measure.value is None or np.isfinite(measure.value), name
    if batches == "one":
        assert "needs two batches" in found.measures["ilisi"].reason
    if labels == "one":
        assert "needs two labels" in found.measures["nmi"].reason


def test_missing_batches_are_a_batch():
    latent, batches, _ = cells(200)
    some = batches.astype(object)
    some[batches == "2"] = None
    assert score_latent(latent, some)["ilisi"] == score_latent(latent, batches)["ilisi"]


def test_errors():
    with pytest.raises(EmptyError, match="no cell has a latent"):
        score_latent(np.full((4, 2), np.nan))
    with pytest.raises(BadValuesError, match="3 labels for 4"):
        score_latent(np.zeros((4, 2)), labels=["a", "b", "c"])
