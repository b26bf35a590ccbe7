"""Flows between two labellings of the same cells, such as given and transferred labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.errors import UsageError
from streamx.labels import crosstab
from streamx.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = (0.0, 0.15, 0.5, 0.85, 1.0)  # height of a band's edge at each quarter of its way


@dataclass(frozen=True)
class Bar:
    """One name on one side: `count` cells, from `low` to `high`, in shares of all cells."""

    name: str
    count: int
    low: float
    high: float


@dataclass(frozen=True)
class Band:
    """The cells of one pair of names: where they leave the left bar and where they reach the right one."""

    left: int
    right: int
    count: int
    from_low: float
    to_low: float
    width: float


@dataclass(frozen=True)
class Flow:
    """Where everything goes. A name that both sides have is a bar on each."""

    left: list[Bar]
    right: list[Bar]
    bands: list[Band]

    @property
    def height(self) -> float:
        return max(self.left[-1].high, self.right[-1].high)


def lay_out(counts: pd.DataFrame, gap: float = 0.03, *, ascending: bool = True) -> Flow:
    """Where bars and bands are: from 0 upwards on each side, `gap` of all cells between two bars.

    Parameters
    ----------
    counts
        (left names, right names): cells with both (:func:`~streamx.labels.crosstab`).
    ascending
        Bars by ascending count; else in the order of the table.
    """
    table = counts.to_numpy(dtype=np.int64)
    total = int(table.sum())
    if not total or table.min() < 0:
        raise UsageError("no flow: no cell has a name on both sides")
    sides: list[list[Bar]] = []
    orders: list[list[int]] = []
    for names, sums in ((counts.index, table.sum(axis=1)), (counts.columns, table.sum(axis=0))):
        order = np.flatnonzero(sums).tolist()
        if ascending:
            order.sort(key=lambda at: (sums[at], str(names[at])))
        bars, low = [], 0.0
        for at in order:
            high = low + float(sums[at]) / total
            bars.append(Bar(str(names[at]), int(sums[at]), low, high))
            low = high + gap
        sides.append(bars)
        orders.append(order)
    left, right = sides
    leaves, reaches = [bar.low for bar in left], [bar.low for bar in right]
    bands = []
    for i, row in enumerate(orders[0]):
        for j, column in enumerate(orders[1]):
            count = int(table[row, column])
            if count:
                width = count / total
                bands.append(Band(i, j, count, leaves[i], reaches[j], width))
                leaves[i], reaches[j] = leaves[i] + width, reaches[j] + width
    return Flow(left, right, bands)


def sankey(
    data: Any = None,
    save_path: str | Path | None = None,
    show: bool = False,
    *,
    counts: pd.DataFrame | None = None,
    color_side: int = 1,
    alpha: float = 0.5,
    x_range: tuple[float, float] = (0, 1),
    res: int = 20,
    figsize: tuple[float, float] = (21, 15),
    disp_width: bool = True,
    width_in: bool = True,
    wdisp_sep: str = "  ",
    cmap: Any = None,
    v_gap_frac: float = 0.03,
    h_gap_frac: float = 0.03,
    labels: Sequence[str] | None = None,
    fontname: str | None = None,
    dpi: int = 200,
) -> Figure:
    """Draw how names on the left become names on the right; widths are numbers of cells.

    scArches' ``sankey_diagram`` (its arguments and defaults), from counts and not from rows. Names are keyed
    by side: a name that both sides have is counted on each. Colours follow from the names (`cmap` None),
    where scArches draws them at random; the font is matplotlib's own unless named.

    Parameters
    ----------
    data
        (n_cells, 2) array or frame: the left and the right name of each cell.
    counts
        Instead of `data`: cells per pair of names (:func:`~streamx.labels.crosstab`).
    color_side
        Bands take the colour of their left (0) or right (1) name.
    res
        Points along a band.
    disp_width, width_in, wdisp_sep
        Write counts, between bars and name (`width_in`) or after the name, with this between them.
    v_gap_frac, h_gap_frac
        Gaps between bars, as share of all cells, and between bars and text, as share of the width.
    labels
        What to write above the left and the right side.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError
        If `data` has not two columns, or no cell has a name on both sides.
    """
    import matplotlib

    if color_side not in (0, 1):
        raise UsageError(f"color_side = {color_side}", fix="0 (left) or 1 (right)")
    flow = lay_out(_pairs(data) if counts is None else counts, v_gap_frac)
    left, right = x_range
    with matplotlib.rc_context(style.RC):
        on_screen = style.can_show(show, save_path)
        figure = style.new_figure(*figsize, on_screen)
        axes = figure.subplots()
        axes.set_axis_off()
        colors = _colors(flow, cmap)
        _draw_bands(axes, flow, colors[color_side], color_side, x_range, res, alpha)
        gap, thick = h_gap_frac * (right - left), 0.012 * (right - left)
        font: Any = {"fontweight": "bold", "fontsize": 14, "fontname": fontname, "parse_math": False}
        for bars, shades, x, outwards in zip((flow.left, flow.right), colors, x_range, (-1, 1), strict=True):
            for bar, shade in zip(bars, shades, strict=True):
                axes.fill_between([x, x + outwards * thick], bar.low, bar.high, color=shade, linewidth=0)
                parts = [f"{bar.count:,}", bar.name] if disp_width else [bar.name]
                if width_in == (outwards < 0):
                    parts.reverse()
                place = x + outwards * (thick + gap), (bar.low + bar.high) / 2
                align = "right" if outwards < 0 else "left"
                axes.text(*place, wdisp_sep.join(parts), ha=align, va="center", **font)
        for x, text in zip(x_range, labels or (), strict=False):
            axes.text(x, flow.height + 0.03, text, ha="center", va="bottom", **font)
        return style.finish(figure, save_path, on_screen, dpi)


def _pairs(data: Any) -> pd.DataFrame:
    values = np.asarray(data, dtype=object)
    if values.ndim != 2 or values.shape[1] != 2:
        raise UsageError(f"sankey needs two names per cell, not an array of shape {values.shape}")
    return crosstab(values[:, 0], values[:, 1])


def _colors(flow: Flow, cmap: Any) -> tuple[list[Any], list[Any]]:
    """A colour per bar of each side; the same name has the same colour on both."""
    names = sorted({bar.name for bar in (*flow.left, *flow.right)})
    if cmap is None:
        shade: dict[str, Any] = dict(style.palette(names))
    else:
        import matplotlib

        spread = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
        shade = {name: spread((at + 0.5) / len(names)) for at, name in enumerate(names)}
    return [shade[bar.name] for bar in flow.left], [shade[bar.name] for bar in flow.right]


def _draw_bands(
    axes: Axes,
    flow: Flow,
    colors: Sequence[Any],
    side: int,
    x_range: tuple[float, float],
    res: int,
    alpha: float,
) -> None:
    quarters, along = np.linspace(0, 1, len(CURVE)), np.linspace(0, 1, res)
    rise = np.polyval(np.polyfit(quarters, CURVE, len(CURVE) - 1), along)
    x = np.linspace(*x_range, res)
    for band in flow.bands:
        low = band.from_low + (band.to_low - band.from_low) * rise
        color = colors[band.right if side else band.left]
        axes.fill_between(x, low, low + band.width, color=color, alpha=alpha, linewidth=0)
