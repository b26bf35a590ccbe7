"""Files -> store: align genes, unite obs, order rows, then write (or append) one part."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.sparse import csr_matrix

from streamx.config import ConvertConfig, build, parse_bytes
from streamx.errors import EmptyError, InputError, UsageError, warn
from streamx.memory import give_back, steady_memory
from streamx.schema import align, check_overlap
from streamx.store import cells, genes
from streamx.store.collection import Collection
from streamx.store.filed import cells_of, lay_cells
from streamx.store.ingest import Source, open_sources
from streamx.store.journal import Journal
from streamx.store.location import Location, open_location
from streamx.store.manifest import FORMAT, read_generation
from streamx.store.needs import Needs, needs_of, sample_of
from streamx.store.order import names_digest, row_order
from streamx.store.pack import Content, start, write_part
from streamx.store.slabs import SourceError, blame, modalities, probe, slabs_of
from streamx.store.spill import Slab
from streamx.threads import run_all, thread_count

log = logging.getLogger("streamx")
T = TypeVar("T")

# What decides the bytes of a store; the rest (memory, threads, on_error) may change between runs.
_DECISIVE = (
    "batch_key", "join", "layer", "modality", "obsm", "strip_versions", "duplicate_genes", "allow_float",
    "preset", "shard_rows", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """A finished conversion, the inputs that it left out (``on_error="skip"``), and what was predicted."""

    collection: Collection
    skipped: tuple[InputError, ...] = ()
    needs: Needs | None = None


def convert(
    inputs: Sequence[Any] | Mapping[str, Any] | str | Path,
    output: str | Path | Location,
    *,
    append: bool = False,
    **settings: Any,
) -> Collection:
    """Make a store of single-cell files, or append files to one.

    Killed at any point, run it again with the same arguments: it resumes, and the store is byte-identical
    to that of an uninterrupted run.

    Parameters
    ----------
    inputs
        Files, globs, folders or AnnData objects in any mixture (h5ad, AnnData-Zarr, 10x HDF5 and mtx, csv,
        tsv, h5mu), or a mapping of file keys to them.
    output
        Folder of the store, or ``s3://bucket/prefix`` (see :func:`streamx.store.location.open_location`).
    append
        Add to an existing store: genes are aligned to its axis, categories only grow, and the result is its
        next generation.
    **settings
        Fields of :class:`streamx.config.ConvertConfig`.

    Returns
    -------
    Collection
        The store, opened.

    Raises
    ------
    InputError
        For input that can't be used: broken files, values that are no counts, duplicate or foreign genes,
        no batch; each says where and how to mend it.
    StorageError
        If an unfinished run had other settings, or another process writes there.
    """
    return convert_files(inputs, output, append=append, **settings).collection


def convert_files(
    inputs: Sequence[Any] | Mapping[str, Any] | str | Path,
    output: str | Path | Location,
    *,
    append: bool = False,
    **settings: Any,
) -> Converted:
    """Like :func:`convert`, and also say which inputs were left out."""
    config: ConvertConfig = build(ConvertConfig, settings)
    if config.shard_rows < 1:
        raise UsageError(f"shard_rows = {config.shard_rows}", fix="at least 1; a million is usual")
    steady_memory()
    memory = parse_bytes(config.memory)
    location = open_location(output)
    if append:
        read_generation(location)  # nothing is made beside a store that isn't there
    skipped: list[InputError] = []
    with Journal(location) as journal, ExitStack() as stack:
        base = Collection(location) if append else None
        if base is not None:
            config = _like(base, config)
        listed = [inputs] if isinstance(inputs, (str, Path)) or hasattr(inputs, "obs_names") else inputs
        sources = open_sources(
            listed,
            layer=config.layer,
            modality=config.modality,
            scratch=journal.ingest,
            memory=memory // 4,
            failed=skipped if config.on_error == "skip" else None,
        )
        for source in sources:
            stack.callback(source.close)
        several = len(sources) + len(skipped) > 1
        checksums, sources = _while_good(
            partial(_checksums, thread_count(config.threads)), sources, config, skipped
        )
        fingerprint = _fingerprint(sources, checksums, several, base, config)
        finished = start(journal, fingerprint, append=append)
        if finished is None:
            write = partial(_write, location, journal, base, config, memory, fingerprint)
            (collection, needs), _ = _while_good(write, sources, config, skipped)
        else:
            needs = None
            log.info("%s is complete already", location)
            collection = finished
            skipped += _left_out(finished, fingerprint)
    for error in skipped:
        warn(f"left out: {error.what}", where=error.where, fix=error.fix)
    return Converted(collection, tuple(skipped), needs)


def _while_good(
    work: Callable[[list[Source]], T], sources: list[Source], config: ConvertConfig, skipped: list[InputError]
) -> tuple[T, list[Source]]:
    """The work's result, done without the inputs that spoil it where that is asked for; and those left."""
    while sources:
        try:
            return work(sources), sources
        except SourceError as failure:
            if config.on_error != "skip":
                raise failure.error from failure.error.__cause__
            skipped.append(failure.error)
            sources = [source for source in sources if source.key != failure.source.key]
    raise EmptyError(
        f"no input is left, the first of {len(skipped)} is {skipped[0]}" if skipped else "no input",
        fix="mend one of them",
    )


