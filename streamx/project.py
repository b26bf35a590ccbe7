"""``project``: new cells -> latents in the space of a reference model, without training."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

from streamx.config import ProjectConfig, build, parse_bytes
from streamx.errors import InputError, ResourceError, SettingsChangedError, UsageError, warn
from streamx.loader.plan import permutation
from streamx.loader.transform import apply_transform
from streamx.memory import steady_memory
from streamx.models.matched import QUERY_BATCH_SAMPLE, as_statistics, fit_query, normalised, stay
from streamx.models.scalex import encode, encode_by_minibatch, norm_stats, running_stats
from streamx.query import Block, Query, Request, lay_blocks, open_query, query_obs, read_blocks, requests
from streamx.store.bucket import cache_folder
from streamx.store.journal import first_difference
from streamx.store.latents import write_latents
from streamx.store.location import Location, open_location
from streamx.store.scratch import new_array, pieces
from streamx.train.device import one_torch_thread, pick_device
from streamx.train.feed import query_input
from streamx.train.latent import ORIGINAL
from streamx.train.model import Model, load_model

log = logging.getLogger("streamx")

# Settings that change how the work is done and not its result.
_FREE = ("device", "memory", "threads", "on_error")
_FINGERPRINT = "uns/streamx/fingerprint"


def project(
    model: Model | str | Path,
    queries: Any,
    output: str | Path | Location,
    *,
    progress: bool = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Map new cells onto a reference.

    Cells are filtered by the genes that they have themselves, scaled by their total over all of these, and
    only then brought onto the reference's genes (absent ones are zero). Statistics of the batch norm and the
    largest value per gene come from the reference, or from the query itself (``norm``, ``scale``).

    Parameters
    ----------
    model
        A model, or its folder (also one that SCALEX wrote).
    queries
        See :func:`streamx.query.requests`.
    output
        Folder (or ``s3://bucket/prefix``) for one ``<query>.zarr`` each: AnnData-Zarr with obs,
        ``obs["passed_qc"]`` and ``obsm["X_scalex"]``, one row per input cell in input order; NaN for cells
        that did not pass. Queries that are there already, from the same model, settings and inputs, are
        skipped.
    settings
        Fields of :class:`~streamx.config.ProjectConfig`.

    Returns
    -------
    Per query: ``name, status (done, skipped, failed), n_cells, n_passed, gene_overlap, n_genes_found, path``,
    ``reference_statistics`` (batches too small for their own), or ``error``.

    Raises
    ------
    SettingsChangedError
        If a query is there already, but from another model, settings or inputs; names the field.
    """
    config: ProjectConfig = build(ProjectConfig, settings)
    model = model if isinstance(model, Model) else load_model(model)
    _check(model, config)
    out = open_location(output)
    if any(out.exists(name) for name in ("streamx.json", "model.json")):
        raise UsageError(
            "holds a store, view or model", where=str(out), fix="choose another folder for what is mapped"
        )
    if config.norm is None:
        config = replace(config, norm="minibatch" if model.clusters is None else "matched")
    steady_memory()
    asked = requests(queries)
    model.module.to(pick_device(config.device))
    reports = []
    with _scratch(out) as scratch, one_torch_thread():
        for request in asked:
            try:
                reports.append(_project_one(model, request, out, config, scratch, progress))
            except InputError as error:
                if config.on_error != "skip":
                    raise
                log.error("%s: %s", request.name, error)
                reports.append({"name": request.name, "status": "failed", "error": str(error)})
    return reports


@dataclass(frozen=True)
class _Mapped:
    """Latents of all cells of a query (NaN: did not pass), and its batches that were too small."""

    z_nk: np.ndarray
    small: list[str]


def _project_one(
    model: Model, request: Request, out: Location, config: ProjectConfig, scratch: Path, progress: bool
) -> dict[str, Any]:
    memory = parse_bytes(config.memory)
    target = out.below(f"{request.name}.zarr")
    scratch = Path(tempfile.mkdtemp(dir=scratch))
    query = open_query(request, model, config, scratch=scratch, memory=memory)
    try:
        fingerprint = {
            "model": model.id,
            "settings": {k: v for k, v in asdict(config).items() if k not in _FREE},
            "inputs": {source.key: source.checksum() for source in query.sources},
        }
        report = {"name": request.name, "path": str(target), "n_cells": query.n_obs} | _gene_report(query)
        done = _finished(target, fingerprint)
        if done is not None:
            log.info("%s is mapped already", request.name)
            return report | {"status": "skipped"} | done
        mapped = _map(model, query, config, memory, progress)
        _write(target, query, mapped, model, config, fingerprint, report)
    finally:
        query.close()
        shutil.rmtree(scratch, ignore_errors=True)
    n_passed = int(query.passed_n.sum())
    return report | {"status": "done", "n_passed": n_passed, "reference_statistics": mapped.small}


