"""Colours, figures and files that all pictures share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamx.config import UNLABELED
from streamx.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours first (safe for all common kinds of colour blindness, black and yellow left out),
# then Paul Tol's "muted" ones.
BASE_COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#332288",
    "#999933",
    "#882255",
    "#44AA99",
    "#DDCC77",
    "#117733",
    "#AA4499",
    "#88CCEE",
    "#661100",
)
BACKGROUND = "#E4E4E4"  # cells outside the group
NO_COLOR = "#9A9A9A"  # cells without a label, categories without a colour
RASTERIZE_ABOVE = 5_000  # points, in PDF and SVG
DPI = 200
RC: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "streamx",
    "savefig.facecolor": "white",
}


def palette(names: Sequence[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """A colour per name; with `given`, its colours, and grey for names that it lacks.

    Names that mean no label are grey. Beyond 15 names the colours come again, darker and then lighter.
    """
    if given is not None:
        return {name: given.get(name, NO_COLOR) for name in names}
    found = dict.fromkeys(names, NO_COLOR)
    for position, name in enumerate(name for name in names if name not in UNLABELED):
        turn, place = divmod(position, len(BASE_COLORS))
        color = BASE_COLORS[place]
        if turn:
            color = _blend(color, "#000000" if turn % 2 else "#FFFFFF", min(0.3 + 0.12 * (turn // 2), 0.7))
        found[name] = color
    return found


def _blend(color: str, other: str, share: float) -> str:
    mixed = (
        round((1 - share) * int(color[at : at + 2], 16) + share * int(other[at : at + 2], 16))
        for at in (1, 3, 5)
    )
    return "#" + "".join(f"{value:02X}" for value in mixed)


def new_figure(width: float, height: float, on_screen: bool = False) -> Figure:
    """A figure in inches; only one for the screen is registered with pyplot (and so needs closing)."""
    if on_screen:
        import matplotlib.pyplot as plt

        return plt.figure(figsize=(width, height), layout="constrained")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def can_show(show: bool, save: Any) -> bool:
    """Whether to open a window: asked for, nothing saved, and a backend that has windows."""
    if not show or save is not None:
        return False
    import matplotlib
    from matplotlib.backends import BackendFilter, backend_registry

    windows = {name.lower() for name in backend_registry.list_builtin(BackendFilter.INTERACTIVE)}
    name = matplotlib.get_backend().lower()
    return name in windows or "inline" in name or "ipympl" in name


def finish(figure: Figure, save: str | Path | None, on_screen: bool, dpi: int = DPI) -> Figure:
    """Write the figure where `save` says (format by suffix), or show it."""
    if save is not None:
        write(figure, Path(save), dpi)
    elif on_screen:
        import matplotlib.pyplot as plt

        plt.show()
    return figure


def write(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """PNG, PDF or SVG by suffix; folders are made. The same figure gives the same bytes."""
    suffix = path.suffix.lower().lstrip(".")
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise UsageError(f"{path.name}: no format {suffix!r}", fix="end the name in .png, .pdf or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    dateless = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
    figure.savefig(path, dpi=dpi, format=suffix, bbox_inches="tight", pad_inches=0.08, metadata=dateless)


def as_file_name(text: str) -> str:
    """A group's name as part of a file name: nothing that could leave the folder."""
    return re.sub(r"[^\w.+-]+", "_", text).strip(".") or "_"


def bare(axes: Axes) -> None:
    """No ticks, no frame above and right: coordinates of an embedding mean nothing."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)


def text_on(color: Any) -> str:
    """Black or white, whichever reads better on this RGB(A) colour."""
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
