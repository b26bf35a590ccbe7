"""Columns of cells as they are written: read by pieces of rows, so that no table is ever held whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import InputError
from streamx.store.frame import obs_schema
from streamx.store.text import Text, text_of

# values (of a categorical: codes, -1 for none) and, where any may be missing, which are
Piece = tuple[np.ndarray | Text, np.ndarray | None]


@dataclass(frozen=True)
class Obs:
    """Cells in their final order.

    Attributes
    ----------
    n_obs
        Cells.
    schema
        column -> dtype and categories, as in the manifest.
    names
        (start, stop) -> names of these cells.
    columns
        column -> (start, stop) -> its values for these cells.
    ordered
        Categoricals whose categories are in order.
    """

    n_obs: int
    schema: Mapping[str, dict[str, Any]]
    names: Callable[[int, int], Text]
    columns: Mapping[str, Callable[[int, int], Piece]]
    ordered: frozenset[str] = field(default=frozenset())

    def rows(self, first: int, stop: int) -> Obs:
        """The cells first..stop alone."""

        def shifted(read: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
            return lambda a, b: read(first + a, first + b)

        columns = {name: shifted(read) for name, read in self.columns.items()}
        return Obs(stop - first, self.schema, shifted(self.names), columns, self.ordered)


def as_obs(obs: Obs | pd.DataFrame) -> Obs:
    """A table in memory likewise."""
    if isinstance(obs, Obs):
        return obs

    def reader(column: pd.Series) -> Callable[[int, int], Piece]:
        values, missing = plain(column)
        return lambda a, b: (values[a:b], None if missing is None else missing[a:b])

    index = obs.index.to_numpy(dtype=object)
    columns = {str(name): reader(obs[name]) for name in obs.columns}
    ordered = frozenset(str(name) for name in obs.columns if getattr(obs[name].dtype, "ordered", False))
    return Obs(len(obs), obs_schema(obs), lambda a, b: text_of(index[a:b]), columns, ordered)


def plain(column: pd.Series) -> Piece:
    """A pandas column as values and what is missing.

    Raises
    ------
    InputError
        If its dtype has no place in AnnData.
    """
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return np.asarray(column.cat.codes), None
    if hasattr(dtype, "numpy_dtype") and dtype.kind in "iub":  # pandas's nullable integers and booleans
        return column.to_numpy(dtype=dtype.numpy_dtype, na_value=0), column.isna().to_numpy()
    if dtype.kind in "iufb":
        return column.to_numpy(), None
    if pd.api.types.is_string_dtype(dtype) or dtype.kind == "O":
        missing = column.isna().to_numpy()
        text = text_of(column.astype(object).where(~missing, "").astype(str).to_numpy())
        return text, missing if missing.any() else None
    raise InputError(
        f"dtype {dtype} can't be stored", where=f"column {column.name}", fix="convert it to text or numbers"
    )


def to_pandas(piece: Piece, schema: Mapping[str, Any]) -> pd.Series:
    """Values and what is missing, as a pandas column."""
    values, missing = piece
    if isinstance(values, Text):
        text = values.strings()
        if missing is not None:
            text[missing] = None
        return pd.Series(text, dtype=object)
    if schema["dtype"] == "category":
        return pd.Series(pd.Categorical.from_codes(values, pd.Index(schema["categories"], dtype=object)))
    if missing is None:
        return pd.Series(values)
    array = pd.arrays.BooleanArray if values.dtype.kind == "b" else pd.arrays.IntegerArray
    return pd.Series(array(values, missing))
