"""An AnnData-Zarr hierarchy drafted in memory, as the objects to put in place.

anndata could write it, but then chunks, shards and dtypes would follow its version; ours are fixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamx.store.encode import Values, column_chunk, shard_of
from streamx.store.layout import (
    OBS_CHUNKS_PER_SHARD,
    OBS_ROWS_PER_CHUNK,
    OBSM_ROWS_PER_CHUNK,
    OBSM_ROWS_PER_SHARD,
    column_codecs,
    expect_warnings,
)
from streamx.store.obs import Obs, Piece, as_obs, plain
from streamx.store.text import text_of

if TYPE_CHECKING:
    import zarr

Objects = dict[str, bytes]


class Draft:
    """A zarr hierarchy being drafted: metadata in memory, chunks wherever `put` puts them.

    Parameters
    ----------
    put
        Takes each object's key and its bytes, in pieces, as soon as it is encoded; None keeps them for
        :meth:`take`.
    """

    def __init__(self, put: Callable[..., None] | None = None) -> None:
        from zarr.storage import MemoryStore

        expect_warnings()
        self._buffers: dict[str, Any] = {}
        self._objects: Objects = {}
        self._put = put or self._keep
        self.store = MemoryStore(store_dict=self._buffers)

    def _keep(self, key: str, *data: bytes) -> None:
        self._objects[key] = b"".join(data)

    def group(self, path: str, attributes: Mapping[str, Any]) -> None:
        metadata = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
        self._objects[f"{path}/zarr.json".lstrip("/")] = json.dumps(metadata, indent=2).encode()

    def array(self, path: str, values: np.ndarray, attributes: Mapping[str, Any] | None = None) -> None:
        """One dense array that is in memory."""
        values = np.asarray(values)
        if not values.shape:
            self.empty(path, (), values.dtype, attributes)[...] = values
            return
        self.stream(path, values.shape, values.dtype, lambda a, b: values[a:b], attributes)

    def strings(self, path: str, values: Any) -> None:
        text = text_of(np.asarray(values, dtype=object))
        self.stream(path, (len(text),), str, lambda a, b: text[a:b], STRINGS)

    def stream(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: Any,
        read: Callable[[int, int], Values],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """An array whose rows are read, encoded and put in place chunk by chunk."""
        array = self.empty(path, shape, dtype, attributes)
        n, rows = shape[0], array.chunks[0]
        per_file = array.shards[0] if array.shards else rows
        if 0 in shape:
            return
        for number, first in enumerate(range(0, n, per_file)):
            last = min(first + per_file, n)
            chunks = [column_chunk(read(low, min(low + rows, n)), rows) for low in range(first, last, rows)]
            data = shard_of(chunks, per_file // rows) if array.shards else chunks
            self._put("/".join([path, "c", str(number), *"0" * (len(shape) - 1)]), *data)

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

    def take(self) -> Objects:
        """The objects that are kept, sorted (zarr adds them in any order)."""
        found = {key: bytes(buffer.to_bytes()) for key, buffer in self._buffers.items()} | self._objects
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


STRINGS = {"encoding-type": "string-array", "encoding-version": "0.2.0"}


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
    flat = len(shape) == 1
    rows = max(1, min(shape[0], OBS_ROWS_PER_CHUNK if flat else OBSM_ROWS_PER_CHUNK))
    geometry: dict[str, Any] = {"chunks": (rows, *(max(1, n) for n in shape[1:]))}
    if shape[0] > rows:
        per_file = rows * OBS_CHUNKS_PER_SHARD if flat else OBSM_ROWS_PER_SHARD
        geometry["shards"] = (min(per_file, -(-shape[0] // rows) * rows), *shape[1:])
    return geometry


def draft_frame(draft: Draft, path: str, frame: pd.DataFrame) -> None:
    """Write a data frame: numbers, booleans, nullable ones, categoricals and strings."""
    draft_obs(draft, path, as_obs(frame))


def draft_obs(draft: Draft, path: str, obs: Obs) -> None:
    """Write a table column by column, each by pieces of rows."""
    attributes = {
        "encoding-type": "dataframe",
        "encoding-version": "0.2.0",
        "_index": "_index",
        "column-order": list(obs.schema),
    }
    draft.group(path, attributes)
    draft.stream(f"{path}/_index".lstrip("/"), (obs.n_obs,), str, obs.names, STRINGS)
    for name, schema in obs.schema.items():
        where = f"{path}/{name}".lstrip("/")
        _draft_values(draft, where, obs.n_obs, schema, obs.columns[name], ordered=name in obs.ordered)


def draft_column(draft: Draft, path: str, column: pd.Series) -> None:
    """Write one column in the AnnData encoding of its dtype."""
    obs = as_obs(column.to_frame("x"))
    _draft_values(draft, path, len(column), obs.schema["x"], obs.columns["x"], ordered="x" in obs.ordered)


def _draft_values(
    draft: Draft, path: str, n: int, schema: Mapping[str, Any], read: Callable[[int, int], Piece], *,
    ordered: bool,
) -> None:  # fmt: skip
    """One column: its kind follows from its schema, and from whether anything of it can be missing."""
    values, missing = read(0, 0)
    dtype = values.dtype

    def rows(part: int) -> Callable[[int, int], Any]:
        return lambda a, b: read(a, b)[part]

    if schema["dtype"] == "category":
        draft.group(path, {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": ordered})
        draft.stream(f"{path}/codes", (n,), dtype, rows(0))
        categories, _ = plain(pd.Series(schema["categories"], dtype=None if schema["categories"] else object))
        if isinstance(categories, np.ndarray):
            draft.array(f"{path}/categories", categories)
        else:
            draft.stream(f"{path}/categories", (len(categories),), str, lambda a, b: categories[a:b], STRINGS)
        return
    attributes = STRINGS if dtype is str else None
    if missing is None:
        draft.stream(path, (n,), dtype, rows(0), attributes)
        return
    kind = "string-array" if dtype is str else "boolean" if np.dtype(dtype).kind == "b" else "integer"
    draft.group(path, {"encoding-type": f"nullable-{kind}", "encoding-version": "0.1.0"})
    draft.stream(f"{path}/values", (n,), dtype, rows(0), attributes)
    draft.stream(f"{path}/mask", (n,), bool, rows(1))
