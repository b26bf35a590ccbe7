"""The graph of all cells: a search and rounds of looking around, against exact search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamx.errors import StreamxWarning
from streamx.neighbors import build_index, graph, nearest
from streamx.neighbors.graph import knn_graph


def cells(n: int = 4000, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def true_share(indices_nj: np.ndarray, points_nk: np.ndarray) -> float:
    exact = nearest(points_nk, n_neighbors=indices_nj.shape[1], method="exact").indices_nm
    return (
        float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(indices_nj, exact, strict=True)]))
        / (indices_nj.shape[1])
    )


def test_rounds_reach_what_the_search_did_not():
    points_nk = cells()
    index = build_index(points_nk, 0, method="ivf")
    indices_nj, recall = knn_graph(index, points_nk, 10, target_recall=0.99)
    searched = index.search(points_nk, 10, np.arange(len(points_nk)))[0]
    assert true_share(searched, points_nk) < 0.985
    assert recall >= 0.99
    assert true_share(indices_nj, points_nk) == pytest.approx(recall, abs=0.005)


def test_an_exact_index_gives_its_answers():
    points_nk = cells(500)
    indices_nj, recall = knn_graph(
        build_index(points_nk, 0, method="exact"), points_nk, 7, target_recall=0.99
    )
    np.testing.assert_array_equal(indices_nj, nearest(points_nk, n_neighbors=7, method="exact").indices_nm)
    assert recall == 1.0


def test_threads_tasks_and_files_change_nothing(monkeypatch):
    monkeypatch.setattr(graph, "START_RECALL", 0.5)
    points_nk = cells()
    found = []
    for threads, task, in_memory in ((1, 4096, 1 << 28), (3, 100, 0)):
        monkeypatch.setattr(graph, "TASK", task)
        monkeypatch.setattr(graph, "IN_MEMORY", in_memory)
        index = build_index(points_nk, 0, method="ivf", threads=threads)
        found.append(knn_graph(index, points_nk, 10, target_recall=0.99))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 80), st.integers(1, 5), st.integers(1, 12), st.booleans())
def test_a_round_keeps_what_is_exact(seed, n, d, k, grid):
    """What is right stays right; each list has k cells, none twice, and not its own."""
    rng = np.random.default_rng(seed)
    points_nk = rng.integers(0, 3, size=(n, d)).astype(np.float32) if grid else cells(n, d, seed)
    k = min(k, n - 1)
    exact_nj = nearest(points_nk, n_neighbors=k, method="exact").indices_nm.astype(np.int32)
    better_nj, back_nj, back_n = np.empty_like(exact_nj), np.empty_like(exact_nj), np.zeros(n, np.int32)
    graph.turn(exact_nj, back_nj, back_n)
    assert back_n.sum() <= exact_nj.size
    graph.look_around(points_nk, exact_nj, back_nj, back_n, np.arange(n), better_nj)
    np.testing.assert_array_equal(np.sort(distances(points_nk, better_nj)), distances(points_nk, exact_nj))
    assert all(len(set(row)) == k and own not in row for own, row in enumerate(better_nj))


def distances(points_nk: np.ndarray, indices_nj: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points_nk[indices_nj].astype(np.float64) - points_nk[:, None], axis=2)


def test_a_recall_that_is_not_reached_is_warned_of(monkeypatch):
    monkeypatch.setattr(graph, "ROUNDS", 0)
    points_nk = cells()
    index = build_index(points_nk, 0, method="ivf")
    with pytest.warns(StreamxWarning, match=r"graph of neighbours has a recall of 0\.9"):
        indices_nj, recall = knn_graph(index, points_nk, 10, target_recall=0.999)
    assert 0.95 <= recall < 0.999
    assert true_share(indices_nj, points_nk) == pytest.approx(recall, abs=0.005)
