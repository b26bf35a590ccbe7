"""Which rows a run looks at: ``--batches`` and ``--where``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from streamx.errors import BatchError, EmptyError
from streamx.preprocess.where import rows_where
from streamx.store.collection import Collection


@dataclass(frozen=True)
class Cells:
    """The rows that a run looks at.

    Attributes
    ----------
    code_n
        Batch code per row, int (n_obs,).
    admitted_n
        Rows that were asked for, bool (n_obs,).
    batches
        Name of each code.
    """

    code_n: np.ndarray
    admitted_n: np.ndarray
    batches: Sequence[str]


def chosen_cells(
    store: Collection, batches: Sequence[str] | None, where: str | None, *, first: int = 0
) -> Cells:
    """The rows from `first` on that ``--batches`` and ``--where`` ask for.

    Raises
    ------
    BatchError
        If a batch is unknown.
    UsageError
        If the expression can't be understood.
    EmptyError
        If no row is asked for.
    """
    names = store.batches or ["all cells"]
    code_n = store.batch_codes[first:]
    admitted_n = code_n >= 0
    if batches is not None:
        unknown = sorted(set(batches) - set(names))
        if unknown and first == 0:
            raise BatchError(
                f"no batch {', '.join(map(repr, unknown))}",
                where=str(store.path),
                fix=f"its batches are {', '.join(names[:50])}",
            )
        admitted_n &= np.isin(code_n, [code for code, name in enumerate(names) if name in set(batches)])
    if where is not None:
        admitted_n &= rows_where(
            where, partial(store.obs_column, start=first), store.obs_columns, len(code_n)
        )
    if not admitted_n.any() and first == 0:
        raise EmptyError(
            "no cell is asked for" if store.n_obs else "the store holds no cell",
            where=f"--where {where!r}" if where else str(store.path),
            fix="`streamx info` shows the batches and columns",
        )
    return Cells(code_n, admitted_n, names)
