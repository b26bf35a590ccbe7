"""A task run to its end, or taken up where a journal says: the loop with checkpoints and precision."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from streamx.config import TrainConfig
from streamx.memory import give_back, recycled_memory, steady_memory
from streamx.train.adam import EPS
from streamx.train.checkpoint import Throttle, find_state, restore, save_state
from streamx.train.device import can_record, precision_of
from streamx.train.distributed import Ranks
from streamx.train.early_stopping import EarlyStopping
from streamx.train.fit import State, fit, make_optimizer
from streamx.train.graph import RecordedStep
from streamx.train.task import Run, Task

log = logging.getLogger("streamx")


@dataclass(frozen=True)
class Trained:
    """How a training ended.

    Attributes
    ----------
    state
        Its last one.
    per_epoch
        Steps of an epoch.
    minibatches
        Done in this call, by all processes.
    """

    state: State
    per_epoch: int
    minibatches: int


def run_task(run: Run, task: Task, n_cells: int, progress: bool) -> Trained:
    """Train the task's module, in place, to its end; from the state that the journal holds, if it holds one.

    ``n_cells`` decides the number of epochs where the settings do not.
    """
    config, ranks, journal = run.config, run.ranks, run.journal
    make = task.optimizer or partial(_adam, task.module)
    optimizer = make(config, ranks)
    state = _state(run, task.module, optimizer)
    precision = precision_of(config, run.device)
    recorded = task.recordable and config.graph != "off" and can_record(config, run.device, ranks)
    n_minibatches = ranks.most(task.n_minibatches, run.device)
    per_epoch = -(-n_minibatches // config.accumulate)
    seen = state.epoch * n_minibatches + state.minibatch
    throttle = Throttle(config.checkpoint_seconds)

    def keep(state: State, now: bool) -> None:
        if journal is not None and (now or throttle.due()):
            save_state(journal, task.module, optimizer, state, run.name)

    recycled_memory()
    fit(
        task.module,
        optimizer,
        task.minibatches,
        task.loss,
        n_epochs=n_epochs_of(config, n_cells, per_epoch),
        state=state,
        n_minibatches=n_minibatches,
        accumulate=config.accumulate,
        precision=precision,
        whole_step=RecordedStep(optimizer, task.loss, precision) if recorded else None,
        validate=task.validate,
        lr=config.lr,
        judge_from=judged_from(config, n_cells, per_epoch),
        keep=keep,
        ranks=ranks,
        progress=progress and ranks.first,
    )
    steady_memory()
    give_back()
    return Trained(state, per_epoch, (state.epoch * n_minibatches - seen) * ranks.world)


def _adam(module: nn.Module, config: TrainConfig, ranks: Ranks) -> Any:
    return make_optimizer(module, config.lr, config.weight_decay, ranks, eps=config.eps or EPS)


def warm_up_steps(config: TrainConfig, n_cells: int) -> int | None:
    """Steps in which the weight of the KL divergence rises; None: it rises by epochs.

    totalVI's default: three quarters of the number of cells.
    """
    if config.warmup_steps is None and config.model == "totalvi" and config.warmup_epochs is None:
        return round(0.75 * n_cells)
    return config.warmup_steps


def warm_up_epochs(config: TrainConfig, n_cells: int, steps_per_epoch: int) -> int:
    """Epochs before the loss has its final weights."""
    steps = warm_up_steps(config, n_cells)
    if steps is not None:
        return -(-steps // max(1, steps_per_epoch))
    return config.warmup_epochs or 0


def judged_from(config: TrainConfig, n_cells: int, steps_per_epoch: int) -> int:
    """The first epoch that counts for early stopping and the learning rate: losses have their final weights.

    trVAE's does not look at the first patience - 1 epochs either (scArches).
    """
    warm = warm_up_epochs(config, n_cells, steps_per_epoch)
    return max(warm, config.patience - 1) if config.model == "trvae" else warm


def n_epochs_of(config: TrainConfig, n_cells: int, steps_per_epoch: int) -> int:
    """Epochs to train: as many as the steps ask for; else as many as were asked for; else by size.

    By size is scvi-tools' rule: 400 up to 20,000 cells, fewer in proportion above.
    """
    if config.max_iteration is not None:
        return -(-config.max_iteration // max(1, steps_per_epoch))
    if config.max_epochs is not None:
        return config.max_epochs
    return min(400, max(1, round(20_000 / n_cells * 400)))


def _state(run: Run, module: nn.Module, optimizer: Any) -> State:
    """What an interrupted run has left, on all processes; else a fresh state."""
    config = run.config
    kept = run.ranks.share(find_state(run.journal, run.name) if run.journal is not None else None)
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
