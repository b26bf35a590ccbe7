"""A query as a model sees it: files of any format -> cells that pass, on its genes, block by block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.config import ProjectConfig
from streamx.errors import BatchError, EmptyError, GeneError, UsageError, warn
from streamx.preprocess.qc import names_to_use
from streamx.schema import REFUSE_BELOW, align, align_share, check_overlap
from streamx.store import cells, genes
from streamx.store.columns import Column, file_of, gathered
from streamx.store.filed import lay_files, piece_rows
from streamx.store.frame import as_text
from streamx.store.ingest import Source, check_counts, of_obsm, open_sources
from streamx.store.ingest.inputs import expand, unique_keys
from streamx.store.obs import Obs
from streamx.store.order import unique_names
from streamx.store.scratch import new_array, pieces
from streamx.train.build import takes_floats
from streamx.train.model import Model

Found = tuple[list[str] | None, np.ndarray]  # categories and codes (-1: none), or None and numbers
_NAMED = re.compile(r"^([^=/\\]+)=(.+)$", re.DOTALL)
BLOCK_ROWS = 4096
PASSED = "passed_qc"
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
    scratch: Path
    read: bool = False
    n_features_n: np.ndarray = field(init=False)
    passed_n: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.n_features_n = new_array(self.scratch / "features", self.n_obs, np.int32)
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
        If a source shares less than half of the model's genes, or holds a name twice, or lacks the obsm
        matrix that is to be its features.
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
        if config.obsm is not None:
            sources = [of_obsm(source, config.obsm) for source in sources]
        maps = [map_genes(source, model, config) for source in sources]
        batches, code_n = _batches(sources, config.batch_key, request.name, scratch / "batches")
        return Query(request.name, sources, maps, batches, code_n, scratch)
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
    try:
        check_overlap(
            alignment, axis, model.genes, where=source.location, strip_versions=config.strip_versions
        )
    except GeneError as error:
        wanted = set(model.genes)
        holds = [key for key, names in source.obsm.items() if align_share(names, wanted) >= REFUSE_BELOW]
        if config.obsm is None and holds:
            error.fix = f"--obsm {holds[0]}: there the model's features are"
        raise
    target_g = np.where(used_g, alignment.columns, -1)
    return GeneMap(merged, used_g, target_g, alignment.found, alignment.missing)


def read_blocks(query: Query, model: Model, config: ProjectConfig, memory: int) -> Iterator[Block]:
    """The query's cells that pass, in order; every value that is read is checked.

    Raises
    ------
    BadValuesError
        At the first value that is no count (unless ``allow_float``, or the model takes others).
    EmptyError
        At the end, if no cell passed; names a limit that would work.
    """
    least = model.min_features if config.min_features is None else config.min_features
    allow_float = config.allow_float or takes_floats(getattr(model.module, "config", None))
    first = 0
    for source, gene_map in zip(query.sources, query.maps, strict=True):
        rows = int(min(BLOCK_ROWS, max(64, memory // 4 // (_BYTES_PER_VALUE * source.n_vars))))
        for low in range(0, source.n_obs, rows):
            x_ng = source.read(low, min(low + rows, source.n_obs))
            check_counts(x_ng, source=source, first_row=low, allow_float=allow_float)
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
class Laid:
    """Blocks on disk, read one after the other."""

    folder: Path
    n_genes: int
    sizes: list[tuple[int, int]]  # rows and values of each

    @property
    def nbytes(self) -> int:
        """Bytes that they take in memory."""
        return sum(8 * values + 32 * rows for rows, values in self.sizes)

    def __iter__(self) -> Iterator[Block]:
        return map(self.block, range(len(self.sizes)))

    def block(self, number: int) -> Block:
        rows, values = self.sizes[number]
        before = self._before[number]

        def read(name: str, n: int) -> np.ndarray:
            dtype = np.dtype(_FIELDS[name])
            first = {"indptr": before[0] + number, "indices": before[1], "data": before[1]}.get(
                name, before[0]
            )
            return np.fromfile(self.folder / name, dtype, n, offset=int(first) * dtype.itemsize)

        row_n, total_n, batch_n = (read(name, rows) for name in ("row", "total", "batch"))
        arrays = read("data", values), read("indices", values), read("indptr", rows + 1)
        return Block(row_n, sparse.csr_matrix(arrays, shape=(rows, self.n_genes)), total_n, batch_n)

    @cached_property
    def _before(self) -> np.ndarray:
        """Rows and values of all blocks before each, int64 (n_blocks + 1, 2)."""
        sizes = np.array(self.sizes, np.int64).reshape(-1, 2)
        return np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(sizes, axis=0)])


_FIELDS: dict[str, Any] = {
    "row": np.int64,
    "total": np.float64,
    "batch": np.int64,
    "indptr": np.int32,
    "indices": np.int32,
    "data": np.float32,
}


def lay_blocks(blocks: Iterable[Block], folder: Path, n_genes: int) -> Laid:
    """Blocks, each written when it comes, for as many passes as it takes: memory holds one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = []
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _FIELDS}
        for block in blocks:
            x = block.x_ng
            values = (block.row_n, block.total_n, block.batch_n, x.indptr, x.indices, x.data)
            for (name, dtype), array in zip(_FIELDS.items(), values, strict=True):
                files[name].write(np.ascontiguousarray(array, dtype=dtype).data)
            sizes.append((len(block.row_n), x.nnz))
    return Laid(folder, n_genes, sizes)


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
    ones = model.transform.binarize  # then totals are of ones too
    if model.total == "selected":
        total_n = np.asarray(narrow.getnnz(1) if ones else narrow.sum(1, dtype=np.float64), float).ravel()
    elif model.total == "geometric":  # over the model's panel, as far as this file has it
        logs_n = np.asarray(narrow.astype(np.float64).log1p().sum(1)).ravel()
        total_n = np.exp(logs_n / max(1, gene_map.found))
    else:
        weights = None if ones else x_ng.data[used].astype(np.float64)
        total_n = np.bincount(row[used], weights=weights, minlength=n).astype(np.float64)
    return _Kept(narrow[passed].astype(np.float32), total_n[passed]), features_n


