"""A heat map with names on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from streamx.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    cmap: str = "Blues",
    limits: tuple[float, float] = (0.0, 1.0),
    annot: bool = False,
    cbar: bool = True,
    fontsize: float = 8,
    figsize: tuple[float, float] | None = None,
    row_colors: Sequence[str] | None = None,
    column_colors: Sequence[str] | None = None,
    names: tuple[str, str] = ("", ""),
    bar: str = "",
    on_screen: bool = False,
) -> Figure:
    """One heat map, at most of `figsize` inches; NaN stays white. `names` are the axes' (rows, columns)."""
    longest = max((len(name) for name in (*rows, *columns)), default=1)
    rim = 0.9 + 0.011 * fontsize * longest
    cell = 0.42 if annot or figsize else max(0.16, 0.024 * fontsize)
    widest, highest = figsize or (14, 14)
    width = min(widest, max(2.2, cell * len(columns)) + rim + 0.6)
    height = min(highest, max(2.0, cell * len(rows)) + rim)
    figure = style.new_figure(width, height, on_screen)
    axes = figure.subplots()
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="equal"
    )
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=fontsize)
    axes.set_yticks(range(len(rows)), rows, fontsize=fontsize)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for labels, colors in ((axes.get_yticklabels(), row_colors), (axes.get_xticklabels(), column_colors)):
        for label, color in zip(labels, colors or (), strict=False):
            label.set_color(color)
    axes.set_ylabel(names[0], fontsize=fontsize + 1)
    axes.set_xlabel(names[1], fontsize=fontsize + 1)
    if annot:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value) and abs(value) >= 0.005:
                color = style.text_on(image.cmap(image.norm(value)))
                text = f"{value:.2f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=fontsize - 1.5, color=color)
    if cbar:
        side = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25, label=bar)
        side.outline.set_visible(False)
    return figure
