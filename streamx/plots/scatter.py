"""Cells in two dimensions, coloured by what is known of them: one panel per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.config import UNLABELED
from streamx.errors import UsageError
from streamx.labels import Labels, encode_labels
from streamx.plots import style
from streamx.plots.density import Canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, LEGEND_ROWS = 3.4, 22


def embedding(
    adata: Any,
    color: str = "celltype",
    color_map: Mapping[str, str] | str | None = None,
    groupby: str | None = "batch",
    groups: Sequence[str] | None = None,
    cond2: str | None = None,
    v2: str | None = None,
    save: str | Path | None = None,
    legend_loc: str | None = "right margin",
    legend_fontsize: float | None = None,
    legend_fontweight: str = "bold",
    sep: str = "_",
    basis: str = "X_umap",
    size: float = 10,
    show: bool = True,
) -> Figure:
    """Draw `color` on an embedding, one panel per group, the other cells grey behind it.

    Parameters
    ----------
    adata
        An AnnData, or anything with its ``obs`` and ``obsm``.
    color
        Column of obs. Numbers get a colour bar, everything else a legend.
    color_map
        Colour per category (grey where it has none), or for numbers the name of a colour map.
    groupby, groups
        Column that makes the panels, and which of its values in which order (default: all, sorted). None: one
        panel with all cells.
    cond2, v2
        Only cells of a group for which column `cond2` is `v2`; the title says so.
    save
        A picture's path, which takes all panels (.png, .pdf, .svg); or, as in SCALEX, a suffix such as
        ``.pdf`` or ``_v2.png``: then every group becomes a file ``<basis>_<group><suffix>`` of its own.
    legend_loc
        ``"right margin"``, ``"on data"``, or None.
    size
        Area of a dot, at most 120,000 / cells of the group, in points^2 of a panel 5 inches wide (dots shrink
        with the panel). Every panel has its own; in SCALEX, dots that shrank in one stay small in the next.
        More than 200,000 cells are an image instead: a pixel has the mean colour of its cells, and is the
        paler the fewer they are.
    show
        Open a window, unless saved or without a screen.

    Returns
    -------
    matplotlib.figure.Figure
        All panels.
    """
    import matplotlib

    xy_n2 = _coordinates(adata, basis)
    panels = _panels(adata, groupby, groups, cond2, v2, sep)
    paint = _Paint(_column(adata, color), color, color_map)
    look = _Look(size, legend_loc, legend_fontsize, legend_fontweight, _axis_name(basis))
    with matplotlib.rc_context(style.RC):
        if save is not None and str(save).startswith((".", "_")) and "/" not in str(save):
            for title, group, inside in panels:
                name = f"{basis}_{style.as_file_name(group)}{save}"
                style.write(_draw(xy_n2, [(title, group, inside)], paint, look, False), Path(name))
            return _draw(xy_n2, panels, paint, look, False)
        on_screen = style.can_show(show, save)
        return style.finish(_draw(xy_n2, panels, paint, look, on_screen), save, on_screen)


@dataclass(frozen=True)
class _Look:
    size: float
    legend: str | None
    fontsize: float | None
    fontweight: str
    axis: str


class _Paint:
    """What a column looks like: a colour per category, or a scale for numbers."""

    def __init__(self, column: Any, name: str, color_map: Mapping[str, str] | str | None) -> None:
        self.name = name
        self.values: np.ndarray | None = None
        self.labels: Labels | None = None
        self.colors: dict[str, str] = {}
        kind = getattr(getattr(column, "dtype", None), "kind", "O")
        if kind in "iuf":
            self.values = np.asarray(column, dtype=float)
            self.scale = color_map if isinstance(color_map, str) else "viridis"
            finite = self.values[np.isfinite(self.values)]
            self.limits = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        else:
            if isinstance(color_map, str):
                raise UsageError(f"{name} holds categories: color_map {color_map!r} is for numbers")
            self.labels = _unlabeled_last(encode_labels(column, ("",)))
            self.colors = style.palette(self.labels.names, color_map)

    def known(self) -> np.ndarray:
        if self.values is not None:
            return np.isfinite(self.values)
        assert self.labels is not None
        return self.labels.known_n


def _unlabeled_last(labels: Labels) -> Labels:
    names = sorted(labels.names, key=lambda name: (name in UNLABELED, name))
    place = {name: code for code, name in enumerate(names)}
    lookup = np.array([*(place[name] for name in labels.names), -1], dtype=np.int32)
    return Labels(lookup[labels.codes_n], names)


def _coordinates(adata: Any, basis: str) -> np.ndarray:
    for name in (basis, f"X_{basis}"):
        if name in adata.obsm:
            return np.asarray(adata.obsm[name])[:, :2].astype(np.float64)
    raise UsageError(
        f"no {basis!r} in obsm",
        where=f"obsm has {', '.join(map(str, adata.obsm)) or 'nothing'}",
        fix="compute it (streamx.pl.umap) or name another basis",
    )


def _column(adata: Any, name: str) -> Any:
    if name not in adata.obs.columns:
        raise UsageError(
            f"no column {name!r} in obs", fix=f"one of {', '.join(map(str, adata.obs.columns)) or 'none'}"
        )
    return adata.obs[name]


def _axis_name(basis: str) -> str:
    return basis.removeprefix("X_").replace("_", " ").upper()


def _panels(
    adata: Any,
    groupby: str | None,
    groups: Sequence[str] | None,
    cond2: str | None,
    v2: str | None,
    sep: str,
) -> list[tuple[str, str, np.ndarray]]:
    """(title, group, cells inside) of every panel."""
    inside = np.ones(len(adata.obs), dtype=bool)
    prefix = ""
    if cond2 is not None:
        inside = encode_labels(_column(adata, cond2), ()).text() == str(v2)
        prefix = f"{v2}{sep}"
    if groupby is None:
        return [(prefix.removesuffix(sep), "all", inside)]
    labels = encode_labels(_column(adata, groupby), ())
    chosen = labels.names if groups is None else [str(group) for group in groups]
    unknown = [group for group in chosen if group not in labels.names]
    if unknown:
        raise UsageError(f"{groupby} has no {', '.join(unknown)}", fix=f"one of {', '.join(labels.names)}")
    code = {name: at for at, name in enumerate(labels.names)}
    return [(prefix + group, group, (labels.codes_n == code[group]) & inside) for group in chosen]


def _draw(
    xy_n2: np.ndarray, panels: list[tuple[str, str, np.ndarray]], paint: _Paint, look: _Look, on_screen: bool
) -> Figure:
    columns = min(len(panels), 4 if len(panels) > 6 else 3)
    rows = -(-len(panels) // columns)
    names = _shown_names(panels, paint)
    legend = look.legend == "right margin" and bool(names)
    margin = _legend_width(names, look) if legend else (0.7 if paint.values is not None else 0)
    figure = style.new_figure(columns * PANEL + margin, rows * (PANEL + 0.1), on_screen)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    drawn = None
    for axes, (title, _, inside) in zip(grid.flat, panels, strict=False):
        drawn = _scatter(axes, xy_n2, inside, paint, look) or drawn
        axes.set_title(title)
    if paint.values is not None and drawn is not None:
        bar = figure.colorbar(drawn, ax=list(grid.flat), shrink=0.6, aspect=25, label=paint.name)
        bar.outline.set_visible(False)
    elif legend:
        _legend(figure, names, paint, look)
    return figure


def _scatter(axes: Axes, xy_n2: np.ndarray, inside: np.ndarray, paint: _Paint, look: _Look) -> Any:
    placed = np.isfinite(xy_n2).all(axis=1)
    known = paint.known()
    style.bare(axes)
    axes.set_box_aspect(1)
    axes.set_xlabel(f"{look.axis}1")
    axes.set_ylabel(f"{look.axis}2")
    behind, blank = np.flatnonzero(placed & ~inside), np.flatnonzero(placed & inside & ~known)
    cells = np.flatnonzero(placed & inside & known)
    draw = _dots if placed.sum() <= style.DENSE_ABOVE else _density
    drawn = draw(axes, xy_n2, (behind, blank, cells), paint, look)
    if paint.labels is not None and look.legend == "on data":
        _names_on_data(axes, xy_n2, cells, paint.labels, look)
    return drawn


Layers = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # cells outside the group, without a colour, and the others


def _density(axes: Axes, xy_n2: np.ndarray, layers: Layers, paint: _Paint, look: _Look) -> Any:
    """The layers as one image; with numbers, what a colour bar needs."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    behind, blank, cells = layers
    canvas = Canvas(xy_n2, np.concatenate(layers))
    canvas.lay_plain(behind, style.BACKGROUND)
    canvas.lay_plain(blank, style.NO_COLOR)
    drawn = None
    if paint.values is not None:
        canvas.lay_values(cells, paint.values[cells], paint.scale, paint.limits)
        drawn = ScalarMappable(Normalize(*paint.limits), paint.scale) if len(cells) else None
    else:
        assert paint.labels is not None
        names = paint.labels.names  # those without a label come last, and below
        first = len([name for name in names if name not in UNLABELED])
        colors = [paint.colors[name] for name in names]
        codes = paint.labels.codes_n[cells]
        lower = codes >= first
        canvas.lay_categories(cells[lower], codes[lower] - first, colors[first:])
        canvas.lay_categories(cells[~lower], codes[~lower], colors[:first])
    picture = np.rint(canvas.picture() * 255).astype(np.uint8)  # a figure holds those of all its panels
    axes.imshow(picture, extent=canvas.extent, origin="lower", interpolation="nearest", aspect="auto")
    return drawn


