"""Labels of cells as codes: one rule for what counts as a label, for all that vote, score or draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.config import UNLABELED
from streamx.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Labels:
    """Labels as int32 codes into sorted names; -1 where a cell has none."""

    codes_n: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.codes_n)

    @property
    def known_n(self) -> np.ndarray:
        return self.codes_n >= 0

    def take(self, rows: np.ndarray) -> Labels:
        """Labels of these cells; names that none of them has are dropped."""
        codes = self.codes_n[rows]
        used = np.unique(codes[codes >= 0])
        new = np.full(len(self.names) + 1, -1, dtype=np.int32)
        new[used] = np.arange(len(used))
        return Labels(new[codes], [self.names[code] for code in used])

    def text(self, missing: str = "") -> np.ndarray:
        """The names per cell, as objects."""
        return np.array([*self.names, missing], dtype=object)[self.codes_n]


def encode_labels(labels: Any, unlabeled: Sequence[str] = UNLABELED) -> Labels:
    """Labels of any kind (array, pandas column, categorical, list) -> :class:`Labels`.

    Everything is compared as text, so that ``1`` and ``"1"`` are one label; names are sorted as text. Missing
    values (None, NaN, NA) and the names in `unlabeled` mean that a cell has no label.
    """
    if isinstance(labels, Labels):
        return labels
    if hasattr(labels, "array"):  # a pandas Series or Index
        labels = labels.array
    if hasattr(labels, "categories") and hasattr(labels, "codes"):  # a pandas Categorical
        codes, values = np.asarray(labels.codes), np.asarray(labels.categories, dtype=object)
    else:
        codes, values = _factorize(labels)
    texts = [None if _is_missing(value) else str(value) for value in values]
    skipped = {None, *(str(name) for name in unlabeled)}
    used = np.unique(codes[codes >= 0])
    names = sorted({texts[code] for code in used} - skipped)
    position = {name: code for code, name in enumerate(names)}
    lookup = np.array([*(position.get(text, -1) for text in texts), -1], dtype=np.int32)
    return Labels(lookup[codes], list(names))


def unify_labels(*parts: Labels) -> list[Labels]:
    """The same labels with one list of names for all."""
    names = sorted(set().union(*(part.names for part in parts)))
    position = {name: code for code, name in enumerate(names)}
    return [
        Labels(np.array([*(position[n] for n in part.names), -1], dtype=np.int32)[part.codes_n], names)
        for part in parts
    ]


def crosstab(true: Any, pred: Any, conserved: bool = False) -> pd.DataFrame:
    """Number of cells with each pair of labels, as SCALEX's tutorials tabulate them.

    Cells that lack either label (see :func:`encode_labels`) don't count; ``Unknown`` is a prediction like any
    other.

    Parameters
    ----------
    true, pred
        A label per cell each: rows and columns of the table.
    conserved
        Only categories that both sides have.

    Returns
    -------
    pandas.DataFrame
        int64, (labels of `true`, labels of `pred`), both sorted as text. Tables of pieces of the cells can
        be summed (``a.add(b, fill_value=0)``).

    Raises
    ------
    UsageError
        If the two differ in length.
    """
    import pandas as pd

    rows, columns = encode_labels(true, ("",)), encode_labels(pred, ("",))
    if len(rows) != len(columns):
        raise UsageError(f"{len(rows):,} labels, {len(columns):,} predictions")
    both = rows.known_n & columns.known_n
    rows, columns = rows.take(both), columns.take(both)
    n_rows, n_columns = len(rows.names), len(columns.names)
    pair = rows.codes_n.astype(np.int64) * n_columns + columns.codes_n
    counts = np.bincount(pair, minlength=n_rows * n_columns).reshape(n_rows, n_columns)
    table = pd.DataFrame(counts, index=pd.Index(rows.names), columns=pd.Index(columns.names))
    if not conserved:
        return table
    shared = [name for name in rows.names if name in columns.names]
    return table.loc[shared, shared]


def _factorize(labels: Any) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(labels)
    if values.ndim != 1:
        raise UsageError(f"labels have shape {values.shape}", fix="give one label per cell")
    if values.dtype.kind in "biuUS":
        unique, codes = np.unique(values, return_inverse=True)
        return codes, unique.astype(object)
    first: dict[Any, int] = {}
    codes = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values.tolist()):
        codes[row] = -1 if _is_missing(value) else first.setdefault(value, len(first))
    unique = np.empty(len(first), dtype=object)
    unique[:] = list(first)
    return codes, unique


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return bool(isinstance(value, float) and value != value)
