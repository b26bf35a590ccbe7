"""``train``: from a view to a model folder; killed at any point, the same call goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import streamx
from streamx.config import ARCHES, TRAINING, TrainConfig, build
from streamx.errors import BadValuesError, EmptyError, SettingsChangedError, UsageError, warn
from streamx.schema import Schema
from streamx.store.bucket import scratch_folder
from streamx.store.collection import Collection, open_collection
from streamx.store.columns import obs_of
from streamx.store.journal import Journal, first_difference
from streamx.store.latents import write_latents
from streamx.store.location import Location, open_location
from streamx.store.manifest import MARKER, describe, dump
from streamx.train import counts, scalex
from streamx.train.build import network_of
from streamx.train.card import data_of, write_card
from streamx.train.device import check_device, one_torch_thread, pick_device
from streamx.train.distributed import Ranks, together
from streamx.train.engine import run_task
from streamx.train.fit import State
from streamx.train.model import FORMAT, WEIGHTS, read_card, save_weights
from streamx.train.task import Finished, Run, Task

log = logging.getLogger("streamx")

# Settings that change how the work is done and not its result.
_FREE = ("device", "graph", "memory", "threads", "checkpoint_seconds")
# Settings that not every model has.
_SOME_MODELS = {name for values in TRAINING.values() for name in values}
# Settings of count models that SCALEX would take without a word and not use.
_NOT_SCALEX = ("label_key", "category_keys", "continuous_keys", "init", "empirical_prior")
_POSITIVE = ("minibatch_size", "accumulate", "lr", "n_latent", "n_hidden", "n_layers", "train_size")
# Settings that came later: models that say nothing of them have the default.
_LATER = (
    "accumulate",
    "precision",
    "unlabeled",
    "category_keys",
    "continuous_keys",
    "protein_key",
    "arches",
)


@dataclass(frozen=True)
class TrainResult:
    """What ``train`` did.

    Attributes
    ----------
    model, path
        Name of the model and its folder.
    epochs, steps
        Epochs done and training steps in them, over all runs.
    loss
        Mean loss of the best epoch, which is the one that was kept.
    cells_per_second, seconds
        Of this run; 0 cells where it had nothing left to train.
    """

    model: str
    epochs: int
    steps: int
    loss: float
    cells_per_second: float
    seconds: float
    path: str


def train(
    view: Collection | str | Path,
    output: str | Path | Location,
    *,
    progress: bool = True,
    split: Mapping[str, np.ndarray] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a reference model on a view and write it.

    Called again after an interruption it goes on from its last checkpoint, and ends with bit for bit the
    weights and history of a run that was never interrupted (on the same device).

    Parameters
    ----------
    view
        What ``preprocess`` wrote.
    output
        Folder of the model (see :mod:`streamx.train.model`), or ``s3://bucket/prefix``; unfinished state lies
        beside it, in ``<output>.journal``, or in the local cache.
    split
        Masks ``train`` and ``validation``, bool (n_obs,) each, instead of a random ``train_size`` (not of
        SCALEX); cells in neither are left out of the training.
    settings
        Fields of :class:`~streamx.config.TrainConfig` and of the model's own class, such as
        :class:`~streamx.config.ScalexConfig` or :class:`~streamx.config.ScviConfig`.

    Raises
    ------
    SettingsChangedError
        If the folder holds a model, finished or not, with other settings or of another view.
    KeyboardInterrupt
        Ctrl-C passes through; the same call resumes.
    """
    begun = time.monotonic()
    config, network = _configs(settings)
    view = view if isinstance(view, Collection) else open_collection(view)
    if view.n_obs == 0:
        raise EmptyError("the view has no cells", where=str(view.path), fix="preprocess with other limits")
    device = pick_device(config.device)
    location = open_location(output)
    if location.exists(MARKER):
        raise UsageError(
            "holds a store or view", where=str(output), fix="choose another folder for the model"
        )
    if config.model == "scalex":
        if split is not None:
            raise UsageError("scalex trains on all cells", fix="leave split out")
        _check_values(view)
    schema = scalex_schema(view) if config.model == "scalex" else counts.schema_of(view, config, network)
    fingerprint = _fingerprint(view, config, network)
    if split is not None:
        masks = b"".join(np.packbits(split[name]).tobytes() for name in ("train", "validation"))
        fingerprint |= {"split": hashlib.sha256(masks).hexdigest()}
    card = read_card(location)
    if card is not None:
        return _finished(location, card, fingerprint, begun)
    _check_free(location)
    with one_torch_thread(), together(device) as ranks:
        check_device(config, device, ranks)
        journal = Journal(location, fingerprint | _several(ranks)) if ranks.first else None
        try:
            run = Run(view, schema, config, network, device, ranks, journal, split=split)
            task, state, done, rate = _fit(run, progress)
            if journal is not None:
                kept = task.module if task.result is None else task.result
                found = _model_of(config).finish(run, kept)
                _write(location, run, kept, task.base, found, state, done, fingerprint)
                journal.remove()
        finally:
            if journal is not None:
                journal.release()
    return _result(location, config.model, done, rate, time.monotonic() - begun)