def _dots(axes: Axes, xy_n2: np.ndarray, layers: Layers, paint: _Paint, look: _Look) -> Any:
    behind, blank, cells = layers
    raster = sum(map(len, layers)) > style.RASTERIZE_ABOVE
    shared: dict[str, Any] = {"linewidths": 0, "rasterized": bool(raster)}

    def dots(cells: np.ndarray, size: float, **colors: Any) -> Any:
        area = size * (PANEL / 5) ** 2
        return axes.scatter(xy_n2[cells, 0], xy_n2[cells, 1], s=area, **colors, **shared)

    if len(behind):
        dots(behind, min(look.size, 120_000 / len(behind)), color=style.BACKGROUND)
    size = min(look.size, 120_000 / max(len(blank) + len(cells), 1))
    if len(blank):
        dots(blank, size, color=style.NO_COLOR)
    # drawn in random order, or the last category would hide the others; those without a label first
    cells = np.random.default_rng(0).permutation(cells)
    if paint.labels is not None:
        no_label = np.array([name in UNLABELED for name in paint.labels.names], dtype=bool)
        cells = cells[np.argsort(~no_label[paint.labels.codes_n[cells]], kind="stable")]
    if not len(cells):
        return None
    if paint.values is not None:
        low, high = paint.limits
        return dots(cells, size, c=paint.values[cells], cmap=paint.scale, vmin=low, vmax=high)
    assert paint.labels is not None
    colors = np.array([*(paint.colors[name] for name in paint.labels.names), style.NO_COLOR], dtype=object)
    dots(cells, size, color=list(colors[paint.labels.codes_n[cells]]))
    return None