def _write(
    location: Location,
    journal: Journal,
    base: Collection | None,
    config: ConvertConfig,
    memory: int,
    fingerprint: dict[str, Any],
    sources: list[Source],
) -> tuple[Collection, Needs | None]:
    content, slabs = _plan(sources, base, config, memory, fingerprint, journal.rows)
    written = write_part(
        location,
        slabs,
        content,
        preset=config.preset,
        shard_rows=config.shard_rows,
        memory=memory,
        threads=config.threads,
        append=base is not None,
        journal=journal,
    )
    return written, content.needs


def _left_out(collection: Collection, fingerprint: dict[str, Any]) -> list[InputError]:
    """The inputs that the run which wrote this store has skipped."""
    held = {source["checksum"] for part in collection.parts for source in part.sources}
    return [
        InputError(
            "is not in the store: an earlier run left it out", where=key, fix="mend it, then --append it"
        )
        for key, entry in fingerprint["inputs"].items()
        if entry["checksum"] not in held
    ]


def _like(base: Collection, config: ConvertConfig) -> ConvertConfig:
    """The settings of an append: what the store has decided stays."""
    if base.kind != "store":
        raise UsageError("is a view; files are appended to stores", where=str(base.path))
    before = base.manifest.fingerprint["settings"]
    if config.batch_key not in (None, before["batch_key"], base.batch_key):
        raise UsageError(
            f"--batch-key {config.batch_key}, but the store's batches are {base.batch_key!r}",
            where=str(base.path),
            fix="leave --batch-key out; --obs-map renames a column of the new file",
        )
    return replace(
        config,
        preset=before["preset"],
        seed=before["seed"],
        batch_key=before["batch_key"],
        strip_versions=config.strip_versions or before["strip_versions"],
    )


def _checksums(threads: int, sources: list[Source]) -> dict[str, str]:
    def checksum(source: Source) -> str:
        with blame(source):
            return source.checksum()

    found = run_all([partial(checksum, source) for source in sources], threads, "checksums")
    checksums = {source.key: value for source, value in zip(sources, found, strict=True)}
    first: dict[str, str] = {}
    for source in sources:
        twin = first.setdefault(checksums[source.key], source.key)
        if twin != source.key:
            warn(f"holds the same as {twin!r}: each of its cells will occur twice", where=source.location)
    return checksums


def _fingerprint(
    sources: list[Source],
    checksums: dict[str, str],
    several: bool,
    base: Collection | None,
    config: ConvertConfig,
) -> dict[str, Any]:
    settings: dict[str, Any] = {name: getattr(config, name) for name in _DECISIVE}
    settings["obsm"] = list(config.obsm)
    known = {source.key for source in sources} | (set() if base is None else set(base.sources["key"]))
    settings["obs_map"] = _read_obs_map(config, known)
    settings["batches_are_files"] = (
        (config.batch_key is None and several) or config.batch_key == cells.FILE
        if base is None
        else base.manifest.fingerprint["settings"]["batches_are_files"]
    )
    inputs = {source.key: {"checksum": checksums[source.key], "n_obs": source.n_obs} for source in sources}
    return {"format": FORMAT, "settings": settings, "inputs": inputs}


def _read_obs_map(config: ConvertConfig, known: set[str]) -> dict[str, dict[str, str]]:
    """The map of a JSON file, for files of these keys (a file that was left out may be among its keys)."""
    if config.obs_map is None:
        return {}
    try:
        value = json.loads(Path(config.obs_map).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"can't be read: {error}", where=config.obs_map, fix="write a JSON object"
        ) from error
    if not isinstance(value, dict) or not all(isinstance(names, dict) for names in value.values()):
        raise UsageError(
            "is no map of file keys to {column: new name}",
            where=config.obs_map,
            fix='write it like {"file1": {"celltype": "cell_type"}}',
        )
    unknown = sorted(value.keys() - known)
    if unknown and config.on_error == "stop":
        raise UsageError(
            f"names the files {unknown}", where=config.obs_map, fix=f"the files are {sorted(known)}"
        )
    return value


