import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from views import make_counts, write_view

from streamx.errors import (
    BadFileError,
    BatchError,
    IncompleteError,
    IntegrityError,
    SettingsChangedError,
    UsageError,
)
from streamx.interop.scalex import write_checkpoint
from streamx.store.collection import Collection
from streamx.train.latent import impute, latents
from streamx.train.model import load_model
from streamx.train.run import TrainResult, train

SIZES = [180, 90, 1]
SPARSE = 0.2  # the path of real data; test_feed.py compares it with the dense one
SMALL: dict[str, Any] = {
    "max_iteration": 24,
    "n_hidden": 16,
    "threads": 1,
    "checkpoint_seconds": 0,
    "progress": False,
}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return write_view(tmp_path_factory.mktemp("train") / "view", SIZES, expressed=SPARSE)


def test_the_view_is_sparse(view: Collection) -> None:
    assert view.nnz < 0.25 * view.n_obs * view.n_vars


@pytest.fixture(scope="module")
def trained(view: Collection, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    path = tmp_path_factory.mktemp("trained") / "model"
    return path, train(view, path, **SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_written(view: Collection, trained: tuple[Path, TrainResult]) -> None:
    path, result = trained
    assert (result.epochs, result.steps) == (6, 24)  # 271 cells: 4 whole minibatches
    assert result.model == "scalex"
    assert result.cells_per_second > 0
    assert sorted(p.name for p in path.iterdir()) == [
        "README.md",
        "history.csv",
        "model.json",
        "model.safetensors",
        "reference.zarr",
    ]
    assert not path.with_name("model.journal").exists()
    lines = (path / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,reconstruction,kl"
    assert len(lines) == 7
    first, last = (float(line.split(",")[1]) for line in (lines[1], lines[-1]))
    assert last < first
    assert result.loss == pytest.approx(min(float(line.split(",")[1]) for line in lines[1:]))
    _, loss, reconstruction, kl = (float(v) for v in lines[-1].split(","))
    assert loss == pytest.approx(reconstruction + 0.5 * kl)


def test_the_reference_opens_with_anndata(view: Collection, trained: tuple[Path, TrainResult]) -> None:
    reference = anndata.read_zarr(trained[0] / "reference.zarr")
    assert reference.obs_names.tolist() == view.obs_names.tolist()
    assert list(reference.obs.columns) == view.obs_columns
    assert reference.obs["batch"].tolist() == view.obs["batch"].tolist()
    assert reference.n_vars == 0
    model = load_model(trained[0])
    assert reference.uns["streamx"]["model"] == model.id
    z = reference.obsm["X_scalex"]
    assert z.shape == (view.n_obs, 10)
    assert z.dtype == np.float32
    again = latents(model.module, view, "matched", seed=model.card["settings"]["train"]["seed"])
    np.testing.assert_allclose(z, again, atol=1e-6)


def test_load(view: Collection, trained: tuple[Path, TrainResult]) -> None:
    model = load_model(trained[0])
    assert model.genes == tuple(view.var_names)
    assert model.batches == ("batch0", "batch1", "batch2")
    assert model.transform.log1p
    assert model.min_features == 5
    assert model.drop == ("ERCC", "MT-", "mt-")
    assert model.scale_bg is not None
    assert view.scale_bg is not None
    assert np.array_equal(model.scale_bg, view.scale_bg)
    assert model.stats is not None
    assert model.stats.n_b.tolist() == SIZES
    assert not model.module.training
    assert model.card["training"]["n_cells"] == 271


def test_same_seed_same_bytes_whatever_the_machine_offers(
    view: Collection, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_num_threads()
    train(view, tmp_path / "again", **SMALL | {"threads": 2, "memory": "100MB", "checkpoint_seconds": 1000})
    assert torch.get_num_threads() == before
    assert contents(tmp_path / "again") == contents(trained[0])
    train(view, tmp_path / "other", **SMALL | {"seed": 5})
    assert load_model(tmp_path / "other").id != load_model(trained[0]).id


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_killed_at_a_write_it_resumes_to_the_same_bytes(
    view: Collection,
    trained: tuple[Path, TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    from streamx.store.folder import Folder

    write, operations = Folder.write, 0

    def mortal(self: Folder, key: str, data: Any) -> None:
        nonlocal operations
        operations += 1
        if operations == at:
            raise Killed
        write(self, key, data)

    monkeypatch.setattr(Folder, "write", mortal)
    try:
        train(view, tmp_path / "model", **SMALL)
    except Killed:
        with pytest.raises((IncompleteError, BadFileError)):
            load_model(tmp_path / "model")
    monkeypatch.undo()
    train(view, tmp_path / "model", **SMALL)
    assert contents(tmp_path / "model") == contents(trained[0])
    assert not (tmp_path / "model.journal").exists()


def test_interrupted_between_checkpoints(
    view: Collection, trained: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of an epoch: what the last checkpoint held is not lost, the rest is done again."""
    from streamx.models.scalex import Scalex

    loss, calls = Scalex.loss, 0

    def interrupted(self: Scalex, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(Scalex, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(view, tmp_path / "model", **SMALL)
    with pytest.raises(IncompleteError, match="training has not finished"):
        load_model(tmp_path / "model")
    calls = 100
    train(view, tmp_path / "model", **SMALL)
    assert calls == 100 + 24 - 14
    assert contents(tmp_path / "model") == contents(trained[0])


def test_a_damaged_checkpoint_is_not_trusted(
    view: Collection, trained: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamx.train.run._write", lambda *args: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train(view, tmp_path / "model", **SMALL)
    monkeypatch.undo()
    [state] = (tmp_path / "model.journal" / "training").iterdir()
    data = bytearray(state.read_bytes())
    data[5000] ^= 1
    state.write_bytes(data)
    train(view, tmp_path / "model", **SMALL)
    assert contents(tmp_path / "model") == contents(trained[0])


def test_changed_settings_are_refused_by_name(
    view: Collection, trained: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsChangedError, match=r"another train\.lr: 0\.0002 -> 0\.001"):
        train(view, trained[0], **SMALL | {"lr": 1e-3})
    with pytest.raises(SettingsChangedError, match=r"network\.n_latent"):
        train(view, trained[0], **SMALL | {"n_latent": 3})
    other = write_view(tmp_path / "view", SIZES, seed=9)
    with pytest.raises(SettingsChangedError, match=r"view\.sha256"):
        train(other, trained[0], **SMALL)
    monkeypatch.setattr("streamx.train.run._write", lambda *args: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train(view, tmp_path / "model", **SMALL)
    with pytest.raises(SettingsChangedError, match=r"train\.seed: 124 -> 1"):
        train(view, tmp_path / "model", **SMALL | {"seed": 1})


def test_a_finished_model_is_left_alone(
    view: Collection, trained: tuple[Path, TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(trained[0])
    caplog.set_level("INFO", "streamx")
    again = train(view, trained[0], **SMALL)
    assert "nothing to train" in caplog.text
    assert (again.epochs, again.steps, again.loss) == (6, 24, trained[1].loss)
    assert again.cells_per_second == 0
    assert contents(trained[0]) == before


def test_wrong_settings(view: Collection, tmp_path: Path) -> None:
    for wrong in (
        {"lr": 0.0},
        {"minibatch_size": 0},
        {"max_iteration": -1},
        {"epochs": 3},
        {"device": "tpu9"},
        {"accumulate": 0},
        {"device": "cpu", "precision": "bfloat16"},
        {"device": "cpu", "graph": "on"},
    ):
        with pytest.raises(UsageError):
            train(view, tmp_path / "model", **SMALL | wrong)
    with pytest.raises(UsageError, match="holds a store or view"):
        train(view, view.path, **SMALL)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "donor1.h5ad").touch()
    for place in (tmp_path / "files", tmp_path / "files" / "donor1.h5ad"):
        with pytest.raises(UsageError, match="holds other files, and no model"):
            train(view, place, **SMALL)
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["donor1.h5ad"]


def test_the_bar_shows_the_loss_alone(
    view: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("streamx.train.fit.tqdm.set_postfix", lambda bar, values: shown.append(values))
    result = train(view, tmp_path / "model", **SMALL)
    assert len(shown) == result.epochs
    assert [list(values) for values in shown] == [["loss"]] * result.epochs
    assert float(shown[-1]["loss"]) == pytest.approx(result.loss, rel=1e-4)


def test_scalex_refuses_raw_counts(tmp_path: Path) -> None:
    raw = write_view(tmp_path / "view", SIZES, transform={})
    with pytest.raises(UsageError, match="holds raw counts"):
        train(raw, tmp_path / "model", **SMALL)


def test_every_flipped_bit_is_noticed(trained: tuple[Path, TrainResult], tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "model")
    rng = np.random.default_rng(0)
    for name in ("model.json", "model.safetensors"):
        path = tmp_path / "model" / name
        whole = path.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            with pytest.raises(IntegrityError):
                load_model(tmp_path / "model")
        path.write_bytes(whole)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        load_model(tmp_path / "model")
    with pytest.raises(BadFileError, match="is no model"):
        load_model(tmp_path / "elsewhere")


def test_scalex_own_folder(trained: tuple[Path, TrainResult], tmp_path: Path) -> None:
    ours = load_model(trained[0])
    write_checkpoint(tmp_path / "out" / "checkpoint", ours.module, list(ours.genes))
    theirs = load_model(tmp_path / "out")
    assert theirs.genes == ours.genes
    assert theirs.scale_bg is None
    for name, value in ours.module.state_dict().items():
        assert torch.equal(theirs.module.state_dict()[name], value)


@pytest.mark.parametrize("norm", ["running", "domain", "minibatch"])
def test_latents_in_row_order(view: Collection, trained: tuple[Path, TrainResult], norm: str) -> None:
    module = load_model(trained[0]).module
    z = latents(module, view, norm)
    x = (
        make_counts(SIZES, expressed=SPARSE)[0].toarray()
        * (1e4 / view.obs["_streamx_total"].to_numpy())[:, None]
    )
    assert view.scale_bg is not None
    batch = view.batch_codes
    pre = module.encoder.hidden(
        torch.as_tensor(np.log1p(x) / view.scale_bg[batch], dtype=torch.float32)
    ).detach()
    norms = module.encoder.norm
    if norm == "running":
        h = norms(pre)
    else:
        h = torch.zeros_like(pre)
        for b in range(2):
            rows = torch.as_tensor(batch == b)
            h[rows] = torch.nn.functional.batch_norm(pre[rows], None, None, norms.weight, norms.bias, True)
    want = module.encoder.mean(torch.relu(h)).detach().numpy()
    many = batch < 2
    if norm == "minibatch":  # 64 cells at a time: near the whole batch's, not equal
        assert np.corrcoef(z[many].ravel(), want[many].ravel())[0, 1] > 0.95
        assert np.array_equal(z, latents(module, view, norm))
        assert not np.array_equal(z, latents(module, view, norm, seed=1))
    else:
        np.testing.assert_allclose(z[many], want[many], atol=2e-5)
    assert np.isfinite(z).all()


def test_sx19_imputation_by_name(trained: tuple[Path, TrainResult]) -> None:
    model = load_model(trained[0])
    z = np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32)
    blocks = list(impute(model, z, "batch1", rows=4))
    assert [b.shape for b in blocks] == [(4, 40), (4, 40), (2, 40)]
    with torch.no_grad():
        np.testing.assert_allclose(
            np.concatenate(blocks), model.module.impute(torch.as_tensor(z), 1), atol=1e-6
        )
    with pytest.raises(BatchError, match=r"no batch 'batch9'\n  fix: one of: batch0, batch1, batch2"):
        next(impute(model, z, "batch9"))


def test_few_cells(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [20, 1, 1], expressed=SPARSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(view, tmp_path / "model", **SMALL | {"max_iteration": 5})
    assert (result.epochs, result.steps) == (5, 5)
    assert np.isfinite(anndata.read_zarr(tmp_path / "model" / "reference.zarr").obsm["X_scalex"]).all()


SCRIPT = """
import sys
from streamx.train.run import train
train(*sys.argv[1:], max_iteration=400, n_hidden=16, threads=1, checkpoint_seconds=0, progress=False)
"""


def test_real_kills(view: Collection, tmp_path: Path) -> None:
    """kill -9 a few times at random moments of training: the same bytes as in one go."""
    command = [sys.executable, "-c", SCRIPT, str(view.path), str(tmp_path / "model")]
    rng = np.random.default_rng(1)
    kills = 0
    while kills < 3:
        run = subprocess.Popen(command)
        record = tmp_path / "model.journal" / "records" / "training.json"
        epoch = json.loads(record.read_bytes())["epoch"] if record.exists() else 0
        until = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < until:
            if record.exists() and json.loads(record.read_bytes())["epoch"] > epoch + rng.integers(1, 15):
                break
            time.sleep(0.001)
        if run.poll() is not None:
            break
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills > 0
    subprocess.run(command, check=True)
    train(view, tmp_path / "whole", **SMALL | {"max_iteration": 400, "checkpoint_seconds": 60})
    assert contents(tmp_path / "model") == contents(tmp_path / "whole")
