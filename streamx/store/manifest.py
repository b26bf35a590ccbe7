"""What a collection consists of: the marker, its generations and their parts, as JSON objects.

``streamx.json`` (the marker) names the newest generation; a generation names its parts; a part names every
object that one commit added, with size and CRC-32C. All but the marker are written once and never changed,
so a reader that opened one generation keeps reading that one. Nothing holds a time, a host or a path.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from streamx.errors import BadFileError, IncompleteError, IntegrityError
from streamx.store.location import Location, crc32c

FORMAT = 1
MARKER = "streamx.json"

ObjectTable = dict[str, list[Any]]  # key -> [bytes, crc32c]


@dataclass(frozen=True)
class Shard:
    """One AnnData-Zarr: `path` below the store, cells and stored values in it."""

    path: str
    n_obs: int
    nnz: int


@dataclass(frozen=True)
class Part:
    """What one commit added."""

    number: int
    n_obs: int
    nnz: int
    shards: tuple[Shard, ...]
    sources: tuple[dict[str, Any], ...]
    objects: ObjectTable

    @property
    def obs_path(self) -> str:
        return f"obs/{self.number:06d}.zarr"


@dataclass(frozen=True)
class Generation:
    """A numbered, immutable state of a collection.

    Attributes
    ----------
    parts
        ``{"path", "bytes", "crc32c", "n_obs", "nnz", "n_shards"}`` for each part, in row order.
    obs_schema
        column -> ``{"dtype": ..., "categories": [...]}``: the dtype that all parts are read as.
    overlays
        obs columns that were joined later: ``{"path", "n_obs", "columns"}``.
    tables
        name -> key of an ``.npy`` object (a view's scale, kept statistics).
    fingerprint
        Settings and inputs of each commit: what a resumed run must have in common.
    """

    kind: str
    number: int
    n_vars: int
    batch_key: str | None
    obs_schema: dict[str, dict[str, Any]]
    parts: tuple[dict[str, Any], ...]
    fingerprint: dict[str, Any]
    overlays: tuple[dict[str, Any], ...] = ()
    modalities: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    view: dict[str, Any] | None = None
    objects: ObjectTable = field(default_factory=dict)

    @property
    def n_obs(self) -> int:
        return sum(part["n_obs"] for part in self.parts)

    @property
    def path(self) -> str:
        return f"generations/{self.number:06d}.json"


def dump(value: Any) -> bytes:
    """JSON bytes that depend on the value alone; dictionaries keep their order, as obs columns need."""
    return (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def describe(data: bytes) -> list[Any]:
    return [len(data), crc32c(data)]


def dump_part(part: Part) -> tuple[str, bytes]:
    return f"parts/{part.number:06d}.json", dump(asdict(part))


def read_part(location: Location, entry: dict[str, Any]) -> Part:
    raw = json.loads(_checked(location, entry["path"], [entry["bytes"], entry["crc32c"]]))
    shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
    return Part(shards=shards, sources=tuple(raw.pop("sources")), **raw)


def commit(location: Location, generation: Generation) -> None:
    """Write the generation, make everything durable, then replace the marker: the one step that counts."""
    data = dump(asdict(generation))
    location.write(generation.path, data)
    location.sync()
    marker = {"format": FORMAT, "kind": generation.kind, "generation": generation.number}
    location.write(MARKER, dump(marker | {"path": generation.path, "object": describe(data)}))
    location.sync()


def read_generation(location: Location) -> Generation:
    """The newest generation of the collection at a location.

    Raises
    ------
    IncompleteError
        If its writing has not finished.
    BadFileError
        If this is no collection, or one of a newer format.
    IntegrityError
        If the manifest's bytes are not those that were written.
    """
    if not location.exists(MARKER):
        journal = location.root.with_name(location.root.name + ".journal")
        if journal.exists() or location.exists("shards"):
            raise IncompleteError(
                "incomplete: its writing was interrupted",
                where=str(location),
                fix="resume: run the command that wrote it once more",
            )
        what = "is no streamx store" if location.root.exists() else "does not exist"
        raise BadFileError(what, where=str(location), fix="make one with `streamx convert FILES... -o STORE`")
    try:
        marker = json.loads(location.read(MARKER))
        if marker["format"] > FORMAT:
            raise BadFileError(
                f"format {marker['format']} is newer than this streamx knows ({FORMAT})",
                where=str(location),
                fix="upgrade streamx",
            )
        path, expected = marker["path"], marker["object"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError("the marker is damaged", where=f"{location}/{MARKER}") from error
    raw = json.loads(_checked(location, path, expected))
    return Generation(parts=tuple(raw.pop("parts")), overlays=tuple(raw.pop("overlays")), **raw)


def _checked(location: Location, key: str, expected: list[Any]) -> bytes:
    data = location.read(key)
    if describe(data) != list(expected):
        raise IntegrityError(
            f"{len(data)} bytes, crc32c {crc32c(data)}; the manifest says {expected[0]} bytes, {expected[1]}",
            where=f"{location}/{key}",
            fix="restore the object from a copy, or convert again",
        )
    return data
