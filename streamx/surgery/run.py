"""``surgery``: a reference model learns the batches of query files as they come; its own latents stay.

::

    UPDATED/
      model.json            as the reference's, and: origin, earlier, added, surgery (an entry per file)
      model-<n>.safetensors weights after n files
      reference.zarr        a copy of the reference's cells
      added/<name>.zarr     cells of each file, with latents
      cells/<name>          counts of batches that may be learnt anew (with ``refit``)
      neighbors/            the reference's kept indexes; `transfer` appends the cells that were added

A file is done when the card says so; until then all that was written for it is written anew by the next run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamx.config import (
    FreezeConfig,
    ProjectConfig,
    SurgeryConfig,
    build,
    parse_bytes,
)
from streamx.errors import InputError, SettingsChangedError, UsageError, warn
from streamx.mapping import read_cells
from streamx.project import project
from streamx.query import Request, open_query, read_blocks, requests
from streamx.store.amend import amend
from streamx.store.frame import as_text
from streamx.store.journal import Journal, first_difference
from streamx.store.location import Location, open_location
from streamx.surgery.arrivals import arrivals
from streamx.surgery.batch import files_with, kept, learn, reading_of
from streamx.surgery.begin import begin, copy_tree
from streamx.surgery.cells import PLACE, lay_query
from streamx.surgery.narrow import warn_narrow
from streamx.train.build import TAKES_ROWS
from streamx.train.card import write_card
from streamx.train.cells import columns_of
from streamx.train.counts import latents
from streamx.train.device import one_torch_thread
from streamx.train.model import Model, load_model, save_weights
from streamx.train.surgery import measured_in, narrowed

log = logging.getLogger("streamx")

# Settings that change how the work is done and not its result.
_FREE = ("device", "memory", "threads", "on_error", "checkpoint_seconds")
# Options that would move weights which the latents of the reference depend on.
_MOVES_REFERENCE = {"unfrozen": True, "freeze_expression": False, "freeze_batchnorm_encoder": False}


def surgery(
    reference: str | Path | Location,
    queries: Any,
    output: str | Path | Location,
    *,
    watch: str | Path | None = None,
    idle: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Extend a reference by the batches of query files, one file after the other.

    Each new batch is learnt from its own cells alone, by weights that no other batch uses; then the file's
    cells get latents and join the updated reference. A batch that the model knows is only projected. The
    reference itself is never written to.

    Parameters
    ----------
    reference
        Folder of a scvi, scanvi, totalvi or trvae model, also one that another tool wrote. That one holds no
        cells: files of its own batches, which are only projected, bring them.
    queries
        As for :func:`streamx.project`: each file is a query, and without ``batch_key`` one batch.
    output
        Folder of the updated model. Files that it holds already are skipped; so the same call goes on after
        an interruption, and a call with more files adds those.
    watch, idle
        Then go on with files that appear in a folder, or as lines of a text file; until Ctrl-C, or until
        none came for so many seconds. A file in a folder is taken when it no longer grows.
    settings
        Fields of :class:`~streamx.config.SurgeryConfig` and :class:`~streamx.config.FreezeConfig`.

    Returns
    -------
    Per query: ``name, status (done, skipped, failed), n_cells, learnt, projected`` (names of batches),
    ``gene_overlap``, or ``error``.

    Raises
    ------
    UsageError
        For a SCALEX model, which knows no surgery; for options that would move the reference's latents.
    SettingsChangedError
        If the folder holds another model's update, or a file was added with other content or settings.
    """
    config, options = _configs(settings)
    source, out = open_location(reference), open_location(output)
    asked = requests(queries) if queries or watch is None else []
    first = load_model(source)
    _check(first, options)
    if config.refit and out.shared:
        raise UsageError(
            "refit keeps cells beside the model, which it does not do in a bucket",
            where=str(out),
            fix="give a folder; or leave --refit out",
        )
    reports = []
    with Journal(out, {"reference": first.id, "settings": _decisive(config, options)}) as journal:
        begin(source, out, first)
        arriving = () if watch is None else arrivals(Path(watch), idle)
        for request in chain(asked, arriving):
            try:
                with one_torch_thread():
                    reports.append(_add(out, request, config, options, journal, progress))
            except InputError as error:
                if config.on_error != "skip":
                    raise
                log.error("%s: %s", request.name, error)
                reports.append({"name": request.name, "status": "failed", "error": str(error)})
        journal.remove()
    return reports


