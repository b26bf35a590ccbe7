"""The choice between the searches, and recall: measured, raised, reported."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from streamx.errors import StreamxWarning, UsageError
from streamx.neighbors import build_index, choose_method, nearest, reach_recall
from streamx.neighbors.nndescent import EPSILONS, NNDescentIndex


def test_auto_is_exact_while_small():
    assert choose_method(10_000, 10_000) == "exact"
    assert choose_method(1_000_000, 1_000) == "exact"
    assert choose_method(1_000_000, 50_000) == "ivf"
    assert choose_method(1_000_000, 1_000_000) == "ivf"
    assert choose_method(10, 10, "nndescent") == "nndescent"
    with pytest.raises(UsageError, match="one of"):
        choose_method(10, 10, "faiss")


class Forgetful(NNDescentIndex):
    """Finds every neighbour only at a wide search; before, it replaces each second one by a far cell."""

    needs = 0.3

    def search(self, query_mk, n_neighbors, own_m=None):
        from streamx.neighbors.exact import ExactIndex

        indices, distances = ExactIndex(self.reference_nk).search(query_mk, n_neighbors, own_m)
        if self.effort < self.needs:
            indices[:, ::2], distances[:, ::2] = 0, 1e9
        return indices, distances


def test_recall_is_raised_to_its_target():
    rng = np.random.default_rng(0)
    index = Forgetful(rng.normal(size=(300, 4)).astype(np.float32))
    recall, rows = reach_recall(index, rng.normal(size=(2000, 4)), 6)
    assert (recall, rows, index.effort) == (1.0, 1000, 0.3)


def test_recall_below_its_target_warns():
    rng = np.random.default_rng(0)
    index = Forgetful(rng.normal(size=(300, 4)).astype(np.float32))
    index.needs = 9.0
    with pytest.warns(StreamxWarning, match=r"recall of 0\.500"):
        recall, _ = reach_recall(index, rng.normal(size=(50, 4)), 6)
    assert recall == 0.5
    assert index.effort == EPSILONS[-1]


def test_exact_recall_is_one_by_construction():
    points = np.random.default_rng(0).normal(size=(200, 3))
    found = nearest(points)
    assert (found.method, found.recall, found.recall_rows) == ("exact", 1.0, 0)
    assert found.first(4).indices_nm.shape == (200, 4)
    assert found.take(np.array([3, 5])).distances_nm.shape == (2, 15)


def test_tiny_references_are_searched_exactly():
    assert build_index(np.zeros((5, 2)), 10, method="nndescent").method == "exact"


@pytest.mark.slow
def test_nndescent_finds_the_neighbours():
    rng = np.random.default_rng(5)
    reference, query = (rng.normal(size=(size, 10)).astype(np.float32) for size in (4000, 500))
    query[3] = np.nan
    found = nearest(reference, query, 15, method="nndescent")
    truth = nearest(reference, query, 15, method="exact")
    assert found.method == "nndescent"
    assert found.recall >= 0.95
    assert found.recall_rows == 499
    same = np.mean(
        [len(set(a) & set(b)) / 15 for a, b in zip(found.indices_nm, truth.indices_nm, strict=True)]
    )
    assert same >= 0.95
    assert (found.indices_nm[3] == -1).all()
    graph = nearest(reference, n_neighbors=15, method="nndescent")
    assert (graph.indices_nm != np.arange(len(reference))[:, None]).all()


def test_exact_search_needs_no_compiler():
    code = (
        "import sys, numpy as np, streamx.transfer, streamx.metrics\n"
        "from streamx.neighbors import nearest\n"
        "nearest(np.random.default_rng(0).normal(size=(300, 4)))\n"
        "print([m for m in ('numba', 'pynndescent', 'torch', 'zarr', 'umap', 'scanpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