def _plan(
    sources: list[Source],
    base: Collection | None,
    config: ConvertConfig,
    memory: int,
    fingerprint: dict[str, Any],
    folder: Path,
) -> tuple[Content, list[Slab]]:
    """Everything that names and obs decide, before a value is read; arrays over cells lie in the folder."""
    keys = _file_keys(sources, base, fingerprint)
    axes = [_axis_of(source, config) for source in sources]
    axis = list(base.var_names) if base is not None else genes.join_genes(axes, config.join)
    columns = [genes.column_map(names, axis) for names in axes]
    files, batch_key = cells_of(sources, keys, fingerprint["settings"])
    lengths = [source.n_obs for source in sources]
    schema, batches = cells.plan_columns(
        files,
        lengths,
        batch_key,
        base.manifest.obs_schema if base is not None else None,
        base.obs_column if base is not None else None,
    )
    laid = lay_cells(sources, files, keys, schema, base, folder)
    checksums = [fingerprint["inputs"][source.key]["checksum"] for source in sources]
    starts = np.cumsum([0, *lengths]).tolist()
    digests = [
        names_digest(laid.names_of(first, first + source.n_obs), source.var_names)
        for source, first in zip(sources, starts, strict=False)
    ]
    codes = laid.column(batch_key)
    order, destination = row_order(codes, digests, checksums, lengths, config.seed, folder)
    give_back()  # what names and columns have left, before rows are looked at
    obsm = modalities(sources, config.obsm, codes, schema[batch_key]["categories"], base)
    entries = [
        _source_entry(source, key, names, axis, cols, sorted(mine), checksum, base, config)
        for source, key, names, cols, mine, checksum in zip(
            sources, keys, axes, columns, batches, checksums, strict=True
        )
    ]
    slabs: list[Slab] = []
    seen: list[csr_matrix] = []
    for source, key, cols, first in zip(sources, keys, columns, starts, strict=False):
        rows = destination[first : first + source.n_obs]
        most, found = probe(source, cols, len(axis))
        slabs += slabs_of(source, key, cols, rows, len(axis), obsm, config, memory, most)
        seen.append(found)
    obs = laid.in_order(order)
    dense = 4 * sum(len(names) for names, _ in obsm.values())
    needs = needs_of(
        sample_of(seen, lengths, dense), obs, slabs, preset=config.preset, shard_rows=config.shard_rows,
        memory=memory, threads=thread_count(config.threads),
    )  # fmt: skip
    content = Content(
        kind="store",
        obs=obs,
        var=base.var
        if base is not None
        else genes.common_var([source.var for source in sources], axes, axis),
        batch_key=batch_key,
        fingerprint=fingerprint,
        obsm=obsm,
        uns={"batch_key": batch_key},
        sources=entries,
        needs=needs,
    )
    return content, slabs


def _axis_of(source: Source, config: ConvertConfig) -> list[str | None]:
    """The names that a file's columns go by."""
    with blame(source):
        return genes.resolve_names(
            source.var_names,
            rule=config.duplicate_genes,
            strip_versions=config.strip_versions,
            where=source.location,
        )


def _file_keys(sources: list[Source], base: Collection | None, fingerprint: dict[str, Any]) -> list[str]:
    """Keys by which the store knows its files; a file that is in it already is refused."""
    if base is None:
        return [source.key for source in sources]
    known = {entry["checksum"]: entry["key"] for part in base.parts for entry in part.sources}
    taken = set(known.values())
    keys = []
    for source in sources:
        checksum = fingerprint["inputs"][source.key]["checksum"]
        if checksum in known:
            what = f"is in the store already, as {known[checksum]!r}"
            raise SourceError(source, InputError(what, where=source.location, fix="leave it out"))
        key, number = source.key, 2
        while key in taken:
            key, number = f"{source.key}-{number}", number + 1
        taken.add(key)
        keys.append(key)
    return keys


def _source_entry(
    source: Source, key: str, names: list[str | None], axis: list[str], columns: np.ndarray,
    batches: list[str], checksum: str, base: Collection | None, config: ConvertConfig,
) -> dict[str, Any]:  # fmt: skip
    """What the manifest says of a file; reports (and guards) the overlap of its genes."""
    alignment = align([name for name in names if name is not None], axis)
    if base is not None:
        with blame(source):
            check_overlap(
                alignment,
                list(source.var_names),
                axis,
                where=source.location,
                strip_versions=config.strip_versions,
            )
    log.info(
        "%s: %d cells, %d genes; %d of the %d genes of the store (%.0f %%), %d genes of its own dropped",
        key, source.n_obs, source.n_vars, alignment.found, len(axis), 100 * alignment.overlap,
        len(alignment.extra),
    )  # fmt: skip
    return {
        "key": key,
        "n_obs": source.n_obs,
        "n_genes": source.n_vars,
        "n_dropped": len(alignment.extra),
        "overlap": round(alignment.overlap, 6),
        "checksum": checksum,
        "batches": batches,
        "measured": genes.pack_mask(genes.measured_mask(columns, len(axis))),
    }
