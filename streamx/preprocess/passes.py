"""Passes over the rows of a store as dask tasks.

The cut into tasks (every `TASK_ROWS` rows) and the tree that adds their results depend on the number of rows
alone: memory, threads and slab size decide how many tasks run at once and how much of a task is read at a
time, and a kernel adds row after row, so none of them changes a bit of any result. dask schedules; a
`distributed` client is used when one is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streamx.cluster import active_client
from streamx.errors import ResourceError
from streamx.preprocess import kernels
from streamx.preprocess.moments import Moments, merge
from streamx.preprocess.rows import Rows
from streamx.store.scratch import new_array
from streamx.threads import thread_count

TASK_ROWS = 16_384
FAN_IN = 8
BYTES_PER_VALUE = 32  # a decoded value, its index, and the decoder's copies of both
LIBRARIES = 64 << 20  # what reading holds beside the rows


class Pass(Protocol):
    """What is added up while rows go by, and which property each cell gets. Picklable."""

    dtype: Any  # of the cell property
    empty: Any  # its value for rows that were not read

    def add(
        self, csr: tuple, admitted_n: np.ndarray, code: int, table_g4: np.ndarray, cell_n: np.ndarray
    ) -> None: ...

    def counted(self, cell_n: np.ndarray, admitted_n: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Counting:
    """Pass 1: detected features of every admitted cell; raw counts of those with at least `min_features`.

    Cells get their number of features, int32; -1 where they were not admitted.
    """

    use_g: np.ndarray
    min_features: int
    dtype = np.int32
    empty = -1

    def add(
        self, csr: tuple, admitted_n: np.ndarray, code: int, table_g4: np.ndarray, cell_n: np.ndarray
    ) -> None:
        kernels.add_counts(*csr, admitted_n, self.use_g, self.min_features, table_g4, cell_n)

    def counted(self, cell_n: np.ndarray, admitted_n: np.ndarray) -> np.ndarray:
        return admitted_n & (cell_n >= self.min_features)


@dataclass(frozen=True)
class Normalising:
    """Pass 2: values scaled to `target` per cell, on the linear scale or after log1p.

    Cells get their total over `keep_g`, float64 (`geometric`: the geometric mean of 1 + x instead); NaN where
    they were not kept. ``target`` 0 scales nothing.
    """

    keep_g: np.ndarray
    target: float
    binarize: bool = False
    log: bool = False
    geometric: bool = False
    dtype = np.float64
    empty = np.nan

    def add(
        self, csr: tuple, admitted_n: np.ndarray, code: int, table_g4: np.ndarray, cell_n: np.ndarray
    ) -> None:
        indptr, indices, _ = csr
        value_v = np.empty(int(indptr[-1] - indptr[0]))
        panel = int(self.keep_g.sum()) if self.geometric else 0
        kernels.scale_rows(*csr, admitted_n, self.keep_g, self.target, self.binarize, panel, value_v, cell_n)
        if self.log:
            np.log1p(value_v, out=value_v)
        kernels.add_values(indptr, indices, value_v, table_g4)

    def counted(self, cell_n: np.ndarray, admitted_n: np.ndarray) -> np.ndarray:
        return admitted_n


@dataclass(frozen=True)
class Clipping:
    """Pass 2 of seurat_v3: counts up to each batch's clip, cells above it, and the maximum after scaling."""

    keep_g: np.ndarray
    target: float
    clip_bg: dict[int, np.ndarray]
    dtype = np.float64
    empty = np.nan

    def add(
        self, csr: tuple, admitted_n: np.ndarray, code: int, table_g4: np.ndarray, cell_n: np.ndarray
    ) -> None:
        kernels.add_clipped(*csr, admitted_n, self.keep_g, self.clip_bg[code], self.target, table_g4, cell_n)

    def counted(self, cell_n: np.ndarray, admitted_n: np.ndarray) -> np.ndarray:
        return admitted_n


