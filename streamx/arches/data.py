"""Any data as a model takes them: AnnData objects, files, stores and views -> minibatches in row order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from streamx.arches.keys import Keys, with_protein_names
from streamx.config import ProjectConfig, parse_bytes
from streamx.errors import BatchError, UsageError
from streamx.loader.deliver import Minibatch
from streamx.models.cells import Cells
from streamx.project.counts import query_columns
from streamx.query import Block, Query, Request, lay_blocks, obs_rows, open_query, read_blocks
from streamx.schema import Alignment, Schema, align, check_overlap
from streamx.store import genes
from streamx.store.collection import Collection, open_collection
from streamx.store.ingest.inputs import expand
from streamx.store.location import open_location
from streamx.store.manifest import MARKER
from streamx.train.build import TAKES_ROWS
from streamx.train.cells import Columns, columns_of
from streamx.train.model import Model

ROWS = 4096  # per minibatch
ALL = "cells"  # name of a query whose cells are all of one batch


@dataclass(frozen=True, eq=False)
class Opened:
    """Cells as a model takes them.

    Attributes
    ----------
    n_obs
        All cells of the data.
    rows
        Which of them were asked for, int64, in the order asked for.
    names
        Names of those.
    cells_at
        Rows -> minibatches of the cells there, in that order, a row as often as it is named.
    column, columns
        Name of an obs column -> its values of all cells; names of those that there are.
    """

    n_obs: int
    rows: np.ndarray
    names: pd.Index
    cells_at: Callable[[np.ndarray], Iterator[Cells]]
    column: Callable[[str], pd.Series]
    columns: Sequence[str]

    def __iter__(self) -> Iterator[Cells]:
        """Minibatches of the cells asked for."""
        return self.cells_at(self.rows)


def as_collection(data: Any) -> Collection | None:
    """A store or view, also by its path; None for anything else."""
    if isinstance(data, Collection):
        return data
    if isinstance(data, (str, Path)) and open_location(data).exists(MARKER):
        return open_collection(data)
    return None


@contextmanager
def open_data(
    model: Model,
    data: Any,
    keys: Keys,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    whole: bool = True,
    memory: str = "4GB",
) -> Iterator[Opened]:
    """Data for a model, for the time of the block.

    Parameters
    ----------
    data
        An AnnData object; a path or a list of them; a store or view, or its path.
    keys
        Where they hold what the model asks for; what is not said is as the model has it.
    indices
        Rows wanted: numbers, in any order and as often as wanted, or a bool mask; None: all.
    whole
        Cells for decoder and loss; False: for the encoder alone, which may see no batch.

    Raises
    ------
    BatchError
        If the data have a batch that the model does not know.
    GeneError
        If they share less than half of its genes.
    UsageError
        If they lack a column, or the rows.
    """
    model = replace(model, schema=_with_a_batch(keys.spoken(model.schema)))
    collection = as_collection(data)
    if collection is not None:
        cells_at = _of_collection(model, collection, whole)
        row_n = rows_of(indices, collection.n_obs)
        names = collection.obs_names[row_n]
        columns: list[str] = collection.obs_columns
        yield Opened(collection.n_obs, row_n, names, cells_at, collection.obs_column, columns)
        return
    with tempfile.TemporaryDirectory(prefix="streamx-") as folder:
        query, config = open_files(model, data, keys, Path(folder), memory)
        try:
            row_n = rows_of(indices, query.n_obs)
            cells_at = _of_query(model, query, config, whole, parse_bytes(memory))
            every_n = np.arange(query.n_obs)
            names = obs_rows(query, every_n, []).index[row_n]

            columns = list(dict.fromkeys(str(c) for s in query.sources for c in s.cells.columns))

            def column(name: str) -> pd.Series:
                found = obs_rows(query, every_n, [name])
                if name not in found:
                    there = ", ".join(columns) or "none is there"
                    raise UsageError(f"no obs column {name!r}", where=query.name, fix=f"one of: {there}")
                return found[name]

            yield Opened(query.n_obs, row_n, names, cells_at, column, columns)
        finally:
            query.close()


def _with_a_batch(schema: Schema) -> Schema:
    """A model that was told of no batches has one."""
    return schema if schema.batches else replace(schema, batches=(ALL,), batch_key=None)


def _is_one_batch(schema: Schema) -> bool:
    """Whether all cells count as one batch, of whatever name."""
    return len(schema.batches) == 1 and schema.batch_key is None


def rows_of(indices: Sequence[int] | np.ndarray | None, n: int) -> np.ndarray:
    """Rows as int64, from numbers or a bool mask.

    Raises
    ------
    UsageError
        If there is no such row.
    """
    if indices is None:
        return np.arange(n)
    found = np.asarray(indices)
    if found.dtype == bool:
        if found.shape != (n,):
            raise UsageError(f"a mask of {len(found):,} for {n:,} cells", fix="one value per cell")
        return np.flatnonzero(found)
    found = found.astype(np.int64).ravel()
    if found.size and not (-n <= found.min() and found.max() < n):
        raise UsageError(f"no row {int(np.abs(found).max()):,}", fix=f"rows are 0 to {n - 1:,}")
    return np.where(found < 0, found + n, found)


def open_files(
    model: Model, data: Any, keys: Keys, scratch: Path, memory: str
) -> tuple[Query, ProjectConfig]:
    """An AnnData object or files as a query on the model's genes, no cell left out; to be closed."""
    items = data if isinstance(data, (list, tuple)) else [data]
    inputs = [member for item in items for member in expand(item)]
    if not isinstance(data, (list, tuple)) and hasattr(data, "obsm"):
        inputs = [with_protein_names(data, keys)]
    key, name = model.schema.batch_key, ALL
    if keys.batch_key is None and _is_one_batch(model.schema):
        key, name = None, model.schema.batches[0]
    config = ProjectConfig(layer=keys.layer, batch_key=key, min_features=0)
    request = Request(name, tuple(inputs))
    return open_query(request, model, config, scratch=scratch, memory=parse_bytes(memory)), config


