"""Predicted against true labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamx.config import UNLABELED
from streamx.errors import BadValuesError
from streamx.labels import encode_labels, unify_labels


def agreement(truth: Any, predicted: Any, unlabeled: Sequence[str] = UNLABELED) -> dict[str, Any]:
    """Accuracy, balanced accuracy (mean recall) and macro F1 over the labels that occur in `truth`.

    Cells without a true label don't count; a cell predicted Unknown counts as wrong.

    Returns
    -------
    dict
        ``accuracy, balanced_accuracy, macro_f1`` (None without any true label), ``n_scored``, and ``recall``
        per label.
    """
    true, guess = unify_labels(encode_labels(truth, unlabeled), encode_labels(predicted, unlabeled))
    if len(true) != len(guess):
        raise BadValuesError(f"{len(true):,} true labels for {len(guess):,} predictions")
    scored = true.known_n
    t, p = true.codes_n[scored], guess.codes_n[scored]
    if not len(t):
        return {"accuracy": None, "balanced_accuracy": None, "macro_f1": None, "n_scored": 0, "recall": {}}
    classes, n_true = np.unique(t, return_counts=True)
    size = len(true.names)
    hits = np.bincount(t[t == p], minlength=size)[classes]
    n_guessed = np.bincount(p[p >= 0], minlength=size)[classes]
    recall = hits / n_true
    return {
        "accuracy": float(np.mean(t == p)),
        "balanced_accuracy": float(recall.mean()),
        "macro_f1": float((2 * hits / (n_true + n_guessed)).mean()),
        "n_scored": len(t),
        "recall": {true.names[code]: float(value) for code, value in zip(classes, recall, strict=True)},
    }
