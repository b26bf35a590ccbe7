"""All metrics of one latent space: samples that say so, and sets of cells that have no such metric."""

from __future__ import annotations

import json

import numpy as np
import pytest

from streamx.errors import BadValuesError, EmptyError
from streamx.metrics import BATCH_METRICS, LABEL_METRICS, clusters, mixing, score, score_latent, space
from streamx.neighbors import build_index, nearest


def cells(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    labels, batches = rng.integers(5, size=n), rng.choice(3, size=n, p=[0.5, 0.3, 0.2])
    latent = rng.normal(size=(n, 6)) + 1.5 * np.eye(5, 6)[labels] + 0.7 * np.eye(3, 6, k=3)[batches]
    return latent.astype(np.float32), batches.astype(str), labels.astype(str)


def test_small_sets_are_exact_and_large_ones_sampled_with_an_interval():
    latent, batches, labels = cells()
    exact = score_latent(latent, batches, labels, resolution=1.0)
    sampled = score_latent(latent, batches, labels, resolution=1.0, max_cells=500, seed=7)
    drawn = {"batch_entropy_mixing", "ebm"}  # defined by draws
    for name in (*BATCH_METRICS, *LABEL_METRICS):
        assert exact.measures[name].exact == (name not in drawn), name
        one, other = exact.measures[name], sampled.measures[name]
        if name == "graph_connectivity":
            assert other == one  # of all cells, whatever the sample
            continue
        assert not other.exact
        assert other.seed == 7
        low, high = other.ci95
        assert low <= other.value <= high
        if name not in ("nmi", "ari"):  # a sketch's graph is another graph
            assert low - (high - low) <= one.value <= high + (high - low), name
    assert sampled.measures["ilisi"].n == sampled.measures["kbet"].n == 500
    assert sampled.measures["silhouette"].n == 400
    assert sampled.measures["nmi"].n == 2000
    assert sampled.measures["nmi"].extra == {"samples": 10, "sketch": 2000, "resolution": 1.0}


def test_clusters_are_exact_up_to_four_times_as_many_cells():
    latent, batches, labels = cells()
    exact = score_latent(latent, batches, labels, resolution=1.0)
    sampled = score_latent(latent, batches, labels, resolution=1.0, max_cells=1000)
    for name in ("nmi", "ari", "graph_connectivity"):
        assert sampled.measures[name].exact
        assert sampled[name] == exact[name], name


@pytest.mark.parametrize("max_cells", [1000, 500])
def test_a_graph_that_may_lack_edges_is_not_called_exact(monkeypatch, max_cells):
    def inverted(*args, method="auto", **options):
        return build_index(*args, method="ivf", **options)

    monkeypatch.setattr(space, "build_index", inverted)
    monkeypatch.setattr(space, "IN_MEMORY", 100)  # the graph lies in a file
    monkeypatch.setattr(score, "_silhouettes", lambda *rest: {})
    latent, batches, labels = cells(2500)
    found = score_latent(latent, batches, labels, resolution=1.0, max_cells=max_cells)
    connectivity = found.measures["graph_connectivity"]
    assert not connectivity.exact
    assert 0.99 <= connectivity.extra["knn_recall"] <= 1
    assert connectivity.n == 2500
    exact = clusters.graph_connectivity(nearest(latent, n_neighbors=14).indices_nm, labels.astype(int))
    assert connectivity.value == pytest.approx(exact, abs=0.005)
    assert ("knn_recall" in found.measures["nmi"].extra) == (max_cells == 1000)
    assert not found.measures["nmi"].exact


def test_intervals_cover(monkeypatch):
    """95 % intervals of sampled metrics hold the value over all cells about as often."""
    latent, batches, labels = cells(1200, seed=3)
    labels[::240] = "rare"
    exact = score_latent(latent, batches, labels, resolution=1.0).values
    names = ("silhouette", "asw_batch", "ilisi", "clisi", "knn_purity", "kbet", "same_batch")
    hits = dict.fromkeys((*names, "batch_entropy_mixing", "ebm"), 0)
    codes, batch = (np.unique(values, return_inverse=True)[1] for values in (labels, batches))
    around = batch[nearest(latent, n_neighbors=mixing.BEM_NEIGHBORS).indices_nm]
    exact["batch_entropy_mixing"] = mixing.mixing_entropies(around, np.bincount(batch) / 1200).mean()
    exact["batch_entropy_mixing"] /= np.log2(3)
    exact["ebm"] = mixing.batch_entropies(around[:, : mixing.EBM_NEIGHBORS], 3).mean()
    monkeypatch.setattr(score, "_cluster_measures", lambda *rest: {})
    for seed in range(25):
        found = score_latent(latent, batches, codes, max_cells=240, seed=seed)
        for name in hits:
            low, high = found.measures[name].ci95
            hits[name] += low <= exact[name] <= high
    assert all(count >= 21 for count in hits.values()), hits  # fewer: one chance in a hundred each at 95 %


def test_an_interval_shrinks_with_the_root_of_the_sample():
    latent, batches, labels = cells(4000)
    widths = []
    for max_cells in (200, 3200):
        found = score_latent(latent, batches, labels, resolution=1.0, max_cells=max_cells)
        widths.append({name: np.ptp(found.measures[name].ci95) for name in ("ilisi", "kbet", "knn_purity")})
    for name, wide in widths[0].items():
        assert 2.5 < wide / widths[1][name] < 6, name  # 4


def test_memory_mapped_latents_give_the_same(tmp_path, monkeypatch):
    latent, batches, labels = cells(1500)
    latent[::7] = np.nan
    some = labels.astype(object)
    some[::5] = None
    np.save(tmp_path / "latent.npy", latent)
    mapped = np.load(tmp_path / "latent.npy", mmap_mode="r")
    expected = score_latent(latent, batches, some, resolution=1.0, max_cells=300)
    monkeypatch.setattr(space, "IN_MEMORY", 100)
    found = score_latent(mapped, batches, some, resolution=1.0, max_cells=300)
    assert found.to_json() == expected.to_json()


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


def test_missing_batches_are_a_batch(monkeypatch):
    monkeypatch.setattr(score, "_cluster_measures", lambda *rest: {})
    latent, batches, labels = cells(200)
    some = batches.astype(object)
    some[batches == "2"] = None
    named = np.where(batches == "2", "missing", batches)
    for max_cells in (200, 60):
        found, expected = (
            score_latent(latent, given, labels, max_cells=max_cells) for given in (some, named)
        )
        assert found.values == expected.values


def test_errors():
    with pytest.raises(EmptyError, match="no cell has a latent"):
        score_latent(np.full((4, 2), np.nan))
    with pytest.raises(BadValuesError, match="3 labels for 4"):
        score_latent(np.zeros((4, 2)), labels=["a", "b", "c"])
