"""A training step on a GPU, recorded once and replayed: one launch instead of some two hundred small ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
WARM_UP = 3  # steps before recording: libraries choose their algorithms and allocate


class RecordedStep:
    """Forward pass, backward pass and optimiser as one CUDA graph.

    At 64 cells the host needs longer to launch a step's operations than the GPU to run them. The graph works
    on tensors of its own, into which every minibatch is copied; it does the arithmetic of the loop's own
    steps. Minibatches of another size than the first are done without it.

    Parameters
    ----------
    optimizer
        One that can be captured: ``torch.optim.Adam(..., fused=True, capturable=True)``.
    loss
        (*minibatch) -> named losses; ``"loss"`` is minimised. Must not look at values (no ``item``).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensors],
        precision: AbstractContextManager[Any],
    ) -> None:
        self.optimizer, self.loss, self.precision = optimizer, loss, precision
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._losses: Tensors = {}
        self._runs = 0

    def __call__(self, *minibatch: Tensor) -> Tensors:
        """Losses of the minibatch, float64 scalars that the next call overwrites."""
        shapes = [tensor.shape for tensor in minibatch]
        if self._inputs and shapes != [tensor.shape for tensor in self._inputs]:
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
        for own, given in zip(self._inputs, minibatch, strict=True):
            own.copy_(given, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        return self._losses

    def _record(self, minibatch: tuple[Tensor, ...]) -> None:
        """Recording runs nothing: the first replay does this minibatch."""
        self._inputs = tuple(tensor.clone() for tensor in minibatch)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # the loader's thread allocates and copies meanwhile: only this thread's calls are to be checked
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._losses = self._step(*self._inputs, zero=False)
        self._graph = graph

    def _step(self, *minibatch: Tensor, zero: bool = True) -> Tensors:
        if zero:
            self.optimizer.zero_grad(set_to_none=True)
        with self.precision:
            losses = self.loss(*minibatch)
        losses["loss"].backward()
        self.optimizer.step()
        return {name: value.detach().double() for name, value in losses.items()}
