"""The loop itself, without a view: resumed after any step, stopped by a signal, gradients accumulated."""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from streamx.config import ScalexConfig
from streamx.models.scalex import Scalex
from streamx.models.sparse import Rows
from streamx.train.early_stopping import EarlyStopping
from streamx.train.fit import State, fit, make_optimizer, seed_of

PER_EPOCH = 5


def minibatches(epoch: int, done: int) -> list[tuple[Rows, Tensor, Tensor]]:
    found = []
    for number in range(done, PER_EPOCH):
        rng = np.random.default_rng((epoch, number))
        x_ng = (rng.random((20, 50)) * (rng.random((20, 50)) < 0.1)).astype(np.float32)
        noise_nk = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed_of(epoch, number)))
        found.append((Rows.of(sparse.csr_matrix(x_ng)), torch.from_numpy(rng.integers(0, 3, 20)), noise_nk))
    return found


def loss_of(module: Scalex) -> Any:
    def loss(*minibatch: Any) -> dict[str, Tensor]:
        found = module.loss(*minibatch)
        return {"loss": found.total, "kl": found.kl}

    return loss


def make(state: State | None = None, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    module = Scalex(50, 3, ScalexConfig(n_latent=4, n_hidden=24), torch.Generator().manual_seed(2))
    optimizer = make_optimizer(module, 1e-3, 5e-4)
    if kept is not None:
        module.load_state_dict(kept["module"])
        optimizer.load_state_dict(kept["optimizer"])
    state = state or State(0, [], EarlyStopping(9))
    return {"module": module, "optimizer": optimizer, "loss": loss_of(module), "state": state}


def run(parts: dict[str, Any], **options: Any) -> tuple[State, dict[str, Tensor]]:
    state = fit(**parts, minibatches=minibatches, n_epochs=3, progress=False, **options)
    return state, parts["module"].state_dict()


class Killed(BaseException):
    pass


def killer(parts: dict[str, Any], at: int, kept: dict[str, Any]) -> Any:
    """Keeps everything after each step, and dies after the one with number ``at``."""
    calls = 0

    def keep(state: State, now: bool) -> None:
        nonlocal calls
        calls += 1
        kept["state"] = copy.deepcopy(state)
        kept["module"] = copy.deepcopy(parts["module"].state_dict())
        kept["optimizer"] = copy.deepcopy(parts["optimizer"].state_dict())
        if calls == at:
            raise Killed

    return keep


@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_after_any_step(accumulate: int) -> None:
    whole, weights = run(make(), accumulate=accumulate)
    assert [row["epoch"] for row in whole.history] == [0, 1, 2]
    steps = -(-PER_EPOCH // accumulate) + 1  # and once after the epoch
    for at in range(1, 3 * steps):
        kept: dict[str, Any] = {}
        parts = make()
        with pytest.raises(Killed):
            run(parts, keep=killer(parts, at, kept), accumulate=accumulate)
        state, resumed = run(make(kept["state"], kept), accumulate=accumulate)
        assert state.history == whole.history, at
        assert all(torch.equal(resumed[name], value) for name, value in weights.items()), at


def test_accumulated_gradients_are_those_of_all_cells() -> None:
    """The mean of minibatches of equal size, where no norm ties cells together."""

    class Linear(torch.nn.Linear):
        pass

    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    results = []
    for size, accumulate in ((12, 1), (3, 4), (6, 2)):
        torch.manual_seed(0)
        module = Linear(7, 2)
        state = fit(
            module,
            torch.optim.SGD(module.parameters(), lr=0.1),
            lambda epoch, done, size=size: [(part,) for part in x.split(size)],
            lambda x, module=module: {"loss": module(x).square().mean()},
            n_epochs=3,
            state=State(0, [], EarlyStopping(9)),
            accumulate=accumulate,
            progress=False,
        )
        results.append((module.weight.detach(), state.history[-1]["loss"]))
    for weight, loss in results[1:]:
        torch.testing.assert_close(weight, results[0][0])
        assert loss == pytest.approx(results[0][1])


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Killed)])
def test_a_signal_waits_for_the_step(number: int, raised: type[BaseException]) -> None:
    """It comes in the middle of a step; the step is finished and kept before it acts."""

    def on_sigterm(number: int, frame: Any) -> None:
        raise Killed

    former = signal.signal(signal.SIGTERM, on_sigterm)
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        parts, kept = make(), {}
        loss, calls = parts["loss"], 0

        def signalling(*args: Any) -> dict[str, Tensor]:
            nonlocal calls
            calls += 1
            if calls == 7:
                os.kill(os.getpid(), number)
            return loss(*args)

        saw: list[bool] = []
        keeping = killer(parts, -1, kept)

        def keep(state: State, now: bool) -> None:
            saw.append(now)
            keeping(state, now)

        with pytest.raises(raised):
            run(parts | {"loss": signalling}, keep=keep)
        assert (kept["state"].epoch, kept["state"].minibatch) == (1, 2)
        assert [i for i, now in enumerate(saw) if now] == [len(saw) - 1]
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
    finally:
        signal.signal(signal.SIGTERM, former)
        signal.signal(signal.SIGINT, ctrl_c)
    whole, weights = run(make())
    state, resumed = run(make(kept["state"], kept))
    assert state.history == whole.history
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
