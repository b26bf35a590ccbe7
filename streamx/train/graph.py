"""A training step on a GPU, recorded once and replayed: one launch instead of some two hundred small ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
WARM_UP = 3  # steps before recording: libraries choose their algorithms and allocate


class RecordedStep:
    """Forward pass, backward pass and optimiser as one CUDA graph.

    At 64 cells the host needs longer to launch a step's operations than the GPU to run them. The graph works
    on a minibatch of its own, into which every other is copied; it does the arithmetic of the loop's own
    steps, with the same noise. Minibatches of another size than the first are done without it.

    Parameters
    ----------
    optimizer
        One that can be captured: ``torch.optim.Adam(..., fused=True, capturable=True)``.
    loss
        (*minibatch) -> named losses; ``"loss"`` is minimised. Must not look at values (no ``item``).
        A minibatch is made of tensors, dataclasses of them, numbers, and generators that were just seeded.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensors],
        precision: AbstractContextManager[Any],
    ) -> None:
        self.optimizer, self.loss, self.precision = optimizer, loss, precision
        self._graph: torch.cuda.CUDAGraph | None = None
        self._own: tuple[Any, ...] = ()
        self._losses: Tensors = {}
        self._runs = 0

    def __call__(self, *minibatch: Any) -> Tensors:
        """Losses of the minibatch, float64 scalars that the next call overwrites."""
        if self._own and _shapes(minibatch) != _shapes(self._own):
            return self._step(*minibatch)
        self._runs += 1
        if self._runs <= WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                losses = self._step(*minibatch)
            torch.cuda.current_stream().wait_stream(side)
            return losses
        if self._graph is None:
            self._record(minibatch)
        for own, given in zip(self._own, minibatch, strict=True):
            _copy(own, given)
        assert self._graph is not None
        self._graph.replay()
        return self._losses

    def _record(self, minibatch: tuple[Any, ...]) -> None:
        """Recording runs nothing: the first replay does this minibatch."""
        device = _tensors(minibatch)[0].device
        self._own = tuple(_twin(given, device) for given in minibatch)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        for own in self._own:
            if isinstance(own, torch.Generator):
                graph.register_generator_state(own)
        # the loader's thread allocates and copies meanwhile: only this thread's calls are to be checked
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._losses = self._step(*self._own, zero=False)
        self._graph = graph

    def _step(self, *minibatch: Any, zero: bool = True) -> Tensors:
        if zero:
            self.optimizer.zero_grad()
        with self.precision:
            losses = self.loss(*minibatch)
        losses["loss"].backward()
        self.optimizer.step()
        return {name: value.detach().double() for name, value in losses.items()}


def _parts(value: Any) -> list[Any]:
    """The fields of a dataclass."""
    return [getattr(value, part.name) for part in fields(value)]


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif is_dataclass(value):
            found += _tensors(_parts(value))
    return found


def _shapes(values: Any) -> list[torch.Size]:
    """Of the tensors that hold cells; a number is a tensor of none in a graph's own minibatch."""
    return [tensor.shape for tensor in _tensors(values) if tensor.ndim]


def _twin(given: Any, device: torch.device) -> Any:
    """Something of the graph's own to copy ``given`` into."""
    if isinstance(given, Tensor):
        return given.clone()
    if isinstance(given, float):
        return torch.tensor(given, device=device)
    if isinstance(given, torch.Generator):
        return torch.Generator(device)
    if is_dataclass(given) and not isinstance(given, type):
        twins = {part.name: _twin(getattr(given, part.name), device) for part in fields(given)}
        return replace(given, **twins)
    return given


def _copy(own: Any, given: Any) -> None:
    if isinstance(given, Tensor):
        own.copy_(given, non_blocking=True)
    elif isinstance(given, float):
        own.fill_(given)
    elif isinstance(given, torch.Generator):
        own.manual_seed(given.initial_seed())
    elif is_dataclass(given):
        for mine, theirs in zip(_parts(own), _parts(given), strict=True):
            _copy(mine, theirs)
