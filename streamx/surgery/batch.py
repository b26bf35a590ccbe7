"""One new batch: learnt from its cells alone, or, where it was added before, anew from all of them."""

from __future__ import annotations

import shutil
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from streamx.config import TRAINING, FreezeConfig, SurgeryConfig, TrainConfig
from streamx.errors import BadFileError, UsageError
from streamx.models.grow import selected
from streamx.schema import Schema
from streamx.store.collection import Collection, open_collection
from streamx.store.journal import Journal
from streamx.store.location import Location
from streamx.surgery.cells import merge_cells, rows_of
from streamx.train.cells import names_in
from streamx.train.device import pick_device
from streamx.train.distributed import ALONE
from streamx.train.model import Model
from streamx.train.surgery import learn_batch
from streamx.train.task import Run


def learn(
    out: Location,
    model: Model,
    view: Collection,
    batch: str,
    config: SurgeryConfig,
    options: FreezeConfig,
    journal: Journal,
    progress: bool,
) -> tuple[Model, dict[str, Any]]:
    """The model with this batch learnt, last among its batches or again in its place; and how that went."""
    earlier = files_with(model, batch)
    schema, module = model.schema, model.module
    if earlier:  # on all its cells, as if they had come at once
        views = [kept(out, name) for name in earlier]
        scratch = Path(journal.location.root) / "merged"
        shutil.rmtree(scratch, ignore_errors=True)
        view = merge_cells(model, [*views, view], batch, scratch, reading_of(config))
        place = schema.batches.index(batch)
        others = [code for code in range(len(schema.batches)) if code != place]
        module = selected(module, others)
        schema = replace(schema, batches=tuple(schema.batches[code] for code in others))
    rows = rows_of(view, batch)
    schema, new_levels = _with_levels(schema.with_batches([batch]), view, rows, config)
    training = _training(model.kind, config)
    run = Run(view, schema, training, None, pick_device(config.device), ALONE, journal, name=_state(batch))
    module, state = learn_batch(run, module, batch, rows, options, progress=progress)
    module = module.cpu().eval()
    if earlier:
        last = len(schema.batches) - 1
        module = selected(module, [*range(place), last, *range(place, last)])
        schema = model.schema
    done = state.history[-1]
    report: dict[str, Any] = {"cells": rows[1] - rows[0], "epochs": state.epoch}
    report["loss"] = done.get("validation_loss", done["loss"])
    if new_levels:
        report["levels"] = new_levels
    return replace(model, module=module, schema=schema), report


def _with_levels(
    schema: Schema, view: Collection, rows: tuple[int, int], config: SurgeryConfig
) -> tuple[Schema, dict[str, list[str]]]:
    """The schema with the levels of covariates that come with a batch; and which these are."""
    grown = schema.with_levels(
        {key: names_in(view.obs_column(key).iloc[slice(*rows)]) for key, _ in schema.categories}
    )
    pairs = zip(schema.categories, grown.categories, strict=True)
    new = {key: list(now[len(before) :]) for (key, before), (_, now) in pairs if now != before}
    if new and config.refit:
        some = ", ".join(f"{key} = {name}" for key, names in new.items() for name in names[:3])
        raise UsageError(
            f"a batch that may be learnt anew can't bring levels of a covariate ({some}): other batches may "
            "use them meanwhile",
            where=str(view.path),
            fix="leave --refit out, from the first file on",
        )
    return grown, new


def kept(out: Location, name: str) -> Collection:
    try:
        return open_collection(Path(out.root) / "cells" / name)
    except BadFileError:
        raise UsageError(
            f"{name} was added without refit: its cells are not here",
            where=str(out),
            fix="begin a new folder, with --refit from the first file on",
        ) from None


def _state(batch: str) -> str:
    """Name of a batch's state in the journal."""
    return f"batch-{zlib.crc32(batch.encode()):08x}"


def _training(kind: str, config: SurgeryConfig) -> TrainConfig:
    """The model's own training settings, and what the call says instead.

    Weight decay would move weights that have no gradient, and the reference's latents with them: it is 0.
    """
    asked = {f.name: getattr(config, f.name) for f in fields(SurgeryConfig)}
    known = {f.name for f in fields(TrainConfig)}
    given = {name: value for name, value in asked.items() if value is not None and name in known}
    return TrainConfig(model=kind, **TRAINING[kind] | given | {"weight_decay": 0.0})


def files_with(model: Model, batch: str) -> list[str]:
    """Names of the files from which a batch was learnt."""
    return [entry["name"] for entry in model.card["surgery"] if batch in entry["report"]["learnt"]]


def reading_of(config: SurgeryConfig) -> dict[str, Any]:
    return {"memory": config.memory, "threads": config.threads}
