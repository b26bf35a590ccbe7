"""Tables of two labellings, and the flows and confusions drawn from them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

import streamx as sx
from streamx import pl
from streamx.errors import UsageError
from streamx.plots.sankey import lay_out

GIVEN = ["T"] * 5 + ["B"] * 3 + ["NK"] * 2 + ["", None]
FOUND = ["T"] * 4 + ["B"] * 4 + ["Unknown", "T", "T", "B"]


def test_sx29_crosstab_counts_pairs_and_keeps_what_both_have():
    table = pl.crosstab(GIVEN, FOUND)
    expected = pd.crosstab(np.array(GIVEN[:10]), np.array(FOUND[:10]))
    np.testing.assert_array_equal(table.to_numpy(), expected.to_numpy())
    assert (list(table.index), list(table.columns)) == (["B", "NK", "T"], ["B", "T", "Unknown"])
    conserved = pl.crosstab(GIVEN, FOUND, conserved=True)
    assert (list(conserved.index), list(conserved.columns)) == (["B", "T"], ["B", "T"])
    np.testing.assert_array_equal(conserved.to_numpy(), [[3, 0], [1, 4]])
    pieces = pl.crosstab(GIVEN[:6], FOUND[:6]).add(pl.crosstab(GIVEN[6:], FOUND[6:]), fill_value=0)
    np.testing.assert_array_equal(pieces.fillna(0).to_numpy(), table.to_numpy())
    assert pl.crosstab(["a"], [None]).shape == (0, 0)
    with pytest.raises(UsageError, match="2 labels, 1 predictions"):
        pl.crosstab(["a", "b"], ["a"])


def test_sa20_names_are_keyed_by_side_and_bars_ascend():
    flow = lay_out(pl.crosstab(GIVEN, FOUND), gap=0.1)
    assert [(bar.name, bar.count) for bar in flow.left] == [("NK", 2), ("B", 3), ("T", 5)]
    assert [(bar.name, bar.count) for bar in flow.right] == [("Unknown", 1), ("B", 4), ("T", 5)]
    edges = [(round(bar.low, 9), round(bar.high, 9)) for bar in flow.left]
    assert edges == [(0, 0.2), (0.3, 0.6), (0.7, 1.2)]
    assert flow.height == pytest.approx(1.2)
    for side, bars, starts in (("left", flow.left, "from_low"), ("right", flow.right, "to_low")):
        for at, bar in enumerate(bars):  # bands fill their bar, one after the other
            own = [band for band in flow.bands if getattr(band, side) == at]
            assert sum(band.count for band in own) == bar.count
            ends = sorted((getattr(band, starts), getattr(band, starts) + band.width) for band in own)
            assert ends[0][0] == pytest.approx(bar.low)
            assert ends[-1][1] == pytest.approx(bar.high)
            assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(ends))


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_sankey_from_rows_is_sankey_from_counts(tmp_path):
    rows = np.column_stack([np.array(GIVEN, dtype=object), np.array(FOUND, dtype=object)])
    for name, given in (("rows.svg", {"data": rows}), ("counts.svg", {"counts": pl.crosstab(GIVEN, FOUND)})):
        pl.sankey(save_path=tmp_path / name, **given)
    assert (tmp_path / "rows.svg").read_bytes() == (tmp_path / "counts.svg").read_bytes()
    figure = pl.sankey_diagram(pd.DataFrame(rows), labels=("given", "found"))
    assert texts(figure) == ["NK  2", "B  3", "T  5", "1  Unknown", "4  B", "5  T", "given", "found"]
    assert texts(pl.sankey(rows, width_in=False))[::3] == ["2  NK", "Unknown  1"]
    assert texts(pl.sankey(rows, disp_width=False))[0] == "NK"


def test_bands_follow_their_curve_and_colour():
    counts = pd.DataFrame([[0, 1], [1, 2]], index=["a", "b"], columns=["x", "y"])
    figure = pl.sankey(counts=counts, res=5, v_gap_frac=0)
    rising, *_ = figure.axes[0].collections  # from a (0 to 1/4) to y (1/4 to 1)
    drawn = {tuple(point) for point in np.round(rising.get_paths()[0].vertices, 9)}
    for edge in (0, 0.25):
        heights = edge + 0.25 * np.array([0, 0.15, 0.5, 0.85, 1])
        assert set(zip(np.linspace(0, 1, 5), np.round(heights, 9), strict=True)) <= drawn

    def colors(**settings):
        bands = pl.sankey(counts=counts, alpha=1, **settings).axes[0].collections[:3]
        return [tuple(band.get_facecolor()[0]) for band in bands]

    by_right, by_left = colors(), colors(color_side=0)
    assert by_right[0] == by_right[2] != by_right[1]
    assert by_left[1] == by_left[2] != by_left[0]
    assert colors(cmap="jet") != by_right


def test_sankey_errors():
    with pytest.raises(UsageError, match=r"shape \(3, 1\)"):
        pl.sankey(np.zeros((3, 1)))
    with pytest.raises(UsageError, match="no flow"):
        pl.sankey(np.array([["", "a"], ["b", ""]]))
    with pytest.raises(UsageError, match="right"):
        pl.sankey(np.array([["a", "b"]]), color_side=2)


def test_names_are_no_formulas(tmp_path):
    pl.sankey(np.array([[r"$\frac$", "a_{b}$x$"]]), save_path=tmp_path / "s.png", labels=("$\\", "$^$"))
    assert (tmp_path / "s.png").is_file()


def test_confusion_from_counts_scores_as_from_cells():
    rng = np.random.default_rng(3)
    truth = rng.choice(list("abcd"), 400)
    for guess in (
        np.where(rng.random(400) < 0.7, truth, "a"),
        np.char.add("cluster ", rng.choice(list("wxyz"), 400)),
        np.full(400, "a"),
    ):
        found = pl.plot_confusion(counts=pl.crosstab(truth, guess))
        assert found == pl.plot_confusion(truth, guess)
        assert found[1] == pytest.approx(sk.normalized_mutual_info_score(truth, guess), abs=1e-12)
        assert found[2] == pytest.approx(sk.adjusted_rand_score(truth, guess), abs=1e-12)
    assert pl.plot_confusion(["a"], ["a"]) == (1, 1, 1)
    with pytest.raises(UsageError, match="no cell has both"):
        pl.plot_confusion([""], ["a"])


def test_documented_names():
    assert (pl.plot_meta, pl.plot_meta2, pl.plot_confusion) == (pl.meta, pl.meta2, pl.confusion)
    assert pl.sankey_diagram is pl.sankey
    assert sx.pl is pl
