"""Which labels were predicted for which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from streamx.errors import UsageError
from streamx.labels import Labels, encode_labels
from streamx.plots import style
from streamx.plots.heat import heat_map


def match_clusters(y: Any, y_pred: Any) -> dict[str, str]:
    """Cluster -> label, one to one, such that most cells agree (Hungarian matching).

    Clusters in excess of the labels keep their own names.
    """
    from scipy.optimize import linear_sum_assignment

    true, found = encode_labels(y, ()), encode_labels(y_pred, ())
    table = _table(true, found)
    rows, columns = linear_sum_assignment(-table)
    matched = {found.names[c]: true.names[r] for r, c in zip(rows, columns, strict=True)}
    return {name: matched.get(name, name) for name in found.names}


def _table(true: Labels, found: Labels) -> np.ndarray:
    """(true labels, predicted labels): cells with both."""
    both = true.known_n & found.known_n
    width = len(found.names)
    cell = true.codes_n[both].astype(np.int64) * width + found.codes_n[both]
    return np.bincount(cell, minlength=len(true.names) * width).reshape(len(true.names), width)


def confusion(
    y: Any,
    y_pred: Any,
    save: str | Path | None = None,
    cmap: str = "Blues",
    *,
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

    Returns
    -------
    f1, nmi, ari
        F1 micro-averaged (= accuracy), normalised mutual information (arithmetic), adjusted Rand index.
    """
    import matplotlib
    from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score

    true, found = encode_labels(y, ("",)), encode_labels(y_pred, ("",))
    if len(true) != len(found):
        raise UsageError(f"{len(true):,} labels, {len(found):,} predictions")
    both = true.known_n & found.known_n
    if not both.any():
        raise UsageError("no cell has both a label and a prediction")
    true, found = true.take(both), found.take(both)
    are_clusters = not set(true.names) & set(found.names)
    matching: dict[str, str] = match_clusters(true.text(), found.text()) if are_clusters else {}
    order = sorted(found.names, key=lambda name: _place(matching.get(name) or name, name, true.names))
    table = _table(true, found)[:, [found.names.index(name) for name in order]]
    guess = np.array([matching.get(name, name) for name in found.text()], dtype=object).astype(str)
    with matplotlib.rc_context(style.RC):
        on_screen = style.can_show(show, save)
        figure = heat_map(
            table / np.maximum(table.sum(axis=0), 1),
            true.names,
            order,
            cmap=cmap,
            annot=max(table.shape) <= 20 if annot is None else annot,
            names=("label", "prediction"),
            bar="share of the prediction's cells",
            on_screen=on_screen,
        )
        style.finish(figure, save, on_screen)
    return (
        float(f1_score(true.text().astype(str), guess, average="micro")),
        float(normalized_mutual_info_score(true.codes_n, found.codes_n)),
        float(adjusted_rand_score(true.codes_n, found.codes_n)),
    )


def _place(label: str, name: str, labels: list[str]) -> tuple[int, str]:
    return (labels.index(label) if label in labels else len(labels), name)
