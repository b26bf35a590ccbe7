"""A query as a model sees it: files of any format -> cells that pass, on its genes, block by block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.config import ProjectConfig
from streamx.errors import BatchError, EmptyError, UsageError, warn
from streamx.preprocess.qc import names_to_use
from streamx.schema import align, check_overlap
from streamx.store import cells, genes
from streamx.store.frame import as_text
from streamx.store.ingest import Source, check_counts, open_sources
from streamx.store.ingest.inputs import expand, unique_keys
from streamx.train.model import Model

_NAMED = re.compile(r"^([^=/\\]+)=(.+)$", re.DOTALL)
BLOCK_ROWS = 4096
_BYTES_PER_VALUE = 32  # of a block while it is checked, filtered and mapped
_LOSS_WORTH_A_WARNING = 0.2


@dataclass(frozen=True)
class Request:
    """A query's name and inputs, not opened yet."""

    name: str
    inputs: tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """Cells of one stretch of a query that pass the filter.

    Attributes
    ----------
    row_n
        Their rows in the query, int64.
    x_ng
        Counts on the model's genes, float32 CSR; genes that the query lacks are zero.
    total_n
        Total of each cell over its own genes, float64.
    batch_n
        Query batch of each cell, int64.
    """

    row_n: np.ndarray
    x_ng: sparse.csr_matrix
    total_n: np.ndarray
    batch_n: np.ndarray

    @property
    def nbytes(self) -> int:
        x = self.x_ng
        return x.data.nbytes + x.indices.nbytes + x.indptr.nbytes + 24 * len(self.row_n)


@dataclass(frozen=True)
class GeneMap:
    """What becomes of a source's columns.

    Attributes
    ----------
    merged
        Position of each column on the axis of unique names (-1: dropped); None if that is the columns.
    used_g
        Over that axis: counts for features and total.
    target_g
        Over that axis: position among the model's genes, or -1.
    """

    merged: np.ndarray | None
    used_g: np.ndarray
    target_g: np.ndarray
    found: int
    missing: tuple[str, ...]

    @property
    def overlap(self) -> float:
        return self.found / max(self.found + len(self.missing), 1)


@dataclass(eq=False)
class Query:
    """An opened query: one or several sources, one after the other.

    Attributes
    ----------
    batches
        Names of its batches; their codes are the query's own and never those of the reference.
    read
        All cells were looked at; then ``n_features_n`` and ``passed_n`` hold.
    """

    name: str
    sources: list[Source]
    maps: list[GeneMap]
    batches: list[str]
    code_n: np.ndarray
    read: bool = False
    n_features_n: np.ndarray = field(init=False)
    passed_n: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.n_features_n = np.zeros(self.n_obs, np.int64)
        self.passed_n = np.zeros(self.n_obs, bool)

    @property
    def n_obs(self) -> int:
        return sum(source.n_obs for source in self.sources)

    def close(self) -> None:
        for source in self.sources:
            source.close()


