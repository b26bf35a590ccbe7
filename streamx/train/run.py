"""``train``: from a view to a model folder; killed at any point, the same call goes on."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import streamx
from streamx.config import ScalexConfig, TrainConfig, build
from streamx.errors import BadValuesError, EmptyError, SettingsChangedError, UsageError, warn
from streamx.models.matched import Clusters
from streamx.models.scalex import NormStats, Scalex
from streamx.store.collection import Collection, open_collection
from streamx.store.journal import Journal, first_difference
from streamx.store.latents import write_latents
from streamx.store.location import Location, open_location
from streamx.store.manifest import MARKER, describe, dump
from streamx.threads import thread_count
from streamx.train.checkpoint import Throttle, find_state, restore, save_state
from streamx.train.device import can_record, check_device, one_torch_thread, pick_device, precision_of
from streamx.train.distributed import Ranks, together
from streamx.train.early_stopping import EarlyStopping
from streamx.train.feed import make_loader, training_inputs
from streamx.train.fit import State, fit, make_optimizer, seed_of
from streamx.train.graph import RecordedStep
from streamx.train.latent import latents, match_reference, view_stats
from streamx.train.model import CARD, FORMAT, WEIGHTS, read_card, save_weights, seal

log = logging.getLogger("streamx")

# Settings that change how the work is done and not its result.
_FREE = ("device", "graph", "memory", "threads", "checkpoint_seconds")
# Settings that came later: models that say nothing of them have the default.
_LATER = ("accumulate", "precision")


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
        Fields of :class:`~streamx.config.TrainConfig` and :class:`~streamx.config.ScalexConfig`.

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
    fingerprint = _fingerprint(view, config, network)
    if location.exists(MARKER):
        raise UsageError(
            "holds a store or view", where=str(output), fix="choose another folder for the model"
        )
    card = read_card(location)
    if card is not None:
        return _finished(location, card, fingerprint, begun)
    with one_torch_thread(), together(device) as ranks:
        check_device(config, device, ranks)
        journal = Journal(location, fingerprint | _several(ranks)) if ranks.first else None
        try:
            run = _Run(view, config, network, device, ranks, journal)
            module, state, done, rate = _fit(run, progress)
            if journal is not None:
                _finish(location, run, module, state, done, fingerprint)
                journal.remove()
        finally:
            if journal is not None:
                journal.release()
    return _result(location, done, rate, time.monotonic() - begun)


@dataclass(frozen=True, eq=False)
class _Run:
    """What a call works with; processes other than the first have no journal."""

    view: Collection
    config: TrainConfig
    network: ScalexConfig
    device: torch.device
    ranks: Ranks
    journal: Journal | None

    @property
    def reading(self) -> dict[str, Any]:
        return {"memory": self.config.memory, "threads": thread_count(self.config.threads)}


def _fit(run: _Run, progress: bool) -> tuple[Scalex, State, dict[str, Any], float]:
    """Train, or go on: the model, its state, what was done in numbers, and cells per second of this call."""
    view, config, ranks, journal = run.view, run.config, run.ranks, run.journal
    loader = make_loader(
        view,
        config.minibatch_size,
        device=run.device,
        drop_last=True,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
        **run.reading,
    )
    generator = torch.Generator().manual_seed(seed_of(config.seed, 0))
    module = Scalex(view.n_vars, max(1, len(view.batches)), run.network, generator).to(run.device)
    optimizer = make_optimizer(module, config.lr, config.weight_decay, ranks)
    state = _state(run, module, optimizer)
    loss, precision = named_losses(module), precision_of(config, run.device)
    recorded = config.graph != "off" and can_record(config, run.device, ranks)
    n_minibatches = ranks.most(len(loader), run.device)
    per_epoch = -(-n_minibatches // config.accumulate)
    seen = state.epoch * n_minibatches + state.minibatch
    throttle, begun = Throttle(config.checkpoint_seconds), time.monotonic()

    def keep(state: State, now: bool) -> None:
        if journal is not None and (now or throttle.due()):
            save_state(journal, module, optimizer, state)

    fit(
        module,
        optimizer,
        partial(training_inputs, loader, run.network.n_latent, config.seed),
        loss,
        n_epochs=-(-config.max_iteration // per_epoch),
        state=state,
        n_minibatches=n_minibatches,
        accumulate=config.accumulate,
        precision=precision,
        whole_step=RecordedStep(optimizer, loss, precision) if recorded else None,
        keep=keep,
        ranks=ranks,
        progress=progress and ranks.first,
    )
    minibatches = (state.epoch * n_minibatches - seen) * ranks.world
    rate = minibatches * min(config.minibatch_size, view.n_obs) / (time.monotonic() - begun)
    return module, state, _summary(view, state, per_epoch), rate


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
    if state.stopping.best_epoch != state.epoch - 1 and math.isnan(state.history[-1]["loss"]):
        warn(f"the loss became NaN in epoch {state.epoch - 1}; epoch {state.stopping.best_epoch} is kept")
    return {
        "n_cells": view.n_obs,
        "epochs": state.epoch,
        "steps": state.epoch * per_epoch,
        "best_epoch": state.stopping.best_epoch,
        "loss": state.stopping.best,
    }


def _finish(
    location: Location,
    run: _Run,
    module: Scalex,
    state: State,
    done: dict[str, Any],
    fingerprint: dict[str, Any],
) -> None:
    """What the model says of its reference, and the folder with all of it."""
    view, config, options = run.view, run.config, run.reading
    stats = view_stats(module, view, **options)
    clusters, moves = match_reference(module, view, seed=config.seed, **options)
    z_nk = latents(module, view, config.norm, stats, moves, seed=config.seed, **options)
    _write(location, view, module, stats, clusters, z_nk, state, done, fingerprint, config)


def _several(ranks: Ranks) -> dict[str, Any]:
    """What a run of several processes can't be taken up without: their number."""
    return {"processes": ranks.world} if ranks.several else {}


