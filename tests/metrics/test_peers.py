"""scib-metrics and scalex beside us, on the same cells."""

from __future__ import annotations

import numpy as np
import pytest

from streamx.metrics import batch_entropy_mixing_score, clusters, lisi, score_latent
from streamx.neighbors import nearest

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def space(golden):
    stored = np.load(golden / "metric_fixture.npz")
    return stored["Z"], stored["b"], np.digitize(stored["Z"][:, 0], [-0.5, 0.5]).astype(str)


def test_scib_metrics(space):
    scib = pytest.importorskip("scib_metrics")
    from scib_metrics.nearest_neighbors import NeighborsResults

    latent, batches, labels = space
    ours = score_latent(latent, batches, labels)
    found = nearest(latent, n_neighbors=lisi.LISI_NEIGHBORS - 1)
    indices, distances = clusters.with_self(found.indices_nm, found.distances_nm)
    graph = NeighborsResults(indices=indices, distances=distances)
    assert ours["ilisi"] == pytest.approx(scib.ilisi_knn(graph, batches), abs=1e-4)
    assert ours["clisi"] == pytest.approx(scib.clisi_knn(graph, labels), abs=1e-4)
    expected = scib.kbet(graph.subset_neighbors(50), np.unique(batches, return_inverse=True)[1])
    kbet = ours.measures["kbet"]
    assert kbet.value == pytest.approx(expected[0], abs=1e-12)
    assert kbet.extra["mean_statistic"] == pytest.approx(np.mean(expected[1]), rel=1e-5)
    assert kbet.extra["mean_p_value"] == pytest.approx(np.mean(expected[2]), abs=1e-5)
    few = graph.subset_neighbors(15)
    assert ours["graph_connectivity"] == pytest.approx(scib.graph_connectivity(few, labels), abs=1e-12)
    assert ours["asw_label"] == pytest.approx(scib.silhouette_label(latent, labels), abs=1e-5)
    assert ours["asw_batch"] == pytest.approx(scib.silhouette_batch(latent, labels, batches), abs=1e-5)
    leiden = scib.nmi_ari_cluster_labels_leiden(few, labels)
    assert ours["nmi"] == pytest.approx(leiden["nmi"], abs=0.05)  # another seed, half as many resolutions


def test_scalex(space):
    pytest.importorskip("scalex")
    import importlib.util

    spec = importlib.util.find_spec("scalex")
    path = f"{spec.submodule_search_locations[0]}/metrics.py"  # the package itself fails on new numpy
    loaded = importlib.util.spec_from_file_location("scalex_metrics", path)
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    latent, batches, _ = space
    for seed in (0, 5):
        np.random.seed(seed)  # noqa: NPY002
        expected = module.batch_entropy_mixing_score(latent, batches)
        assert batch_entropy_mixing_score(latent, batches, seed=seed) == pytest.approx(expected, abs=1e-12)


def test_harmonypy(space):
    harmonypy = pytest.importorskip("harmonypy")
    import pandas as pd

    latent, batches, _ = space
    found = nearest(latent, n_neighbors=90)  # version 2 counts 90 others; before, R and scib count 89
    codes = np.unique(batches, return_inverse=True)[1]
    expected = harmonypy.compute_lisi(latent, pd.DataFrame({"b": batches}), ["b"])[:, 0]
    ours = lisi.lisi(found.distances_nm, codes[found.indices_nm], 3, perplexity=30)
    np.testing.assert_allclose(ours, expected, atol=1e-9)
