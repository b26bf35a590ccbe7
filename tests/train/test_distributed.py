"""Two processes over gloo beside one: equal where no norm ties cells together, near where batch norms do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from views import write_view

from streamx.store.collection import Collection
from streamx.train.feed import all_inputs, make_loader
from streamx.train.model import load_model
from streamx.train.run import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

EQUAL = """
import sys, torch
from torch import nn
from streamx.train.distributed import together
from streamx.train.early_stopping import EarlyStopping
from streamx.train.fit import State, fit, make_optimizer

class Net(nn.Module):
    # a layer norm, and a row of a table for each batch of cells
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(7, 16), nn.LayerNorm(16), nn.Linear(16, 1)
        self.table = nn.Parameter(torch.zeros(4, 16))
        self.unused = nn.Parameter(torch.ones(3))
    def forward(self, x, batch):
        h = self.norm(self.first(x))
        for b in batch.unique().tolist():  # absent batches do not take part at all
            h = h + (batch == b)[:, None] * self.table[b]
        return self.last(torch.relu(h))

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
x, y = torch.randn(96, 7, generator=g), torch.randn(96, 1, generator=g)
batch = torch.arange(96) // 4 % 4  # each half of a minibatch of 8 holds batches that the other one lacks

with together(torch.device("cpu")) as ranks:
    torch.manual_seed(1)
    net = Net()
    size = 8 // ranks.world
    def minibatches(epoch, done):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
        order = order[batch[order].argsort(stable=True)] if epoch % 2 else order
        pieces = order.split(size)[ranks.rank::ranks.world]
        return [(x[i], y[i], batch[i]) for i in pieces[done:]]
    state = fit(
        net,
        make_optimizer(net, 1e-2, 0.0, ranks),
        minibatches,
        lambda x, y, batch: {"loss": (net(x, batch) - y).square().mean()},
        n_epochs=6, state=State(0, [], EarlyStopping(9)), n_minibatches=12, ranks=ranks, progress=False,
    )
    torch.save((net.state_dict(), state.history), f"{sys.argv[1]}.{ranks.rank}")
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