def _gene_report(query: Query) -> dict[str, Any]:
    """The least overlap among the query's files."""
    least = min(query.maps, key=lambda gene_map: gene_map.found)
    return {"gene_overlap": round(least.overlap, 6), "n_genes_found": least.found}


# -- the mapping ---------------------------------------------------------------------------------------


def _map(model: Model, query: Query, config: ProjectConfig, memory: int, progress: bool) -> _Mapped:
    """Latents; reads the query once. What passed is laid down in the scratch folder for further passes."""
    n_latent = model.module.config.n_latent
    z_nk = new_array(query.scratch / "latents", query.n_obs * n_latent, np.float32).reshape(-1, n_latent)
    for low, high in pieces(query.n_obs):
        z_nk[low:high] = np.nan
    own_scale = config.scale == "query" and model.transform.scale is not None
    blocks: Callable[[], Iterable[Block]] = lambda: _watched(  # noqa: E731
        query, read_blocks(query, model, config, memory), progress
    )
    small: list[int] = []
    n_batches = len(query.batches)
    pooled_g = model.pooled_scale_g
    scale_bg = None if pooled_g is None else np.tile(pooled_g, (n_batches, 1))
    if config.norm != "running" or own_scale:
        kept = lay_blocks(blocks(), query.scratch / "blocks", len(model.genes))
        blocks = lambda: kept  # noqa: E731
        if config.norm == "minibatch" and kept.nbytes > memory // 2:
            raise ResourceError(
                f"norm minibatch draws cells at random from the whole query, which takes more than half of "
                f"{config.memory}",
                where=query.name,
                fix="--norm domain, its exact limit; or more --memory",
            )
        n_b = np.zeros(n_batches, np.int64)
        for low, high in pieces(query.n_obs):
            n_b += np.bincount(query.code_n[low:high][query.passed_n[low:high]], minlength=n_batches)
        small = np.flatnonzero(n_b < config.min_query_cells).tolist()
        _warn_small(query, n_b, small, config)
        if own_scale:
            scale_bg = _query_scale(model, blocks(), n_b, small, pooled_g)
    inputs = _Inputs(model, blocks, scale_bg)
    for row_n, found in _encoded(model, inputs, query, config, small):
        z_nk[row_n] = found
    return _Mapped(z_nk, [query.batches[b] for b in small])


@dataclass(frozen=True)
class _Inputs:
    """The query as the network's input; every call of :meth:`transformed` is a pass."""

    model: Model
    blocks: Callable[[], Iterable[Block]]
    scale_bg: np.ndarray | None

    @property
    def device(self) -> torch.device:
        return self.model.module.encoder.hidden.weight.device

    def transformed(self) -> Iterator[Block]:
        for block in self.blocks():
            x_ng = block.x_ng.copy()
            apply_transform(
                x_ng,
                self.model.transform,
                total_n=block.total_n,
                batch_n=block.batch_n,
                scale_bg=self.scale_bg,
            )
            yield replace(block, x_ng=x_ng)

    def minibatches(self, rows: deque[np.ndarray] | None = None) -> Iterator[tuple[Any, np.ndarray]]:
        """(input, batch codes) of each block; their rows are appended to ``rows``."""
        for block in self.transformed():
            if len(block.row_n):
                if rows is not None:
                    rows.append(block.row_n)
                yield query_input(block.x_ng, self.device), block.batch_n