def _configs(settings: dict[str, Any]) -> tuple[SurgeryConfig, FreezeConfig]:
    of_freeze = {f.name for f in fields(FreezeConfig)}
    config = build(SurgeryConfig, {k: v for k, v in settings.items() if k not in of_freeze})
    return config, build(FreezeConfig, {k: v for k, v in settings.items() if k in of_freeze})


def _decisive(config: SurgeryConfig, options: FreezeConfig) -> dict[str, Any]:
    """Settings that the result depends on."""
    return {k: v for k, v in (asdict(config) | asdict(options)).items() if k not in _FREE}


def _check(model: Model, options: FreezeConfig) -> None:
    where = str(model.path)
    if model.kind == "scalex":
        raise UsageError(
            "SCALEX has no surgery: its encoder knows no batches",
            where=where,
            fix="streamx project MODEL QUERY... -o OUT maps new batches as they are",
        )
    for name, value in _MOVES_REFERENCE.items():
        if getattr(options, name) is value:
            raise UsageError(
                f"{name} = {value} moves weights that the latents of the reference depend on",
                where=where,
                fix="leave it out; or use load_query_data, and compute the reference's latents again",
            )
    if not getattr(model.module.config, "encode_covariates", True):
        warn(
            "the encoder sees no batches: surgery changes the decoder alone, latents are as projected",
            where=where,
            fix="train the reference with --arches (or --encode-covariates)",
        )


# -- one file ------------------------------------------------------------------------------------------


def _add(
    out: Location,
    request: Request,
    config: SurgeryConfig,
    options: FreezeConfig,
    journal: Journal,
    progress: bool,
) -> dict[str, Any]:
    model = load_model(out)
    mapping = _mapping(config)
    scratch = Path(journal.location.root) / "query"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    query = open_query(request, model, mapping, scratch=scratch, memory=parse_bytes(config.memory))
    try:
        entry = {
            "name": request.name,
            "inputs": {source.key: source.checksum() for source in query.sources},
            "settings": _decisive(config, options),
        }
        before = next((e for e in model.card["surgery"] if e["name"] == request.name), None)
        if before is not None:
            return _skipped(out, before, entry)
        learnable = [b for b in query.batches if _learnable(model, b, config)]
        home = Path(out.root) / "cells" / request.name if config.refit else scratch / "cells"
        blocks = read_blocks(query, model, mapping, parse_bytes(config.memory))
        view = None
        if learnable:
            shutil.rmtree(home, ignore_errors=True)
            view = lay_query(
                model,
                query,
                learnable,
                blocks,
                home,
                reading_of(config),
                new_labels=config.new_labels,
                mask_missing=config.mask_missing,
            )
    finally:
        query.close()
    learnt: dict[str, Any] = {}
    about = {"model": model.id, "inputs": entry["inputs"]}
    if journal.find("file") != about:  # what is kept of batches is of other cells, which may be called alike
        journal.clear(keep=(scratch.name,))
        journal.record("file", about)
    if view is not None:
        for batch in sorted(view.batches):
            model, learnt[batch] = learn(out, model, view, batch, config, options, journal, progress)
    return _commit(out, model, request, entry, learnt, query.batches, config, journal, progress)


