"""``train``: from a view to a model folder; killed at any point, the same call goes on."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import streamx
from streamx.config import ARCHES, TRAINING, TrainConfig, build
from streamx.errors import BadValuesError, EmptyError, SettingsChangedError, UsageError, warn
from streamx.schema import Schema
from streamx.store.collection import Collection, open_collection
from streamx.store.journal import Journal, first_difference
from streamx.store.latents import write_latents
from streamx.store.location import Location, open_location
from streamx.store.manifest import MARKER, describe, dump
from streamx.train import counts, scalex
from streamx.train.adam import EPS
from streamx.train.build import network_of
from streamx.train.checkpoint import Throttle, find_state, restore, save_state
from streamx.train.device import can_record, check_device, one_torch_thread, pick_device, precision_of
from streamx.train.distributed import Ranks, together
from streamx.train.early_stopping import EarlyStopping
from streamx.train.fit import State, fit, make_optimizer
from streamx.train.graph import RecordedStep
from streamx.train.model import CARD, FORMAT, WEIGHTS, read_card, save_weights, seal
from streamx.train.task import Finished, Run, Task

log = logging.getLogger("streamx")

# Settings that change how the work is done and not its result.
_FREE = ("device", "graph", "memory", "threads", "checkpoint_seconds")
# Settings that not every model has.
_SOME_MODELS = {name for values in TRAINING.values() for name in values}
_POSITIVE = ("minibatch_size", "accumulate", "lr", "n_latent", "n_hidden", "n_layers", "train_size")
# Settings that came later: models that say nothing of them have the default.
_LATER = ("accumulate", "precision", "unlabeled", "category_keys", "continuous_keys", "protein_key", "arches")


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
    view: Collection | str | Path, output: str | Path | Location, *, progress: bool = True, **settings: Any
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
    schema = scalex_schema(view) if config.model == "scalex" else counts.schema_of(view, config)
    fingerprint = _fingerprint(view, config, network)
    card = read_card(location)
    if card is not None:
        return _finished(location, card, fingerprint, begun)
    with one_torch_thread(), together(device) as ranks:
        check_device(config, device, ranks)
        journal = Journal(location, fingerprint | _several(ranks)) if ranks.first else None
        try:
            run = Run(view, schema, config, network, device, ranks, journal)
            module, state, done, rate = _fit(run, progress)
            if journal is not None:
                found = _model_of(config).finish(run, module)
                _write(location, run, module, found, state, done, fingerprint)
                journal.remove()
        finally:
            if journal is not None:
                journal.release()
    return _result(location, config.model, done, rate, time.monotonic() - begun)


def _model_of(config: TrainConfig) -> Any:
    """The file that knows the model: its ``prepare`` and ``finish``."""
    return scalex if config.model == "scalex" else counts


def _fit(run: Run, progress: bool) -> tuple[Any, State, dict[str, Any], float]:
    """Train, or go on: the model, its state, what was done in numbers, and cells per second of this call."""
    config, ranks, journal = run.config, run.ranks, run.journal
    task: Task = _model_of(config).prepare(run)
    optimizer = make_optimizer(task.module, config.lr, config.weight_decay, ranks, eps=config.eps or EPS)
    state = _state(run, task.module, optimizer)
    precision = precision_of(config, run.device)
    recorded = task.recordable and config.graph != "off" and can_record(config, run.device, ranks)
    n_minibatches = ranks.most(task.n_minibatches, run.device)
    per_epoch = -(-n_minibatches // config.accumulate)
    seen = state.epoch * n_minibatches + state.minibatch
    throttle, begun = Throttle(config.checkpoint_seconds), time.monotonic()

    def keep(state: State, now: bool) -> None:
        if journal is not None and (now or throttle.due()):
            save_state(journal, task.module, optimizer, state)

    fit(
        task.module,
        optimizer,
        task.minibatches,
        task.loss,
        n_epochs=n_epochs_of(config, run.view.n_obs, per_epoch),
        state=state,
        n_minibatches=n_minibatches,
        accumulate=config.accumulate,
        precision=precision,
        whole_step=RecordedStep(optimizer, task.loss, precision) if recorded else None,
        validate=task.validate,
        lr=config.lr,
        keep=keep,
        ranks=ranks,
        progress=progress and ranks.first,
    )
    minibatches = (state.epoch * n_minibatches - seen) * ranks.world
    rate = minibatches * min(config.minibatch_size, run.view.n_obs) / (time.monotonic() - begun)
    return task.module, state, _summary(run.view, state, per_epoch), rate


def n_epochs_of(config: TrainConfig, n_cells: int, steps_per_epoch: int) -> int:
    """Epochs to train: as many as the steps ask for; else as many as were asked for; else by size.

    By size is scvi-tools' rule: 400 up to 20,000 cells, fewer in proportion above.
    """
    if config.max_iteration is not None:
        return -(-config.max_iteration // max(1, steps_per_epoch))
    if config.max_epochs is not None:
        return config.max_epochs
    return min(400, max(1, round(20_000 / n_cells * 400)))


def _summary(view: Collection, state: State, per_epoch: int) -> dict[str, Any]:
    """What was done, over all calls.

    Raises
    ------
    BadValuesError
        If no epoch had a loss.
    """
    if state.stopping.best_epoch < 0:
        raise BadValuesError(
            "the loss is not a number", where=str(view.path), fix="a lower --lr, or other input"
        )
    if not state.stopping.patience:  # the last epoch is kept
        last = state.history[-1]
        if math.isnan(last["loss"]):
            raise BadValuesError(
                f"the loss became NaN in epoch {state.epoch - 1}",
                where=str(view.path),
                fix="a lower --lr, or --patience, which keeps the best epoch",
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


def _state(run: Run, module: nn.Module, optimizer: Any) -> State:
    """What an interrupted run has left, on all processes; else a fresh state."""
    config = run.config
    kept = run.ranks.share(find_state(run.journal) if run.journal is not None else None)
    if kept is None:
        rule = EarlyStopping(
            config.patience,
            threshold=config.threshold or 0.0,
            lr_patience=config.lr_patience or 0,
            lr_factor=config.lr_factor or 1.0,
        )
        return State(0, [], rule)
    state = restore(kept, module, optimizer)
    log.info("going on after epoch %d, minibatch %d", state.epoch, state.minibatch)
    return state


def _write(
    location: Location,
    run: Run,
    module: Any,
    found: Finished,
    state: State,
    trained: dict[str, Any],
    fingerprint: dict[str, Any],
) -> None:
    """The model folder; ``model.json`` comes last and makes it a model."""
    view, config = run.view, run.config
    names = list(state.history[0]) if state.history else ["epoch", "loss"]
    rows = [",".join(names)] + [",".join(repr(row[name]) for name in names) for row in state.history]
    history = ("\n".join(rows) + "\n").encode()
    location.write("history.csv", history)
    digest, described = save_weights(location, module, found.tables)
    uns = {"streamx": {"model": digest, "batch_key": view.batch_key}}
    if config.norm is not None:
        uns["streamx"]["norm"] = config.norm
    write_latents(location.below("reference.zarr"), view.obs, {f"X_{config.model}": found.z_nk}, uns)
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
        "versions": {"streamx": streamx.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "files": {WEIGHTS: described, "history.csv": describe(history)},
    }
    location.sync()
    location.write(CARD, seal(card))


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
    left_out = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.max_epochs is not None:
        left_out.pop("max_iteration", None)
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
        "network": asdict(network),
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
