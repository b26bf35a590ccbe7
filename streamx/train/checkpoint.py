"""The state of an unfinished training, on disk beside the model: enough to go on bit for bit."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from streamx.store.journal import Journal
from streamx.store.manifest import describe
from streamx.train.early_stopping import EarlyStopping
from streamx.train.fit import State, Tensors, snapshot

TRAINING = "training"


def save_state(
    journal: Journal, module: nn.Module, optimizer: Any, state: State, name: str = TRAINING
) -> None:
    """Keep the state after a step, under a name; a kill at any moment leaves the former one or this one.

    First the tensors under a new name, then (atomically) the record that names them, then the old
    tensors go.
    """
    tensors = {f"weights.{name}": value for name, value in snapshot(module).items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": value.cpu().contiguous() for name, value in slots.items()}
    data = save_tensors(tensors)
    key = f"{name}/epoch-{state.epoch:06d}-{state.minibatch:08d}.safetensors"
    journal.location.write(key, data)
    journal.record(
        name,
        {
            "epoch": state.epoch,
            "minibatch": state.minibatch,
            "sums": {name: float(value) for name, value in state.sums.items()},
            "history": state.history,
            "stopping": asdict(state.stopping),
            "tensors": [key, *describe(data)],
        },
    )
    for other in journal.location.list(name):
        if other != key:
            journal.location.delete(other)


@dataclass(frozen=True)
class Kept:
    """What :func:`save_state` wrote: the record and its tensors, on the CPU."""

    record: dict[str, Any]
    tensors: Tensors


def find_state(journal: Journal, name: str = TRAINING) -> Kept | None:
    """What was kept last under a name; None if there is nothing, or it is not whole."""
    record = journal.find(name)
    if record is None or not journal.location.exists(record["tensors"][0]):
        return None
    data = journal.location.read(record["tensors"][0])
    if describe(data) != record["tensors"][1:]:
        return None  # damaged: begin again rather than go on from a wrong state
    return Kept(record, load_tensors(data))


def restore(kept: Kept, module: nn.Module, optimizer: Any) -> State:
    """Bring module and optimizer to that state, and say where it was."""
    record, tensors = kept.record, kept.tensors
    module.load_state_dict(_part(tensors, "weights."))
    parameters = list(module.parameters())
    slots: dict[int, dict[str, Any]] = {}
    for name, value in _part(tensors, "adam.").items():
        number, _, slot = name.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:  # in its order in memory
            value = torch.empty_like(parameter).copy_(value)
        slots.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    device = parameters[0].device
    return State(
        epoch=record["epoch"],
        history=record["history"],
        stopping=EarlyStopping(**record["stopping"]),
        best=_part(tensors, "best."),
        minibatch=record["minibatch"],
        sums={k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in record["sums"].items()},
    )


class Throttle:
    """Says "now" once per interval, so that short epochs do not spend their time on checkpoints."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
