"""Many cells as an image of their density."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from streamx import pl
from streamx.plots import style
from streamx.plots.density import PIXELS, Canvas

RED, BLUE, WHITE = [1, 0, 0], [0, 0, 1], [1, 1, 1]


@pytest.fixture
def canvas():
    """Cells 0 to 99 at one place, 100 at a second and 101 at a third; 102 has no place."""
    xy = np.zeros((103, 2))
    xy[100], xy[101], xy[102] = [1, 1], [1, 0], np.nan
    return Canvas(xy, np.arange(102))


def colour(canvas, cell):
    row, column = divmod(canvas.pixel_n[cell], PIXELS)
    return canvas.picture()[row, column]


def test_pixels_mix_the_colours_of_their_cells(canvas):
    codes = np.r_[np.zeros(75, int), np.ones(25, int), [0], [1]]
    canvas.lay_categories(np.arange(102), codes, ["#FF0000", "#0000FF"])
    np.testing.assert_allclose(colour(canvas, 0), [0.75, 0, 0.25], atol=0.02)  # the densest is opaque
    assert colour(canvas, 100)[0] == 1
    assert 0.3 < colour(canvas, 100)[1] < 0.7  # one cell is pale red
    assert colour(canvas, 101)[2] == 1
    assert (canvas.picture().reshape(-1, 3) == 1).all(axis=1).sum() == PIXELS**2 - 3


def test_rows_of_the_picture_go_up_and_columns_to_the_right(canvas):
    row, column = divmod(canvas.pixel_n[101], PIXELS)
    assert row < PIXELS / 2 < column
    low_x, high_x, low_y, high_y = canvas.extent
    assert low_x < 0 < 1 < high_x
    assert low_y < 0 < 1 < high_y


def test_numbers_have_the_colour_of_their_mean(canvas):
    from matplotlib import colormaps

    values = np.r_[np.tile([0.0, 1.0], 50), 0.0, 1.0]
    canvas.lay_values(np.arange(102), values, "viridis", (0, 1))
    np.testing.assert_allclose(colour(canvas, 0), colormaps["viridis"](0.5)[:3], atol=0.02)


def test_cells_at_one_point_and_no_cells():
    canvas = Canvas(np.zeros((5, 2)), np.arange(5))
    canvas.lay_categories(np.arange(5), np.zeros(5, int), ["#FF0000"])
    canvas.lay_plain(np.empty(0, int), style.BACKGROUND)
    canvas.lay_values(np.empty(0, int), np.empty(0), "viridis", (0, 1))
    np.testing.assert_allclose(colour(canvas, 0), RED)


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(style, "DENSE_ABOVE", 100)
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"kind": rng.choice(["T", "B", "unknown", ""], 300), "batch": ["x", "y", "y"] * 100})
    obs["number"] = np.where(np.arange(300) % 9, rng.random(300), np.nan)
    xy = rng.normal(size=(300, 2))
    xy[3] = np.nan
    return SimpleNamespace(obs=obs, obsm={"X_umap": xy})


def test_embedding_of_many_cells_is_an_image_per_panel(many, tmp_path):
    figure = pl.embedding(many, color="kind", save=tmp_path / "a.svg")
    assert [axes.get_title() for axes in figure.axes] == ["x", "y"]
    for axes in figure.axes:
        assert len(axes.images) == 1
        assert not axes.collections
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["B", "T", "unknown"]
    written = (tmp_path / "a.svg").read_text()
    assert "<image" in written
    assert "unknown" in written
    pl.embedding(many, color="kind", save=tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == written
    assert figure.axes[0].images[0].get_extent() == figure.axes[1].images[0].get_extent()


def test_density_of_numbers_has_a_colour_bar_and_labels_their_names(many):
    assert pl.embedding(many, color="number", groupby=None).axes[-1].get_ylabel() == "number"
    names = pl.embedding(many, color="kind", groupby=None, legend_loc="on data").axes[0].texts
    assert [text.get_text() for text in names] == ["B", "T"]