def _encoded(
    model: Model, inputs: _Inputs, query: Query, config: ProjectConfig, small: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, latents) under the chosen norm; small batches always by the running statistics."""
    n_batches = len(query.batches)
    rows: deque[np.ndarray] = deque()
    mean_h, var_h = running_stats(model.module)
    mean_bh, var_bh = mean_h[None], var_h[None]
    if config.norm == "minibatch":
        yield from _encoded_by_minibatch(model, inputs, n_batches, small)
        return
    if config.norm == "domain":
        stats = norm_stats(model.module, inputs.minibatches, n_batches)
        mean_bh, var_bh = stats.mean_bh.copy(), stats.var_bh.copy()
        mean_bh[small], var_bh[small] = mean_h, var_h
    if config.norm == "matched":
        mean_bh, var_bh = _matched(model, inputs, query, small)
    for z_nk in encode(model.module, lambda: inputs.minibatches(rows), mean_bh, var_bh):
        yield rows.popleft(), z_nk


def _matched(model: Model, inputs: _Inputs, query: Query, small: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Statistics per query batch that give it what the reference has at its composition.

    A batch of many cells is judged by a sample, chosen and ordered by the hash of the cells' names: neither
    the order of files nor that of cells matters.
    """
    assert model.clusters is not None
    chosen = _sampled(query, small)
    wanted = np.zeros(query.n_obs, dtype=bool)
    wanted[np.concatenate(chosen)] = True
    found_n, found_nh = [], []
    for block in inputs.transformed():
        take = wanted[block.row_n]
        if take.any():
            x_ng = block.x_ng[take]
            found_n.append(block.row_n[take])
            found_nh.append(normalised(model.module, query_input(x_ng, inputs.device)))
    moves = [stay(model.module.config.n_hidden)] * len(query.batches)
    if found_n:
        found, u_nh = np.concatenate(found_n), np.concatenate(found_nh)  # rows come in order
        for b, rows in enumerate(chosen):
            if len(rows):
                moves[b] = fit_query(model.module, u_nh[np.searchsorted(found, rows)], model.clusters)
    mean_bh, var_bh = zip(*(as_statistics(model.module, move) for move in moves), strict=True)
    return np.stack(mean_bh), np.stack(var_bh)


def _sampled(query: Query, small: list[int]) -> list[np.ndarray]:
    """Per batch that is not small, its rows with the least hashes of names, by hash."""
    keys = [np.zeros(0, np.uint64) for _ in query.batches]
    rows = [np.zeros(0, np.int64) for _ in query.batches]
    first = 0
    for source in query.sources:
        for low, high in pieces(source.n_obs):
            span = slice(first + low, first + high)
            key_n = pd.util.hash_array(source.obs_names[low:high])
            code_n, passed_n = np.asarray(query.code_n[span]), query.passed_n[span]
            for b in np.unique(code_n[passed_n]).tolist():
                if b in small:
                    continue
                mine = np.flatnonzero(passed_n & (code_n == b))
                keys[b] = np.concatenate([keys[b], key_n[mine]])
                rows[b] = np.concatenate([rows[b], mine + span.start])
                least = np.argsort(keys[b], kind="stable")[:QUERY_BATCH_SAMPLE]
                keys[b], rows[b] = keys[b][least], rows[b][least]
        first += source.n_obs
    return rows


