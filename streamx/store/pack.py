"""The second half of writing: rows in their final order -> zarr shards -> manifest -> marker.

Everything is planned from the number of stored values per row; each zarr shard is then encoded in memory and
put in place whole, once, by one writer, and journaled. The bytes depend on the content alone, never on
slabs, threads or memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.cluster import run_spread
from streamx.config import parse_bytes
from streamx.errors import UsageError
from streamx.memory import give_back
from streamx.store import layout
from streamx.store.collection import Collection
from streamx.store.draft import Draft, draft_anndata_shell, draft_frame, draft_obs
from streamx.store.encode import offsets_shard
from streamx.store.journal import Journal
from streamx.store.location import Location, ObjectTable, Put, crc32c, describe, open_location
from streamx.store.manifest import (
    MARKER,
    Generation,
    Part,
    Shard,
    commit,
    dump,
    dump_part,
    is_unfinished,
    read_generation,
    run_tag,
)
from streamx.store.needs import Needs, at_once, refuse
from streamx.store.obs import Obs, as_obs
from streamx.store.plan import ShardPlan, plan_shards
from streamx.store.scratch import pieces
from streamx.store.spill import Slab, Spill, npy_pieces, spill
from streamx.store.steps import MatrixWriter, Steps
from streamx.threads import thread_count


@dataclass(frozen=True)
class Content:
    """What a commit holds besides the matrix.

    Attributes
    ----------
    kind
        ``"store"`` or ``"view"``.
    obs, var
        Cells of this part in their final order; genes.
    obsm
        name -> (feature names, batch -> which features were measured).
    uns
        Parameters, written into every shard's ``uns["streamx"]``.
    tables
        name -> array, kept once per generation (a view's scale per batch and gene).
    sources
        One entry per input: key, cells, checksum, which genes were measured.
    fingerprint
        Settings and inputs that a resumed run must share.
    value_dtype
        None: the smallest unsigned integers that hold the maximum; else a dtype.
    needs
        What writing it will take, where that was predicted.
    """

    kind: str
    obs: Obs | pd.DataFrame
    var: pd.DataFrame
    batch_key: str | None
    fingerprint: dict[str, Any]
    obsm: Mapping[str, tuple[Sequence[str], Mapping[str, Sequence[bool]]]] = field(default_factory=dict)
    uns: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    sources: Sequence[dict[str, Any]] = ()
    view: dict[str, Any] | None = None
    value_dtype: str | None = None
    needs: Needs | None = None


def write_part(
    path: str | Path | Location,
    slabs: Sequence[Slab],
    content: Content,
    *,
    preset: str = "default",
    shard_rows: int = 1 << 20,
    memory: str | int = "4GB",
    threads: int = 0,
    append: bool = False,
    journal: Journal | None = None,
) -> Collection:
    """Write a new collection, or (`append`) one more generation of an existing one.

    Killed at any point it leaves either no readable collection (respectively the former generation) or the
    finished one; run again with the same content it resumes.

    Parameters
    ----------
    path
        Folder of the collection.
    slabs
        The rows, in any order; together they fill destinations 0..n_obs of this part.
    content
        Everything else.
    memory
        Bytes that packing may use; it bounds how many zarr shards are encoded at once.
    journal
        The journal, where the caller has opened it already.

    Returns
    -------
    Collection
        The new generation.

    Raises
    ------
    ResourceError
        If disk or memory are too small by what was predicted.
    """
    location = open_location(path)
    if journal is None:
        with Journal(location) as journal:
            return write_part(
                location, slabs, content, preset=preset, shard_rows=shard_rows,
                memory=memory, threads=threads, append=append, journal=journal,
            )  # fmt: skip
    finished = start(journal, content.fingerprint, append=append)
    if finished is not None:
        return finished
    give_back()  # what planning has left
    base = read_generation(location) if append else None
    staged = location.staged(journal.tmp)
    limit, n = parse_bytes(memory), thread_count(threads)
    if content.needs is not None:
        local = isinstance(location.root, Path)  # else only the journal takes disk here
        place = location.root if isinstance(location.root, Path) else journal.location.root
        refuse(content.needs if local else content.needs.elsewhere, place, journal.laid_down())
    _write(staged, journal, base, slabs, content, preset, shard_rows, limit, n)
    journal.remove()
    return Collection(location)


def start(journal: Journal, fingerprint: dict[str, Any], *, append: bool) -> Collection | None:
    """Begin, or go on with, the run that this fingerprint stands for, now that the store is locked.

    Returns
    -------
    Collection or None
        The collection, if its newest generation is what this run would write.

    Raises
    ------
    UsageError
        If something else is there, and this is no append.
    SettingsChangedError
        If an unfinished run was started with other settings or inputs.
    """
    finished = already_written(journal.store, fingerprint, append=append)
    if finished is not None:
        journal.forget_finished()
        return finished
    store = journal.store
    occupied = os.path.isfile(store.root) or any(not is_unfinished(key) for key in store.list())
    if not append and journal.fingerprint is None and occupied:
        raise UsageError(
            "holds other files, and no store",
            where=str(journal.store),
            fix="choose another folder, or empty it",
        )
    journal.begin(fingerprint)
    return None


def already_written(location: Location, fingerprint: dict[str, Any], *, append: bool) -> Collection | None:
    """The collection, if its newest generation is what a run with this fingerprint would write.

    Raises
    ------
    UsageError
        If something else is there, and this is no append.
    """
    if not location.exists(MARKER):
        return None
    collection = Collection(location)
    if collection.manifest.fingerprint == json.loads(dump(fingerprint)):
        return collection
    if append:
        return None
    raise UsageError(
        "exists already, made with other settings or inputs",
        where=str(location),
        fix="choose another folder, remove this one, or add to it (convert --append, preprocess --update)",
    )


def _write(
    location: Location,
    journal: Journal,
    base: Generation | None,
    slabs: Sequence[Slab],
    content: Content,
    preset: str,
    shard_rows: int,
    memory: int,
    threads: int,
) -> None:
    obs = as_obs(content.obs)
    spilled = spill(slabs, journal, threads=threads, progress="reading")
    rows = Spill(spilled, obs.n_obs, journal.rows)
    number = base.number + 1 if base else 1
    before = sum(part["n_shards"] for part in base.parts) if base else 0
    tag = run_tag(location, content.fingerprint, base)
    plans = plan_shards(rows.ends, first_number=before, shard_rows=shard_rows, tag=tag)
    steps = Steps(location, journal)
    writer = _Writer(steps, rows, content, obs, preset)
    matrix = MatrixWriter(steps, rows, preset, writer.index_dtype, writer.data_dtype)
    at_a_time = at_once(max((plan.shard for plan in plans), default=0), memory, threads)
    tasks = [partial(writer.frame, plan) for plan in plans]
    tasks += [partial(writer.part_obs, f"{number:06d}{tag}")]
    shards_of = [partial(matrix.write, plan, k) for plan in plans for k in range(len(plan.cuts))]
    portable = [False] * len(tasks) + [True] * len(shards_of)
    objects: ObjectTable = {}
    for found in run_spread([*tasks, *shards_of], portable, at_a_time, "writing"):
        objects |= found
    shards = tuple(Shard(plan.path, plan.n_obs, plan.nnz) for plan in plans)
    nnz, runs = int(rows.ends[-1]), batch_runs(content)
    part = Part(number, obs.n_obs, nnz, shards, runs, tuple(content.sources), objects, tag)
    part_path, part_data = dump_part(part)
    location.write(part_path, part_data)
    entry = {"path": part_path, "bytes": len(part_data), "crc32c": crc32c(part_data)}
    entry |= {"n_obs": part.n_obs, "nnz": part.nnz, "n_shards": len(shards)}
    entry |= {"maximum": rows.maximum, "dtype": str(writer.data_dtype)}
    generation = _next_generation(location, base, number, entry, content, tag)
    commit(location, generation, base)


def batch_runs(content: Content) -> tuple[tuple[str | None, int], ...]:
    """(batch, rows) of each stretch of cells of one batch, in row order."""
    obs = as_obs(content.obs)
    if content.batch_key is None:
        return ((None, obs.n_obs),)
    categories = obs.schema[content.batch_key]["categories"]
    runs: list[tuple[str | None, int]] = []
    for low, high in pieces(obs.n_obs):
        code_n = np.asarray(obs.columns[content.batch_key](low, high)[0])
        starts = np.flatnonzero(np.diff(code_n, prepend=code_n[0] + 1))
        for start, size in zip(
            starts.tolist(), np.diff(np.append(starts, len(code_n))).tolist(), strict=True
        ):
            name = None if code_n[start] < 0 else str(categories[code_n[start]])
            if start == 0 and runs and runs[-1][0] == name:
                size += runs.pop()[1]
            runs.append((name, size))
    return tuple(runs)


def _next_generation(
    location: Location,
    base: Generation | None,
    number: int,
    part: dict[str, Any],
    content: Content,
    tag: str,
) -> Generation:
    tables: dict[str, str] = {}
    objects: ObjectTable = {}
    for name, values in content.tables.items():
        key = f"tables/{number:06d}{tag}/{name}.npy"
        data = npy_pieces(values)
        location.write(key, *data)
        tables[name], objects[key] = key, describe(*data)
    generation = Generation(
        kind=content.kind,
        number=number,
        n_vars=len(content.var),
        batch_key=content.batch_key,
        obs_schema=dict(as_obs(content.obs).schema),
        parts=(part,),
        fingerprint=content.fingerprint,
        modalities={
            name: {
                "names": list(names),
                "measured": {batch: [bool(m) for m in mask] for batch, mask in measured.items()},
            }
            for name, (names, measured) in content.obsm.items()
        },
        tables=tables,
        view=content.view,
        objects=objects,
        tag=tag,
    )
    if base is None:
        return generation
    return replace(
        generation,
        parts=(*base.parts, part),
        obs_schema=base.obs_schema | generation.obs_schema,
        overlays=base.overlays,
        tables=base.tables | tables,
        modalities=_merge_modalities(base.modalities, generation.modalities),
        objects=base.objects | objects,
    )


def _merge_modalities(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(before)
    for name, modality in new.items():
        measured = dict(before.get(name, {}).get("measured", {}))
        for batch, mask in modality["measured"].items():
            measured[batch] = [a or b for a, b in zip(measured.get(batch, mask), mask, strict=True)]
        merged[name] = {"names": modality["names"], "measured": measured}
    return merged


@dataclass(frozen=True)
class _Writer:
    """Encodes all but the matrix."""

    steps: Steps
    rows: Spill
    content: Content
    obs: Obs
    preset: str

    def frame(self, plan: ShardPlan) -> ObjectTable:
        """Everything of a shard but the values: obs, var, obsm, uns, indptr and all metadata."""

        def encode(put: Put) -> None:
            draft = Draft(put)
            n_vars = len(self.content.var)
            draft_anndata_shell(draft, (plan.n_obs, n_vars), {"streamx": dict(self.content.uns)})
            draft_obs(draft, "obs", self.obs.rows(plan.first, plan.first + plan.n_obs))
            draft_frame(draft, "var", self.content.var)
            geometry = layout.offset_geometry(plan.n_obs + 1)
            draft.empty("X/indptr", (plan.n_obs + 1,), np.int64, **geometry)
            put("X/indptr/c/0", *offsets_shard(plan.ends, geometry["chunks"][0]))
            for name in ("indices", "data"):
                self._array(draft, plan, name)
            for name, (features, _) in self.content.obsm.items():
                width, dtype = len(features), self.rows.dense_dtype(name)
                read = partial(self._dense, name, plan.first, width, dtype)
                draft.stream(f"obsm/{name}", (plan.n_obs, width), dtype, read)
            for key, data in draft.consolidated().items():
                put(key, data)

        return self.steps.run(f"{plan.path[7:-5]}-frame", plan.path, encode)

    def part_obs(self, name: str) -> ObjectTable:
        """obs of the whole part in large column chunks."""

        def encode(put: Put) -> None:
            draft = Draft(put)
            draft_obs(draft, "", self.obs)
            for key, data in draft.take().items():
                put(key, data)

        return self.steps.run(f"obs-{name}", f"obs/{name}.zarr", encode)

    def _dense(self, name: str, first: int, width: int, dtype: np.dtype, low: int, high: int) -> np.ndarray:
        return self.rows.dense(name, first + low, first + high, width, dtype)

    @property
    def data_dtype(self) -> np.dtype:
        if self.content.value_dtype:
            return np.dtype(self.content.value_dtype)
        return layout.smallest_unsigned(int(self.rows.maximum)) if self.rows.counts else np.dtype(np.float32)

    @property
    def index_dtype(self) -> np.dtype:
        return layout.index_dtype(len(self.content.var))

    def _array(self, draft: Draft, plan: ShardPlan, name: str) -> Any:
        dtype = self.data_dtype if name == "data" else self.index_dtype
        codecs = layout.matrix_codecs(self.preset, name, dtype)
        return draft.empty(
            f"X/{name}", (plan.nnz,), dtype, chunks=(plan.chunk,), shards=(plan.shard,), **codecs
        )
