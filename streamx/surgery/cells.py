"""Cells that batches are learnt from, as views: of one file, or of all files that hold cells of a batch.

Rows lie by batch and, within, by the hash of the cells' names. So neither the order of cells in a file nor
how a batch is shared out over files matters for what is learnt from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BadValuesError, EmptyError
from streamx.project.counts import query_proteins
from streamx.query import Block, Query, lay_blocks, obs_rows
from streamx.store.collection import Collection
from streamx.store.pack import Content, write_part
from streamx.store.spill import Slab
from streamx.train.cells import category_codes
from streamx.train.model import Model

PLACE = "_streamx_place"  # of a cell among those of its file that pass
BLOCK_ROWS = 16_384

Read = Callable[[], tuple[Any, dict[str, np.ndarray]]]  # counts (CSR), and dense matrices by name


def lay_query(
    model: Model,
    query: Query,
    batches: Sequence[str],
    blocks: Iterable[Block],
    path: Path,
    options: dict[str, Any],
    *,
    new_labels: str,
    mask_missing: bool,
) -> Collection:
    """A view of the cells of some of a query's batches.

    Parameters
    ----------
    blocks
        The query's cells that pass; read once.
    options
        ``memory`` and ``threads``.
    new_labels
        ``refuse`` labels that the model does not know, or ``keep`` them.
    mask_missing
        Leave genes out that a file of the query lacks.

    Raises
    ------
    EmptyError
        If no cell of these batches passes.
    BadValuesError
        If a cell has an unknown label, or one of another batch an unknown level of a covariate.
    """
    kept = lay_blocks(blocks, query.scratch / "blocks", len(model.genes))
    wanted_b = np.isin(query.batches, batches)
    genes = np.arange(len(model.genes))
    if mask_missing:
        missing = {name for gene_map in query.maps for name in gene_map.missing}
        genes = np.array([g for g, name in enumerate(model.genes) if name not in missing])
    found, reads, place = [], [], 0
    measured = {name: np.zeros(len(model.schema.proteins), bool) for name in batches}
    for number, block in enumerate(kept):
        mine = np.flatnonzero(wanted_b[block.batch_n])
        _check_levels(model, query, block.row_n[~wanted_b[block.batch_n]])
        frame = obs_rows(query, block.row_n[mine], _columns(model))
        frame["batch"] = np.array(query.batches, dtype=object)[block.batch_n[mine]]
        frame[PLACE] = place + mine
        found.append(frame)
        reads.append(partial(_read_block, model, query, kept, number, mine, genes))
        if measured and model.schema.proteins:
            _note_measured(measured, query_proteins(model, query, block.row_n[mine]), frame["batch"])
        place += len(block.row_n)
    obs = pd.concat(found) if found else pd.DataFrame()
    if not len(obs):
        raise EmptyError(
            f"no cell of {', '.join(batches)} passes", where=query.name, fix="a lower --min-features"
        )
    _check_labels(model, query, obs, new_labels)
    pieces = list(zip(map(len, found), reads, strict=True))
    return _write(model, genes, obs, pieces, measured, path, options)


def _note_measured(measured: dict[str, np.ndarray], y_np: np.ndarray, batch_n: pd.Series) -> None:
    """A protein counts as measured in a batch with its first count there."""
    for name in batch_n.unique():
        measured[name] |= (y_np[(batch_n == name).to_numpy()] > 0).any(0)


def merge_cells(
    model: Model, views: Sequence[Collection], batch: str, path: Path, options: dict[str, Any]
) -> Collection:
    """A view of all cells of a batch, from those of several files, on the genes that all of these have."""
    found, reads = [], []
    shared = set.intersection(*({str(name) for name in view.var_names} for view in views))
    genes = np.array([g for g, name in enumerate(model.genes) if name in shared])
    measured_p = np.zeros(len(model.schema.proteins), bool)
    for view in views:
        if model.schema.protein_key is not None:
            measured_p |= np.array(view.modalities[model.schema.protein_key]["measured"][batch], bool)
        start, stop = rows_of(view, batch)
        found.append(view.obs.iloc[start:stop])
        for low, high in view.iter_rows(BLOCK_ROWS, start, stop):
            reads.append((high - low, partial(_read_view, model, view, low, high, genes)))
    return _write(model, genes, pd.concat(found), reads, {batch: measured_p}, path, options)


def rows_of(view: Collection, batch: str) -> tuple[int, int]:
    """Where the cells of a batch lie in a view of this room."""
    sizes = view.batch_sizes
    code = view.batches.index(batch)
    return int(sizes[:code].sum()), int(sizes[: code + 1].sum())


def _columns(model: Model) -> list[str]:
    """obs columns that the model asks for, those that a query may lack last."""
    schema = model.schema
    return [*(key for key, _ in schema.categories), *schema.continuous, *filter(None, [schema.label_key])]


def _read_block(
    model: Model, query: Query, kept: Any, number: int, mine: np.ndarray, genes: np.ndarray
) -> tuple[Any, dict[str, np.ndarray]]:
    block, key = kept.block(number), model.schema.protein_key
    dense = {} if key is None else {key: query_proteins(model, query, block.row_n[mine])}
    return _of_genes(block.x_ng[mine], genes), dense


def _read_view(
    model: Model, view: Collection, low: int, high: int, genes: np.ndarray
) -> tuple[Any, dict[str, np.ndarray]]:
    key = model.schema.protein_key
    chosen = view.var_names.get_indexer([model.genes[g] for g in genes])
    dense = {} if key is None else {key: view.read_obsm(key, low, high)}
    return _of_genes(view.read(low, high), chosen), dense


def _of_genes(x_ng: Any, genes: np.ndarray) -> Any:
    return x_ng if len(genes) == x_ng.shape[1] else x_ng[:, genes]


def _check_levels(model: Model, query: Query, row_n: np.ndarray) -> None:
    """Cells that are only projected have levels that the model knows; said before others are learnt from."""
    if len(row_n) and model.schema.categories:
        obs = obs_rows(query, row_n, [key for key, _ in model.schema.categories])
        for key, names in model.schema.categories:
            if key in obs:
                category_codes(obs[key], names, key=key, where=query.name)


def _check_labels(model: Model, query: Query, obs: pd.DataFrame, new_labels: str) -> None:
    """Labels that the model does not know are a mistake, unless they are said to be new."""
    key = model.schema.label_key
    if new_labels == "keep" or key is None or key not in obs or not model.schema.labels:
        return
    known = {*model.schema.labels, model.schema.unlabeled}
    other = sorted({str(label) for label in obs[key].dropna()} - known)
    if other:
        raise BadValuesError(
            f"{len(other)} labels in {key!r} that the reference does not know: {', '.join(other[:5])}",
            where=query.name,
            fix="rename them; or --new-labels keep (in obs: for the classifier they count as unlabelled)",
        )


def _write(
    model: Model,
    genes: np.ndarray,
    obs: pd.DataFrame,
    reads: Sequence[tuple[int, Read]],
    measured: dict[str, np.ndarray],
    path: Path,
    options: dict[str, Any],
) -> Collection:
    """A view of cells that come in pieces of so many rows each."""
    batches = sorted({str(name) for name in obs["batch"]})
    batch_n = pd.Categorical(obs["batch"].astype(str), categories=batches)
    hash_n = pd.util.hash_array(obs.index.to_numpy(dtype=object))
    order = np.lexsort((obs.index.to_numpy(dtype=str), hash_n, batch_n.codes))
    target_n = np.empty(len(obs), np.int64)
    target_n[order] = np.arange(len(obs))
    ends = np.cumsum([rows for rows, _ in reads])
    slabs = [
        Slab(f"{number:06d}", target_n[end - rows : end], read)
        for number, (end, (rows, read)) in enumerate(zip(ends.tolist(), reads, strict=True))
        if rows
    ]
    schema = model.schema
    obsm = {}
    if schema.protein_key is not None:
        masks = {name: measured[name].tolist() for name in batches}
        obsm = {schema.protein_key: (list(schema.proteins), masks)}
    content = Content(
        kind="view",
        obs=obs.assign(batch=batch_n).iloc[order],
        var=pd.DataFrame(index=[schema.genes[g] for g in genes]),
        batch_key="batch",
        fingerprint={"cells": len(obs)},
        obsm=obsm,
        view={"transform": {}, "parameters": {}, "recipe": {}},
    )
    return write_part(path, slabs, content, **options)
