"""Files -> store: align genes, unite obs, order rows, then write (or append) one part."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.config import ConvertConfig, build, parse_bytes
from streamx.errors import EmptyError, InputError, UsageError, warn
from streamx.schema import align, check_overlap
from streamx.store import cells, genes
from streamx.store.collection import Collection
from streamx.store.ingest import Source, check_counts, open_sources
from streamx.store.journal import Journal, journal_path
from streamx.store.location import Location, open_location
from streamx.store.pack import Content, already_written, write_part
from streamx.store.spill import Slab
from streamx.threads import thread_count

log = logging.getLogger("streamx")

MAX_SLAB_ROWS = 1 << 16
# What decides the bytes of a store; the rest (memory, threads, on_error) may change between runs.
_DECISIVE = (
    "batch_key", "join", "layer", "modality", "obsm", "strip_versions", "duplicate_genes", "allow_float",
    "preset", "shard_rows", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """A finished conversion and the inputs that it left out (``on_error="skip"``)."""

    collection: Collection
    skipped: tuple[InputError, ...] = ()


def convert(
    inputs: Sequence[Any] | Mapping[str, Any] | str | Path,
    output: str | Path,
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
        Folder of the store.
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
    output: str | Path,
    *,
    append: bool = False,
    **settings: Any,
) -> Converted:
    """Like :func:`convert`, and also say which inputs were left out."""
    config: ConvertConfig = build(ConvertConfig, settings)
    location = open_location(output)
    base = Collection(location) if append else None
    if base is not None:
        config = _like(base, config)
    memory = parse_bytes(config.memory)
    skipped: list[InputError] = []
    skip = config.on_error == "skip"
    scratch = journal_path(location.root) / "ingest"
    with ExitStack() as stack:
        listed = [inputs] if isinstance(inputs, (str, Path)) or hasattr(inputs, "obs_names") else inputs
        sources = open_sources(
            listed,
            layer=config.layer,
            modality=config.modality,
            scratch=scratch,
            memory=memory // 4,
            failed=skipped if skip else None,
        )
        for source in sources:
            stack.callback(source.close)
        while True:
            if not sources:
                raise EmptyError("no input is left", fix="mend one of the inputs named above")
            try:
                collection = _convert(sources, location, base, config, memory)
            except SourceError as failure:
                if not skip:
                    raise failure.error from failure.error.__cause__
                skipped.append(failure.error)
                sources = [source for source in sources if source is not failure.source]
            else:
                break
    for error in skipped:
        warn(f"left out: {error.what}", where=error.where, fix=error.fix)
    return Converted(collection, tuple(skipped))


class SourceError(Exception):
    """An input that turned out to be unusable while it was read."""

    def __init__(self, source: Source, error: InputError) -> None:
        super().__init__(str(error))
        self.source, self.error = source, error


def _convert(
    sources: list[Source], location: Location, base: Collection | None, config: ConvertConfig, memory: int
) -> Collection:
    fingerprint = _fingerprint(sources, base, config)
    finished = already_written(location, fingerprint, append=base is not None)
    if finished is not None:
        log.info("%s is complete already", location)
        return finished
    journal = Journal(location, fingerprint)
    try:
        content, slabs = _plan(sources, base, config, memory, fingerprint)
        return write_part(
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
    except (InputError, UsageError, SourceError):
        journal.remove()  # nothing to resume: the input has to change
        raise
    finally:
        journal.release()


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
    return replace(config, preset=before["preset"], seed=before["seed"], batch_key=before["batch_key"])


def _fingerprint(sources: list[Source], base: Collection | None, config: ConvertConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {name: getattr(config, name) for name in _DECISIVE}
    settings["obsm"] = list(config.obsm)
    settings["obs_map"] = _read_obs_map(config)
    settings["batches_are_files"] = (
        config.batch_key is None and len(sources) > 1
        if base is None
        else base.manifest.fingerprint["settings"]["batches_are_files"]
    )
    inputs = {source.key: {"checksum": source.checksum(), "n_obs": source.n_obs} for source in sources}
    return {"settings": settings, "inputs": inputs}


def _read_obs_map(config: ConvertConfig) -> dict[str, dict[str, str]]:
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
    return value


def _plan(
    sources: list[Source],
    base: Collection | None,
    config: ConvertConfig,
    memory: int,
    fingerprint: dict[str, Any],
) -> tuple[Content, list[Slab]]:
    """Everything that names and obs decide, before a value is read."""
    keys = _file_keys(sources, base, fingerprint)
    axes = [
        genes.resolve_names(
            source.var_names,
            rule=config.duplicate_genes,
            strip_versions=config.strip_versions,
            where=source.location,
        )
        for source in sources
    ]
    axis = list(base.var_names) if base is not None else genes.join_genes(axes, config.join)
    columns = [genes.column_map(names, axis) for names in axes]
    obs_map = fingerprint["settings"]["obs_map"]
    frames = {
        key: cells.rename_columns(source.obs.copy(), obs_map.get(source.key, {}), source.location)
        for key, source in zip(keys, sources, strict=True)
    }
    per_file = fingerprint["settings"]["batches_are_files"]
    batch_key = cells.add_batches(frames, config.batch_key, per_file=per_file)
    obs = cells.unite(
        list(frames.values()), batch_key, base.manifest.obs_schema if base is not None else None
    )
    originals = obs.index.to_numpy(dtype=object)
    obs.index = pd.Index(
        cells.unique_names(frames, base.obs_names if base is not None else None), dtype=object
    )
    lengths = [source.n_obs for source in sources]
    known = base.manifest.obs_schema[cells.FILE]["categories"] if base is not None else []
    obs[cells.FILE] = pd.Categorical(np.repeat(keys, lengths), categories=[*known, *sorted(keys)])
    obs[cells.FILE_ROW] = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    obs[cells.NAME] = originals
    checksums = [fingerprint["inputs"][source.key]["checksum"] for source in sources]
    digests = [cells.names_digest(source.obs_names, source.var_names) for source in sources]
    codes = obs[batch_key].cat.codes.to_numpy()
    destination = cells.row_order(codes, digests, checksums, lengths, config.seed)
    by_source = np.split(destination, np.cumsum(lengths)[:-1])
    batch_names = [sorted(set(frames[key][batch_key].astype(str))) for key in keys]
    obsm = _modalities(sources, config.obsm, [frames[key][batch_key].to_numpy() for key in keys], base)
    entries = [
        _source_entry(source, key, names, axis, cols, batches, checksum, base, config)
        for source, key, names, cols, batches, checksum in zip(
            sources, keys, axes, columns, batch_names, checksums, strict=True
        )
    ]
    slabs = [
        slab
        for source, key, cols, rows in zip(sources, keys, columns, by_source, strict=True)
        for slab in _slabs(source, key, cols, rows, len(axis), obsm, config, memory)
    ]
    inverse = np.argsort(destination)
    content = Content(
        kind="store",
        obs=obs.iloc[inverse],
        var=base.var
        if base is not None
        else genes.common_var([source.var for source in sources], axes, axis),
        batch_key=batch_key,
        fingerprint=fingerprint,
        obsm=obsm,
        uns={"batch_key": batch_key},
        sources=entries,
    )
    return content, slabs


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
            raise InputError(
                f"is in the store already, as {known[checksum]!r}", where=source.location, fix="leave it out"
            )
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


def _modalities(
    sources: list[Source], wanted: Sequence[str], batches: list[np.ndarray], base: Collection | None
) -> dict[str, tuple[list[str], dict[str, list[bool]]]]:
    """Features of each dense matrix to carry, and per batch which were measured (not zero throughout)."""
    found: dict[str, tuple[list[str], dict[str, list[bool]]]] = {}
    for name in wanted:
        offered = [source.obsm[name] for source in sources if name in source.obsm]
        known = base.modalities[name]["names"] if base is not None and name in base.modalities else []
        if not offered or (base is not None and not known):
            continue
        names = known or list(dict.fromkeys(feature for features in offered for feature in features))
        sums: dict[str, np.ndarray] = {}
        for source, batch_n in zip(sources, batches, strict=True):
            for low, dense in _dense_rows(source, name, names):
                rows = batch_n[low : low + len(dense)]
                for batch in np.unique(rows.astype(str)):
                    total = np.abs(dense[rows.astype(str) == batch]).sum(axis=0)
                    sums[batch] = sums.get(batch, np.zeros(len(names))) + total
        found[name] = (names, {batch: (total > 0).tolist() for batch, total in sorted(sums.items())})
    return found


def _dense_rows(source: Source, name: str, names: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    for low in range(0, source.n_obs, MAX_SLAB_ROWS):
        yield low, _dense(source, name, names, low, min(low + MAX_SLAB_ROWS, source.n_obs))


def _dense(source: Source, name: str, names: list[str], low: int, high: int) -> np.ndarray:
    if name not in source.obsm:
        return np.zeros((high - low, len(names)), dtype=np.float32)
    position = {feature: i for i, feature in enumerate(source.obsm[name])}
    stored = source.read_obsm(name, low, high)
    dense = np.zeros((high - low, len(names)), dtype=stored.dtype)
    shared = [(i, position[feature]) for i, feature in enumerate(names) if feature in position]
    dense[:, [i for i, _ in shared]] = stored[:, [j for _, j in shared]]
    return dense


def _slabs(
    source: Source, key: str, columns: np.ndarray, rows: np.ndarray, n_genes: int,
    obsm: Mapping[str, tuple[list[str], Any]], config: ConvertConfig, memory: int,
) -> Iterator[Slab]:  # fmt: skip
    """A file in slabs that `threads` threads can hold at once."""
    probe = source.read(0, min(64, source.n_obs))
    # a slab is held about four times over while it is mapped and sorted: indices and values, 16 bytes each
    per_row = 4 * 16 * (probe.nnz / probe.shape[0] + 16) + 8 * source.n_vars
    size = int(np.clip(memory / 4 / thread_count(config.threads) / per_row, 64, MAX_SLAB_ROWS))
    for number, low in enumerate(range(0, source.n_obs, size)):
        high = min(low + size, source.n_obs)
        read = partial(_read_slab, source, low, high, columns, n_genes, obsm, config.allow_float)
        yield Slab(f"{key}-{number:06d}", rows[low:high], read)


def _read_slab(
    source: Source, low: int, high: int, columns: np.ndarray, n_genes: int,
    obsm: Mapping[str, tuple[list[str], Any]], allow_float: bool,
) -> tuple[sparse.csr_matrix, dict[str, np.ndarray]]:  # fmt: skip
    try:
        x_ng = source.read(low, high)
        check_counts(x_ng, source=source, first_row=low, allow_float=allow_float)
        if x_ng.dtype.kind == "f" and not allow_float:  # whole numbers, as the check has shown
            x_ng = x_ng.astype(np.int32 if x_ng.nnz == 0 or x_ng.data.max() < 2**31 else np.int64)
        dense = {name: _dense(source, name, names, low, high) for name, (names, _) in obsm.items()}
    except InputError as error:
        raise SourceError(source, error) from error
    return genes.map_columns(x_ng, columns, n_genes), dense