def _encoded_by_minibatch(
    model: Model, inputs: _Inputs, n_batches: int, small: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The original's way: minibatches of 64 random cells of one batch, normalised by themselves."""
    blocks = list(inputs.transformed())
    x_ng = sparse.vstack([block.x_ng for block in blocks], format="csr")
    row_n = np.concatenate([block.row_n for block in blocks])
    code_n = np.concatenate([block.batch_n for block in blocks])
    mean_h, var_h = running_stats(model.module)
    for b in range(n_batches):
        members = np.flatnonzero(code_n == b)
        members = members[permutation(len(members), 0, b)]
        pieces = [members[low : low + ORIGINAL] for low in range(0, len(members), ORIGINAL)]
        given = lambda pieces=pieces: (  # noqa: E731
            (query_input(x_ng[piece], inputs.device), np.zeros(len(piece), np.int64)) for piece in pieces
        )
        found = (
            encode(model.module, given, mean_h[None], var_h[None])
            if b in small
            else encode_by_minibatch(model.module, given)
        )
        for piece, z_nk in zip(pieces, found, strict=True):
            yield row_n[piece], z_nk


def _query_scale(
    model: Model, blocks: Iterable[Block], n_b: np.ndarray, small: list[int], pooled_g: np.ndarray | None
) -> np.ndarray:
    """Largest transformed value per query batch and gene, float32; small batches take the reference's."""
    unscaled = replace(model.transform, scale=None)
    scale_bg = np.zeros((len(n_b), len(model.genes)), np.float32)
    for block in blocks:
        x_ng = block.x_ng.copy()
        apply_transform(x_ng, unscaled, total_n=block.total_n)
        for b in np.unique(block.batch_n):
            largest_g = x_ng[block.batch_n == b].max(axis=0).toarray().ravel()
            np.maximum(scale_bg[b], largest_g, out=scale_bg[b])
    if model.transform.scale == "global":
        scale_bg[:] = scale_bg.max(0)
        small = list(range(len(n_b))) if len(small) == len(n_b) else []
    if pooled_g is not None:
        scale_bg[small] = pooled_g
    return scale_bg


def _watched(query: Query, blocks: Iterable[Block], progress: bool) -> Iterator[Block]:
    """The blocks, with a bar over the cells read."""
    bar = tqdm(
        total=query.n_obs, desc=query.name, unit="cell", leave=False, disable=None if progress else True
    )
    with bar:
        for block in blocks:
            yield block
            bar.update(int(block.row_n[-1]) + 1 - bar.n if len(block.row_n) else 0)


def _warn_small(query: Query, n_b: np.ndarray, small: list[int], config: ProjectConfig) -> None:
    if small:
        some = ", ".join(f"{query.batches[b]} ({n_b[b]})" for b in small[:5])
        warn(
            f"{len(small)} of {len(n_b)} batches have fewer than {config.min_query_cells} cells: {some}"
            + (", ..." if len(small) > 5 else "")
            + "; the reference's statistics are used for them",
            where=query.name,
            fix="name files that belong together as one query (NAME=FILE...), or lower --min-query-cells",
        )


# -- what is on disk -----------------------------------------------------------------------------------


def _write(
    target: Location,
    query: Query,
    mapped: _Mapped,
    model: Model,
    config: ProjectConfig,
    fingerprint: dict[str, Any],
    report: dict[str, Any],
) -> None:
    z_nk = mapped.z_nk
    order: np.ndarray | int = query.n_obs
    if config.drop_filtered:
        order = np.flatnonzero(query.passed_n)
        z_nk = z_nk[order]
    obs = query_obs(query, order, query.scratch / "obs")
    least = min(query.maps, key=lambda gene_map: gene_map.found)
    about = {
        "query": query.name,
        "model": model.id,
        "norm": config.norm,
        "scale": config.scale,
        "batch_key": config.batch_key,
        "n_passed": int(query.passed_n.sum()),
        "gene_overlap": report["gene_overlap"],
        "n_genes_found": report["n_genes_found"],
        "missing_genes": list(least.missing),
        "reference_statistics": mapped.small,
        "fingerprint": json.dumps(fingerprint),
    }
    write_latents(target, obs, {"X_scalex": z_nk}, {"streamx": about})


def _finished(target: Location, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """What was found out when the query was mapped, if it was, with the same fingerprint."""
    import zarr

    there = os.path.exists(target.root) or any(target.exists(name) for name in ("zarr.json", ".zgroup"))
    if not there:
        return None
    try:
        group = zarr.open_group(target.zarr(""), mode="r", zarr_format=3, use_consolidated=False)
        before = json.loads(str(np.asarray(group[_FINGERPRINT][()]).item()))  # type: ignore[index]
        n_passed = int(np.asarray(group["uns/streamx/n_passed"][()]).item())  # type: ignore[index]
        small = [str(name) for name in np.asarray(group["uns/streamx/reference_statistics"][:])]  # type: ignore[index]
    except (OSError, KeyError, ValueError) as error:
        raise SettingsChangedError(
            f"is there already, and not what this would write ({type(error).__name__})",
            where=str(target),
            fix="choose another folder, or remove it",
        ) from None
    field = first_difference(before, json.loads(json.dumps(fingerprint)))
    if field:
        raise SettingsChangedError(
            f"was mapped with another {field}",
            where=str(target),
            fix="choose another folder, or remove it to map the query again",
        )
    return {"n_passed": n_passed, "reference_statistics": small}


def _check(model: Model, config: ProjectConfig) -> None:
    if model.transform.scale is not None and model.scale_bg is None and config.scale == "reference":
        raise UsageError(
            "this checkpoint of SCALEX keeps no largest values per gene",
            where=str(model.path),
            fix="--scale query estimates them from the query, as SCALEX does",
        )
    if config.norm == "matched" and model.clusters is None:
        raise UsageError(
            "this checkpoint of SCALEX says nothing about its cells",
            where=str(model.path),
            fix="--norm minibatch, as SCALEX does; or running, domain",
        )
    for name in ("min_features", "min_query_cells"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UsageError(f"{name} = {value}", fix="0 or more")


@contextmanager
def _scratch(out: Location) -> Iterator[Path]:
    """A folder in the output or the cache for spills, removed at the end; those of processes that were killed
    go too.
    """
    home = cache_folder() if out.shared else Path(out.root)
    try:
        home.mkdir(parents=True, exist_ok=True)
        for old in home.glob(".scratch-*"):
            if not _alive(old.name.split("-")[1]):
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".scratch-{os.getpid()}-", dir=home))
    except OSError as error:
        raise ResourceError(
            f"can't be written: {error.strerror}", where=str(home), fix="choose another folder"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True
