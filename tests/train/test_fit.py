import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamx.train.adam import Adam
from streamx.train.early_stopping import EarlyStopping
from streamx.train.fit import State, fit, make_optimizer, seed_of, snapshot


def run_rule(losses: list[float], patience: int = 3) -> EarlyStopping:
    rule = EarlyStopping(patience)
    for epoch, loss in enumerate(losses):
        rule = rule.after(epoch, loss)
        if rule.stopped:
            break
    return rule


def test_learning_rate_falls_after_more_epochs_without_than_its_patience() -> None:
    """As torch's ReduceLROnPlateau does with the same losses."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=0.5, patience=2, threshold=0.0)
    rule, losses = EarlyStopping(0, lr_patience=2, lr_factor=0.5), [3, 2, 2, 2.5, 2, 1.9, 3, 3, 3, 3, 3, 3, 1]
    for epoch, loss in enumerate(losses):
        rule = rule.after(epoch, loss)
        plateau.step(loss)
        assert rule.lr_scale == theirs.param_groups[0]["lr"]
    assert rule.lr_scale == 0.125


def test_early_stopping() -> None:
    assert not run_rule([5, 4, 4, 4.5]).stopped
    rule = run_rule([5, 4, 4, 4, 4, 1])
    assert rule.stopped
    assert (rule.best, rule.best_epoch, rule.waited) == (4, 1, 3)
    assert run_rule([5, 6, 6, 4, 6, 6]).best_epoch == 3
    assert run_rule([5, math.nan, 1]).stopped
    assert run_rule([5, math.nan, 1]).best_epoch == 0


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.0]))


def square(module: Line) -> Any:
    def loss(minibatch: float) -> dict[str, Tensor]:
        error = (module.slope - minibatch).square().sum()
        return {"loss": error, "half": error / 2}

    return loss


def test_the_best_epoch_is_restored_for_real() -> None:
    module = Line()
    targets = [1.0, 1.0, 50.0, 60.0, 70.0]
    after: list[float] = []
    state = fit(
        module,
        torch.optim.SGD(module.parameters(), lr=0.25),
        lambda epoch, done: [(targets[epoch],)] * 2,
        square(module),
        n_epochs=5,
        state=State(0, [], EarlyStopping(2)),
        keep=lambda state, now: after.append(float(module.slope.detach())) if state.minibatch == 0 else None,
    )
    assert [row["epoch"] for row in state.history] == [0, 1, 2, 3]
    assert state.stopping.best_epoch == 1
    assert float(module.slope.detach()) == after[1] != after[-1]
    assert not module.training
    assert state.history[0]["half"] == pytest.approx(state.history[0]["loss"] / 2)


def test_a_whole_step_may_use_the_same_tensors_again() -> None:
    """As a recorded one does: the means are those of all steps all the same."""
    module, box = Line(), torch.zeros((), dtype=torch.float64)

    def whole_step(value: float) -> dict[str, Tensor]:
        return {"loss": box.fill_(value)}

    state = fit(
        module,
        make_optimizer(module, 0.1, 0.0),
        lambda epoch, done: [(1.0,), (2.0,), (6.0,)],
        square(module),
        n_epochs=2,
        state=State(0, [], EarlyStopping(9)),
        whole_step=whole_step,
    )
    assert [row["loss"] for row in state.history] == [3.0, 3.0]


def test_snapshot_does_not_alias() -> None:
    module = Line()
    copy = snapshot(module)
    with torch.no_grad():
        module.slope += 1
    assert copy["slope"].item() == 0


def test_our_adam_is_torchs() -> None:
    results = []
    for ours in (True, False):
        module = Line()
        optimizer = make_optimizer(module, 0.1, 0.01)
        assert isinstance(optimizer, Adam)
        if not ours:
            optimizer = torch.optim.Adam(module.parameters(), lr=0.1, weight_decay=0.01, foreach=False)
        fit(
            module,
            optimizer,
            lambda epoch, done: [(1.0,), (2.0,), (3.0,)],
            square(module),
            n_epochs=4,
            state=State(0, [], EarlyStopping(9)),
        )
        results.append(float(module.slope.detach()))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_seeds_differ() -> None:
    seeds = {seed_of(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert len({seed % 2**32 for seed in seeds}) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
