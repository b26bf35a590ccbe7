"""scArches 0.6.1's trVAE itself beside ours: training steps, surgery, folders both ways.

It installs with ``pip install --no-deps scArches==0.6.1 requests``; what it imports and trVAE never uses is
replaced by empty modules.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

LOSSES = ["nb", "zinb", "mse"]


class Empty(types.ModuleType):
    """A module with every name in it."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    """The class TRVAE. It needs a name that anndata took away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anndata, "read", anndata.read_h5ad, raising=False)
        for name in ("scHPL", "scHPL.learn", "scHPL.predict", "scHPL.utils", "scHPL.train", "scHPL.evaluate"):
            if name not in sys.modules:
                patch.setitem(sys.modules, name, Empty(name))
        pytest.importorskip("scarches")
        from scarches.models import TRVAE

        yield TRVAE


def cells(seed: int = 0, names: tuple[str, ...] = ("b", "a", "c")) -> anndata.AnnData:
    """Counts of 20 genes; conditions in the order in which scArches codes them, that of appearance."""
    rng = np.random.default_rng(seed)
    data = anndata.AnnData(rng.poisson(2.0, (60, 20)).astype(np.float32))
    data.obs["study"] = [
        names[i] for i in (*range(len(names)), *rng.integers(0, len(names), 60 - len(names)))
    ]
    return data


def theirs(peer: Any, data: anndata.AnnData, **settings: Any) -> Any:
    import torch

    torch.manual_seed(3)
    given = {"hidden_layer_sizes": [16, 8], "latent_dim": 4, "dr_rate": 0.0} | settings
    return peer(data, condition_key="study", **given)


def minibatch(data: anndata.AnnData, batches: list[str]) -> Any:
    import torch

    from streamx.models.cells import Cells

    codes = [batches.index(name) for name in data.obs["study"]]
    return Cells(torch.as_tensor(data.X), torch.tensor(codes))


