"""New columns for cells that are already on disk: added so that no reader ever sees half of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.store.draft import Draft, draft_column
from streamx.store.location import Location, open_location

META = "zarr.json"


def amend(
    place: str | Path | Location,
    obs: Mapping[str, pd.Series | None],
    obsm: Mapping[str, np.ndarray | None] | None = None,
    uns: Mapping[str, Sequence[str] | None] | None = None,
) -> None:
    """Set columns of obs, matrices of obsm and lists of uns in an AnnData-Zarr v3; None removes.

    A name that exists already is first taken out of the list of columns, then its arrays are replaced, and
    last it is listed again. A process that dies in between leaves a file without the column, or with the old
    or new one whole; the same call repairs it. Every step is one atomic replacement, both for readers
    that use consolidated metadata and for those that don't.
    """
    location = open_location(place)
    nodes = {f"obs/{name}": value for name, value in obs.items()}
    nodes |= {f"obsm/{name}": value for name, value in (obsm or {}).items()}
    nodes |= {f"uns/{name}": value for name, value in (uns or {}).items()}
    order = [name for name in _attributes(location, "obs")["column-order"] if name not in obs]
    if any(location.list(node) for node in nodes):
        _list_columns(location, order)
        _consolidate(location, order, set(nodes), {})
        for node in nodes:
            location.delete(f"{node}/{META}")  # first, or the array would be there without its chunks
            location.delete_tree(node)
    written = _write(location, {node: value for node, value in nodes.items() if value is not None})
    order += [name for name, value in obs.items() if value is not None]
    _list_columns(location, order)
    _consolidate(location, order, set(nodes), written)


def _write(location: Location, nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Put all objects of these nodes in place, chunks before metadata; returns the metadata."""
    draft = Draft()
    for node, value in nodes.items():
        if node.startswith("obs/"):
            draft_column(draft, node, value)
        elif node.startswith("obsm/"):
            draft.array(node, np.asarray(value))
        else:
            draft.strings(node, list(value))
    objects = {
        key: data
        for key, data in draft.take().items()
        if any(key.startswith(f"{node}/") for node in nodes)  # not the parents, which exist
    }
    for key in sorted(objects, key=lambda key: (key.endswith(META), -key.count("/"), key)):
        location.write(key, objects[key])
    suffix = f"/{META}"
    return {
        key.removesuffix(suffix): json.loads(data) for key, data in objects.items() if key.endswith(suffix)
    }


def _attributes(location: Location, group: str) -> dict[str, Any]:
    return json.loads(location.read(f"{group}/{META}"))["attributes"]


def _list_columns(location: Location, order: list[str]) -> None:
    node = json.loads(location.read(f"obs/{META}"))
    if node["attributes"]["column-order"] != order:
        node["attributes"]["column-order"] = order
        location.write(f"obs/{META}", json.dumps(node, indent=2).encode())


def _consolidate(location: Location, order: list[str], gone: set[str], written: Mapping[str, Any]) -> None:
    """Bring the root's copy of everyone's metadata up to date, where there is one."""
    root = json.loads(location.read(META))
    if not root.get("consolidated_metadata"):
        return
    nodes = {
        path: node
        for path, node in root["consolidated_metadata"]["metadata"].items()
        if not any(path == name or path.startswith(f"{name}/") for name in gone)
    }
    nodes |= written
    nodes["obs"]["attributes"]["column-order"] = order
    root["consolidated_metadata"]["metadata"] = {path: nodes[path] for path in sorted(nodes)}
    location.write(META, json.dumps(root, indent=2).encode())
