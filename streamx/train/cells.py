"""The cells of a view as count models take them: counts as stored, and codes for what obs says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from streamx.errors import BadValuesError, UsageError
from streamx.loader.deliver import Minibatch
from streamx.models.cells import Cells
from streamx.models.sparse import Rows
from streamx.schema import Schema
from streamx.store.collection import Collection


def label_codes(column: pd.Series, labels: Sequence[str], unlabeled: str | None) -> np.ndarray:
    """int32 codes of labels; -1 for missing ones, ``unlabeled`` and names that are no label of the model."""
    names = column.astype("object").where(column.notna(), None)
    position = {name: code for code, name in enumerate(labels) if name != unlabeled}
    return np.array([-1 if name is None else position.get(str(name), -1) for name in names], np.int32)


def category_codes(column: pd.Series, names: Sequence[str], *, key: str, where: str) -> np.ndarray:
    """int32 codes of a categorical covariate.

    Raises
    ------
    BadValuesError
        If a cell has no value, or one that the model does not know.
    """
    position = {name: code for code, name in enumerate(names)}
    texts = column.astype("object")
    codes = np.array([position.get(str(value), -1) for value in texts], np.int32)
    if (codes < 0).any():
        value = texts.iloc[int(np.argmax(codes < 0))]
        raise BadValuesError(
            f"{int((codes < 0).sum()):,} cells have no known {key}, the first {value!r}",
            where=where,
            fix=f"one of: {', '.join(names[:10])}",
        )
    return codes


def continuous_values(column: pd.Series, *, key: str, where: str) -> np.ndarray:
    """float32 values of a continuous covariate.

    Raises
    ------
    BadValuesError
        If a cell has none, or it is no number.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float32)
    if not np.isfinite(values).all():
        bad = int(np.argmin(np.isfinite(values)))
        raise BadValuesError(
            f"{key} of cell {bad} is {column.iloc[bad]!r}", where=where, fix="a finite number for every cell"
        )
    return values


@dataclass(frozen=True, eq=False)
class Columns:
    """What obs says of each cell of a collection, as tensors of codes on a model's device.

    Attributes
    ----------
    batch_b
        The model's code of each batch of the collection, int64; -1 where it knows none.
    label_n, category_nc, continuous_nc
        Of each row; None where the model has none.
    protein_key
        obsm matrix that comes along.
    """

    batch_b: Tensor
    label_n: Tensor | None
    category_nc: Tensor | None
    continuous_nc: Tensor | None
    protein_key: str | None

    def cells(self, minibatch: Minibatch) -> Cells:
        """A minibatch of the loader as the model takes it; a cell without proteins (NaN) has none of any."""
        x_ng = minibatch.x_ng
        row_n = torch.as_tensor(minibatch.row_n)
        of_rows = [None if t is None else t[row_n] for t in (self.label_n, self.category_nc)]
        label_n, category_nc = (None if t is None else t.long() for t in of_rows)
        key = self.protein_key
        return Cells(
            x_ng=x_ng if isinstance(x_ng, Tensor) else Rows.of(x_ng),
            batch_n=self.batch_b[torch.as_tensor(minibatch.batch_n)],
            label_n=label_n,
            category_nc=category_nc,
            continuous_nc=None if self.continuous_nc is None else self.continuous_nc[row_n],
            protein_np=None if key is None else torch.nan_to_num(torch.as_tensor(minibatch.obsm[key])),
        )


def columns_of(view: Collection, schema: Schema, device: torch.device) -> Columns:
    """The columns that a model asks for.

    Raises
    ------
    UsageError
        If an obs column, or the protein matrix, is absent.
    BadValuesError
        If a covariate has a value that the model can't take.
    """
    where = str(view.path)
    position = {name: code for code, name in enumerate(schema.batches)}
    batch_b = [position.get(name, -1) for name in view.batches] or [0]
    label_n = category_nc = continuous_nc = None
    if schema.label_key is not None and schema.label_key in view.obs_columns:
        codes = label_codes(view.obs_column(schema.label_key), schema.labels, schema.unlabeled)
        label_n = torch.from_numpy(codes.astype(np.min_scalar_type(-len(schema.labels) - 1)))
    if schema.categories:
        found = [
            category_codes(view.obs_column(key), names, key=key, where=where)
            for key, names in schema.categories
        ]
        category_nc = torch.from_numpy(np.stack(found, axis=1))
    if schema.continuous:
        numbers = [continuous_values(view.obs_column(k), key=k, where=where) for k in schema.continuous]
        continuous_nc = torch.from_numpy(np.stack(numbers, axis=1))
    if schema.protein_key is not None:
        check_proteins(view, schema.protein_key)

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return Columns(
        torch.tensor(batch_b, device=device),
        there(label_n),
        there(category_nc),
        there(continuous_nc),
        schema.protein_key,
    )


def check_proteins(view: Collection, key: str) -> None:
    """Refuse a view without this matrix of proteins."""
    if key not in view.modalities:
        raise UsageError(
            f"no obsm matrix {key!r}",
            where=str(view.path),
            fix=f"--protein-key with one of: {', '.join(view.modalities) or 'none is there; convert --obsm'}",
        )


def names_in(column: pd.Series, *, without: str | None = None) -> tuple[str, ...]:
    """Values of a column as sorted names, without missing ones."""
    present = column.dropna().astype("object").unique()
    return tuple(sorted({str(value) for value in present} - {without}))