# -- files and objects ---------------------------------------------------------------------------------


def _of_query(
    model: Model, query: Query, config: ProjectConfig, whole: bool, memory: int
) -> Callable[[np.ndarray], Iterator[Cells]]:
    try:
        columns = query_columns(model, query, whole=whole)
    except BatchError as error:
        raise BatchError(
            error.what,
            where=error.where,
            fix="load_query_data(data, this model), and train what it returns; or batch_key = a column that "
            f"names batches of the reference ({', '.join(model.batches[:3])}, ...)",
        ) from None
    laid: list[Any] = []

    def cells_at(row_n: np.ndarray) -> Iterator[Cells]:
        if np.array_equal(row_n, np.arange(query.n_obs)):
            yield from map(columns.cells, read_blocks(query, model, config, memory))
            return
        if not laid:  # the first time that single rows are asked for
            laid.append(
                lay_blocks(
                    read_blocks(query, model, config, memory), query.scratch / "rows", len(model.genes)
                )
            )
        first_b = np.cumsum([0, *(rows for rows, _ in laid[0].sizes)])
        for low in range(0, len(row_n), ROWS):
            yield columns.cells(_gathered(laid[0], first_b, row_n[low : low + ROWS]))

    return cells_at


def _gathered(laid: Any, first_b: np.ndarray, row_n: np.ndarray) -> Block:
    """The cells at some rows of laid blocks, each block read once."""
    order = np.argsort(row_n, kind="stable")
    block_n = np.searchsorted(first_b, row_n[order], side="right") - 1
    parts = []
    for number in np.unique(block_n).tolist():
        block, within = laid.block(number), row_n[order][block_n == number] - first_b[number]
        parts.append((block.x_ng[within], block.total_n[within], block.batch_n[within]))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    x_ng, total_n, batch_n = zip(*parts, strict=True)
    return Block(
        row_n, sparse.vstack(x_ng, "csr")[back], np.concatenate(total_n)[back], np.concatenate(batch_n)[back]
    )