@dataclass(frozen=True)
class Magnitudes:
    """|x| of values that stay as they are; cells get the sum of their values."""

    dtype = np.float64
    empty = np.nan

    def add(
        self, csr: tuple, admitted_n: np.ndarray, code: int, table_g4: np.ndarray, cell_n: np.ndarray
    ) -> None:
        kernels.add_magnitudes(*csr, admitted_n, table_g4, cell_n)

    def counted(self, cell_n: np.ndarray, admitted_n: np.ndarray) -> np.ndarray:
        return admitted_n


@dataclass(frozen=True)
class Resources:
    """How much may be used at once; changes no result."""

    threads: int = 1
    slab_rows: int = 4096
    progress: bool = False
    scratch: Path | None = None  # folder for arrays over cells; None keeps them in memory


def plan_resources(
    nnz_per_row: float, n_genes: int, n_batches: int, *, memory: int, threads: int, progress: bool = False,
    scratch: Path | None = None,
) -> Resources:  # fmt: skip
    """Threads, and rows read at a time, that fit into the memory.

    Parameters
    ----------
    nnz_per_row
        Stored values per row, on average.
    n_genes, n_batches
        Size of a table.
    memory
        Bytes.
    threads
        Wanted; 0 for one per core.
    scratch
        Folder for arrays over cells; None keeps them in memory.

    Raises
    ------
    ResourceError
        If the tables alone do not fit.
    """
    wanted = thread_count(threads)
    table = n_genes * 4 * 8
    fixed = table * n_batches * 3 + LIBRARIES  # the result, and what is being merged into it
    per_row = nnz_per_row * BYTES_PER_VALUE + 64
    least = fixed + 256 * per_row + 2 * table
    if memory < least:
        raise ResourceError(
            f"statistics of {n_genes} genes in {n_batches} batches need {least / 1e6:.0f} MB, "
            f"memory allows {memory / 1e6:.0f} MB",
            fix=f"--memory {int(least / 1e6) + 1}MB",
        )
    used = max(1, min(wanted, int((memory - fixed) / (1024 * per_row + 2 * table))))
    slab = ((memory - fixed) / used - 2 * table) / per_row
    return Resources(used, int(np.clip(slab, 256, 4096)), progress, scratch)


@dataclass(frozen=True)
class Piece:
    """What a task returns, and what neighbouring ones become: moments, and a property of each cell.

    Tasks of this process write the property where it belongs, and return none of it.
    """

    moments: Moments
    cell_n: np.ndarray