SETTINGS: list[dict[str, Any]] = [
    *({"recon_loss": loss} for loss in LOSSES),
    {"use_bn": True},
    {"use_ln": False},
    {"mmd_on": "y", "beta": 2.0},
    {"mmd_boundary": 1},
    {"use_mmd": False, "hidden_layer_sizes": [16]},
    {"recon_loss": "zinb", "use_bn": True, "hidden_layer_sizes": [16, 8, 8]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_steps(peer: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    """From equal weights and noise: equal losses, and after three steps equal weights."""
    import torch

    from streamx.interop.scarches_trvae import read_trvae, to_theirs

    data = cells()
    model = theirs(peer, data, **settings)
    model.save(str(tmp_path / "model"))
    ours = read_trvae(tmp_path / "model")
    assert (ours.batches, ours.batch_key, ours.genes) == (["b", "a", "c"], "study", list(data.var_names))
    given = minibatch(data, ours.batches)
    networks = (model.model.train(), ours.module.train())
    optimizers = [torch.optim.Adam(n.parameters(), lr=1e-3, eps=0.01, weight_decay=0.04) for n in networks]
    size_n = given.x_ng.sum(1)
    for step in range(3):
        torch.manual_seed(step)
        want = model.model(x=given.x_ng, batch=given.batch_n, sizefactor=size_n)
        torch.manual_seed(step)
        got = ours.module.loss(given, 0.5)
        for name, value in zip(("reconstruction", "kl", "mmd"), want, strict=True):
            assert got[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), (step, name)
        for optimizer, loss in zip(optimizers, (want[0] + 0.5 * want[1] + want[2], got["loss"]), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected, found = model.model.state_dict(), to_theirs(ours.module.state_dict())
    assert set(found) == set(expected)
    for name, value in expected.items():
        # a bias in front of a batch norm cancels: its gradient is rounding, which Adam makes steps of
        cancels = settings.get("use_bn") and name.endswith(("L0.expr_L.bias", "L1.bias", "L2.bias"))
        limit = 1e-4 if cancels else 2e-6
        np.testing.assert_allclose(found[name], value, atol=limit, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_folder_of_scarches_encodes_to_its_latents(
    peer: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from streamx.interop.scarches_trvae import read_trvae

    data = cells()
    model = theirs(peer, data, **settings)
    model.train(n_epochs=3, use_early_stopping=False)
    model.model.eval()
    model.save(str(tmp_path / "model"))
    ours = read_trvae(tmp_path / "model")
    want, want_var = model.get_latent(mean_var=True)
    mean, var = ours.module.encode(minibatch(data, ours.batches))
    np.testing.assert_allclose(mean.detach(), want, atol=1e-5)
    np.testing.assert_allclose(var.detach(), want_var, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scarches_reads_a_folder_of_ours(peer: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    import torch

    from streamx.config import TrvaeConfig
    from streamx.interop.scarches_trvae import write_trvae
    from streamx.models.trvae import Trvae

    data, batches = cells(), ["a", "b", "c"]
    config = {"hidden_layer_sizes": [16, 8], "latent_dim": 4, "log_input": False} | settings
    config["hidden_layer_sizes"] = tuple(config["hidden_layer_sizes"])
    module = Trvae(20, 3, TrvaeConfig(**config), generator=torch.Generator().manual_seed(8))
    given = minibatch(data, batches)
    module.loss(given, 1.0, torch.Generator().manual_seed(0))  # moves running statistics
    write_trvae(tmp_path / "model", module.eval(), list(data.var_names), batches, "study")
    model = peer.load(str(tmp_path / "model"), data)
    mean, _ = module.encode(given)
    np.testing.assert_allclose(model.get_latent(mean=True), mean.detach(), atol=1e-5)


def test_surgery(peer: Any, tmp_path: Path) -> None:
    """From equal new columns: the same weights move, to the same values, where no weight decays."""
    import torch

    from streamx.interop.scarches_trvae import read_trvae, to_theirs
    from streamx.models.freeze import freeze
    from streamx.models.freeze_trvae import trainable_trvae

    model = theirs(peer, cells(), dr_rate=0.1)
    model.model.eval()
    model.save(str(tmp_path / "reference"))
    query = cells(1, ("new", "newer"))
    grown = peer.load_query_data(query, str(tmp_path / "reference"))
    grown.save(str(tmp_path / "grown"))
    ours = read_trvae(tmp_path / "grown")
    assert ours.batches == ["b", "a", "c", "new", "newer"]
    before = read_trvae(tmp_path / "reference").module.state_dict()
    for name, value in ours.module.state_dict().items():
        assert torch.equal(value[..., :3] if value.shape[-1] == 5 else value, before[name]), name
    plan = trainable_trvae(ours.module, 2)
    free = {name for name, p in grown.model.named_parameters() if p.requires_grad}
    assert set(to_theirs({n: torch.ones(1) for n in plan.moves})) == free
    freeze(ours.module, plan)
    given = minibatch(query, ours.batches)
    networks = (grown.model.train(), ours.module.train())
    optimizers = [
        torch.optim.Adam([p for p in n.parameters() if p.requires_grad], lr=1e-2, eps=0.01) for n in networks
    ]
    for step in range(3):
        torch.manual_seed(step)
        want = grown.model(x=given.x_ng, batch=given.batch_n, sizefactor=given.x_ng.sum(1))
        torch.manual_seed(step)
        got = ours.module.loss(given, 1.0)
        for optimizer, loss in zip(optimizers, (sum(want), got["loss"]), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected = grown.model.state_dict()
    for name, value in to_theirs(ours.module.state_dict()).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-6, rtol=1e-5, err_msg=name)
    assert not torch.equal(
        ours.module.log_theta_gb[:, 3:], read_trvae(tmp_path / "grown").module.log_theta_gb[:, 3:]
    )