def test_equals_one_process_at_equal_global_minibatch(tmp_path: Path) -> None:
    script = tmp_path / "equal.py"
    script.write_text(EQUAL)
    for command, name in (([sys.executable], "one"), (TORCHRUN, "two")):
        done = run(*command, str(script), name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "warn" not in done.stderr.lower(), done.stderr
    one, two, other = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    for name, value in one[0].items():
        torch.testing.assert_close(two[0][name], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(two[0][name], other[0][name])
    assert two[1] == other[1]
    np.testing.assert_allclose([r["loss"] for r in two[1]], [r["loss"] for r in one[1]], rtol=1e-5)


UNEVEN = """
import sys, torch
from torch import nn
from streamx.train.distributed import together, tracked
from streamx.train.early_stopping import EarlyStopping
from streamx.train.fit import State, fit, make_optimizer

with together(torch.device("cpu")) as ranks:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(1))
    mine = [(part,) for part in x[ranks.rank::ranks.world]]  # three minibatches and two
    state = fit(
        net, make_optimizer(net, 1e-2, 0.0, ranks), lambda epoch, done: mine[done:],
        lambda x: {"loss": net(x).square().mean()},
        n_epochs=2, state=State(0, [], EarlyStopping(9)), n_minibatches=len(mine), ranks=ranks,
    )
    torch.save((net.state_dict(), state.history), f"{sys.argv[1]}.{ranks.rank}")
"""


def test_a_process_that_runs_out_of_minibatches(tmp_path: Path) -> None:
    script = tmp_path / "uneven.py"
    script.write_text(UNEVEN)
    done = run(*TORCHRUN, str(script), "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"two.{rank}") for rank in (0, 1))
    assert first[1] == second[1]
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    assert first[0]["1.num_batches_tracked"] == 10  # updates of both in two epochs


def command(view: Path, output: Path, **settings: Any) -> list[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return ["-m", "streamx", "train", str(view), "-o", str(output), "--json", *words]


SETTINGS: dict[str, Any] = {"max_iteration": 150, "n_hidden": 32, "threads": 1, "lr": 2e-3, "patience": 99}


def judged(path: Path, view: Collection) -> float:
    """Loss of a trained model over all cells, by running statistics and without noise."""
    module = load_model(path).module
    loader = make_loader(view, 4096, device=torch.device("cpu"), order="sequential")
    [(x_ng, batch_n)] = all_inputs(loader)
    with torch.no_grad():
        return float(module.loss(x_ng, batch_n, torch.zeros(len(x_ng), 10)).total)


def test_scalex_ends_near_one_process(tmp_path: Path) -> None:
    """Batch norms see half of the cells each: within 1 % of the loss over three seeds, judged in one way.

    Not by the losses of training: in these each norm takes part with its own minibatch, and a smaller one
    gives a higher loss for the same weights.
    """
    view = write_view(tmp_path / "view", [1400, 800, 360], expressed=0.2)
    settings = SETTINGS | {"max_iteration": 400}
    ratios = []
    for seed in range(3):
        one, two = tmp_path / f"one-{seed}", tmp_path / f"two-{seed}"
        alone = train(view, one, progress=False, seed=seed, minibatch_size=128, **settings)
        words = command(view.path, two, seed=seed, minibatch_size=64, **settings)
        done = run(*TORCHRUN, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)  # one object: rank 0 speaks alone
        assert result["steps"] == alone.steps
        assert not two.with_name(f"{two.name}.journal").exists()
        ratios.append(judged(two, view) / judged(one, view))
    assert abs(np.mean(ratios) - 1) < 0.01, ratios


@pytest.mark.parametrize("kind", ["scvi", "scanvi"])
def test_scvi_of_two_processes_equals_one(kind: str, tmp_path: Path) -> None:
    """Layer norm: nothing ties cells together. One process takes the same two minibatches per step."""
    view = write_view(tmp_path / "view", [96, 64, 96], n_genes=30)
    settings: dict[str, Any] = {"model": kind, "max_epochs": 3, "minibatch_size": 16, "n_hidden": 16}
    settings |= {"train_size": 1, "seed": 3, "threads": 1}
    more = ["--arches"] + (["--label-key=type", "--base-epochs=1"] if kind == "scanvi" else [])
    one = run(
        sys.executable, *command(view.path, tmp_path / "one", accumulate=2, **settings), *more, cwd=tmp_path
    )
    two = run(*TORCHRUN, *command(view.path, tmp_path / "two", **settings), *more, cwd=tmp_path)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    first, second = (load_model(tmp_path / name).module.state_dict() for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_stopped_together_and_taken_up(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [180, 90, 1], expressed=0.2)
    settings = SETTINGS | {"max_iteration": 1000, "checkpoint_seconds": 0, "minibatch_size": 32}
    words = [*TORCHRUN, *command(view.path, tmp_path / "model", **settings)]
    child = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    record = tmp_path / "model.journal" / "records" / "training.json"
    while not record.exists() or json.loads(record.read_bytes())["epoch"] < 3:
        assert child.poll() is None, child.stderr and child.stderr.read()
        time.sleep(0.02)
    told = time.monotonic()
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert time.monotonic() - told < 20
    assert child.returncode != 0
    assert "takes it up again" in err
    at = json.loads(record.read_bytes())
    assert at["epoch"] >= 3
    assert at["minibatch"] == 0
    alone = run(sys.executable, *command(view.path, tmp_path / "model", **settings), cwd=tmp_path)
    assert "processes" in alone.stdout  # not with another number of them
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = run(*TORCHRUN, *command(view.path, tmp_path / "whole", **settings), cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for name in ("model.safetensors", "history.csv"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("world", ["1", ""])
def test_alone_without_torchrun(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamx.train.distributed import together

    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    else:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together(torch.device("cpu")) as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)
        assert not torch.distributed.is_initialized()
