"""A step recorded on a GPU does the arithmetic of the loop's own; needs CUDA (``-m gpu``)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from count_models import repeated, scanvi, scvi, some_cells, totalvi
from views import make_counts, write_view

import streamx as sx
from streamx.models.cells import Cells
from streamx.train.feed import make_loader, training_inputs
from streamx.train.fit import make_optimizer, set_rate
from streamx.train.graph import WARM_UP, RecordedStep
from streamx.train.model import load_model
from streamx.train.run import train
from streamx.train.scalex import named_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
SETTINGS = {"n_hidden": 64, "threads": 1, "progress": False}
COUNTS: dict[str, dict[str, Any]] = {
    "scvi": {"arches": True, "n_hidden": 16},
    "scanvi": {"arches": True, "n_hidden": 16, "label_key": "type", "unlabeled": "type3", "base_epochs": 2},
    "totalvi": {"n_hidden": 16, "n_latent": 6},
    "trvae": {"hidden_layer_sizes": (16, 8), "latent_dim": 6},
}


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


@pytest.mark.parametrize("make", [scvi, scanvi, totalvi], ids=lambda make: make.__name__)
def test_the_step_of_a_count_model_is_the_same(make: Any) -> None:
    """Noise, the weight of the divergence and the learning rate of each minibatch included."""
    device = torch.device("cuda")
    found = []
    for recorded in (False, True):
        module = make().to(device).train()
        optimizer = make_optimizer(module, 1e-3, 0.0, eps=0.01)
        step = RecordedStep(optimizer, module.loss, nullcontext())
        losses = []
        for number in range(WARM_UP + 8):
            cells = to_device(repeated(some_cells(number=number), 3), device)
            generator = torch.Generator(device).manual_seed(100 + number)
            set_rate(optimizer, 1e-3 / (1 + number))
            minibatch = (cells, min(1.0, number / 8), generator)
            done = step(*minibatch) if recorded else step._step(*minibatch)
            losses.append(float(done["loss"]))
        found.append((losses, {k: v.cpu() for k, v in module.state_dict().items()}))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-4)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def to_device(cells: Cells, device: torch.device) -> Cells:
    given = {f.name: getattr(cells, f.name) for f in fields(cells)}
    return Cells(**{name: None if value is None else value.to(device) for name, value in given.items()})


@pytest.mark.parametrize("kind", COUNTS)
def test_count_models_train_as_on_the_cpu(kind: str, tmp_path: Path) -> None:
    """Noise differs between devices, and the models are small: losses agree roughly."""
    view = write_view(tmp_path / "view", [400, 300, 200], n_genes=30, proteins=4)
    settings = {"model": kind, "max_epochs": 8, "minibatch_size": 64, "patience": 0, "threads": 1}
    loss = {}
    for name in ("cpu", "off", "auto"):
        where = {"device": "cpu"} if name == "cpu" else {"device": "cuda", "graph": name}
        done = train(view, tmp_path / name, progress=False, **settings, **where, **COUNTS[kind])
        loss[name] = done.loss
        assert all(
            torch.isfinite(value).all() for value in load_model(tmp_path / name).module.state_dict().values()
        )
    assert loss["off"] == pytest.approx(loss["cpu"], rel=0.1)
    assert loss["auto"] == pytest.approx(loss["off"], rel=1e-2)


@pytest.mark.parametrize("kind", ["scvi", "scanvi"])
def test_latents_of_equal_weights_equal_the_cpus(kind: str) -> None:
    module = {"scvi": scvi, "scanvi": scanvi}[kind]().eval()
    cells = repeated(some_cells(), 4)
    here = module.encode(cells)[0]
    there = module.to("cuda").encode(to_device(cells, torch.device("cuda")))[0].cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_surgery_on_a_gpu_keeps_the_reference(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [400, 300], n_genes=30)
    train(
        view, tmp_path / "model", model="scvi", max_epochs=3, progress=False, device="cuda", **COUNTS["scvi"]
    )
    x_ng, _, _ = make_counts([200], 30, seed=4)
    genes = pd.DataFrame(index=[f"GENE{g}" for g in range(30)])
    obs = pd.DataFrame({"batch": "new"}, index=[f"q{i}" for i in range(200)])
    ad.AnnData(x_ng, obs=obs, var=genes).write_h5ad(tmp_path / "q.h5ad")
    before = load_model(tmp_path / "model").module.state_dict()
    sx.surgery(
        tmp_path / "model",
        [tmp_path / "q.h5ad"],
        tmp_path / "updated",
        batch_key="batch",
        max_epochs=3,
        min_features=0,
        device="cuda",
    )
    after = load_model(tmp_path / "updated").module.state_dict()
    old = after["encoder.stack.layers.0.columns.batch"][:, :2]
    assert torch.equal(old, before["encoder.stack.layers.0.columns.batch"])
    assert torch.equal(after["decoder.scale.weight"], before["decoder.scale.weight"])
