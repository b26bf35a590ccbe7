"""Differential expression on data: who is compared, one pass for raw counts, draws of chosen rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.arches.data import Opened, rows_of
from streamx.arches.evidence import Holder
from streamx.arches.expression import BatchNames, batches_of
from streamx.arches.state import generator_for, opened
from streamx.config import DifferentialConfig, build
from streamx.errors import UsageError
from streamx.models.cells import Cells
from streamx.models.sparse import Rows
from streamx.posterior.de import Draws, GroupSums, compare, draw, ranked
from streamx.posterior.expression import Asked, de_sampler
from streamx.preprocess.where import rows_where
from streamx.train.model import Model

REST = "Rest"
Groups = tuple[str, str, np.ndarray, np.ndarray]  # names of two groups, and the rows of each
_NAMES = {"pseudocounts": "pseudocount", "cred_interval_lvls": "intervals", "fdr": "fdr_target"}


def differential_expression(
    self: Holder,
    adata: Any = None,
    groupby: str | None = None,
    group1: str | Sequence[str] | None = None,
    group2: str | None = None,
    idx1: Any = None,
    idx2: Any = None,
    mode: str = "change",
    delta: float | None = 0.25,
    batch_size: int | None = None,
    all_stats: bool = True,
    batch_correction: bool = False,
    batchid1: BatchNames = None,
    batchid2: BatchNames = None,
    fdr_target: float = 0.05,
    silent: bool = True,
    protein_prior_count: float = 0.1,
    scale_protein: bool = False,
    sample_protein_mixing: bool = False,
    include_protein_background: bool = False,
    *,
    seed: int = 0,
    **settings: Any,
) -> pd.DataFrame:
    """Which features differ between groups of cells (:mod:`streamx.posterior.de`).

    At most ``n_samples`` cells per group are read for their draws; raw means take one pass over the data.

    Parameters
    ----------
    groupby, group1, group2
        obs column, and the values to compare; by default each with all other cells.
    idx1, idx2
        Rows of the groups instead: numbers, a bool mask, or an expression over obs as ``preprocess`` takes it
        with ``where``; ``idx2``: by default the rest.
    mode
        ``change`` or ``vanilla`` (scvi-tools' default for RNA since 1.4).
    batch_correction, batchid1, batchid2
        Decode the cells of each group as these batches; by default those that it has cells of.
    all_stats
        Means of raw counts.
    protein_prior_count, scale_protein, sample_protein_mixing, include_protein_background
        Of totalVI's proteins.
    settings
        Further fields of :class:`~streamx.config.DifferentialConfig`, also as scvi-tools calls them
        (``pseudocounts``, ``cred_interval_lvls``). Ours, for changes of a group's mean at the false discovery
        rate asked for: ``cells_per_draw=100, relative_to="median", delta=0.5`` (``benchmarks/de.py``).

    Returns
    -------
    Table with a row per feature (and comparison), by descending ``proba_de`` or ``bayes_factor``.

    Raises
    ------
    UsageError
        If there is no such column, value or row.
    """
    named = {_NAMES.get(name, name): value for name, value in settings.items()}
    main = {"mode": mode, "delta": delta, "fdr_target": fdr_target, "seed": seed}
    config = build(DifferentialConfig, main | {"batch_correction": batch_correction} | named)
    with opened(self.state, adata) as (model, cells):
        if idx1 is not None:
            groups = [_by_rows(cells, idx1, idx2)]
        else:
            groups = _by_column(cells, groupby, group1, group2)
        sums: list[GroupSums] = []
        if all_stats or config.pseudocount is None:
            sums = group_sums(model, cells, [rows for _, _, *both in groups for rows in both])
        asked = Asked(
            scale_protein=scale_protein,
            sample_mixing=sample_protein_mixing,
            include_background=include_protein_background,
        )
        sampler = de_sampler(
            model.module, cells.cells_at, asked, protein_prior_count, generator_for(model, seed)
        )
        tables = []
        for number, (name1, name2, rows1, rows2) in enumerate(groups):
            rng = np.random.default_rng([seed, number])
            drawn = []
            for rows, chosen in ((rows1, batchid1), (rows2, batchid2)):
                batches = _decoded_as(model, cells, rows, chosen) if batch_correction else None
                drawn.append(draw(sampler, rows, config.n_samples, rng, batches, config.cells_per_draw))
            both = (sums[2 * number], sums[2 * number + 1]) if sums else None
            table = _compared(model, drawn[0], drawn[1], config, rng, both, all_stats)
            if idx1 is None:
                table = table.assign(comparison=f"{name1} vs {name2}", group1=name1, group2=name2)
            tables.append(table)
    return pd.concat(tables)


def _compared(
    model: Model,
    one: Draws,
    two: Draws,
    config: DifferentialConfig,
    rng: np.random.Generator,
    sums: tuple[GroupSums, GroupSums] | None,
    all_stats: bool,
) -> pd.DataFrame:
    result = compare(one, two, config, rng, sums, n_shares=len(model.genes))
    if not all_stats:
        result = {name: value for name, value in result.items() if not name.startswith(("raw_", "non_"))}
    features = [*model.genes, *(model.schema.proteins if model.kind == "totalvi" else ())]
    return pd.DataFrame(result, index=pd.Index(features, dtype=object)).iloc[ranked(result)]


# -- who is compared -----------------------------------------------------------------------------------


def _by_rows(cells: Opened, idx1: Any, idx2: Any) -> Groups:
    first = _chosen(cells, idx1)
    second = np.setdiff1d(np.arange(cells.n_obs), first) if idx2 is None else _chosen(cells, idx2)
    return "One", "Two" if idx2 is not None else REST, first, second


def _chosen(cells: Opened, rows: Any) -> np.ndarray:
    if not isinstance(rows, str):
        return rows_of(rows, cells.n_obs)
    return np.flatnonzero(rows_where(rows, cells.column, cells.columns, cells.n_obs))


def _by_column(cells: Opened, groupby: str | None, group1: Any, group2: str | None) -> list[Groups]:
    if groupby is None:
        raise UsageError("no groups", fix="groupby = an obs column, or idx1 = rows")
    column = cells.column(groupby)
    name_n = column.astype(object).where(column.notna(), None).map(lambda v: None if v is None else str(v))
    value_n = name_n.to_numpy(dtype=object)
    known = sorted({name for name in value_n if name is not None})
    firsts = known if group1 is None else [group1] if isinstance(group1, str) else list(group1)
    for name in (*firsts, *([] if group2 is None else [group2])):
        if str(name) not in known:
            raise UsageError(f"no cell has {groupby} {name!r}", fix=f"one of: {', '.join(known[:10])}")
    groups = []
    for first in map(str, firsts):
        second_n = value_n != first if group2 is None else value_n == str(group2)
        rows = np.flatnonzero(value_n == first), np.flatnonzero(second_n)
        groups.append((first, REST if group2 is None else str(group2), *rows))
    return groups


def _decoded_as(model: Model, cells: Opened, row_n: np.ndarray, chosen: BatchNames) -> list[int]:
    """Codes of batches; by default those that the cells are of."""
    if chosen is not None:
        return [code for code in batches_of(model, chosen) if code is not None]
    found: set[int] = set()
    for minibatch in cells.cells_at(row_n):
        found |= set(minibatch.batch_n.unique().tolist())
    return sorted(found)


# -- raw counts ----------------------------------------------------------------------------------------


def group_sums(model: Model, cells: Opened, groups: Sequence[np.ndarray]) -> list[GroupSums]:
    """Sums of raw counts over groups of rows, from one pass over all cells; genes, then proteins."""
    of_n = sparse.vstack([_indicator(rows, cells.n_obs) for rows in groups], "csc")
    n_genes, with_proteins = len(model.genes), model.kind == "totalvi"
    n_features = n_genes + (len(model.schema.proteins) if with_proteins else 0)
    sums, nonzero, normalized = np.zeros((3, len(groups), n_features))
    normalized[:, n_genes:] = np.nan
    low = 0
    for minibatch in cells.cells_at(np.arange(cells.n_obs)):
        of_minibatch, x_ng = of_n[:, low : low + len(minibatch)], _counts(minibatch)
        total_n = np.asarray(x_ng.sum(1)).ravel()
        scaled_ng = sparse.diags(1e4 / np.maximum(total_n, 1)) @ x_ng
        sums[:, :n_genes] += (of_minibatch @ x_ng).toarray()
        nonzero[:, :n_genes] += (of_minibatch @ (x_ng > 0)).toarray()
        normalized[:, :n_genes] += (of_minibatch @ scaled_ng).toarray()
        if with_proteins and minibatch.protein_np is not None:
            y_np = minibatch.protein_np.cpu().numpy().astype(np.float64)
            sums[:, n_genes:] += of_minibatch @ y_np
            nonzero[:, n_genes:] += of_minibatch @ (y_np > 0)
        low += len(minibatch)
    sizes = [len(np.unique(rows)) for rows in groups]
    return [GroupSums(*parts) for parts in zip(sizes, sums, nonzero, normalized, strict=True)]


def _indicator(rows: np.ndarray, n: int) -> sparse.csr_matrix:
    """1 where a row is in the group, (1, n)."""
    rows = np.unique(rows)
    return sparse.csr_matrix((np.ones(len(rows)), (np.zeros(len(rows), int), rows)), shape=(1, n))


def _counts(cells: Cells) -> sparse.csr_matrix:
    x = cells.x_ng
    if isinstance(x, Rows):
        arrays = x.value_v.astype(np.float64), x.gene_v, x.first_n
        return sparse.csr_matrix(arrays, shape=(len(x), x.n_genes))
    return sparse.csr_matrix(x.cpu().numpy().astype(np.float64))