def _state(run: _Run, module: Scalex, optimizer: Any) -> State:
    """What an interrupted run has left, on all processes; else a fresh state."""
    kept = run.ranks.share(find_state(run.journal) if run.journal is not None else None)
    if kept is None:
        return State(0, [], EarlyStopping(run.config.patience))
    state = restore(kept, module, optimizer)
    log.info("going on after epoch %d, minibatch %d", state.epoch, state.minibatch)
    return state


def named_losses(module: Scalex) -> Callable[..., dict[str, Tensor]]:
    """The model's loss and its parts, as the loop takes them."""

    def loss(x_ng: Any, batch_n: Tensor, noise_nk: Tensor) -> dict[str, Tensor]:
        found = module.loss(x_ng, batch_n, noise_nk)
        return {"loss": found.total, "reconstruction": found.reconstruction, "kl": found.kl}

    return loss


def _write(
    location: Location,
    view: Collection,
    module: Scalex,
    stats: NormStats,
    clusters: Clusters,
    z_nk: np.ndarray,
    state: State,
    trained: dict[str, Any],
    fingerprint: dict[str, Any],
    config: TrainConfig,
) -> None:
    """The model folder; ``model.json`` comes last and makes it a model."""
    names = list(state.history[0]) if state.history else ["epoch", "loss"]
    rows = [",".join(names)] + [",".join(repr(row[name]) for name in names) for row in state.history]
    history = ("\n".join(rows) + "\n").encode()
    location.write("history.csv", history)
    digest, described = save_weights(location, module, view.scale_bg, stats, clusters)
    uns = {"streamx": {"model": digest, "norm": config.norm, "batch_key": view.batch_key}}
    write_latents(location.below("reference.zarr"), view.obs, {"X_scalex": z_nk}, uns)
    card = {
        "format": FORMAT,
        "model": config.model,
        "id": digest,
        "genes": [str(name) for name in view.var_names],
        "batches": view.batches,
        "batch_key": view.batch_key,
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


def preprocessing(view: Collection) -> dict[str, Any]:
    """What a query must go through: the transform, and the decisions that the view records."""
    if view.view is None:  # a store: its counts as they are
        return {"transform": {}, "recipe": {"min_features": 0, "drop": [], "total": "kept"}, "parameters": {}}
    return {name: view.view[name] for name in ("transform", "recipe", "parameters")}


def _configs(settings: dict[str, Any]) -> tuple[TrainConfig, ScalexConfig]:
    of_network = {f.name for f in fields(ScalexConfig)}
    config = build(TrainConfig, {k: v for k, v in settings.items() if k not in of_network})
    network = build(ScalexConfig, {k: v for k, v in settings.items() if k in of_network})
    for name, value in (asdict(config) | asdict(network)).items():
        positive = name in (
            "max_iteration",
            "minibatch_size",
            "accumulate",
            "lr",
            "patience",
            "n_latent",
            "n_hidden",
        )
        if isinstance(value, (int, float)) and (value < 0 or (positive and value == 0)):
            raise UsageError(f"{name} = {value}", fix="a positive number" if positive else "0 or more")
    return config, network


def _fingerprint(view: Collection, config: TrainConfig, network: ScalexConfig) -> dict[str, Any]:
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
    settings = asdict(config)
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
    return _result(location, card["training"], 0.0, time.monotonic() - begun)


def _result(location: Location, trained: dict[str, Any], rate: float, seconds: float) -> TrainResult:
    return TrainResult(
        model="scalex",
        epochs=trained["epochs"],
        steps=trained["steps"],
        loss=trained["loss"],
        cells_per_second=round(rate, 1),
        seconds=round(seconds, 3),
        path=str(location),
    )