def requests(queries: Any) -> list[Request]:
    """What the user named -> queries by name.

    Parameters
    ----------
    queries
        Paths, globs, AnnData objects, or texts ``NAME=FILE``: each file is a query of its own, files under
        the same name form one. Or a mapping of names to one input or a list of them.

    Raises
    ------
    UsageError
        If nothing matches, or two queries would have the same name.
    """
    if isinstance(queries, (str, Path)) or hasattr(queries, "obs"):
        queries = [queries]
    named: dict[str, list[Any]] = {}
    single: list[tuple[Any, str | None]] = []
    pairs: list[tuple[str | None, Any]] = []
    if isinstance(queries, Mapping):
        for name, items in queries.items():
            several = isinstance(items, Sequence) and not isinstance(items, str)
            pairs += [(str(name), item) for item in (items if several else [items])]
    else:
        for item in queries:
            match = _NAMED.match(item) if isinstance(item, str) and not Path(item).exists() else None
            pairs.append((match.group(1), match.group(2)) if match else (None, item))
    for name, item in pairs:
        if name is None:
            single += [(member, None) for member in expand(item)]
        else:
            named.setdefault(name, []).extend(expand(item))
    found = [Request(key, (item,)) for key, item in unique_keys(single)]
    found += [Request(name, tuple(items)) for name, items in named.items()]
    names = [request.name for request in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two queries are called {name!r}", fix="give one another name: NAME=FILE")
        if name.startswith(".") or "/" in name or "\\" in name:
            raise UsageError(
                f"a query can't be called {name!r}", fix="a name without / and without a dot in front"
            )
    if not found:
        raise UsageError("no query", fix="name at least one file")
    return found


def open_query(request: Request, model: Model, config: ProjectConfig, *, scratch: Path, memory: int) -> Query:
    """Open a query's inputs and settle its genes and batches.

    Raises
    ------
    GeneError
        If a source shares less than half of the model's genes, or holds a name twice.
    BatchError
        If the batch column is absent or a cell has no batch.
    """
    alone = len(request.inputs) == 1
    sources = open_sources(
        {request.name: request.inputs[0]} if alone else list(request.inputs),
        layer=config.layer,
        modality=config.modality,
        scratch=scratch,
        memory=memory // 2,
    )
    try:
        maps = [map_genes(source, model, config) for source in sources]
        names = [_batch_names(source, config.batch_key, request.name) for source in sources]
        codes, batches = pd.factorize(np.concatenate(names), sort=True)
        return Query(request.name, sources, maps, [str(b) for b in batches], codes.astype(np.int64))
    except BaseException:
        for source in sources:
            source.close()
        raise


def map_genes(source: Source, model: Model, config: ProjectConfig) -> GeneMap:
    """How a source's columns become the model's genes, with the guards of :mod:`streamx.schema`."""
    names = genes.resolve_names(
        source.var_names,
        rule=config.duplicate_genes,
        strip_versions=config.strip_versions,
        where=source.location,
    )
    axis = list(dict.fromkeys(name for name in names if name is not None))
    merged = None if axis == names else genes.column_map(names, axis)
    used_g = names_to_use(axis, model.drop)
    alignment = align(axis, model.genes, strip_versions=config.strip_versions)
    check_overlap(alignment, axis, model.genes, where=source.location, strip_versions=config.strip_versions)
    target_g = np.where(used_g, alignment.columns, -1)
    return GeneMap(merged, used_g, target_g, alignment.found, alignment.missing)


def read_blocks(query: Query, model: Model, config: ProjectConfig, memory: int) -> Iterator[Block]:
    """The query's cells that pass, in order; every value that is read is checked.

    Raises
    ------
    BadValuesError
        At the first value that is no count (unless ``allow_float``).
    EmptyError
        At the end, if no cell passed; names a limit that would work.
    """
    least = model.min_features if config.min_features is None else config.min_features
    first = 0
    for source, gene_map in zip(query.sources, query.maps, strict=True):
        rows = int(min(BLOCK_ROWS, max(64, memory // 4 // (_BYTES_PER_VALUE * source.n_vars))))
        for low in range(0, source.n_obs, rows):
            x_ng = source.read(low, min(low + rows, source.n_obs))
            check_counts(x_ng, source=source, first_row=low, allow_float=config.allow_float)
            span = slice(first + low, first + low + x_ng.shape[0])
            block, features_n = _filter(x_ng, gene_map, model, least)
            query.n_features_n[span] = features_n
            query.passed_n[span] = features_n >= least
            kept = np.flatnonzero(query.passed_n[span])
            yield Block(kept + span.start, block.x_ng, block.total_n, query.code_n[span][kept])
        first += source.n_obs
    if not query.read:
        query.read = True
        _report_filter(query, least)


@dataclass(frozen=True)
class _Kept:
    x_ng: sparse.csr_matrix
    total_n: np.ndarray


def _filter(x_ng: sparse.csr_matrix, gene_map: GeneMap, model: Model, least: int) -> tuple[_Kept, np.ndarray]:
    """The cells of a slab that pass, on the model's genes; and the features of all of them."""
    if gene_map.merged is not None:
        x_ng = genes.map_columns(x_ng, gene_map.merged, len(gene_map.used_g))
    n = x_ng.shape[0]
    row = np.repeat(np.arange(n), np.diff(x_ng.indptr))
    used = gene_map.used_g[x_ng.indices]
    features_n = np.bincount(row[used], minlength=n)
    passed = features_n >= least
    narrow = genes.map_columns(x_ng, gene_map.target_g, len(model.genes))
    if model.total == "selected":
        total_n = np.asarray(narrow.sum(1, dtype=np.float64)).ravel()
    else:
        total_n = np.bincount(row[used], weights=x_ng.data[used].astype(np.float64), minlength=n)
    return _Kept(narrow[passed].astype(np.float32), total_n[passed]), features_n


def _report_filter(query: Query, least: int) -> None:
    left = int(query.passed_n.sum())
    features_n = query.n_features_n
    if left == 0:
        works = int(np.quantile(features_n, 0.1))
        raise EmptyError(
            f"none of {query.n_obs:,} cells has {least} detected features; half of them have at least "
            f"{int(np.median(features_n))}",
            where=query.name,
            fix=f"--min-features {max(works, 1)} keeps nine in ten",
        )
    if query.n_obs - left > _LOSS_WORTH_A_WARNING * query.n_obs:
        low, half, high = np.quantile(features_n, [0.05, 0.5, 0.95]).astype(int)
        warn(
            f"min_features {least} leaves {query.n_obs - left:,} of {query.n_obs:,} cells without a latent "
            f"(features per cell: 5 % {low}, median {half}, 95 % {high})",
            where=query.name,
            fix="a lower --min-features, if these are good cells of a shallow technology",
        )


def _batch_names(source: Source, batch_key: str | None, name: str) -> np.ndarray:
    """Name of each cell's batch: of the column, else the query's own name."""
    if batch_key is None:
        return np.full(source.n_obs, name, dtype=object)
    if batch_key not in source.obs.columns:
        raise BatchError(
            f"no obs column {batch_key!r}",
            where=source.location,
            fix=f"--batch-key with one of: {', '.join(map(str, source.obs.columns))}; or leave it out",
        )
    names = as_text(source.obs[batch_key])
    missing = names.isna().to_numpy()
    if missing.any():
        cell = source.obs_names[int(np.argmax(missing))]
        raise BatchError(
            f"{int(missing.sum()):,} cells have no batch in {batch_key!r}, the first is {cell!r}",
            where=source.location,
            fix="name their batch, or leave --batch-key out",
        )
    return names.to_numpy(dtype=object)


def query_obs(query: Query) -> pd.DataFrame:
    """obs of all cells, in input order, under their original names.

    Several files: the union of their columns, and a column with each cell's file. Names that occur twice get
    their file's key; the original ones are kept in a column then.
    """
    frames = {
        source.key: cells.rename_columns(source.obs.copy(), {}, source.location) for source in query.sources
    }
    obs = cells.unite(list(frames.values()), "")
    originals = obs.index
    if originals.has_duplicates:
        obs.index = pd.Index(cells.unique_names(frames), dtype=object)
        obs[cells.NAME] = originals.to_numpy(dtype=object)
    if len(frames) > 1:
        lengths = [len(frame) for frame in frames.values()]
        obs[cells.FILE] = pd.Categorical(np.repeat(list(frames), lengths), categories=sorted(frames))
    return obs