def _names_on_data(axes: Axes, xy_n2: np.ndarray, cells: np.ndarray, labels: Labels, look: _Look) -> None:
    from matplotlib.patheffects import withStroke

    for code, name in enumerate(labels.names):
        own = cells[labels.codes_n[cells] == code]
        if len(own) and name not in UNLABELED:
            x, y = np.median(xy_n2[own], axis=0)
            axes.text(
                x,
                y,
                name,
                ha="center",
                va="center",
                fontsize=look.fontsize or 8,
                fontweight=look.fontweight,
                path_effects=[withStroke(linewidth=2.2, foreground="white")],
            )


def _shown_names(panels: list[tuple[str, str, np.ndarray]], paint: _Paint) -> list[str]:
    """Categories with a cell in some panel."""
    if paint.labels is None:
        return []
    inside = np.logical_or.reduce([cells for _, _, cells in panels])
    codes = np.unique(paint.labels.codes_n[inside])
    return [paint.labels.names[code] for code in codes if code >= 0]


def _legend_width(names: list[str], look: _Look) -> float:
    columns = -(-len(names) // LEGEND_ROWS)
    return columns * (0.45 + 0.0085 * (look.fontsize or 8) * max(map(len, names), default=0))


def _legend(figure: Figure, names: list[str], paint: _Paint, look: _Look) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=paint.colors[name], label=name)
        for name in names
    ]
    figure.legend(
        handles=handles,
        loc="outside right center",
        ncols=-(-len(names) // LEGEND_ROWS),
        title=paint.name,
        alignment="left",
        fontsize=look.fontsize,
        title_fontproperties={"weight": look.fontweight, "size": look.fontsize or 8},
        handletextpad=0.2,
        columnspacing=1.0,
    )
