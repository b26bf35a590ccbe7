"""What a collection consists of: the marker, its generations and their parts, as JSON objects.

``streamx.json`` (the marker) names the newest generation; a generation names its parts; a part names every
object that one commit added, with size and checksum. All but the marker are written once and never changed,
so a reader that opened one generation keeps reading that one. Nothing holds a time, a host or a path.

In a folder a writer holds the lock of the journal (:mod:`streamx.store.journal`). A bucket has no such lock:
there the names of all objects that a run writes hold a digest of the run (:func:`run_tag`), so that two runs
never write the same object unless they write the same bytes, and the conditional PUT of the marker makes
one generation live. Who comes second gets a :class:`~streamx.errors.LockedError`, and no reader a mixture.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from streamx.errors import BadFileError, IncompleteError, IntegrityError, StorageError
from streamx.store.location import RESTORE, Location, ObjectTable, crc32c, describe, is_there

FORMAT = 2
MARKER = "streamx.json"
# Where a commit puts its objects; what lies there and is in no manifest is left from an unfinished run.
FOLDERS = ("generations", "obs", "parts", "shards", "tables")


@dataclass(frozen=True)
class Shard:
    """One AnnData-Zarr: `path` below the store, cells and stored values in it."""

    path: str
    n_obs: int
    nnz: int


@dataclass(frozen=True)
class Part:
    """What one commit added; its rows lie in `runs` of one batch: (name, rows) each, in row order."""

    number: int
    n_obs: int
    nnz: int
    shards: tuple[Shard, ...]
    runs: tuple[tuple[str | None, int], ...]
    sources: tuple[dict[str, Any], ...]
    objects: ObjectTable
    tag: str = ""

    @property
    def obs_path(self) -> str:
        return f"obs/{self.number:06d}{self.tag}.zarr"


@dataclass(frozen=True)
class Generation:
    """A numbered, immutable state of a collection.

    Attributes
    ----------
    parts
        ``{"path", "bytes", "crc32c", "n_obs", "nnz", "n_shards", "maximum", "dtype"}`` of each, in row order.
    obs_schema
        column -> ``{"dtype": ..., "categories": [...]}``: the dtype that all parts are read as.
    overlays
        obs columns that were joined later: ``{"path", "n_obs", "columns", "digest"}``.
    tables
        name -> key of an ``.npy`` object (a view's scale, kept statistics).
    fingerprint
        Settings and inputs of the newest part: what a resumed run must have in common.
    objects
        What belongs to no part: tables, overlays, the manifests of the generations before.
    tag
        What the names of its newest objects end in (:func:`run_tag`).
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
    tag: str = ""

    @property
    def n_obs(self) -> int:
        return sum(part["n_obs"] for part in self.parts)

    @property
    def path(self) -> str:
        return f"generations/{self.number:06d}{self.tag}.json"


def dump(value: Any) -> bytes:
    """JSON bytes that depend on the value alone; dictionaries keep their order, as obs columns need."""
    return (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def dump_part(part: Part) -> tuple[str, bytes]:
    return f"parts/{part.number:06d}{part.tag}.json", dump(asdict(part))


def read_part(location: Location, entry: dict[str, Any]) -> Part:
    data = location.read(entry["path"])
    if [len(data), crc32c(data)] != [entry["bytes"], entry["crc32c"]]:
        raise _damaged(location, entry["path"])
    raw = json.loads(data)
    shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
    runs = tuple((name, rows) for name, rows in raw.pop("runs"))
    return Part(shards=shards, runs=runs, sources=tuple(raw.pop("sources")), **raw)


def run_tag(location: Location, fingerprint: dict[str, Any], base: Generation | None) -> str:
    """What the names of a run's objects end in: nothing where a lock keeps others out.

    It depends on all that decides their bytes, and on the generation that the run starts from: what was
    written for an older one can never become part of the collection any more.
    """
    if not location.shared:
        return ""
    libraries = [version(name) for name in ("zarr", "numcodecs")]
    start = None if base is None else asdict(base)
    digest = hashlib.blake2b(dump([fingerprint, start, libraries]), digest_size=6).hexdigest()
    return f"-{digest}"


def is_unfinished(key: str) -> bool:
    """Whether an object that is in no manifest may belong to a run that is under way elsewhere."""
    return re.match(rf"({'|'.join(FOLDERS)})/\d{{6,}}-[0-9a-f]{{12}}[./]", key) is not None


def commit(location: Location, generation: Generation, base: Generation | None) -> None:
    """Write the generation after `base`, make everything durable, then replace the marker: what counts.

    What an abandoned run has left goes too: before that where a lock keeps others out, else after it, when
    nobody who has written anything so far can win any more.

    Raises
    ------
    LockedError
        If another process has committed a generation after `base` meanwhile.
    """
    if base is not None:
        before = {base.path: describe(dump(asdict(base)))}
        generation = replace(generation, objects=generation.objects | before)
    keep = {generation.path, *expected_objects(location, generation)}
    strays: list[str] = []
    if location.shared:
        strays = _unnamed(location, keep, new=generation.path)
    else:
        _sweep(location, keep)
    data = dump(asdict(generation))
    location.write(generation.path, data)
    location.sync()
    former = None if base is None else _marker(base, dump(asdict(base)))
    location.replace(MARKER, _marker(generation, data), former)
    location.sync()
    location.delete(*strays)


def _marker(generation: Generation, data: bytes) -> bytes:
    marker = {"format": FORMAT, "kind": generation.kind, "generation": generation.number}
    return dump(marker | {"path": generation.path, "object": describe(data)})


def expected_objects(location: Location, generation: Generation) -> ObjectTable:
    """All objects of a generation but its own manifest and the marker."""
    expected = dict(generation.objects)
    for entry in generation.parts:
        part = read_part(location, entry)
        expected |= part.objects | {entry["path"]: describe(location.read(entry["path"]))}
    return expected


def sweep(location: Location, generation: Generation | None) -> None:
    """Delete what a hopeless run has left; in a bucket the next commit does, for it may be another's."""
    if not location.shared:
        named = () if generation is None else expected_objects(location, generation)
        _sweep(location, {*named, *([] if generation is None else [generation.path])})


def _sweep(location: Location, keep: set[str]) -> None:
    for folder in FOLDERS:
        if not any(key.startswith(f"{folder}/") for key in keep):
            location.delete_tree(folder)
        for key in location.list(folder):
            if key not in keep:
                location.delete(key)


def _unnamed(location: Location, keep: set[str], new: str) -> list[str]:
    """Objects that are not to be kept; those that are must be there, all but the new manifest.

    Raises
    ------
    StorageError
        If one is gone: a process that was taken for dead, or a person, may have deleted it.
    """
    there = {key for key in location.list() if key.partition("/")[0] in FOLDERS}
    lost = keep - there - {new}
    if lost:
        raise StorageError(
            f"{len(lost)} objects of this run are gone, the first is {min(lost)}",
            where=str(location),
            fix="run the same command again: it writes them anew",
        )
    return sorted(there - keep)


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
        if location.exists("zarr.json") or location.exists(".zgroup"):
            raise BadFileError(
                "is an AnnData-Zarr, no streamx store",
                where=str(location),
                fix="`streamx convert` takes it as an input; `streamx project` wrote it? Name its folder",
            )
        if location.journal.exists() or any(location.list(folder) for folder in FOLDERS):
            raise IncompleteError(
                "incomplete: its writing was interrupted",
                where=str(location),
                fix="resume: run the command that wrote it once more",
            )
        if location.exists("model.json"):
            raise BadFileError(
                "is a model, no streamx store",
                where=str(location),
                fix="name a store or view, such as the one that it was trained on",
            )
        if is_there(location) and _holds_latents(location):
            raise BadFileError(
                "is a folder of mapped queries, no streamx store",
                where=str(location),
                fix="streamx status (of `map`), transfer, metrics, plot and report take it",
            )
        what = "is no streamx store" if is_there(location) else "does not exist"
        raise BadFileError(what, where=str(location), fix="make one with `streamx convert FILES... -o STORE`")
    marked = location.read(MARKER)
    try:
        marker = json.loads(marked)
        if marker["format"] != FORMAT:
            newer = marker["format"] > FORMAT
            raise BadFileError(
                f"format {marker['format']}, and this streamx reads {FORMAT}",
                where=str(location),
                fix="upgrade streamx" if newer else "make it again with this version",
            )
        path, expected = str(marker["path"]), list(marker["object"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(location, MARKER) from error
    data = location.read(path)
    if describe(data) != expected:
        raise _damaged(location, path)
    raw = json.loads(data)
    generation = Generation(parts=tuple(raw.pop("parts")), overlays=tuple(raw.pop("overlays")), **raw)
    if marked != _marker(generation, data):  # no checksum covers the marker itself
        raise _damaged(location, MARKER)
    return generation


def _holds_latents(location: Location) -> bool:
    from streamx.store.latents import latent_names

    return any(location.exists(f"{name}/obsm/zarr.json") for name in latent_names(location))


def _damaged(location: Location, key: str) -> IntegrityError:
    return IntegrityError("bytes are not those that were written", where=f"{location}/{key}", fix=RESTORE)
