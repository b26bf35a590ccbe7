"""A collection (store or view) opened at one generation: ordered shards as one row space.

Reading is planned over plain row ranges (:func:`plan_reads`) and executed by one short loop.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.errors import IntegrityError, UsageError
from streamx.store.ahead import AT_ONCE
from streamx.store.frame import Group, cast, column_names, missing, read_column, read_frame
from streamx.store.genes import unpack_mask
from streamx.store.kept import NBYTES, NBYTES_OF_BUCKET, Kept
from streamx.store.layout import index_dtype
from streamx.store.location import RESTORE, Location, ObjectTable, describe, open_location
from streamx.store.manifest import Generation, Part, read_generation, read_part
from streamx.store.matrix import Allocate, Matrix, gather
from streamx.store.read import integrity, open_group, plan_reads
from streamx.store.text import Text, joined, text_of
from streamx.threads import run_all

if TYPE_CHECKING:
    import anndata


class Collection:
    """A store or view, read-only, at the generation that was newest when it was opened.

    Answers AnnData's own names: ``shape, n_obs, n_vars, obs, var, obs_names, var_names``.
    Reading is thread-safe; contiguous rows are cheap, single rows are not.

    Parameters
    ----------
    place
        Where it lies.
    verify
        Check the checksum of every chunk of counts that is read. Without, damaged bytes may pass as counts.
    """

    def __init__(self, place: str | Path | Location, *, verify: bool = True) -> None:
        self.location = open_location(place)
        self.verify = verify
        self._state: Generation = read_generation(self.location)

    # -- what it is ------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | str:
        """Folder, or URL."""
        return self.location.root

    @property
    def kind(self) -> str:
        return self._state.kind

    @property
    def generation(self) -> int:
        return self._state.number

    @property
    def manifest(self) -> Generation:
        return self._state

    @property
    def n_obs(self) -> int:
        return self._state.n_obs

    @property
    def n_vars(self) -> int:
        return self._state.n_vars

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_obs, self.n_vars

    @property
    def nnz(self) -> int:
        return sum(part["nnz"] for part in self._state.parts)

    @property
    def maximum(self) -> float:
        """The largest stored value."""
        return max((part["maximum"] for part in self._state.parts), default=0)

    @property
    def view(self) -> dict[str, Any] | None:
        """Of a view: its store, the store's generation, transform and parameters."""
        return self._state.view

    @property
    def modalities(self) -> dict[str, dict[str, Any]]:
        """Dense matrices in the same row order: name -> ``{"names": [...], "measured": {batch: [...]}}``."""
        return self._state.modalities

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to read the same generation; open files stay here."""
        return {"location": self.location, "verify": self.verify, "_state": self._state}

    def __repr__(self) -> str:
        return (
            f"streamx {self.kind} {str(self.path)!r}, generation {self.generation}: "
            f"{self.n_obs} cells x {self.n_vars} genes"
            + (f", {len(self.batches)} batches" if self.batch_key else "")
        )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        read = [partial(read_part, self.location, entry) for entry in self._state.parts]
        return tuple(run_all(read, AT_ONCE if self.location.shared else 1))

    @cached_property
    def part_starts(self) -> np.ndarray:
        """First row of each part and, last, the number of rows; int64."""
        return np.concatenate([[0], np.cumsum([part["n_obs"] for part in self._state.parts])]).astype(
            np.int64
        )

    @cached_property
    def sources(self) -> pd.DataFrame:
        """One row per input file: key, part, n_obs, n_genes, overlap, checksum."""
        rows = [
            {"part": part.number} | {k: v for k, v in source.items() if k != "measured"}
            for part in self.parts
            for source in part.sources
        ]
        return pd.DataFrame(rows)

    # -- genes and cells -------------------------------------------------------------------------------

    @cached_property
    def var(self) -> pd.DataFrame:
        with integrity(f"{self.path}/var"):
            frame = read_frame(self._group(0)["var"])
        frame.index.name = None
        return frame

    @property
    def var_names(self) -> pd.Index:
        return self.var.index

    @cached_property
    def obs_names(self) -> pd.Index:
        with integrity(f"{self.path}/obs"):
            pieces = [np.asarray(self._obs_group(k)["_index"][:]) for k in range(len(self.parts))]
        return pd.Index(np.concatenate(pieces).astype(object) if pieces else [], dtype=object)

    def cell_names(self, start: int = 0, stop: int | None = None) -> Text:
        """Names of the cells start..stop, as bytes."""
        with integrity(f"{self.path}/obs"):
            return joined(
                text_of(np.asarray(self._obs_group(piece)["_index"][low:high]).tolist())
                for piece, low, high in self._part_ranges(start, self.n_obs if stop is None else stop)
            )

    @property
    def obs_columns(self) -> list[str]:
        return list(self._state.obs_schema)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """All columns of all cells (read now; :meth:`obs_column` reads one)."""
        names = self.obs_names  # opens the parts once, before threads ask for them
        read = [partial(self.obs_column, name) for name in self.obs_columns]
        found = run_all(read, AT_ONCE if self.location.shared else 1)
        columns = {name: column.array for name, column in zip(self.obs_columns, found, strict=True)}
        return pd.DataFrame(columns, index=names)

    def obs_column(self, name: str, start: int = 0, stop: int | None = None) -> pd.Series:
        """Rows start..stop of one obs column, in the dtype that the newest generation gives it.

        Raises
        ------
        UsageError
            If there is no such column; lists those there are.
        """
        if name not in self._state.obs_schema:
            raise UsageError(
                f"no obs column {name!r}", where=str(self.path), fix=f"one of: {', '.join(self.obs_columns)}"
            )
        schema = self._state.obs_schema[name]
        stop = self.n_obs if stop is None else stop
        if not 0 <= start <= stop <= self.n_obs:
            raise UsageError(
                f"rows {start}..{stop}, but there are {self.n_obs}", where=f"obs column {name!r}"
            )
        pieces = []
        with integrity(f"{self.path}/obs/{name}"):
            overlay = next((o for o in reversed(self._state.overlays) if name in o["columns"]), None)
            if overlay is not None and start < overlay["n_obs"]:  # a later annotation hides what is below it
                group = open_group(self.location, overlay["path"], self._state.objects)
                high = min(stop, overlay["n_obs"])
                pieces.append(cast(read_column(group, name, start, high), schema))
                start = high
            for piece, low, high in self._part_ranges(start, stop):
                pieces.append(cast(self._stored(name, piece, low, high, schema), schema))
        return pd.concat(pieces, ignore_index=True) if pieces else missing(0, schema, name)

    @property
    def batch_key(self) -> str | None:
        return self._state.batch_key

    @property
    def batches(self) -> list[str]:
        """Names of the batches; a batch's code is its position here."""
        if self.batch_key is None:
            return []
        return [str(name) for name in self._state.obs_schema[self.batch_key]["categories"]]

    @cached_property
    def batch_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows lie in runs of one batch: bounds int64 (n_runs + 1,), batch codes int32 (n_runs,)."""
        position: dict[str | None, int] = {name: code for code, name in enumerate(self.batches)}
        runs = [run for part in self.parts for run in part.runs]
        bounds = np.cumsum([0, *(rows for _, rows in runs)], dtype=np.int64)
        return bounds, np.array([position.get(name, -1 if position else 0) for name, _ in runs], np.int32)

    @cached_property
    def batch_codes(self) -> np.ndarray:
        """int32, (n_obs,)."""
        bounds, code_r = self.batch_runs
        return np.repeat(code_r, np.diff(bounds))

    @property
    def batch_sizes(self) -> np.ndarray:
        """Cells of each batch, int64 (n_batches,)."""
        bounds, code_r = self.batch_runs
        known = code_r >= 0
        sizes = np.bincount(code_r[known], weights=np.diff(bounds)[known], minlength=len(self.batches))
        return sizes.astype(np.int64)

    @cached_property
    def measured_bg(self) -> np.ndarray:
        """bool, (n_batches, n_genes): measured in every file that holds cells of the batch."""
        measured = np.ones((max(1, len(self.batches)), self.n_vars), dtype=bool)
        position = {name: code for code, name in enumerate(self.batches)}
        for part in self.parts:
            for source in part.sources:
                mask = unpack_mask(source["measured"], self.n_vars)
                codes = [position[batch] for batch in source["batches"] if batch in position]
                measured[codes or ([] if position else [0])] &= mask
        return measured

    # -- values ----------------------------------------------------------------------------------------

    def read(
        self, start: int, stop: int, columns: np.ndarray | None = None, dtype: Any = np.float32
    ) -> sparse.csr_matrix:
        """Rows start..stop; see :meth:`fetch`."""
        return self.fetch([(start, stop)], columns, dtype)

    def fetch(
        self,
        ranges: Sequence[tuple[int, int]],
        columns: np.ndarray | None = None,
        dtype: Any = np.float32,
        order: np.ndarray | None = None,
    ) -> sparse.csr_matrix:
        """Row ranges as one CSR matrix.

        Parameters
        ----------
        ranges
            (start, stop) rows.
        columns
            Gene positions to keep, in the order wanted; None keeps all.
        dtype
            Dtype of the values (float32 rounds counts above 2^24; see :attr:`maximum`); ``"stored"`` gives
            the stored unsigned integers, whose arithmetic wraps.
        order
            Which of the rows read come out, and in which order, none twice; None: all, one after the other.

        Raises
        ------
        IntegrityError
            If stored bytes are missing or not those that were written.
        """
        indptr, indices, data = self.gather(ranges, order, None, dtype)
        x_ng = sparse.csr_matrix((len(indptr) - 1, self.n_vars), dtype=data.dtype)
        # set directly: the constructor would scan all indices once more
        x_ng.indptr, x_ng.indices, x_ng.data = indptr.astype(indices.dtype), indices, data
        x_ng.has_sorted_indices = x_ng.has_canonical_format = True
        return x_ng if columns is None else x_ng[:, np.asarray(columns)]

    def gather(
        self,
        ranges: Sequence[tuple[int, int]],
        order: np.ndarray | None,
        index_dtype: Any,
        dtype: Any,
        allocate: Allocate = np.empty,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three arrays of :meth:`fetch`; see :func:`streamx.store.matrix.gather`."""
        stored = isinstance(dtype, str)
        return gather(
            self._matrix,
            plan_reads(ranges, self._shard_starts),
            order,
            index_dtype,
            self.value_dtype if stored else dtype,
            allocate,
        )

    def keep(self, nbytes: int) -> None:
        """Keep up to so many bytes of what says where rows lie, if not more already: who reads in any order
        needs it again and again."""
        self._kept.parts.most = max(self._kept.parts.most, nbytes)

    @property
    def value_dtype(self) -> np.dtype:
        """The narrowest dtype that holds the stored values of all shards."""
        return np.result_type(*(np.dtype(part["dtype"]) for part in self._state.parts), np.uint8)

    def iter_rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive blocks."""
        stop = self.n_obs if stop is None else stop
        return ((low, min(low + block, stop)) for low in range(start, stop, block))

    def read_obsm(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop of a dense matrix."""
        if name not in self.modalities:
            raise UsageError(
                f"no modality {name!r}",
                where=str(self.path),
                fix=f"one of: {', '.join(self.modalities) or 'none'}",
            )
        stop = self.n_obs if stop is None else stop
        width = len(self.modalities[name]["names"])
        pieces = []
        for read in plan_reads([(start, stop)], self._shard_starts):
            group = self._group(read.shard)
            with integrity(f"{self.path}/{self._shard_paths[read.shard][0]}/obsm/{name}"):
                if f"obsm/{name}" in group:
                    pieces.append(np.asarray(group[f"obsm/{name}"][read.start : read.stop]))
                else:
                    pieces.append(np.zeros((read.stop - read.start, width), dtype=np.float32))
        return np.concatenate(pieces) if pieces else np.zeros((0, width), dtype=np.float32)

    def table(self, name: str) -> np.ndarray | None:
        """An array kept with the generation, or None."""
        key = self._state.tables.get(name)
        if key is None:
            return None
        data = self.location.read(key)
        if describe(data) != list(self._state.objects[key]):
            raise IntegrityError(
                "bytes are not those that were written", where=f"{self.path}/{key}", fix=RESTORE
            )
        return np.load(io.BytesIO(data), allow_pickle=False)

    @cached_property
    def scale_bg(self) -> np.ndarray | None:
        """Of a view: float32, (n_batches, n_genes), what each value is divided by after the transform."""
        return self.table("scale_bg")

    # -- out of here -----------------------------------------------------------------------------------

    def to_anndata(self, lazy: bool = False) -> anndata.AnnData:
        """All of it as one AnnData; `lazy` leaves X on disk, as a dask array of CSR blocks.

        X is float32, or float64 where a count is too large for float32 to hold it exactly.
        """
        import anndata

        dtype = np.float32 if self.maximum <= 1 << 24 else np.float64
        x: Any = self._dask(dtype) if lazy else self.read(0, self.n_obs, dtype=dtype)
        adata = anndata.AnnData(X=x, obs=self.obs.copy(), var=self.var.copy())
        for name, modality in self.modalities.items():
            adata.obsm[name] = pd.DataFrame(
                self.read_obsm(name), index=adata.obs_names, columns=modality["names"]
            )
        return adata

    def _dask(self, dtype: Any, rows: int = 1 << 16) -> Any:
        import dask.array as da
        from dask import delayed

        blocks = [
            da.from_delayed(
                delayed(self.read)(low, high, dtype=dtype),
                shape=(high - low, self.n_vars),
                dtype=dtype,
                meta=sparse.csr_matrix((0, 0), dtype=dtype),
            )
            for low, high in self.iter_rows(rows)
        ]
        return da.concatenate(blocks, axis=0)

    def summary(self) -> dict[str, Any]:
        """Cells, genes, batches, dtypes, bytes: what ``streamx info`` shows."""
        n_bytes = sum(size for part in self.parts for size, _ in part.objects.values())
        shards = [shard for part in self.parts for shard in part.shards]
        return {
            "kind": self.kind,
            "generation": self.generation,
            "n_cells": self.n_obs,
            "n_genes": self.n_vars,
            "n_batches": len(self.batches),
            "batch_key": self.batch_key,
            "batches": dict(
                zip(
                    self.batches,
                    self.batch_sizes.tolist(),
                    strict=True,
                )
            ),
            "n_shards": len(shards),
            "nnz": self.nnz,
            "value_dtype": str(self.value_dtype),
            "index_dtype": str(index_dtype(self.n_vars)),
            "bytes": n_bytes,
            "bytes_per_cell": round(n_bytes / max(1, self.n_obs), 1),
            "obs_columns": self.obs_columns,
            "modalities": {name: len(modality["names"]) for name, modality in self.modalities.items()},
            "view": self.view,
        }

    # -- inside ----------------------------------------------------------------------------------------

    @cached_property
    def _shard_starts(self) -> np.ndarray:
        sizes = [shard.n_obs for part in self.parts for shard in part.shards]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def _shard_paths(self) -> list[tuple[str, ObjectTable]]:
        return [(shard.path, part.objects) for part in self.parts for shard in part.shards]

    @cached_property
    def _kept(self) -> Kept:
        return Kept(NBYTES_OF_BUCKET if self.location.shared else NBYTES)

    @cached_property
    def _matrices(self) -> dict[int, Matrix]:
        return {}

    def _matrix(self, shard: int) -> Matrix:
        if shard not in self._matrices:
            path, expected = self._shard_paths[shard]
            self._matrices[shard] = Matrix(self.location, path, expected, self.verify, self._kept)
        return self._matrices[shard]

    def _group(self, shard: int) -> Group:
        return self._matrix(shard).group

    def _obs_group(self, piece: int) -> Group:
        """obs of a part."""
        part = self.parts[piece]
        return self._kept.parts.get(
            part.obs_path, partial(open_group, self.location, part.obs_path, part.objects)
        )

    def _part_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        for piece in range(len(self.parts)):
            first, last = int(self.part_starts[piece]), int(self.part_starts[piece + 1])
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield piece, low - first, high - first

    def _stored(self, name: str, piece: int, low: int, high: int, schema: dict[str, Any]) -> pd.Series:
        group = self._obs_group(piece)
        if name not in column_names(group):
            return missing(high - low, schema, name)
        return read_column(group, name, low, high)


def open_collection(place: str | Path | Location, *, verify: bool = True) -> Collection:
    """Open a store or a view (``sx.open``); see :class:`Collection`.

    Raises
    ------
    IncompleteError
        If it was not finished.
    BadFileError
        If this is no collection.
    """
    return Collection(place, verify=verify)