def _check_values(view: Collection) -> None:
    """SCALEX takes shares of a gene's maximum, 0 to 1; raw counts would train for hours, and to nothing."""
    if not any((view.view or {}).get("transform", {}).values()):
        raise UsageError(
            "holds raw counts, and SCALEX learns from values that `preprocess` scales to 0..1",
            where=str(view.path),
            fix="streamx preprocess STORE -o VIEW (without --profile counts), or --model scvi",
        )


def _check_free(location: Location) -> None:
    """What an interrupted run wrote is no obstacle; anything else would lie among the model's files."""
    occupied = os.path.isfile(location.root) or any(True for _ in location.list())
    if occupied and not location.journal.exists():
        raise UsageError(
            "holds other files, and no model", where=str(location), fix="choose another folder, or empty it"
        )


def _model_of(config: TrainConfig) -> Any:
    """The file that knows the model: its ``prepare`` and ``finish``."""
    return scalex if config.model == "scalex" else counts


def _fit(run: Run, progress: bool) -> tuple[Task, State, dict[str, Any], float]:
    """Train, or go on: the task, its last state, what was done in numbers, and cells per second now."""
    config = run.config
    task: Task = _model_of(config).prepare(run, progress)
    begun, trained = time.monotonic(), run_task(run, task, run.view.n_obs, progress)
    rate = trained.minibatches * min(config.minibatch_size, run.view.n_obs) / (time.monotonic() - begun)
    return task, trained.state, _summary(run.view, trained.state, trained.per_epoch), rate


def _summary(view: Collection, state: State, per_epoch: int) -> dict[str, Any]:
    """What was done, over all calls.

    Raises
    ------
    BadValuesError
        If no epoch had a loss.
    """
    if state.stopping.best_epoch < 0 or not state.stopping.patience:  # the last epoch is kept
        last = state.history[-1]
        if math.isnan(last["loss"]):
            raise BadValuesError(
                f"the loss is not a number, since epoch {state.epoch - 1}",
                where=str(view.path),
                fix="a lower --lr, or other input",
            )
        return {
            "n_cells": view.n_obs,
            "epochs": state.epoch,
            "steps": state.epoch * per_epoch,
            "best_epoch": state.epoch - 1,
            "loss": last.get("validation_loss", last["loss"]),
        }
    if state.stopping.best_epoch != state.epoch - 1 and math.isnan(state.history[-1]["loss"]):
        warn(f"the loss became NaN in epoch {state.epoch - 1}; epoch {state.stopping.best_epoch} is kept")
    return {
        "n_cells": view.n_obs,
        "epochs": state.epoch,
        "steps": state.epoch * per_epoch,
        "best_epoch": state.stopping.best_epoch,
        "loss": state.stopping.best,
    }


def _several(ranks: Ranks) -> dict[str, Any]:
    """What a run of several processes can't be taken up without: their number."""
    return {"processes": ranks.world} if ranks.several else {}