def _skipped(out: Location, before: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    if before["settings"].get("new_labels") == "refuse":  # it held none: keeping them changes nothing
        entry = entry | {"settings": entry["settings"] | {"new_labels": "refuse"}}
    difference = first_difference({k: before[k] for k in entry}, entry)
    if difference:
        raise SettingsChangedError(
            f"{entry['name']} was added with another {difference}",
            where=str(out),
            fix="give the file another name (NAME=FILE), or begin a new folder",
        )
    log.info("%s is in the reference already", entry["name"])
    return {"name": entry["name"], "status": "skipped"} | before["report"]


def _mapping(config: SurgeryConfig) -> ProjectConfig:
    """The settings that surgery and projection have in common."""
    shared = {f.name for f in fields(ProjectConfig)} & {f.name for f in fields(SurgeryConfig)}
    return build(ProjectConfig, {name: getattr(config, name) for name in shared} | {"drop_filtered": True})


def _learnable(model: Model, batch: str, config: SurgeryConfig) -> bool:
    """Whether a batch is learnt: new ones; with ``refit`` also those that surgery added before."""
    return batch not in model.batches or (config.refit and bool(files_with(model, batch)))


def _commit(
    out: Location,
    model: Model,
    request: Request,
    entry: dict[str, Any],
    learnt: dict[str, Any],
    batches: list[str],
    config: SurgeryConfig,
    journal: Journal,
    progress: bool,
) -> dict[str, Any]:
    """Weights, then the file's cells with their latents, then the card that makes them count."""
    card = model.card
    number = len(card["surgery"]) + 1
    key = card["weights"]
    if learnt:
        key = f"model-{number:06d}.safetensors"
        digest, described = save_weights(out, model.module, {}, key)
        files = {name: of for name, of in card["files"].items() if name != card["weights"]} | {key: described}
        earlier = [*card["earlier"], card["id"]]
        card = card | {"id": digest, "files": files, "earlier": earlier, "weights": key}
        model = replace(model, id=digest)
    added = f"added/{request.name}.zarr"
    out.delete_tree(added)  # of a run that was killed
    mapping = {k: v for k, v in asdict(_mapping(config)).items() if v is not None}
    [mapped] = project(
        model, {request.name: list(request.inputs)}, out.below("added"), progress=progress, **mapping
    )
    _look(out.below(added), learnt, config.batch_key, card.get("spread", 0.0))
    report = {
        "n_cells": mapped["n_passed"],
        "learnt": learnt,
        "projected": [name for name in batches if name not in learnt],
        "gene_overlap": mapped["gene_overlap"],
    }
    old, names = model.card["weights"], _encoded_again(out, model, learnt, number, config)
    card = card | {
        "batches": list(model.schema.batches),
        "categories": model.schema.categories,
        "added": [*names, added],
        "surgery": [*card["surgery"], entry | {"report": report}],
    }
    out.sync()
    write_card(out, card)
    if key != old:
        out.delete(old)
    for name in set(model.card["added"]) - set(names):
        out.delete_tree(name)
    journal.clear()
    return {"name": request.name, "status": "done"} | report


def _look(added: Location, learnt: Collection[str], batch_key: str | None, spread: float) -> None:
    """Warn of new batches whose cells may be of one kind."""
    cells = read_cells(added, str(added))
    for batch in learnt:
        mine = np.ones(cells.n_cells, bool)
        if batch_key is not None:
            mine = (as_text(cells.column(batch_key)) == batch).to_numpy()
        warn_narrow(batch, cells.latent_nk[mine], spread)


def _encoded_again(
    out: Location, model: Model, learnt: dict[str, Any], number: int, config: SurgeryConfig
) -> list[str]:
    """Names of the files that were added, those with cells of batches that were learnt anew as new copies."""
    names = []
    for name, entry in zip(model.card["added"], model.card["surgery"], strict=True):
        batches = [batch for batch in entry["report"]["learnt"] if batch in learnt]
        if batches:
            fresh = f"added/{entry['name']}.{number:06d}.zarr"
            out.delete_tree(fresh)
            copy_tree(out.below(name), out.below(fresh))
            view, key = kept(out, entry["name"]), model.latent_key
            columns = columns_of(view, model.schema, torch.device("cpu"))
            options = {
                "device": torch.device("cpu"),
                "sparse": model.kind in TAKES_ROWS,
                **reading_of(config),
            }
            module = narrowed(model.kind, model.schema, model.module, measured_in(view, model.schema))
            found_nk = latents(module, view, columns, **options)
            z_nk = read_cells(out.below(fresh), fresh).latent_nk
            again = np.isin(view.obs_column("batch").astype(str), batches)
            z_nk[view.obs_column(PLACE).to_numpy()[again]] = found_nk[again]
            amend(out.below(fresh), {}, {key: z_nk})
            name = fresh
        names.append(name)
    return names