def join_pieces(neighbours: Sequence[tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """The pieces of neighbouring tasks -> those of both."""
    return tuple(
        Piece(merge([p.moments for p in pieces]), np.concatenate([p.cell_n for p in pieces]))
        for pieces in zip(*neighbours, strict=True)
    )


def _working_dtype(stored: np.dtype) -> type:
    """What the kernels see: float32 where that is exact, so that they are compiled for two dtypes only."""
    small = stored == np.float32 or (stored.kind in "ui" and stored.itemsize <= 2)
    return np.float32 if small else np.float64


def runs_of(code_n: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each run of equal codes."""
    edges = [0, *(np.flatnonzero(np.diff(code_n)) + 1).tolist(), len(code_n)]
    return list(pairwise(edges)) if len(code_n) else []


def add_rows(
    rows: Rows,
    start: int,
    code_n: np.ndarray,
    admitted_n: np.ndarray,
    chain: Sequence[Pass],
    slab_rows: int,
    given: Sequence[np.ndarray] | None = None,
) -> tuple[Piece, ...]:
    """One task: the rows from `start` on, of which `code_n` and `admitted_n` tell batch and use.

    Each pass of the chain sees the cells that the one before counted. Slabs without an admitted row are not
    read. `given` takes the cells' properties, one array per pass; without it they are returned.
    """
    code_n, admitted_n = np.asarray(code_n), np.asarray(admitted_n)
    codes = np.unique(code_n[admitted_n]).astype(np.int64)
    tables = [np.zeros((len(codes), rows.n_vars, 4)) for _ in chain]
    cells = list(given or [np.empty(len(code_n), dtype=what.dtype) for what in chain])
    for cell_n, what in zip(cells, chain, strict=True):
        cell_n[:] = what.empty
    n_b = np.zeros((len(chain), len(codes)), np.int64)
    for low in range(0, len(code_n), slab_rows):
        high = min(low + slab_rows, len(code_n))
        if not admitted_n[low:high].any():
            continue
        block = rows.read(start + low, start + high)
        data = block.data.astype(_working_dtype(block.dtype), copy=False)
        for a, b in runs_of(code_n[low:high]):
            mine = slice(low + a, low + b)
            here_n = admitted_n[mine]
            if not here_n.any():
                continue
            k = int(np.searchsorted(codes, code_n[low + a]))
            csr = (block.indptr[a : b + 1], block.indices, data)
            for step, what in enumerate(chain):
                what.add(csr, here_n, int(codes[k]), tables[step][k], cells[step][mine])
                here_n = what.counted(cells[step][mine], here_n)
                n_b[step, k] += np.count_nonzero(here_n)
    some = n_b > 0
    found = [Moments(codes[some[k]], n_b[k, some[k]], tables[k][some[k]]) for k in range(len(chain))]
    return tuple(
        Piece(moments, cell_n[:0] if given else cell_n) for moments, cell_n in zip(found, cells, strict=True)
    )


def run_pass(
    rows: Rows,
    code_n: np.ndarray,
    admitted_n: np.ndarray,
    *chain: Pass,
    resources: Resources,
    first: int = 0,
    title: str = "statistics",
) -> tuple[Piece, ...]:
    """One pass over the rows from `first` on.

    Parameters
    ----------
    code_n
        Batch code of each row, (n_obs - first,).
    admitted_n
        Rows that count, bool, likewise.
    chain
        What to add up; each sees the cells that the one before counted.
    first
        Row that the pass starts at.
    title
        For the progress bar.

    Returns
    -------
    For each of the chain: moments of the cells that it counted, and the property of each row
    (n_obs - first,).
    """
    from dask import delayed

    task, combine = delayed(add_rows, traverse=False), delayed(join_pieces)
    here = active_client() is None
    out = [_cell_array(resources, f"{title} {k}", len(code_n), what) for k, what in enumerate(chain)]
    level = []
    for low in range(0, max(1, len(code_n)), TASK_ROWS):
        mine = slice(low, low + TASK_ROWS)
        given = [cell_n[mine] for cell_n in out] if here else None
        level.append(
            task(rows, first + low, code_n[mine], admitted_n[mine], chain, resources.slab_rows, given)
        )
    n_tasks = len(level)
    while len(level) > 1:
        groups = [level[i : i + FAN_IN] for i in range(0, len(level), FAN_IN)]
        # pair by pair: the same sums in the same order, and each level holds the tables of two, not of all
        level = [reduce(lambda sum_so_far, piece: combine([sum_so_far, piece]), group) for group in groups]
    found = _compute(level[0], n_tasks, resources, title)
    return (
        tuple(replace(piece, cell_n=cell_n) for piece, cell_n in zip(found, out, strict=True))
        if here
        else found
    )


def _cell_array(resources: Resources, name: str, n: int, what: Pass) -> np.ndarray:
    folder = resources.scratch
    return new_array(None if folder is None else folder / name.replace(" ", "-"), n, what.dtype)


def _compute(result: Any, n_tasks: int, resources: Resources, title: str) -> tuple[Piece, ...]:
    """Run the graph on the active `distributed` client, else on threads of this process."""
    import dask

    if active_client() is not None:
        return dask.compute(result)[0]
    scheduler = "threads" if resources.threads > 1 else "synchronous"
    with _bar(n_tasks, resources, title):
        return dask.compute(result, scheduler=scheduler, num_workers=resources.threads)[0]


def _bar(n_tasks: int, resources: Resources, title: str) -> Any:
    """A dask callback that moves a bar with every task of rows."""
    from dask.callbacks import Callback
    from tqdm.auto import tqdm

    bar = tqdm(total=n_tasks, desc=title, unit="task", disable=None if resources.progress else True)

    class Bar(Callback):
        def _posttask(self, key: Any, result: Any, dsk: Any, state: Any, worker_id: Any) -> None:
            if str(key).startswith("add_rows"):
                bar.update()

        def _finish(self, dsk: Any, state: Any, errored: bool) -> None:
            bar.close()

    return Bar()
