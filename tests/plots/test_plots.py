"""Pictures: they exist in each format, show what they should, and close what they open."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from sklearn import metrics as sk

from streamx import pl
from streamx.errors import BadFileError, BatchError, UsageError
from streamx.plots import style
from streamx.plots.layout import _place

MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    n = 300
    kinds, batches = rng.choice(["T", "B", "unknown"], n), rng.choice(["one", "two"], n)
    obs = pd.DataFrame({"celltype": pd.Categorical(kinds), "batch": batches, "uncertainty": rng.random(n)})
    obs["condition"] = np.where(np.arange(n) % 2, "stim", "ctrl")
    xy = rng.normal(size=(n, 2)).astype(np.float32)
    xy[5] = np.nan
    latent = rng.normal(size=(n, 6)) + (kinds == "T")[:, None] * np.arange(6)
    return SimpleNamespace(obs=obs, obsm={"X_umap": xy, "latent": latent}, layers={}, X=latent)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_embedding_in_each_format_and_the_same_bytes(cells, tmp_path, suffix):
    first, second = tmp_path / f"a/x.{suffix}", tmp_path / f"b/x.{suffix}"
    for path in (first, second):
        pl.embedding(cells, save=path)
    assert first.read_bytes().startswith(MAGIC[suffix])
    assert first.read_bytes() == second.read_bytes()


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_visible() and axes.get_title()]


def test_embedding_has_a_panel_per_group(cells):
    assert titles(pl.embedding(cells)) == ["one", "two"]
    assert titles(pl.embedding(cells, groups=["two"], cond2="condition", v2="stim")) == ["stim_two"]
    assert titles(pl.embedding(cells, groupby=None)) == []
    panel = pl.embedding(cells, groups=["two"]).axes[0]
    inside = ((cells.obs["batch"] == "two") & np.isfinite(cells.obsm["X_umap"][:, 0])).sum()
    background, own = panel.collections
    assert len(own.get_offsets()) == inside
    assert len(background.get_offsets()) == len(cells.obs) - 1 - inside


def test_embedding_without_any_label_is_grey(cells):
    cells.obs["celltype"] = [None] * len(cells.obs)
    (dots,) = pl.embedding(cells, groupby=None).axes[0].collections
    assert len(dots.get_offsets()) == len(cells.obs) - 1
    assert to_hex(dots.get_facecolors()[0]) == to_hex(style.NO_COLOR)


def test_embedding_legend_and_colours(cells):
    legend = pl.embedding(cells).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["B", "T", "unknown"]
    figure = pl.embedding(cells, groupby=None, color_map={"B": "#FF0000"})
    colors = {tuple(color) for color in figure.axes[0].collections[0].get_facecolors()}
    assert (1.0, 0.0, 0.0, 1.0) in colors
    assert len(colors) == 2  # names without a colour are grey
    assert not pl.embedding(cells, legend_loc=None).legends
    on_data = pl.embedding(cells, groupby=None, legend_loc="on data").axes[0].texts
    assert [text.get_text() for text in on_data] == ["B", "T"]
    bar = pl.embedding(cells, color="uncertainty", groupby=None).axes[-1]
    assert bar.get_ylabel() == "uncertainty"


def test_legend_is_not_cut_off(cells, tmp_path):
    from matplotlib.image import imread

    cells.obs["celltype"] = [f"a rather long name of a cell type {i % 40}" for i in range(300)]
    pl.embedding(cells, save=tmp_path / "x.png")
    picture = imread(tmp_path / "x.png")[:, :, :3]
    rim = np.concatenate(
        [picture[:8].ravel(), picture[-8:].ravel(), picture[:, :8].ravel(), picture[:, -8:].ravel()]
    )
    assert (rim == 1).all()


def test_sx20_embedding_as_scalex_names_files(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells.obs["batch"] = cells.obs["batch"].replace({"one": "../one"})
    pl.embedding(cells, save=".png")
    pl.embedding(cells, save="_v2.pdf", groups=["two"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "X_umap__one.png",
        "X_umap_two.png",
        "X_umap_two_v2.pdf",
    ]


def test_embedding_errors_name_the_choices(cells, tmp_path):
    with pytest.raises(UsageError, match="celltype, batch"):
        pl.embedding(cells, color="type")
    with pytest.raises(UsageError, match="one, two"):
        pl.embedding(cells, groups=["three"])
    with pytest.raises(UsageError, match="X_umap, latent"):
        pl.embedding(cells, basis="X_tsne")
    with pytest.raises(UsageError, match=r"\.png, \.pdf or \.svg"):
        pl.embedding(cells, save=tmp_path / "x.bmp")


def test_large_scatter_is_an_image_inside_a_vector_file(cells, tmp_path, monkeypatch):
    pl.embedding(cells, save=tmp_path / "small.svg")
    monkeypatch.setattr(style, "RASTERIZE_ABOVE", 100)
    pl.embedding(cells, save=tmp_path / "large.svg")
    assert "<image" not in (tmp_path / "small.svg").read_text()
    assert "<image" in (tmp_path / "large.svg").read_text()
    assert "unknown" in (tmp_path / "large.svg").read_text()  # text stays text


def test_sx22_confusion_values(tmp_path):
    rng = np.random.default_rng(1)
    truth = rng.choice(list("abc"), 200)
    guess = np.where(rng.random(200) < 0.6, truth, rng.choice(["a", "b", "Unknown"], 200))
    f1, nmi, ari = pl.confusion(truth, guess, save=tmp_path / "c.png")
    assert f1 == pytest.approx(np.mean(truth == guess))
    assert nmi == pytest.approx(sk.normalized_mutual_info_score(truth, guess))
    assert ari == pytest.approx(sk.adjusted_rand_score(truth, guess))
    assert (tmp_path / "c.png").is_file()


def test_confusion_columns_sum_to_one(monkeypatch):
    seen = {}

    def spy(values, rows, columns, **rest):
        seen.update(values=values, rows=list(rows), columns=list(columns))
        return style.new_figure(1, 1)

    monkeypatch.setattr("streamx.plots.agreement.heat_map", spy)
    pl.confusion(["a", "a", "b", "b", ""], ["a", "b", "b", "Unknown", "a"])
    assert (seen["rows"], seen["columns"]) == (["a", "b"], ["a", "b", "Unknown"])
    np.testing.assert_allclose(seen["values"], [[1, 0.5, 0], [0, 0.5, 1]])


def test_clusters_are_matched_to_labels():
    truth = ["a"] * 5 + ["b"] * 4 + ["c"] * 3
    clusters = ["2"] * 5 + ["0"] * 4 + ["1"] * 2 + ["3"]
    assert pl.match_clusters(truth, clusters) == {"0": "b", "1": "c", "2": "a", "3": "3"}
    f1, _, _ = pl.confusion(truth, clusters)
    assert f1 == pytest.approx(11 / 12)


def test_sx21_meta_is_the_correlation_of_means(cells, tmp_path, monkeypatch):
    from streamx.plots import profiles

    figure = pl.meta(cells, use_rep="latent", save=tmp_path / "m.png")
    shown = figure.axes[0].images[0].get_array()
    pairs = sorted(set(zip(cells.obs["batch"], cells.obs["celltype"].astype(str), strict=True)))
    means = [
        cells.obsm["latent"][(cells.obs["batch"] == b) & (cells.obs["celltype"] == c)].mean(axis=0)
        for b, c in pairs
    ]
    expected = np.corrcoef(means)
    lower = np.tril_indices(len(pairs))
    np.testing.assert_allclose(np.asarray(shown)[lower], expected[lower], atol=1e-12)
    assert np.ma.getmaskarray(shown)[np.triu_indices(len(pairs), 1)].all()
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert ticks == [c for _, c in pairs]
    two = pl.meta2(cells, batches=["two", "one"], save=tmp_path / "m2.pdf")
    block = np.asarray(two.axes[0].images[0].get_array())
    first = [at for at, pair in enumerate(pairs) if pair[0] == "two"]
    second = [at for at, pair in enumerate(pairs) if pair[0] == "one"]
    np.testing.assert_allclose(block, expected[np.ix_(second, first)], atol=1e-12)
    assert (two.axes[0].get_xlabel(), two.axes[0].get_ylabel()) == ("two", "one")
    from scipy.sparse import csr_matrix

    cells.X = csr_matrix(cells.X)
    monkeypatch.setattr(profiles._means, "__defaults__", (7,))
    np.testing.assert_allclose(
        np.asarray(pl.meta(cells).axes[0].images[0].get_array())[lower], expected[lower], atol=1e-12
    )


def test_meta2_keeps_all_categories(cells):
    cells.obs.loc[cells.obs["batch"] == "one", "celltype"] = "T"
    assert pl.meta2(cells).axes[0].images[0].get_array().shape == (3, 1)
    whole = np.asarray(pl.meta2(cells, keep=True).axes[0].images[0].get_array())
    assert whole.shape == (3, 3)
    assert (whole[:, [0, 2]] == 0).all()
    with pytest.raises(BatchError, match="two of one, two"):
        pl.meta2(cells, batches=["one"])


def test_history(tmp_path):
    table = pd.DataFrame(
        {"epoch": [1, 2, 3], "loss": [3.0, 1.0, 2.0], "kl": [0.1, 0.2, 0.3], "seconds": [1, 1, 1]}
    )
    table.to_csv(tmp_path / "history.csv", index=False)
    for given in (tmp_path, tmp_path / "history.csv", table, table.to_dict("list")):
        figure = pl.history(given, save=tmp_path / "h.png")
        assert titles(figure) == ["loss", "kl"]
        marked = [axes.lines[1].get_xdata() for axes in figure.axes]
        assert [list(np.atleast_1d(x)) for x in marked] == [[2], [2]]
    with pytest.raises(BadFileError, match="no history there"):
        pl.history(tmp_path / "nothing")
    with pytest.raises(UsageError, match="it has epoch"):
        pl.history(table, columns=["elbo"])


def test_palette_is_distinct_and_unlabelled_is_grey():
    names = [f"c{i}" for i in range(45)]
    found = style.palette([*names, "unknown"])
    assert len(set(found.values())) == 46
    assert found["unknown"] == style.NO_COLOR


def test_cells_are_placed_with_their_own_cluster():
    near = np.zeros((1, 10, 2))
    near[0, 6:] = 100.0  # four of ten neighbours lie in another cluster
    placed = _place(near, np.ones((1, 10)))
    np.testing.assert_array_equal(placed, [[0, 0]])


def test_umap_of_few_cells():
    found = pl.umap(np.array([[0.0, 1.0], [np.nan, 0.0], [1.0, 1.0]]))
    assert np.isfinite(found[[0, 2]]).all()
    assert np.isnan(found[1]).all()


@pytest.mark.slow
def test_umap_keeps_clusters_together_and_places_the_rest():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=900)
    latent = rng.normal(size=(900, 8)) + 12 * np.eye(4, 8)[labels]
    latent[7] = np.nan
    found = pl.umap(latent, sketch=400, seed=3)
    np.testing.assert_array_equal(found, pl.umap(latent, sketch=400, seed=3, threads=1))
    keep = np.arange(900) != 7
    assert np.isnan(found[7]).all()
    from sklearn.neighbors import KNeighborsClassifier

    scored = KNeighborsClassifier(5).fit(found[keep], labels[keep]).score(found[keep], labels[keep])
    assert scored > 0.99


def test_pictures_are_lazy_and_need_no_screen(tmp_path):
    code = (
        "import sys; from streamx import pl\n"
        "assert not {'matplotlib', 'numba', 'umap', 'pandas', 'anndata'} & set(sys.modules)\n"
        f"pl.history({{'epoch': [1, 2], 'loss': [2.0, 1.0]}}, save=r'{tmp_path / 'h.png'}')\n"
        f"pl.history({{'epoch': [1, 2], 'loss': [2.0, 1.0]}})\n"
        "assert 'tkinter' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "h.png").is_file()
