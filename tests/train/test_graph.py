"""A step recorded on a GPU does the arithmetic of the loop's own; needs CUDA (``-m gpu``)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from views import write_view

from streamx.train.feed import make_loader, training_inputs
from streamx.train.fit import make_optimizer
from streamx.train.graph import WARM_UP, RecordedStep
from streamx.train.model import load_model
from streamx.train.run import train
from streamx.train.scalex import named_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
SETTINGS = {"n_hidden": 64, "threads": 1, "progress": False}


def test_the_step_is_the_same(tmp_path: Path) -> None:
    from streamx.models.scalex import Scalex

    view = write_view(tmp_path / "view", [400, 300])
    device = torch.device("cuda")
    found = []
    for recorded in (False, True):
        module = Scalex(view.n_vars, 2, generator=torch.Generator().manual_seed(0)).to(device).train()
        optimizer, loss = make_optimizer(module, 1e-3, 5e-4), named_losses(module)
        step = RecordedStep(optimizer, loss, nullcontext())
        losses = []
        loader = make_loader(view, 64, device=device, drop_last=True)
        for epoch in range(2):
            for minibatch in training_inputs(loader, 10, 0, epoch, 0):
                done = step(*minibatch) if recorded else step._step(*minibatch)
                losses.append(float(done["loss"]))
        assert len(losses) > WARM_UP + 5
        found.append((losses, {k: v.cpu() for k, v in module.state_dict().items()}))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-4)
    assert found[1][1]["decoder.norm.num_batches_tracked"].tolist() == [20, 20]


def test_training_and_latents_equal_the_cpu(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [400, 300])
    loss = {}
    for name, settings in {"cpu": {}, "cuda": {"graph": "off"}, "graph": {"graph": "on"}}.items():
        device = "cpu" if name == "cpu" else "cuda"
        done = train(view, tmp_path / name, device=device, max_iteration=60, **SETTINGS, **settings)
        loss[name] = done.loss
        weights = load_model(tmp_path / name).module.state_dict()
        assert all(torch.isfinite(value).all() for value in weights.values())
    assert loss["cuda"] == pytest.approx(loss["cpu"], rel=1e-3)
    assert loss["graph"] == pytest.approx(loss["cpu"], rel=1e-3)


def test_bfloat16(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [400, 300])
    settings = SETTINGS | {"device": "cuda", "max_iteration": 60}
    full = train(view, tmp_path / "full", **settings)
    half = train(view, tmp_path / "half", precision="bfloat16", **settings)
    assert half.loss == pytest.approx(full.loss, rel=2e-2)
