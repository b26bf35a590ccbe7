"""Count models: the query through the encoder, with the codes that the model gave to its batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from streamx.config import ProjectConfig
from streamx.errors import BatchError, UsageError
from streamx.models.cells import Cells
from streamx.project.mapped import Mapped, no_latents, watched
from streamx.query import Block, Query, read_blocks
from streamx.store.columns import file_of
from streamx.store.filed import piece_rows
from streamx.store.ingest import Source
from streamx.store.scratch import new_array
from streamx.train.build import TAKES_ROWS, n_latent_of
from streamx.train.cells import category_codes, continuous_values, label_codes
from streamx.train.counts import latent_of
from streamx.train.feed import query_input
from streamx.train.model import Model


def settled(model: Model, config: ProjectConfig) -> ProjectConfig:
    """The settings as they are.

    Raises
    ------
    UsageError
        If they ask for what only SCALEX has.
    """
    if config.norm is not None or config.scale != ProjectConfig.scale:
        name = "scale" if config.norm is None else "norm"
        raise UsageError(f"{name} is a setting of SCALEX", where=str(model.path), fix="leave it out")
    return config


@torch.no_grad()
def map_cells(model: Model, query: Query, config: ProjectConfig, memory: int, progress: bool) -> Mapped:
    """Latents (and what scANVI says of the labels), in one pass over the query."""
    columns = query_columns(model, query)
    z_nk = no_latents(query, n_latent_of(model.module.config))
    predicted = _Predicted.of(model, query)
    for block in watched(query, read_blocks(query, model, config, memory), progress):
        if len(block.row_n):
            cells = columns.cells(block)
            z_nk[block.row_n] = latent_of(model.module, cells).cpu().numpy()
            predicted.add(block.row_n, cells)
    return Mapped(z_nk, columns=predicted.columns)


class _Predicted:
    """The label that the model's classifier gives to each cell, and its probability."""

    def __init__(self, model: Model, query: Query, classifies: bool) -> None:
        self.model, self.columns = model, dict[str, Any]()
        if classifies:
            self.code_n = new_array(query.scratch / "predicted", query.n_obs, np.int32)
            self.share_n = new_array(query.scratch / "probability", query.n_obs, np.float32)
            self.code_n[:], self.share_n[:] = -1, np.nan
            key = model.schema.label_key
            self.columns = {
                f"{key}_{model.kind}": (list(model.schema.labels), self.code_n),
                f"{key}_{model.kind}_probability": (None, self.share_n),
            }

    @classmethod
    def of(cls, model: Model, query: Query) -> _Predicted:
        return cls(model, query, hasattr(model.module, "predict"))

    def add(self, row_n: np.ndarray, cells: Cells) -> None:
        if self.columns:
            share_n, code_n = self.model.module.predict(cells).max(1)
            self.code_n[row_n], self.share_n[row_n] = code_n.cpu().numpy(), share_n.cpu().numpy()


class QueryColumns:
    """Batch codes and covariates of a query's cells, as the model's encoder takes them."""

    def __init__(
        self,
        model: Model,
        query: Query,
        batch_b: np.ndarray,
        category_nc: np.ndarray | None,
        continuous_nc: np.ndarray | None,
        label_n: np.ndarray | None = None,
    ) -> None:
        self.model, self.query, self.batch_b = model, query, batch_b
        self.category_nc, self.continuous_nc, self.label_n = category_nc, continuous_nc, label_n

    def cells(self, block: Block) -> Cells:
        """A block's cells; on the CPU as sparse rows where the model takes them."""
        module = self.model.module
        device = next(module.parameters()).device
        x_ng: Any = query_input(block.x_ng, device)
        if device.type == "cpu" and self.model.kind not in TAKES_ROWS:
            x_ng = x_ng.dense()

        proteins = self.model.schema.protein_key is not None

        def there(values: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values), device=device)

        return Cells(
            x_ng=x_ng,
            batch_n=there(self.batch_b[block.batch_n]),
            label_n=None if self.label_n is None else there(self.label_n[block.row_n]).long(),
            category_nc=None if self.category_nc is None else there(self.category_nc[block.row_n]).long(),
            continuous_nc=None if self.continuous_nc is None else there(self.continuous_nc[block.row_n]),
            protein_np=there(query_proteins(self.model, self.query, block.row_n)) if proteins else None,
        )


