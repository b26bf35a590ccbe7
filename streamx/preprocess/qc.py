"""Which cells and genes stay: names, then features per cell, then cells per gene (SCALEX's order)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from streamx.errors import EmptyError, warn
from streamx.store.scratch import new_array, pieces

LOSS_WORTH_A_WARNING = 0.2  # share of a batch


def names_to_use(names: Sequence[str], drop: tuple[str, ...]) -> np.ndarray:
    """bool (n_genes,): names that start with none of `drop`. No case folding, as in SCALEX."""
    return (
        np.array([not str(name).startswith(drop) for name in names], dtype=bool)
        if drop
        else (np.ones(len(names), dtype=bool))
    )


def cells_to_keep(
    n_features_n: np.ndarray,
    code_n: np.ndarray,
    admitted_n: np.ndarray,
    *,
    min_features: int,
    batches: Sequence[str],
    path: Path | None = None,
) -> np.ndarray:
    """bool (n_cells,): admitted cells with at least `min_features` detected features.

    Warns of batches that lose more than a fifth of their cells, with quantiles to choose another limit by.
    The result lies in a file at `path`, if one is given.

    Raises
    ------
    EmptyError
        If no cell is left; names a value that would work.
    """
    kept_n = new_array(path, len(admitted_n), bool)
    n_b, left_b = np.zeros((2, len(batches)), np.int64)
    for low, high in pieces(len(admitted_n)):
        mine = slice(low, high)
        kept_n[mine] = admitted_n[mine] & (n_features_n[mine] >= min_features)
        n_b += np.bincount(code_n[mine][admitted_n[mine]], minlength=len(batches))
        left_b += np.bincount(code_n[mine][kept_n[mine]], minlength=len(batches))
    if not left_b.any():
        found = n_features_n[admitted_n]
        works = int(np.quantile(found, 0.1)) if len(found) else 0
        raise EmptyError(
            f"none of {len(found)} cells has {min_features} detected features"
            + (
                f"; the best has {found.max()}, half of them at least {int(np.median(found))}"
                if len(found)
                else ""
            ),
            fix=f"--min-features {works} keeps nine in ten" if len(found) else "choose other cells",
        )
    lossy = np.flatnonzero(n_b - left_b > LOSS_WORTH_A_WARNING * n_b)
    if len(lossy):
        lines = [
            _loss(batches[b], n_features_n[admitted_n & (code_n == b)], min_features) for b in lossy[:20]
        ]
        more = f"\n  and {len(lossy) - 20} more batches" if len(lossy) > 20 else ""
        warn(
            f"min_features {min_features} removes over a fifth of {len(lossy)} batches:\n  "
            + "\n  ".join(lines)
            + more,
            fix="a lower --min-features, if these are good cells of a shallow technology",
        )
    return kept_n


def _loss(batch: str, n_features_n: np.ndarray, min_features: int) -> str:
    low, quarter, half, most = np.quantile(n_features_n, [0.05, 0.25, 0.5, 0.95]).astype(int)
    return (
        f"{batch}: {np.count_nonzero(n_features_n < min_features)} of {len(n_features_n)} cells removed "
        f"(features per cell: 5 % {low}, 25 % {quarter}, median {half}, 95 % {most})"
    )


def genes_to_keep(detected_g: np.ndarray, use_g: np.ndarray, *, min_cells: int) -> np.ndarray:
    """bool (n_genes,): usable genes seen in at least `min_cells` of the cells that stay.

    Raises
    ------
    EmptyError
        If no gene is left.
    """
    keep_g = use_g & (detected_g >= min_cells)
    if not keep_g.any():
        raise EmptyError(
            f"none of {int(use_g.sum())} features is seen in {min_cells} cells; the most frequent is in "
            f"{int(detected_g[use_g].max()) if use_g.any() else 0}",
            fix="a lower --min-cells",
        )
    return keep_g
