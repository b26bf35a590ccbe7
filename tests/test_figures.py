"""The figures of a reference and its queries: one UMAP, into which queries are placed."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from streamx.config import PlotConfig
from streamx.figures import coordinates, draw, gather
from streamx.mapping import read_queries, read_reference
from streamx.store.latents import write_latents


def write(place, n, seed, key):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(3, size=n)
    latent = (rng.normal(size=(n, 4)) + 20 * np.eye(3, 4)[kinds]).astype(np.float32)
    latent[2] = np.nan
    obs = pd.DataFrame({"study": [f"s{i % 2}" for i in range(n)], "kind": np.array(list("abc"))[kinds]})
    obs.index = [f"{key}{i}" for i in range(n)]
    write_latents(place, obs, {"X_scalex": latent}, {"streamx": {"model": "abc", "batch_key": "study"}})


@pytest.fixture
def folders(tmp_path):
    model, mapped = tmp_path / "model", tmp_path / "mapped"
    model.mkdir()
    mapped.mkdir()
    write(model / "reference.zarr", 200, 0, "r")
    (model / "model.json").write_text(json.dumps({"batch_key": "study"}))
    pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0]}).to_csv(model / "history.csv", index=False)
    write(mapped / "q1.zarr", 40, 1, "q")
    return model, mapped


def stored(folder):
    with np.load(folder / "umap_reference.npz") as file:
        return file["xy"], file["sketch"]


def test_queries_that_come_later_leave_the_reference_as_it_is(folders, tmp_path):
    model, mapped = folders
    figures = tmp_path / "figures"
    draw(model, None, figures, label_key="kind", max_cells=60)
    first = (figures / "umap_reference.npz").read_bytes()
    xy, sketch = stored(figures)
    assert xy.shape == (199, 2)
    assert len(sketch) == 60
    paths = draw(model, mapped, figures, label_key="kind", max_cells=60)
    assert (figures / "umap_reference.npz").read_bytes() == first
    assert str(figures / "umap_kind.png") in paths
    draw(model, mapped, tmp_path / "others", label_key="kind", max_cells=60)
    np.testing.assert_array_equal(stored(tmp_path / "others")[0], xy)  # fitted beside queries: the same


def test_many_queries_are_drawn_as_one(folders, tmp_path, monkeypatch):
    model, mapped = folders
    monkeypatch.setattr("streamx.figures.MOST_QUERIES", 2)
    write(mapped / "reference.zarr", 10, 5, "x")  # a query may be called so
    config = PlotConfig(label_key="kind")
    reference = read_reference(model)
    cells = gather(reference, read_queries(mapped, reference), config, ["batch", "kind"])
    assert cells.obs["origin"].value_counts().to_dict() == {
        "reference": 199,
        "q1": 39,
        "reference (query)": 9,
    }
    write(mapped / "q2.zarr", 30, 2, "p")
    cells = gather(reference, read_queries(mapped, reference), config, ["batch", "kind"])
    assert cells.obs["origin"].value_counts().to_dict() == {"reference": 199, "3 queries": 77}
    assert set(cells.obs["batch"]) == {"s0", "s1", "3 queries"}
    assert set(cells.obs["kind"]) == set("abc")
    paths = draw(model, mapped, tmp_path / "figures", label_key="kind", max_cells=60)
    assert str(tmp_path / "figures" / "meta2_3 queries.png") in paths


def placed(model, mapped, folder, **settings):
    folder.mkdir(exist_ok=True)
    config = PlotConfig(**settings)
    reference = read_reference(model)
    cells = gather(reference, read_queries(mapped, reference), config, ["batch"])
    return coordinates(cells, reference, config, folder)


def test_a_query_has_its_place_whoever_comes_with_it(folders, tmp_path):
    model, mapped = folders
    alone = placed(model, mapped, tmp_path / "figures")
    assert alone.shape == (199 + 39, 2)
    write(mapped / "q2.zarr", 30, 2, "p")
    both = placed(model, mapped, tmp_path / "figures")
    np.testing.assert_array_equal(both[: len(alone)], alone)
    assert np.isfinite(both).all()


def test_coordinates_are_made_again_for_other_settings_or_where_they_are_damaged(folders, tmp_path):
    model, mapped = folders
    figures = tmp_path / "figures"
    first = placed(model, mapped, figures)
    other = placed(model, mapped, figures, seed=1)
    assert (first[:199] != other[:199]).any()
    again = placed(model, mapped, figures)
    np.testing.assert_array_equal(again, first)
    file = figures / "umap_reference.npz"
    file.write_bytes(file.read_bytes()[:500])
    np.testing.assert_array_equal(placed(model, mapped, figures), first)
    joint = placed(model, mapped, tmp_path / "joint", umap="joint")
    assert joint.shape == first.shape
    assert not list((tmp_path / "joint").iterdir())
