"""The training loop: minibatches in, weights and a history out. It knows no store, no model and no file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from streamx.train.adam import EPS, Adam
from streamx.train.distributed import ALONE, Counts, Ranks, tracked
from streamx.train.early_stopping import EarlyStopping
from streamx.train.stop import Stop

Tensors = dict[str, Tensor]
FULL: AbstractContextManager[Any] = nullcontext()  # float32, as it comes


class Optimizer(Protocol):
    """What the loop asks of an optimiser; torch's have it."""

    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...


class Several:
    """Optimisers of several parts of a module, in the order of its parameters, that step together.

    The learning rate that changes while training is the first one's.
    """

    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Slots of all parameters, by their number in the module."""
        slots: dict[int, Any] = {}
        first = 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()["state"]
            slots |= {first + number: values for number, values in own.items()}
            first += _n_parameters(optimizer)
        return {"state": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        first = 0
        for optimizer in self.optimizers:
            n = _n_parameters(optimizer)
            own = {k - first: slots for k, slots in state["state"].items() if first <= k < first + n}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": own})
            first += n


def _n_parameters(optimizer: Any) -> int:
    if isinstance(optimizer, torch.optim.Optimizer):
        return sum(len(group["params"]) for group in optimizer.param_groups)
    return len(optimizer.parameters)


def set_rate(optimizer: Any, lr: float) -> None:
    """Change the learning rate of an optimiser, ours or torch's."""
    if isinstance(optimizer, Several):
        set_rate(optimizer.optimizers[0], lr)
    elif isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
    else:
        optimizer.lr = lr


@dataclass
class State:
    """All that training needs to go on after a step, bit for bit.

    Order and noise are functions of (seed, epoch, minibatch), so that no generator has a state to keep.

    Attributes
    ----------
    epoch
        Epochs done.
    history
        Mean losses per epoch: ``{"epoch": 0, "loss": ..., ...}``.
    stopping
        Early stopping's state.
    best
        Weights of the best epoch, copies on the CPU.
    minibatch
        Minibatches (of this process) that are done of the next epoch.
    sums
        Sums of the losses over them, float64 scalars.
    """

    epoch: int
    history: list[dict[str, float]]
    stopping: EarlyStopping
    best: Tensors = field(default_factory=dict)
    minibatch: int = 0
    sums: Tensors = field(default_factory=dict)


def make_optimizer(
    module: nn.Module, lr: float, weight_decay: float, ranks: Ranks = ALONE, *, eps: float = EPS
) -> Any:
    """Adam with L2 weight decay in one pass over the weights: on the CPU our own, elsewhere torch's."""
    device = next(module.parameters()).device
    if device.type == "cpu":
        return Adam(module, lr, weight_decay, eps=eps, factors=not ranks.several)
    if device.type != "cuda":
        return torch.optim.Adam(module.parameters(), lr=lr, eps=eps, weight_decay=weight_decay)
    rate = torch.tensor(lr, device=device)  # a recorded step reads it anew each time
    return torch.optim.Adam(
        module.parameters(), lr=rate, eps=eps, weight_decay=weight_decay, fused=True, capturable=True
    )