def _report_filter(query: Query, least: int) -> None:
    left = int(query.passed_n.sum())
    features_n = query.n_features_n
    if left == 0:
        works = int(quantiles(features_n, 0.1)[0])
        raise EmptyError(
            f"none of {query.n_obs:,} cells has {least} detected features; half of them have at least "
            f"{int(quantiles(features_n, 0.5)[0])}",
            where=query.name,
            fix=f"--min-features {max(works, 1)} keeps nine in ten",
        )
    if query.n_obs - left > _LOSS_WORTH_A_WARNING * query.n_obs:
        low, half, high = quantiles(features_n, 0.05, 0.5, 0.95).astype(int)
        warn(
            f"min_features {least} leaves {query.n_obs - left:,} of {query.n_obs:,} cells without a latent "
            f"(features per cell: 5 % {low}, median {half}, 95 % {high})",
            where=query.name,
            fix="a lower --min-features, if these are good cells of a shallow technology",
        )


def quantiles(count_n: np.ndarray, *q: float) -> np.ndarray:
    """numpy's quantiles of small counts, from how often each occurs."""
    times = np.zeros(1, np.int64)
    for low, high in pieces(len(count_n)):
        found = np.bincount(count_n[low:high], minlength=len(times))
        found[: len(times)] += times
        times = found
    ends = np.cumsum(times)
    at = np.array(q) * (ends[-1] - 1)
    below, above = (np.searchsorted(ends, place, side="right") for place in (np.floor(at), np.ceil(at)))
    return below + (above - below) * (at - np.floor(at))


