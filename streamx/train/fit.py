"""The training loop: minibatches in, weights and a history out. It knows no store, no model and no file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from streamx.train.early_stopping import EarlyStopping

Tensors = dict[str, Tensor]
Loss = Callable[[Any, int, int], Tensors]


@dataclass
class State:
    """All that training needs to go on after an epoch, bit for bit.

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
    """

    epoch: int
    history: list[dict[str, float]]
    stopping: EarlyStopping
    best: Tensors = field(default_factory=dict)


def make_optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam with L2 weight decay; fused into one pass over the weights where torch can (4x faster on CPU)."""
    device = next(module.parameters()).device.type
    return torch.optim.Adam(
        module.parameters(), lr=lr, weight_decay=weight_decay, fused=device in ("cpu", "cuda")
    )


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Callable[[int], Iterable[Any]],
    loss: Loss,
    *,
    n_epochs: int,
    state: State,
    after_epoch: Callable[[State], None] = lambda state: None,
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
    steps
        Epoch number -> iterable of minibatches.
    loss
        (minibatch, epoch, step within it) -> named losses, scalars; ``"loss"`` is minimised.
    state
        Where to begin: a fresh one, or what a checkpoint kept.
    after_epoch
        Called with the state after each epoch: the place to write checkpoints.
    progress
        Show a bar with the losses (on stderr, where that is a terminal).

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C passes through; the last state that ``after_epoch`` saw can be resumed.
    """
    bar = tqdm(
        total=n_epochs, initial=state.epoch, desc="training", unit="epoch", disable=None if progress else True
    )
    with bar:
        while state.epoch < n_epochs and not state.stopping.stopped:
            means = _epoch(module, optimizer, steps(state.epoch), loss, state.epoch)
            stopping = state.stopping.after(state.epoch, means["loss"])
            if stopping.improved_at(state.epoch):
                state.best = snapshot(module)
            state.history.append({"epoch": state.epoch} | means)
            state.epoch, state.stopping = state.epoch + 1, stopping
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            after_epoch(state)
    if state.best:
        module.load_state_dict(state.best)
    module.eval()
    return state


def _epoch(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    minibatches: Iterable[Any],
    loss: Loss,
    epoch: int,
) -> dict[str, float]:
    """One epoch; mean of each loss over its steps (summed on the device, read once)."""
    module.train()
    sums: dict[str, Tensor] = {}
    n = 0
    for step, minibatch in enumerate(minibatches):
        losses = loss(minibatch, epoch, step)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()
        for name, value in losses.items():
            value = value.detach().double()
            sums[name] = sums[name] + value if name in sums else value
        n += 1
    return {name: float(value) / n for name, value in sums.items()}


def snapshot(module: nn.Module) -> Tensors:
    """A copy of all weights and buffers on the CPU (a state dict alone aliases the live ones)."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def seed_of(*key: int) -> int:
    """A 63-bit seed from several numbers (splitmix64), so that every step has its own noise."""
    x = 0
    for part in key:
        x = (x + part + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        x ^= x >> 31
    return x >> 1