def query_proteins(model: Model, query: Query, row_n: np.ndarray) -> np.ndarray:
    """Protein counts of rows of a query on the model's proteins, float32; 0 where it has none."""
    names, key = model.schema.proteins, model.schema.protein_key
    out_np = np.zeros((len(row_n), len(names)), np.float32)
    file_n, within_n = file_of(row_n, [source.n_obs for source in query.sources])
    for f in np.unique(file_n).tolist():
        source, mine = query.sources[f], np.flatnonzero(file_n == f)
        if key is None or key not in source.obsm:
            continue
        low, high = int(within_n[mine].min()), int(within_n[mine].max()) + 1
        rows_np = source.read_obsm(key, low, high)[within_n[mine] - low]
        position = {name: p for p, name in enumerate(source.obsm[key])}
        found = [(p, position[name]) for p, name in enumerate(names) if name in position]
        if found:
            to, of = map(list, zip(*found, strict=True))
            out_np[np.ix_(mine, to)] = rows_np[:, of]
    return np.nan_to_num(out_np, copy=False)


def query_columns(model: Model, query: Query, *, whole: bool = False) -> QueryColumns:
    """What the encoder has to know of the query's cells; with ``whole`` also what decoder and loss have to.

    Raises
    ------
    BatchError
        If it sees batches (as a decoder always does), and the model knows one of the query's not.
    UsageError
        If a covariate's column is absent.
    BadValuesError
        If a covariate has a value that the model can't take.
    """
    position = {name: code for code, name in enumerate(model.batches)}
    encoder_sees = getattr(model.module.config, "encode_covariates", True)
    sees = whole or encoder_sees
    unknown = [name for name in query.batches if name not in position]
    if sees and unknown:
        some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        part = "encoder" if encoder_sees else "decoder"
        raise BatchError(
            f"the model's {part} sees batches, and does not know {len(unknown)} of {len(query.batches)} "
            f"({some})",
            where=query.name,
            fix="streamx surgery MODEL QUERY -o UPDATED adds them; or --batch-key with a column that names "
            f"batches of the reference ({', '.join(model.batches[:3])}, ...)",
        )
    batch_b = np.array([position.get(name, 0) for name in query.batches], np.int64)
    category_nc = continuous_nc = None
    schema = model.schema
    if sees and schema.categories:
        category_nc = new_array(
            query.scratch / "categories", query.n_obs * len(schema.categories), np.int32
        ).reshape(query.n_obs, -1)
        for c, (key, names) in enumerate(schema.categories):
            for low, high, column in _column(query, key):
                category_nc[low:high, c] = category_codes(column, names, key=key, where=query.name)
    if sees and schema.continuous:
        continuous_nc = new_array(
            query.scratch / "continuous", query.n_obs * len(schema.continuous), np.float32
        ).reshape(query.n_obs, -1)
        for c, key in enumerate(schema.continuous):
            for low, high, column in _column(query, key):
                continuous_nc[low:high, c] = continuous_values(column, key=key, where=query.name)
    label_n = _labels(model, query) if whole and schema.labels else None
    return QueryColumns(model, query, batch_b, category_nc, continuous_nc, label_n)


def _labels(model: Model, query: Query) -> np.ndarray:
    """Codes of the labels, int32; -1 where a cell, or its file, has none."""
    schema, first = model.schema, 0
    label_n = new_array(query.scratch / "labels", query.n_obs, np.int32)
    label_n[:] = -1
    for source in query.sources:
        if schema.label_key in source.cells.columns:
            for low, high in piece_rows(source):
                column = source.cells.rows(low, high)[schema.label_key]
                codes = label_codes(column, schema.labels, schema.unlabeled)
                label_n[first + low : first + high] = codes
        first += source.n_obs
    return label_n


def _column(query: Query, key: str) -> Iterator[tuple[int, int, pd.Series]]:
    """An obs column of all sources, piece by piece: first row, last row, values."""
    first = 0
    for source in query.sources:
        for low, high in piece_rows(source):
            yield first + low, first + high, _of_source(source, key, low, high)
        first += source.n_obs


def _of_source(source: Source, key: str, low: int, high: int) -> pd.Series:
    if key not in source.cells.columns:
        raise UsageError(
            f"no obs column {key!r}, which the model's encoder needs",
            where=source.location,
            fix=f"it has: {', '.join(map(str, source.cells.columns)) or 'none'}",
        )
    return source.cells.rows(low, high)[key]