# -- stores and views ----------------------------------------------------------------------------------


def _of_collection(
    model: Model, collection: Collection, whole: bool
) -> Callable[[np.ndarray], Iterator[Cells]]:
    where, names = str(collection.path), list(map(str, collection.var_names))
    found = None
    if tuple(names) != model.genes:
        found = align(names, model.genes)
        check_overlap(found, names, model.genes, where=where)
    columns = _columns(model, collection)
    sees = whole or getattr(model.module.config, "encode_covariates", True)
    if (columns.batch_b < 0).any() and sees and not _is_one_batch(model.schema):
        unknown = [name for name in collection.batches if name not in model.batches]
        raise BatchError(
            f"the model does not know {len(unknown)} of {len(collection.batches)} batches "
            f"({', '.join(unknown[:3])})",
            where=where,
            fix="load_query_data(data, this model), and train what it returns",
        )
    columns = replace(columns, batch_b=columns.batch_b.clamp(min=0))

    def cells_at(row_n: np.ndarray) -> Iterator[Cells]:
        for low in range(0, len(row_n), ROWS):
            yield columns.cells(_minibatch(model, collection, row_n[low : low + ROWS], found, columns))

    return cells_at


def _columns(model: Model, collection: Collection) -> Columns:
    """Codes of a collection's cells; unlabelled where it has no labels."""
    device = next(model.module.parameters()).device
    columns = columns_of(collection, replace(model.schema, protein_key=None), device)
    if model.schema.labels and columns.label_n is None:
        unlabelled_n = torch.full((collection.n_obs,), -1, dtype=torch.int8, device=device)
        columns = replace(columns, label_n=unlabelled_n)
    return replace(columns, protein_key=model.schema.protein_key)


def _minibatch(
    model: Model, collection: Collection, row_n: np.ndarray, found: Alignment | None, columns: Columns
) -> Minibatch:
    """The cells at some rows of a store or view, on the model's genes."""
    unique_n, back_n = np.unique(row_n, return_inverse=True)
    starts = np.flatnonzero(np.diff(unique_n, prepend=-2) != 1)
    ranges = [(int(run[0]), int(run[-1]) + 1) for run in np.split(unique_n, starts[1:])]
    x_ng: Any = collection.fetch(ranges)
    if found is not None:
        x_ng = genes.map_columns(x_ng, found.columns, found.n_target).astype(np.float32)
    x_ng = x_ng if np.array_equal(unique_n, row_n) else x_ng[back_n]
    bounds, code_r = collection.batch_runs
    batch_n = code_r[np.searchsorted(bounds, row_n, side="right") - 1].astype(np.int64)
    obsm: dict[str, Any] = {}
    device = columns.batch_b.device
    if columns.protein_key is not None:
        y_np = _proteins(model, collection, columns.protein_key, ranges)[back_n]
        obsm[columns.protein_key] = torch.as_tensor(y_np, device=device)
    if model.kind not in TAKES_ROWS or device.type != "cpu":
        x_ng = torch.from_numpy(x_ng.toarray()).to(device)
    return Minibatch(x_ng, batch_n, row_n, None, obsm)


def _proteins(
    model: Model, collection: Collection, key: str, ranges: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Counts of the model's proteins, float32; 0 where the collection has none."""
    proteins, n = model.schema.proteins, sum(stop - start for start, stop in ranges)
    out_np = np.zeros((n, len(proteins)), np.float32)
    if key in collection.modalities:
        found = align(map(str, collection.modalities[key]["names"]), proteins).columns
        y_np = np.concatenate([collection.read_obsm(key, *rows) for rows in ranges])
        out_np[:, found[found >= 0]] = y_np[:, found >= 0]
    return out_np