def fit(
    module: nn.Module,
    optimizer: Optimizer,
    minibatches: Callable[[int, int], Iterable[tuple[Any, ...]]],
    loss: Callable[..., Tensors],
    *,
    n_epochs: int,
    state: State,
    n_minibatches: int | None = None,
    accumulate: int = 1,
    precision: AbstractContextManager[Any] = FULL,
    whole_step: Callable[..., Tensors] | None = None,
    validate: Callable[[int], tuple[Tensors, float]] | None = None,
    lr: float | None = None,
    judge_from: int = 0,
    keep: Callable[[State, bool], None] = lambda state, now: None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> State:
    """Train until ``n_epochs`` are done or early stopping says so, then restore the best epoch's weights.

    The original keeps the last epoch's weights (its restore of the best ones does nothing); here the
    epoch with the lowest mean loss is restored for real.

    Parameters
    ----------
    module
        Trained in place; left in evaluation mode.
    optimizer
        Over the module's parameters.
    minibatches
        (epoch, n) -> iterable of this process's minibatches of that epoch, without the first n; each is what
        ``loss`` is called with.
    loss
        (*minibatch) -> named losses, scalars; ``"loss"`` is minimised.
    state
        Where to begin: a fresh one, or what a checkpoint kept.
    n_minibatches
        How many an epoch has. Only needed where several processes have to agree on it.
    accumulate
        Minibatches per step; the step follows their mean gradient.
    precision
        Context of forward passes, such as ``torch.autocast``.
    whole_step
        (*minibatch) -> named losses, all of the step done: in place of the loop's own steps of one minibatch
        in one process (:class:`streamx.train.graph.RecordedStep`).
    validate
        (epoch) -> sums of named losses over this process's validation cells, and how many these are; called
        after each epoch, in evaluation mode. Their means join the history as ``validation_<name>``, and
        early stopping goes by ``validation_loss``.
    lr
        The learning rate that early stopping scales; None: it stays as it is.
    judge_from
        The first epoch that early stopping looks at. Until then (while the loss's own weights still change)
        none is the best one.
    keep
        The place to write checkpoints: called with the state after each step and each epoch, and whether this
        has to be kept now (the process is about to stop, or training is over). With several processes only
        after epochs: within one, each has its own statistics.
    ranks
        The processes that train together.
    progress
        Show a bar with the losses (on stderr, where that is a terminal).

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C passes through when the step is done and kept; so does what a handler of SIGTERM raises.
    """
    device = next(module.parameters()).device
    n_steps = None if not ranks.several else ranks.most(-(-(n_minibatches or 0) // accumulate), device)
    assert whole_step is None or (accumulate == 1 and not ranks.several)
    bar = tqdm(
        total=n_epochs, initial=state.epoch, desc="training", unit="epoch", disable=None if progress else True
    )
    with bar, Stop() as stop:
        while state.epoch < n_epochs and not state.stopping.stopped:
            module.train()
            if lr is not None:
                set_rate(optimizer, lr * state.stopping.lr_scale)
            before = tracked(module) if ranks.several else {}
            groups = _grouped(minibatches(state.epoch, state.minibatch), accumulate)
            for group in groups if n_steps is None else _padded(groups, n_steps):
                if whole_step is not None:
                    _add(state.sums, whole_step(*group[0]))
                else:
                    optimizer.zero_grad()
                    for minibatch in group:
                        with precision:
                            losses = loss(*minibatch)
                        (losses["loss"] / len(group) if len(group) > 1 else losses["loss"]).backward()
                        _add(state.sums, losses)
                    asked = ranks.average_gradients(module.parameters(), len(group), bool(stop.asked))
                    optimizer.step()
                state.minibatch += len(group)
                stopping = asked if ranks.several else bool(stop.asked)
                if not ranks.several:
                    keep(state, stopping)
                if stopping:
                    stop.obey()
            _end_epoch(module, state, ranks, before, validate, judge_from)
            keep(state, state.epoch == n_epochs or state.stopping.stopped)
            bar.update()
            shown = ("loss", "validation_loss")  # more does not fit into a line; history.csv has all
            bar.set_postfix({n: f"{v:.5g}" for n, v in state.history[-1].items() if n in shown})
    if state.best:
        module.load_state_dict(state.best)
    module.eval()
    return state


def _end_epoch(
    module: nn.Module,
    state: State,
    ranks: Ranks,
    before: Counts,
    validate: Callable[[int], tuple[Tensors, float]] | None,
    judge_from: int,
) -> None:
    """Mean losses over the minibatches of all processes, read this one time; the best weights."""
    ranks.average_statistics(module, before)
    names = ranks.share(list(state.sums))  # a process may have had no minibatch at all
    means = _means(module, names, state.sums, state.minibatch, ranks)
    judged = means["loss"]
    if validate is not None:
        module.eval()
        sums, n = validate(state.epoch)
        found = _means(module, ranks.share(list(sums)), sums, n, ranks)
        means |= {f"validation_{name}": value for name, value in found.items()}
        judged = found["loss"]
    state.history.append({"epoch": state.epoch} | means)
    if state.epoch >= judge_from or math.isnan(judged):
        state.stopping = state.stopping.after(state.epoch, judged)
    if state.stopping.keeps(state.epoch):
        state.best = snapshot(module)
    state.epoch, state.minibatch, state.sums = state.epoch + 1, 0, {}


def _means(module: nn.Module, names: list[str], sums: Tensors, n: float, ranks: Ranks) -> dict[str, float]:
    """Sums of all processes over their counts."""
    device = next(module.parameters()).device
    count = torch.tensor(float(n), dtype=torch.float64, device=device)
    parts = [sums.get(name, torch.zeros_like(count)) for name in names]
    total, *of_all = ranks.total(torch.stack([count, *parts])).tolist()
    return {name: value / total for name, value in zip(names, of_all, strict=True)}


def _add(sums: Tensors, losses: Tensors) -> None:
    """Add losses up where they are: reading them would wait for the device."""
    for name, value in losses.items():
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value.clone()  # a recorded step overwrites it


def _grouped(minibatches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(minibatches)
    while group := list(islice(remaining, size)):
        yield group


def _padded(groups: Iterator[list[Any]], n: int) -> Iterator[list[Any]]:
    """n groups, empty ones at the end: every process makes every step."""
    for _ in range(n):
        yield next(groups, [])


def snapshot(module: nn.Module) -> Tensors:
    """A copy of all weights and buffers on the CPU (a state dict alone aliases the live ones)."""
    plain = torch.contiguous_format
    return {k: v.detach().cpu().clone(memory_format=plain) for k, v in module.state_dict().items()}


def seed_of(*key: int) -> int:
    """A 63-bit seed from several numbers (splitmix64), so that every step has its own noise."""
    x = 0
    for part in key:
        x = (x + part + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        x ^= x >> 31
    return x >> 1
