"""Every value is looked at: counts, or a named error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from streamx.errors import BadValuesError
from streamx.store.ingest.source import Source

LOG_MAXIMUM = 20.0  # log1p of 5e8: no count matrix that isn't logged stays below it with fractions
SAME_TOTAL = 0.01  # relative spread of row totals that only normalisation brings about


def check_counts(
    x_ng: sparse.csr_matrix,
    *,
    source: Source,
    first_row: int,
    var_names: np.ndarray | None = None,
    obs_names: Sequence[str] | None = None,
    allow_float: bool = False,
) -> None:
    """Scan all values of a slab: counts are finite, not negative, and integral.

    Parameters
    ----------
    x_ng
        Rows ``first_row`` and on of `source`, as :meth:`Source.read` gives them.
    var_names, obs_names
        Names of the columns of `x_ng`, and of all rows of the source (default: the source's own).
    allow_float
        Accept fractions and negative values; NaN and infinity are errors all the same.

    Raises
    ------
    BadValuesError
        Naming the file, the first offending cell and gene, and the value.
    """
    values = x_ng.data
    if not len(values):
        return
    low, high = values.min(), values.max()  # NaN comes through both
    is_float = values.dtype.kind == "f"
    if is_float and not (np.isfinite(low) and np.isfinite(high)):
        wrong, what = ~np.isfinite(values), "not a finite number"
    elif allow_float:
        return
    elif low < 0:
        wrong, what = values < 0, "negative"
    elif is_float:
        wrong, what = values != np.rint(values), "not an integer"
        if not wrong.any():
            return
    else:
        return
    at = int(np.argmax(wrong))
    row = first_row + int(np.searchsorted(x_ng.indptr, at, side="right")) - 1
    cell = (source.obs_names if obs_names is None else obs_names)[row]
    gene = (source.var_names if var_names is None else var_names)[x_ng.indices[at]]
    value = values[at].item()
    meaning = "" if what == "not a finite number" else _meaning(x_ng, float(low), float(high))
    raise BadValuesError(
        f"value {value!r} of gene {gene!r} in cell {cell!r} (row {row}) is {what}{meaning}",
        where=source.location,
        fix=_fix(source, what),
    )


def _meaning(x_ng: sparse.csr_matrix, low: float, high: float) -> str:
    """What a matrix that holds no counts seems to be."""
    if low < 0:
        return "; the matrix looks scaled or centred, it holds no counts"
    values = x_ng.data.astype(np.float64)
    if high < LOG_MAXIMUM and (total := _same_total(x_ng, np.expm1(values))):
        return f"; the matrix is log-normalised (log1p of {total:.6g} per cell), it holds no counts"
    if total := _same_total(x_ng, values):
        return f"; the matrix is normalised to {total:.6g} per cell, it holds no counts"
    if high < LOG_MAXIMUM and (values != np.rint(values)).mean() > 0.5:
        return "; the matrix looks log-transformed, it holds no counts"
    return ""


def _same_total(x_ng: sparse.csr_matrix, values: np.ndarray) -> float | None:
    """The total that all cells share, if they do (at least two cells with at least two values)."""
    totals = np.add.reduceat(np.append(values, 0.0), np.minimum(x_ng.indptr[:-1], len(values)))
    totals = totals[np.diff(x_ng.indptr) > 1]
    if len(totals) < 2:
        return None
    middle = float(np.median(totals))
    return middle if np.abs(totals - middle).max() <= SAME_TOTAL * middle else None


def _fix(source: Source, what: str) -> str:
    if what == "not a finite number":
        return "replace it in the file by a count, or leave the cell or gene out"
    others = source.alternatives()
    if others:
        options = " or ".join(f"--layer {name}" for name in others)
        return f"{options} (the file has counts there); or --allow-float if normalised values are meant"
    return "give the raw counts; or --allow-float if normalised values are meant"
