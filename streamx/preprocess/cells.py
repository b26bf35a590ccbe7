"""Which rows a run looks at: ``--batches`` and ``--where``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from streamx.errors import BatchError, EmptyError
from streamx.preprocess.where import rows_where
from streamx.store.collection import Collection
from streamx.store.scratch import new_array, pieces


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
    store: Collection, batches: Sequence[str] | None, where: str | None, *, folder: Path, first: int = 0
) -> Cells:
    """The rows from `first` on that ``--batches`` and ``--where`` ask for; arrays lie in the folder.

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
    if batches is not None:
        unknown = sorted(set(batches) - set(names))
        if unknown and first == 0:
            raise BatchError(
                f"no batch {', '.join(map(repr, unknown))}",
                where=str(store.path),
                fix=f"its batches are {', '.join(names[:50])}",
            )
    wanted_b = np.array([batches is None or name in set(batches) for name in names] + [False])
    n = store.n_obs - first
    code_n, admitted_n = new_array(folder / "codes", n, np.int32), new_array(folder / "admitted", n, bool)
    bounds, code_r = store.batch_runs
    for low, high in pieces(n):
        code_n[low:high] = code_r[np.searchsorted(bounds, np.arange(first + low, first + high), "right") - 1]
        here_n = wanted_b[code_n[low:high]]
        if where is not None:
            read = partial(store.obs_column, start=first + low, stop=first + high)
            here_n &= rows_where(where, read, store.obs_columns, high - low)
        admitted_n[low:high] = here_n
    if not admitted_n.any() and first == 0:
        raise EmptyError(
            "no cell is asked for" if store.n_obs else "the store holds no cell",
            where=f"--where {where!r}" if where else str(store.path),
            fix="`streamx info` shows the batches and columns",
        )
    return Cells(code_n, admitted_n, names)
