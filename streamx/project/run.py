"""``project``: new cells -> latents in the space of a reference model, without training."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from streamx.config import ProjectConfig, build, parse_bytes
from streamx.errors import InputError, SettingsChangedError, UsageError
from streamx.memory import steady_memory
from streamx.project import counts, scalex
from streamx.project.mapped import Mapped
from streamx.query import Query, Request, open_query, query_obs, requests
from streamx.store.bucket import cache_folder
from streamx.store.journal import first_difference
from streamx.store.latents import write_latents
from streamx.store.location import Location, open_location, storage_error
from streamx.train.device import one_torch_thread, pick_device
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
    only then brought onto the reference's genes (absent ones are zero). For SCALEX, statistics of the batch
    norm and the largest value per gene come from the reference, or from the query itself (``norm``,
    ``scale``). Count models take raw counts; where their encoder sees batches, those of the query have to be
    known to it (surgery adds new ones).

    Parameters
    ----------
    model
        A model, or its folder (also one that SCALEX wrote).
    queries
        See :func:`streamx.query.requests`.
    output
        Folder (or ``s3://bucket/prefix``) for one ``<query>.zarr`` each: AnnData-Zarr with obs,
        ``obs["passed_qc"]`` and ``obsm["X_<model>"]``, one row per input cell in input order; NaN for cells
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
    _check(config)
    config = _way(model).settled(model, config)
    out = open_location(output)
    if any(out.exists(name) for name in ("streamx.json", "model.json")):
        raise UsageError(
            "holds a store, view or model", where=str(out), fix="choose another folder for what is mapped"
        )
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
        mapped = _way(model).map_cells(model, query, config, memory, progress)
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


# -- what is on disk -----------------------------------------------------------------------------------


def _write(
    target: Location,
    query: Query,
    mapped: Mapped,
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
    obs = query_obs(query, order, query.scratch / "obs", mapped.columns)
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
    write_latents(target, obs, {model.latent_key: z_nk}, {"streamx": about})


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


def _way(model: Model) -> Any:
    """The file that knows how this model maps: its ``settled`` and ``map_cells``."""
    return scalex if model.kind == "scalex" else counts


def _check(config: ProjectConfig) -> None:
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
        sweep_scratch(home)
        folder = Path(tempfile.mkdtemp(prefix=_scratch_name(str(os.getpid())), dir=home))
    except OSError as error:
        raise storage_error(error, str(home)) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_scratch(home: Path) -> None:
    """Remove what processes of this machine that were killed have left; of others nothing is known here."""
    for old in home.glob(".scratch-*"):
        pid = old.name.split("-")[1]
        if old.name.startswith(_scratch_name(pid)) and not _alive(pid):
            shutil.rmtree(old, ignore_errors=True)


def _scratch_name(pid: str) -> str:
    return f".scratch-{pid}-{socket.gethostname()}-"


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True
