"""An AnnData-Zarr hierarchy drafted in memory, as the objects to put in place.

anndata could write it, but then chunks, shards and dtypes would follow its version; ours are fixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamx.errors import InputError
from streamx.store.layout import (
    OBS_ROWS_PER_CHUNK,
    OBSM_ROWS_PER_CHUNK,
    OBSM_ROWS_PER_SHARD,
    column_codecs,
    expect_warnings,
)

if TYPE_CHECKING:
    import zarr

Objects = dict[str, bytes]


class Draft:
    """A zarr hierarchy being drafted in memory; `objects` are the bytes to put in place, key by key."""

    def __init__(self) -> None:
        from zarr.storage import MemoryStore

        expect_warnings()
        self._buffers: dict[str, Any] = {}
        self._groups: Objects = {}
        self.store = MemoryStore(store_dict=self._buffers)

    def group(self, path: str, attributes: Mapping[str, Any]) -> None:
        metadata = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
        self._groups[f"{path}/zarr.json".lstrip("/")] = json.dumps(metadata, indent=2).encode()

    def array(self, path: str, values: np.ndarray, attributes: Mapping[str, Any] | None = None) -> None:
        """One dense array, in one chunk up to 2^20 rows; wide matrices in shards of 64 k rows."""
        array = self.empty(path, values.shape, values.dtype, attributes)
        if values.size:
            array[...] = values

    def empty(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: Any,
        attributes: Mapping[str, Any] | None = None,
        **codecs: Any,
    ) -> zarr.Array:
        import zarr

        if "chunks" not in codecs:
            codecs = column_codecs() | _geometry(shape)
        return zarr.create_array(
            self.store,
            name=path,
            shape=shape,
            dtype=dtype,
            zarr_format=3,
            fill_value="" if dtype is str else 0,
            config={"write_empty_chunks": True},
            attributes=dict(attributes or {"encoding-type": "array", "encoding-version": "0.2.0"}),
            **codecs,
        )

    def strings(self, path: str, values: Any) -> None:
        values = np.asarray(values, dtype=object)
        attributes = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
        array = self.empty(path, values.shape, str, attributes)
        if len(values):
            array[...] = values.astype(np.dtypes.StringDType())

    def take(self) -> Objects:
        """The objects drafted since the last call, sorted (zarr adds them in any order)."""
        found = {key: bytes(buffer.to_bytes()) for key, buffer in self._buffers.items()} | self._groups
        for key in [key for key in self._buffers if not key.endswith("zarr.json")]:
            del self._buffers[key]
        return {key: found[key] for key in sorted(found)}

    def consolidated(self) -> Objects:
        """All objects, the root's metadata holding everyone's: one read opens the hierarchy.

        zarr's own consolidation lists members in the order in which its threads find them; sorted, the
        bytes depend on the content alone.
        """
        objects = self.take()
        suffix = "/zarr.json"
        nodes = {
            key[: -len(suffix)]: json.loads(data) for key, data in objects.items() if key.endswith(suffix)
        }
        root = json.loads(objects["zarr.json"])
        root["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": {path: nodes[path] for path in sorted(nodes)},
        }
        objects["zarr.json"] = json.dumps(root, indent=2).encode()
        return objects


def draft_anndata_shell(draft: Draft, shape: tuple[int, int], uns: Mapping[str, Any]) -> None:
    """The groups that every AnnData has, with a CSR matrix of this shape still without arrays."""
    mapping = {"encoding-type": "dict", "encoding-version": "0.1.0"}
    draft.group("", {"encoding-type": "anndata", "encoding-version": "0.1.0"})
    draft.group("X", {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)})
    for name in ("layers", "obsm", "obsp", "varm", "varp"):
        draft.group(name, mapping)
    draft_mapping(draft, "uns", uns)


def draft_mapping(draft: Draft, path: str, values: Mapping[str, Any]) -> None:
    """A dictionary of texts, numbers, flat lists and dictionaries; None is left out."""
    draft.group(path, {"encoding-type": "dict", "encoding-version": "0.1.0"})
    for name, value in values.items():
        key = f"{path}/{name}"
        if isinstance(value, Mapping):
            draft_mapping(draft, key, value)
        elif isinstance(value, str):
            array = draft.empty(key, (), str, {"encoding-type": "string", "encoding-version": "0.2.0"})
            array[...] = np.array(value, dtype=np.dtypes.StringDType())
        elif isinstance(value, (bool, int, float, np.number, np.bool_)):
            array = draft.empty(
                key,
                (),
                np.asarray(value).dtype,
                {"encoding-type": "numeric-scalar", "encoding-version": "0.2.0"},
            )
            array[...] = np.asarray(value)
        elif isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            draft.strings(key, list(value))
        elif value is not None:
            draft.array(key, np.asarray(value))


def _geometry(shape: tuple[int, ...]) -> dict[str, Any]:
    if not shape:
        return {"chunks": ()}
    if len(shape) == 1:
        return {"chunks": (max(1, min(shape[0], OBS_ROWS_PER_CHUNK)),)}
    rows = max(1, min(shape[0], OBSM_ROWS_PER_CHUNK))
    geometry: dict[str, Any] = {"chunks": (rows, *(max(1, n) for n in shape[1:]))}
    if shape[0] > rows:
        geometry["shards"] = (OBSM_ROWS_PER_SHARD, *shape[1:])
    return geometry


def draft_frame(draft: Draft, path: str, frame: pd.DataFrame) -> None:
    """Write a data frame: numbers, booleans, nullable ones, categoricals and strings."""
    attributes = {
        "encoding-type": "dataframe",
        "encoding-version": "0.2.0",
        "_index": "_index",
        "column-order": [str(name) for name in frame.columns],
    }
    draft.group(path, attributes)
    draft.strings(f"{path}/_index", frame.index.to_numpy())
    for name in frame.columns:
        draft_column(draft, f"{path}/{name}", frame[name])


def draft_column(draft: Draft, path: str, column: pd.Series) -> None:
    """Write one column in the AnnData encoding of its dtype."""
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        categories = dtype.categories
        draft.group(
            path,
            {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": bool(dtype.ordered)},
        )
        codes = np.asarray(column.cat.codes)
        draft.array(f"{path}/codes", codes)
        if categories.dtype.kind in "iufb":
            draft.array(f"{path}/categories", categories.to_numpy())
        else:
            draft.strings(f"{path}/categories", categories.astype(str))
    elif hasattr(dtype, "numpy_dtype") and dtype.kind in "iub":  # pandas's nullable integers and booleans
        kind = "nullable-boolean" if dtype.kind == "b" else "nullable-integer"
        draft.group(path, {"encoding-type": kind, "encoding-version": "0.1.0"})
        draft.array(f"{path}/values", column.to_numpy(dtype=dtype.numpy_dtype, na_value=0))
        draft.array(f"{path}/mask", column.isna().to_numpy())
    elif dtype.kind in "iufb":
        draft.array(path, column.to_numpy())
    elif pd.api.types.is_string_dtype(dtype) or dtype.kind == "O":
        missing = column.isna().to_numpy()
        text = column.astype(object).where(~missing, "").astype(str).to_numpy()
        if not missing.any():
            draft.strings(path, text)
            return
        draft.group(path, {"encoding-type": "nullable-string-array", "encoding-version": "0.1.0"})
        draft.strings(f"{path}/values", text)
        draft.array(f"{path}/mask", missing)
    else:
        raise InputError(
            f"dtype {dtype} can't be stored", where=f"column {path}", fix="convert it to text or numbers"
        )
