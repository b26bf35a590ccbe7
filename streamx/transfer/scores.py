"""Transferred against true labels, label by label."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamx.labels import Labels, unify_labels


def score_labels(truth: Labels, found: Labels) -> dict[str, dict[str, Any]]:
    """Precision, recall and F1 of every true label, over the cells that have one.

    Returns
    -------
    dict
        ``n`` (cells that are it), ``n_found`` (that were called it), ``precision`` (None if none was),
        ``recall`` and ``f1``, by name.
    """
    true, guess = unify_labels(truth, found)
    scored = true.known_n
    t, p = true.codes_n[scored], guess.codes_n[scored]
    size = len(true.names)
    n_true, n_found = np.bincount(t, minlength=size), np.bincount(p[p >= 0], minlength=size)
    hits = np.bincount(t[t == p], minlength=size)
    return {
        true.names[code]: {
            "n": int(n_true[code]),
            "n_found": int(n_found[code]),
            "precision": float(hits[code] / n_found[code]) if n_found[code] else None,
            "recall": float(hits[code] / n_true[code]),
            "f1": float(2 * hits[code] / (n_true[code] + n_found[code])),
        }
        for code in np.flatnonzero(n_true)
    }
