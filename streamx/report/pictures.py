"""The pictures of a report: cells as PNG in data URIs, flows and histograms as SVG in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamx.plots import embedding, style, umap
from streamx.plots.sankey import CURVE, lay_out
from streamx.report.facts import BINS, Sketch
from streamx.report.text import escape, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
SHOWN, BEHIND = "shown", "behind"
MOST_NAMES = 20  # on a side of a flow; the rarest beyond are drawn as one
OTHERS = "{:,} more names"
WIDTH, BODY, GAP, BAR = 400, 220, 15, 8  # of a flow: of the whole, of all cells, between bars, of a bar
SLOPE = np.polyfit(np.linspace(0, 1, len(CURVE)), CURVE, 3)[2]  # of a band's edge at either end


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, with what it shows."""

    uri: str
    caption: str

    @property
    def size(self) -> int:
        return len(self.uri)


def lay_out_cells(sketch: Sketch, *, seed: int = 0, threads: int = 0) -> np.ndarray:
    """UMAP of the cells to draw, float32 (n_cells, 2)."""
    return umap(sketch.latent_nk, seed=seed, threads=threads)


def label_colors(names: set[str]) -> dict[str, str]:
    """One colour per label for all pictures of a page."""
    return style.palette(sorted(names))


def draw_cells(
    sketch: Sketch, xy_n2: np.ndarray, shown_n: np.ndarray, color: Mapping[str, str] | None
) -> str:
    """Some cells in front of the reference's: a PNG's data URI.

    Parameters
    ----------
    shown_n
        bool (n_cells,): in colour; the reference's others are grey behind them.
    color
        Colour per label; None: by uncertainty, from 0 to 1.
    """
    keep = shown_n | (sketch.origin_n < 0)
    obs = pd.DataFrame({"label": sketch.label_n[keep], "uncertainty": sketch.uncertainty_n[keep]})
    obs["where"] = np.where(shown_n[keep], SHOWN, BEHIND)
    cells = SimpleNamespace(obs=obs, obsm={"X_umap": xy_n2[keep]})
    settings: dict[str, Any] = {"groupby": "where", "groups": [SHOWN], "legend_loc": None, "show": False}
    if color is None:
        figure = embedding(cells, "uncertainty", "viridis", **settings)
    else:
        figure = embedding(cells, "label", color, **settings)
    figure.axes[0].set_title("")
    return png(figure)


def png(figure: Figure) -> str:
    """A figure as a data URI, in 64 colours: a quarter of the bytes, and dots look the same."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.05)
    packed = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(64).save(packed, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


# -- in the page ---------------------------------------------------------------------------------------


def histogram_svg(counts: np.ndarray) -> str:
    """Bars of the cells per tenth of the uncertainty."""
    most = max(int(counts.max()), 1)
    bars = []
    for at, count in enumerate(counts.tolist()):
        height = 44 * count / most
        low, high = at / BINS, (at + 1) / BINS
        bars.append(
            f'<rect x="{at * 20 + 1}" y="{46 - height:.1f}" width="18" height="{height:.1f}" class="bar">'
            f"<title>{count:,} cells from {low:.1f} to {high:.1f}</title></rect>"
        )
    ends = '<text x="0" y="59">0</text><text x="200" y="59" text-anchor="end">1</text>'
    return (
        '<svg class="histogram" viewBox="0 0 200 62" role="img" aria-label="cells by uncertainty">'
        f'{"".join(bars)}<path d="M0 46.5H200" class="axis"/>{ends}</svg>'
    )


def sankey_svg(counts: pd.DataFrame, color: Mapping[str, str]) -> str:
    """Flows from given (left) to transferred labels (right), names over their bands."""
    flow = lay_out(_side_by_side(_folded(_folded(counts).T).T), gap=GAP / BODY, ascending=False)
    height = flow.height * BODY
    parts = []
    for band in flow.bands:
        left, right = flow.left[band.left].name, flow.right[band.right].name
        low, to = band.from_low * BODY, band.to_low * BODY
        thick = band.width * BODY
        fill = color.get(right, style.NO_COLOR)
        what = f"{escape(left)} → {escape(right)}: {band.count:,} cells"
        path = f"M{BAR} {low:.1f}{_curve(low, to, 1)}V{to + thick:.1f}{_curve(to + thick, low + thick, -1)}Z"
        parts.append(f'<path d="{path}" fill="{fill}" class="band"><title>{what}</title></path>')
    for bars, x, place, anchor in (
        (flow.left, 0, BAR + 5, "start"),
        (flow.right, WIDTH - BAR, WIDTH - BAR - 5, "end"),
    ):
        for bar in bars:
            y, tall = bar.low * BODY, (bar.high - bar.low) * BODY
            fill = color.get(bar.name, style.NO_COLOR)
            parts.append(
                f'<rect x="{x}" y="{y:.1f}" width="{BAR}" height="{max(tall, 0.5):.1f}" fill="{fill}"/>'
                f'<text x="{place}" y="{y + tall / 2 + 4:.1f}" text-anchor="{anchor}">'
                f"<tspan>{escape(shortened(bar.name, 24))}</tspan> {bar.count:,}</text>"
            )
    return (
        f'<svg class="sankey" viewBox="0 -8 {WIDTH} {height + 16:.0f}" role="img" '
        f'aria-label="given against transferred labels">{"".join(parts)}</svg>'
    )


def _curve(start: float, stop: float, way: int) -> str:
    """A band's edge as one Bézier curve: the polynomial through CURVE is a cubic one, so this is exact."""
    from_x, to_x = (BAR, WIDTH - BAR) if way > 0 else (WIDTH - BAR, BAR)
    third, reach = (to_x - from_x) / 3, SLOPE * (stop - start) / 3
    first, second = start + reach, stop - reach
    return f"C{from_x + third:.1f} {first:.1f} {to_x - third:.1f} {second:.1f} {to_x:.1f} {stop:.1f}"


def _side_by_side(counts: pd.DataFrame) -> pd.DataFrame:
    """The largest first, and the same names in the same order on both sides: few bands cross."""

    def by_size(sums: pd.Series) -> list[str]:
        return list(sums.sort_values(ascending=False, kind="stable").index)

    left, right = by_size(counts.sum(axis=1)), by_size(counts.sum(axis=0))
    same = [name for name in left if name in counts.columns]
    return counts.loc[left, [*same, *(name for name in right if name not in same)]]


def _folded(counts: pd.DataFrame) -> pd.DataFrame:
    """The table with its rarest rows as one, if there are more than a picture can name."""
    if len(counts) <= MOST_NAMES:
        return counts
    order = counts.sum(axis=1).sort_values(ascending=False, kind="stable").index
    rest = order[MOST_NAMES - 1 :]
    folded = counts.loc[order[: MOST_NAMES - 1]]
    return pd.concat([folded, counts.loc[rest].sum().to_frame(OTHERS.format(len(rest))).T])