def _batches(
    sources: list[Source], batch_key: str | None, name: str, path: Path
) -> tuple[list[str], np.ndarray]:
    """Names of the batches, sorted, and each cell's: of the column, else the query's own name."""
    n = sum(source.n_obs for source in sources)
    if batch_key is None:
        return [name], np.broadcast_to(np.int64(0), n)
    found: dict[str, int] = {}
    code_n, first = new_array(path, n, np.int32), 0
    for source in sources:
        for low, high in piece_rows(source):
            names = _batch_names(source, batch_key, low, high)
            codes, unique = pd.factorize(names)
            known = np.array([found.setdefault(str(b), len(found)) for b in unique], np.int32)
            code_n[first + low : first + high] = known[codes]
        first += source.n_obs
    batches = sorted(found)
    rank = np.empty(len(found), np.int32)
    rank[[found[b] for b in batches]] = np.arange(len(batches))
    for low, high in pieces(n):
        code_n[low:high] = rank[code_n[low:high]]
    return batches, code_n


def _batch_names(source: Source, batch_key: str, low: int, high: int) -> np.ndarray:
    """Name of the batch of the cells low..high of a source."""
    if batch_key not in source.cells.columns:
        raise BatchError(
            f"no obs column {batch_key!r}",
            where=source.location,
            fix=f"--batch-key with one of: {', '.join(map(str, source.cells.columns))}; or leave it out",
        )
    names = as_text(source.cells.rows(low, high)[batch_key])
    missing = names.isna().to_numpy()
    if missing.any():
        cell = source.obs_names[low + int(np.argmax(missing))]
        raise BatchError(
            f"{int(missing.sum()):,} cells have no batch in {batch_key!r}, the first is {cell!r}",
            where=source.location,
            fix="name their batch, or leave --batch-key out",
        )
    return names.to_numpy(dtype=object)


def query_obs(
    query: Query, order: np.ndarray | int, folder: Path, found: Mapping[str, Found] | None = None
) -> Obs:
    """obs of some cells, in the order given, under their original names; files for it lie in the folder.

    ``found``: further columns, a value per cell of the query.

    Several files: the union of their columns, and a column with each cell's file. Names that occur twice get
    their file's key; the original ones are kept in a column then.
    """
    sources, lengths = query.sources, [source.n_obs for source in query.sources]
    files: list[cells.Pieces] = [partial(_obs_pieces, source) for source in sources]
    schema, _ = cells.plan_columns(files, lengths, "")
    originals, laid = lay_files(sources, files, schema, folder)
    columns: dict[str, Any] = dict(laid)
    names = unique_names(originals, [source.key for source in sources], lengths, folder)
    if names is not originals:
        schema[cells.NAME], columns[cells.NAME] = {"dtype": "string"}, Column(originals, None)
    if len(sources) > 1:
        keys = sorted(source.key for source in sources)
        code_f = np.array([keys.index(source.key) for source in sources], np.int32)
        schema[cells.FILE] = {"dtype": "category", "categories": keys}
        columns[cells.FILE] = lambda rows: code_f[file_of(rows, lengths)[0]]
    schema[PASSED], columns[PASSED] = {"dtype": "bool"}, query.passed_n.__getitem__
    for name, (categories, value_n) in (found or {}).items():
        dtype = {"dtype": "float32"} if categories is None else {"dtype": "category"}
        schema[name] = dtype if categories is None else dtype | {"categories": categories}
        columns[name] = value_n.__getitem__
    return gathered(order, names, columns, schema)


def obs_rows(query: Query, row_n: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Columns of obs, those that there are, for ascending rows of a query; indexed by the cells' names."""
    file_n, within_n = file_of(row_n, [source.n_obs for source in query.sources])
    parts = [pd.DataFrame(index=pd.Index([], dtype=object))]
    for f in np.unique(file_n).tolist():
        source, rows = query.sources[f], within_n[file_n == f]
        low, high = int(rows[0]), int(rows[-1]) + 1
        there = [name for name in names if name in source.cells.columns]
        part = source.cells.rows(low, high)[there].iloc[rows - low]
        parts.append(part.set_axis(pd.Index(source.obs_names[low:high], dtype=object)[rows - low], axis=0))
    return parts[-1] if len(parts) == 2 else pd.concat(parts)


def _obs_pieces(source: Source) -> Iterator[pd.DataFrame]:
    for low, high in piece_rows(source):
        yield cells.rename_columns(source.cells.rows(low, high), {}, source.location)
