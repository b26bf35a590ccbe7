"""Adam on the CPU, with gradients of sparse layers multiplied out where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamx.models import kernels
from streamx.models.sparse import Rows, SparseLinear, dense_gradient, gene_major

BETAS, EPS = (0.9, 0.999), 1e-8


class Adam:
    """Adam (Kingma 2015) with L2 weight decay, as ``torch.optim.Adam`` computes it up to float32 rounding.

    Two differences: it has no per-step bookkeeping, which takes torch's longer than its arithmetic for a
    model of this size; and the gradient of a :class:`SparseLinear` may come as factors, the minibatch's
    sparse x and the gradient d by the layer's output. Their product is made gene by gene in the processor's
    cache and used there: weights and moments pass through memory once per step, the gradient never does.

    Parameters
    ----------
    module
        On the CPU, float32.
    factors
        Take gradients of sparse layers as factors. Not where other processes add to the gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float,
        *,
        eps: float = EPS,
        factors: bool = True,
    ) -> None:
        self.lr, self.weight_decay, self.eps = lr, weight_decay, eps
        self.parameters = list(module.parameters())
        self.layers = [layer for layer in module.modules() if isinstance(layer, SparseLinear)]
        for layer in self.layers:
            layer.pending = [] if factors else None
        self._steps = [0] * len(self.parameters)
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self._tables = [  # as numpy arrays that share their memory
            tuple(_flat(table) for table in (parameter, *moments))
            for parameter, moments in zip(self.parameters, self._moments, strict=True)
        ]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        for layer in self.layers:
            if layer.pending:
                layer.pending.clear()

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        pending = {layer.weight: layer.pending for layer in self.layers if layer.pending}
        for number, parameter in enumerate(self.parameters):
            factors, grad = pending.get(parameter, []), parameter.grad
            if not factors and grad is None:
                continue
            self._steps[number] += 1
            tables, rates = self._tables[number], self._rates(self._steps[number])
            if grad is None:
                x, d_nh = _joined(factors)
                kernels.gradient_and_adam(*x.by_gene, d_nh, *tables, rates)
            else:
                for x, d_nh in factors:
                    grad = grad + dense_gradient(x, d_nh)
                kernels.adam(_flat(_like(parameter, grad)), *tables, rates)

    def _rates(self, t: int) -> np.ndarray:
        """What the kernel needs to know about step t, float32 (6,)."""
        beta1, beta2 = BETAS
        rates = (self.lr / (1 - beta1**t), beta1, beta2, self.eps, self.weight_decay, (1 - beta2**t) ** -0.5)
        return np.array(rates, np.float32)

    def state_dict(self) -> dict[str, Any]:
        """In the form of torch's optimisers."""
        slots = {
            number: {"step": torch.tensor(float(step)), "exp_avg": mean, "exp_avg_sq": square}
            for number, (step, (mean, square)) in enumerate(zip(self._steps, self._moments, strict=True))
        }
        return {"state": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, slots in state["state"].items():
            self._steps[number] = int(slots["step"])
            for mine, kept in zip(
                self._moments[number], (slots["exp_avg"], slots["exp_avg_sq"]), strict=True
            ):
                mine.copy_(kept)


def _flat(table: Tensor) -> np.ndarray:
    """A parameter's numbers in the order in which they lie, as rows that are long enough for vector loops."""
    return table.detach().reshape(1, -1).numpy() if table.is_contiguous() else gene_major(table)


def _like(parameter: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter."""
    return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)


def _joined(factors: list[tuple[Rows, np.ndarray]]) -> tuple[Rows, np.ndarray]:
    """Several minibatches as one (their gradients add up)."""
    if len(factors) == 1:
        return factors[0]
    first = np.cumsum([0, *(len(x.gene_v) for x, _ in factors)])
    starts = [x.first_n[:-1] + low for (x, _), low in zip(factors, first, strict=False)]
    rows = Rows(
        np.append(np.concatenate(starts), first[-1]),
        np.concatenate([x.gene_v for x, _ in factors]),
        np.concatenate([x.value_v for x, _ in factors]),
        factors[0][0].n_genes,
    )
    return rows, np.concatenate([d_nh for _, d_nh in factors])