def _write(
    location: Location,
    run: Run,
    module: Any,
    base: list[dict[str, float]],
    found: Finished,
    state: State,
    trained: dict[str, Any],
    fingerprint: dict[str, Any],
) -> None:
    """The model folder; ``model.json`` comes last and makes it a model."""
    view, config = run.view, run.config
    tables = {"history.csv": as_csv(state.history)}
    if base:
        tables["history-base.csv"] = as_csv(base)
    for name, data in tables.items():
        location.write(name, data)
    digest, described = save_weights(location, module, found.tables)
    uns = {"streamx": {"model": digest, "batch_key": view.batch_key}}
    if config.norm is not None:
        uns["streamx"]["norm"] = config.norm
    with scratch_folder() as folder:
        obs = obs_of(view, folder)
        write_latents(location.below("reference.zarr"), obs, {f"X_{config.model}": found.z_nk}, uns)
    card = {
        "format": FORMAT,
        "model": config.model,
        "id": digest,
        **asdict(run.schema),
        "network": asdict(module.config),
        "norm": config.norm,
        "preprocessing": preprocessing(view),
        "view": fingerprint["view"],
        "settings": fingerprint,
        "training": trained,
        "data": data_of(view, run.schema.label_key),
        "versions": {"streamx": streamx.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "files": {WEIGHTS: described} | {name: describe(data) for name, data in tables.items()},
    }
    location.sync()
    write_card(location, card)


def as_csv(history: list[dict[str, float]]) -> bytes:
    """A history as a table, one row per epoch."""
    names = list(history[0]) if history else ["epoch", "loss"]
    rows = [",".join(names)] + [",".join(repr(row[name]) for name in names) for row in history]
    return ("\n".join(rows) + "\n").encode()


def scalex_schema(view: Collection) -> Schema:
    """The genes and batches of a view: all that SCALEX asks for."""
    return Schema(tuple(str(name) for name in view.var_names), tuple(view.batches), view.batch_key)


def preprocessing(view: Collection) -> dict[str, Any]:
    """What a query must go through: the transform, and the decisions that the view records."""
    if view.view is None:  # a store: its counts as they are
        return {"transform": {}, "recipe": {"min_features": 0, "drop": [], "total": "kept"}, "parameters": {}}
    return {name: view.view[name] for name in ("transform", "recipe", "parameters")}


def _configs(settings: dict[str, Any]) -> tuple[TrainConfig, Any]:
    """Settings of the training, those left out as the model has them; and of the network."""
    in_training = {f.name for f in fields(TrainConfig)}
    config: TrainConfig = build(TrainConfig, {k: v for k, v in settings.items() if k in in_training})
    of_network = {k: v for k, v in settings.items() if k not in in_training}
    if config.arches and config.model not in ("scvi", "scanvi"):
        raise UsageError(f"arches are settings of scvi and scanvi, not of {config.model}", fix="leave it out")
    network = network_of(config.model, (ARCHES if config.arches else {}) | of_network)
    defaults = TRAINING[config.model]
    for name, value in asdict(config).items():
        if value is not None and name not in defaults and name in _SOME_MODELS:
            raise UsageError(f"{config.model} has no {name}", fix="leave it out, or choose another --model")
    for name in _NOT_SCALEX if config.model == "scalex" else ():
        if getattr(config, name) not in (None, ()):
            raise UsageError(f"scalex has no {name}", fix="leave it out, or choose another --model")
    left_out = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.max_epochs is not None:
        left_out.pop("max_iteration", None)
    elif config.model == "scanvi" and config.max_iteration is None:
        left_out["max_epochs"] = 10 if not config.base_epochs else min(10, max(2, config.base_epochs // 3))
    if config.warmup_steps is not None:
        left_out.pop("warmup_epochs", None)
    config = replace(config, **left_out)
    for name, value in (asdict(config) | asdict(network)).items():
        positive = name in _POSITIVE
        if isinstance(value, (int, float)) and (value < 0 or (positive and value == 0)):
            raise UsageError(f"{name} = {value}", fix="a positive number" if positive else "0 or more")
    return config, network


def _fingerprint(view: Collection, config: TrainConfig, network: Any) -> dict[str, Any]:
    """Everything that the weights depend on."""
    manifest = view.manifest
    declared = {k: v for k, v in (view.view or {}).items() if k in ("transform", "parameters")}
    content = dump(
        {
            "parts": manifest.parts,
            "tables": [manifest.objects[key] for _, key in sorted(manifest.tables.items())],
            "declared": declared,
            "batches": view.batches,
        }
    )
    default = asdict(TrainConfig())
    settings = {k: v for k, v in asdict(config).items() if v is not None}
    later = {k for k in _LATER if settings[k] == default[k]}
    return {
        "view": {"generation": view.generation, "sha256": hashlib.sha256(content).hexdigest()},
        "train": {k: v for k, v in settings.items() if k not in later.union(_FREE)},
        "network": json.loads(dump(asdict(network))),  # tuples as the card gives them back
    }


def _finished(
    location: Location, card: dict[str, Any], fingerprint: dict[str, Any], begun: float
) -> TrainResult:
    field = first_difference(card["settings"], fingerprint)
    if field:
        raise SettingsChangedError(
            f"holds a model with another {field}",
            where=str(location),
            fix="choose another folder, or remove this one",
        )
    if location.journal.exists():  # killed between the last write and the end
        Journal(location, fingerprint).remove()
    log.info("%s holds this model already: nothing to train", location)
    return _result(location, card["model"], card["training"], 0.0, time.monotonic() - begun)


def _result(
    location: Location, model: str, trained: dict[str, Any], rate: float, seconds: float
) -> TrainResult:
    return TrainResult(
        model=model,
        epochs=trained["epochs"],
        steps=trained["steps"],
        loss=trained["loss"],
        cells_per_second=round(rate, 1),
        seconds=round(seconds, 3),
        path=str(location),
    )
