"""Which labels were predicted for which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.errors import UsageError
from streamx.labels import crosstab, encode_labels
from streamx.plots import style
from streamx.plots.heat import heat_map

if TYPE_CHECKING:
    import pandas as pd


def match_clusters(y: Any, y_pred: Any) -> dict[str, str]:
    """Cluster -> label, one to one, such that most cells agree (Hungarian matching).

    Clusters in excess of the labels keep their own names.
    """
    return {name: name for name in encode_labels(y_pred, ()).names} | _matched(crosstab(y, y_pred))


def _matched(counts: pd.DataFrame) -> dict[str, str]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-counts.to_numpy())
    return {counts.columns[c]: counts.index[r] for r, c in zip(rows, columns, strict=True)}


def confusion(
    y: Any = None,
    y_pred: Any = None,
    save: str | Path | None = None,
    cmap: str = "Blues",
    *,
    counts: pd.DataFrame | None = None,
    annot: bool | None = None,
    show: bool = True,
) -> tuple[float, float, float]:
    """Draw which labels were predicted for which, each **column** (prediction) summing to 1.

    Where predictions carry no label's name (clusters), they are matched to labels first
    (:func:`match_clusters`), for the order of the columns and for F1.

    Parameters
    ----------
    y, y_pred
        True and predicted label per cell; cells that lack one are left out. ``Unknown`` is a prediction like
        any other.
    counts
        Instead of both: their table (:func:`~streamx.labels.crosstab`), as of cells that were counted piece
        by piece.

    Returns
    -------
    f1, nmi, ari
        F1 micro-averaged (= accuracy), normalised mutual information (arithmetic), adjusted Rand index
        (Hubert 1985).

    Raises
    ------
    UsageError
        If no cell has both a label and a prediction.
    """
    import matplotlib

    counts = crosstab(y, y_pred) if counts is None else counts
    if not counts.to_numpy().any():
        raise UsageError("no cell has both a label and a prediction")
    labels: list[str] = list(counts.index)
    found: list[str] = list(counts.columns)
    matching = {name: name for name in found}
    if not set(labels) & set(found):
        matching |= _matched(counts)
    order = sorted(found, key=lambda name: _place(matching[name], name, labels))
    table = counts[order].to_numpy(dtype=np.float64)
    own = [(labels.index(matching[name]), at) for at, name in enumerate(order) if matching[name] in labels]
    hits = sum(table[place] for place in own)
    with matplotlib.rc_context(style.RC):
        on_screen = style.can_show(show, save)
        figure = heat_map(
            table / np.maximum(table.sum(axis=0), 1),
            labels,
            order,
            cmap=cmap,
            annot=max(table.shape) <= 20 if annot is None else annot,
            names=("label", "prediction"),
            bar="share of the prediction's cells",
            on_screen=on_screen,
        )
        style.finish(figure, save, on_screen)
    return float(hits / table.sum()), _mutual_information(table), _rand_index(table)


def _place(label: str, name: str, labels: list[str]) -> tuple[int, str]:
    return (labels.index(label) if label in labels else len(labels), name)


def _mutual_information(table: np.ndarray) -> float:
    """Of a table of counts, over the mean of both entropies; 1 where both sides have a single name."""
    share = table / table.sum()
    rows, columns = share.sum(axis=1), share.sum(axis=0)

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    mean = (entropy(rows) + entropy(columns)) / 2
    return 1.0 if mean == 0 else (2 * mean - entropy(share.ravel())) / mean


def _rand_index(table: np.ndarray) -> float:
    """Adjusted for chance: (pairs together in both - expected) / (mean of the sides - expected)."""

    def pairs(n: np.ndarray) -> float:
        return float((n * (n - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    every = pairs(table.sum())
    expected = rows * columns / every if every else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)
