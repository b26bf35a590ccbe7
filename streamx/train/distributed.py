"""Several processes that train one model together, started by ``torchrun``.

Every process draws the minibatches of its rank from the same plan, and after every step has the same
weights: gradients are averaged over all minibatches of the step. A process without a minibatch, or a batch
of cells that only one process sees, adds what it has and zeros for the rest. Statistics of batch norms are
each process's own within an epoch and are averaged at its end. Rank 0 alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Counts = dict[str, Tensor]


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone by default, and then every method is trivial."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def most(self, n: int, device: torch.device) -> int:
        """The largest n of all processes."""
        if not self.several:
            return n
        largest = torch.tensor(n, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.several:
            dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """What rank 0 has, on all."""
        if not self.several:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box)
        return box[0]

    def average_gradients(self, parameters: Iterable[nn.Parameter], n: int, stop: bool) -> bool:
        """Mean gradients over the minibatches of all processes, of which this one had ``n``.

        One message for all parameters. Returns whether any process was asked to stop (on a GPU only whether
        this one was: looking would wait for the device).
        """
        if not self.several:
            return stop
        parameters = list(parameters)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        counts = flat[0].new_tensor([n, float(stop)])
        message = torch.cat([*(g * n for g in flat), counts])
        dist.all_reduce(message)
        message[:-2] /= message[-2].clamp(min=1)
        parts = message[:-2].split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
        return bool(message[-1] > 0) if message.device.type == "cpu" else stop

    def average_statistics(self, module: nn.Module, before: Counts) -> None:
        """Running statistics of batch norms: means over the processes, weighted by their updates.

        ``before``: :func:`tracked` at the time of the last average.
        """
        if not self.several:
            return
        for name, norm in _norms(module):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            made = (norm.num_batches_tracked - before[name]).to(norm.running_mean.dtype)
            of_all = self.total(made.clone())
            norm.num_batches_tracked.copy_(before[name] + of_all.to(torch.int64))
            for table in (norm.running_mean, norm.running_var):
                columns = made.view(made.shape + (1,) * (table.dim() - made.dim()))
                sums = self.total(columns * table)
                of_columns = of_all.view(columns.shape)
                table.copy_(torch.where(of_columns > 0, sums / of_columns.clamp(min=1), table))


def tracked(module: nn.Module) -> Counts:
    """How many updates each batch norm has seen."""
    return {name: norm.num_batches_tracked.clone() for name, norm in _norms(module)}


def _norms(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_modules():
        if hasattr(part, "num_batches_tracked"):
            yield name, part


ALONE = Ranks()


@contextmanager
def together(device: torch.device) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, connected; alone where it did not start us."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
