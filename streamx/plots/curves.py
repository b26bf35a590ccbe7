"""How the losses went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.errors import BadFileError, UsageError
from streamx.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = ("epoch", "step", "iteration")
NOT_LOSSES = (
    *STEPS,
    "seconds",
    "time",
    "lr",
    "learning_rate",
    "cells_per_second",
    "n_steps",
    "steps",
    "best",
)


def history(
    history: Any,
    save: str | Path | None = None,
    *,
    columns: list[str] | None = None,
    show: bool = True,
) -> Figure:
    """Draw training losses over epochs, a panel per loss; the epoch with the lowest loss is marked.

    Parameters
    ----------
    history
        ``history.csv``, a model folder that holds it, a data frame, or a dict of columns.
    columns
        Which to draw (default: every number that is a loss).
    """
    import matplotlib

    table = _table(history)
    steps = next((name for name in STEPS if name in table), None)
    chosen = columns or [name for name in table if name not in NOT_LOSSES and np.isfinite(table[name]).any()]
    absent = [name for name in chosen if name not in table]
    if absent or not chosen:
        wanted = ", ".join(absent) or "with losses"
        raise UsageError(f"the history has no column {wanted}", fix=f"it has {', '.join(table)}")
    best = int(np.nanargmin(table["loss" if "loss" in table else chosen[0]]))
    with matplotlib.rc_context(style.RC):
        on_screen = style.can_show(show, save)
        figure = style.new_figure(3.2 * min(len(chosen), 3), 2.4 * -(-len(chosen) // 3), on_screen)
        grid = figure.subplots(-(-len(chosen) // 3), min(len(chosen), 3), squeeze=False)
        for axes in grid.flat[len(chosen) :]:
            axes.set_visible(False)
        for axes, name in zip(grid.flat, chosen, strict=False):
            y = table[name]
            x = table[steps] if steps is not None else np.arange(1, len(y) + 1)
            axes.plot(x, y, color=style.BASE_COLORS[0], linewidth=1.4)
            axes.plot(x[best], y[best], "o", color=style.BASE_COLORS[3], markersize=4)
            late, falling = best > len(y) / 2, y[max(best - len(y) // 8, 0)] > y[best]
            axes.annotate(
                f"{y[best]:.4g}",
                (x[best], y[best]),
                xytext=(-4 if late else 6, -11 if late and falling else 6),  # beside the curve
                textcoords="offset points",
                fontsize=8,
                ha="right" if late else "left",
            )
            axes.set_title(name.replace("_", " "))
            axes.set_xlabel(steps or "epoch")
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
            axes.set_axisbelow(True)
        return style.finish(figure, save, on_screen)


def _table(given: Any) -> dict[str, np.ndarray]:
    """Columns of numbers."""
    if isinstance(given, str | Path):
        path = Path(given)
        path = path / "history.csv" if path.is_dir() else path
        if not path.is_file():
            raise BadFileError("no history there", where=str(path), fix="train writes MODEL/history.csv")
        import pandas as pd

        given = pd.read_csv(path)
    table = {}
    for name in given:
        values = np.asarray(given[name])
        if values.dtype.kind in "iuf" and values.ndim == 1:
            table[str(name)] = values.astype(np.float64)
    if not table or not len(next(iter(table.values()))):
        raise UsageError("the history is empty")
    return table
