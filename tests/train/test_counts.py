"""Count models through the engine: history, warm-up, validation, resume, covariates, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from views import make_counts, write_view

import streamx as sx
from streamx.config import TRAINING, TrainConfig
from streamx.errors import BadValuesError, BatchError, SettingsChangedError, StreamxWarning, UsageError
from streamx.models.scvi import Scvi
from streamx.store.collection import Collection
from streamx.train import engine, run
from streamx.train.counts import kl_weight, latent_of, log_library
from streamx.train.engine import judged_from, n_epochs_of, warm_up_epochs
from streamx.train.model import load_model

SMALL: dict[str, dict[str, Any]] = {
    "scvi": {"n_hidden": 16, "arches": True},
    "scanvi": {"n_hidden": 16, "arches": True, "label_key": "type", "unlabeled": "type3", "base_epochs": 2},
    "totalvi": {"n_hidden": 16, "n_latent": 6},
    "trvae": {"hidden_layer_sizes": (16, 8), "latent_dim": 6},
}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return write_view(tmp_path_factory.mktemp("counts") / "view", [200, 150, 90], n_genes=30, proteins=4)


def history(model: Path) -> list[dict[str, float]]:
    with (model / "history.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", SMALL)
def test_trains_validates_and_is_read_back(kind: str, view: Collection, tmp_path: Path) -> None:
    settings = {"model": kind, "max_epochs": 4, "minibatch_size": 32, "patience": 0} | SMALL[kind]
    done = sx.train(view, tmp_path / "model", **settings)
    rows = history(tmp_path / "model")
    assert (done.model, done.epochs, len(rows)) == (kind, 4, 4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"reconstruction", "kl", "validation_loss"} <= set(rows[0])
    model = load_model(tmp_path / "model")
    reference = ad.read_zarr(tmp_path / "model" / "reference.zarr")
    z_nk = reference.obsm[f"X_{kind}"]
    assert z_nk.shape == (view.n_obs, 10 if kind in ("scvi", "scanvi") else 6)
    assert (model.kind, model.batches) == (kind, tuple(view.batches))
    assert sx.verify(tmp_path / "model")["ok"]
    assert sx.train(view, tmp_path / "model", **settings).cells_per_second == 0  # it is there


@pytest.mark.parametrize("kind", SMALL)
def test_killed_training_ends_with_the_same_bits(
    kind: str, view: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": kind, "max_epochs": 3, "minibatch_size": 64} | SMALL[kind]
    sx.train(view, tmp_path / "whole", **settings)
    saves, save = [], engine.save_state

    def dies(*args: Any) -> None:
        save(*args)
        saves.append(1)
        if len(saves) in (3, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "save_state", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sx.train(view, tmp_path / "killed", checkpoint_seconds=0, **settings)
    monkeypatch.undo()
    sx.train(view, tmp_path / "killed", checkpoint_seconds=0, **settings)
    for name in ("model.safetensors", "history.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize(("size", "steps"), [(60, 7), (56, 8), (99, 4), (131, 4), (197, 2), (395, 1)])
def test_an_epoch_trains_on_what_is_left_over(
    size: int, steps: int, view: Collection, tmp_path: Path
) -> None:
    """Of the 396 cells that train; but for one or two, which are too few for a batch norm."""
    settings = {"model": "scvi", "n_hidden": 4, "minibatch_size": size, "max_epochs": 1}
    assert sx.train(view, tmp_path / "model", **settings).steps == steps


def test_weight_of_the_kl_divergence() -> None:
    by_epochs = TrainConfig(model="scvi", warmup_epochs=400)
    assert [kl_weight(by_epochs, 1000, epoch, 0) for epoch in (0, 200, 400, 500)] == [0, 0.5, 1, 1]
    totalvi = TrainConfig(model="totalvi")
    assert kl_weight(totalvi, 10_849, 0, 8137) == 1  # 0.75 x cells, as documented
    assert kl_weight(totalvi, 10_849, 0, 4068) == pytest.approx(0.5, abs=1e-3)
    assert kl_weight(TrainConfig(model="scvi", warmup_steps=10), 1000, 7, 5) == 0.5
    assert warm_up_epochs(totalvi, 10_849, 42) == 194


def test_number_of_epochs() -> None:
    assert [n_epochs_of(TrainConfig(model="scvi"), n, 1) for n in (1000, 20_000, 80_000, 10**8)] == [
        400,
        400,
        100,
        1,
    ]
    assert n_epochs_of(TrainConfig(model="scvi", max_iteration=95), 1000, 10) == 10


def test_warm_up_is_not_judged(view: Collection, tmp_path: Path) -> None:
    """A loss whose weights still rise is no reason to stop, and its best epoch none to restore."""
    settings = {"model": "scvi", "n_hidden": 8, "max_epochs": 6, "patience": 1, "lr": 1e-9}
    done = sx.train(view, tmp_path / "model", warmup_epochs=4, **settings)
    assert done.epochs > 4


def test_trvae_is_judged_when_its_patience_could_have_ended(view: Collection, tmp_path: Path) -> None:
    """As by scArches: with patience 3 the epochs from the third on count, and the sixth ends it."""
    settings = {"model": "trvae", "hidden_layer_sizes": (8,), "max_epochs": 9, "lr": 1e-9, "weight_decay": 0}
    done = sx.train(view, tmp_path / "model", patience=3, threshold=1e6, **settings)
    assert done.epochs == 6
    assert judged_from(TrainConfig(model="trvae", patience=20, warmup_epochs=50), 1000, 8) == 50


def test_covariates_enter_and_are_needed(view: Collection, tmp_path: Path) -> None:
    settings = {"model": "scvi", "n_hidden": 8, "max_epochs": 1, "encode_covariates": True}
    sx.train(view, tmp_path / "m", category_keys=("type",), continuous_keys=("_streamx_total",), **settings)
    model = load_model(tmp_path / "m")
    assert model.schema.categories == (("type", ("type0", "type1", "type2", "type3")),)
    cells = view.to_anndata()
    mapped = {"batch_key": "batch", "min_features": 0}
    sx.project(model, {"q": cells}, tmp_path / "out", **mapped)
    reference = ad.read_zarr(tmp_path / "m" / "reference.zarr").obsm["X_scvi"]
    np.testing.assert_allclose(ad.read_zarr(tmp_path / "out/q.zarr").obsm["X_scvi"], reference, atol=1e-5)
    del cells.obs["type"]
    with pytest.raises(UsageError, match="no obs column 'type'"):
        sx.project(model, {"r": cells}, tmp_path / "out", **mapped)
    cells.obs["type"] = "nothing"
    with pytest.raises(BadValuesError, match="no known type"):
        sx.project(model, {"s": cells}, tmp_path / "out", **mapped)


def test_unknown_batches_need_surgery(view: Collection, tmp_path: Path) -> None:
    sx.train(view, tmp_path / "m", model="scvi", n_hidden=8, max_epochs=1, arches=True)
    with pytest.raises(BatchError, match="surgery"):
        sx.project(tmp_path / "m", {"new": view.to_anndata()}, tmp_path / "out", min_features=0)


def test_classifier_labels_projected_cells(view: Collection, tmp_path: Path) -> None:
    settings = SMALL["scanvi"] | {
        "model": "scanvi",
        "base_epochs": 15,
        "max_epochs": 10,
        "minibatch_size": 32,
    }
    sx.train(view, tmp_path / "m", **settings)
    sx.project(tmp_path / "m", {"q": view.to_anndata()}, tmp_path / "out", batch_key="batch", min_features=0)
    obs = ad.read_zarr(tmp_path / "out/q.zarr").obs
    labelled = obs["type"] != "type3"
    assert (obs["type_scanvi"].astype(str) == obs["type"].astype(str))[labelled].mean() > 0.9
    assert obs["type_scanvi_probability"].between(0.2, 1).all()
    assert (tmp_path / "m" / "history-base.csv").is_file()


def test_begins_from_a_trained_scvi(view: Collection, tmp_path: Path) -> None:
    sx.train(view, tmp_path / "scvi", model="scvi", n_hidden=16, max_epochs=3, arches=True)
    settings = {k: v for k, v in SMALL["scanvi"].items() if k != "base_epochs"}
    sx.train(
        view, tmp_path / "m", model="scanvi", init=str(tmp_path / "scvi"), max_epochs=1, lr=1e-12, **settings
    )
    base, begun = load_model(tmp_path / "scvi").module, load_model(tmp_path / "m").module
    for name, value in base.state_dict().items():
        torch.testing.assert_close(begun.vae.state_dict()[name], value, atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="no beginning for trvae"):
        sx.train(view, tmp_path / "t", model="trvae", init=str(tmp_path / "scvi"))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "scanvi"}, "scanvi learns from labels"),
        ({"model": "scvi", "label_key": "nothing", "dispersion": "gene-label"}, "no obs column 'nothing'"),
        ({"model": "scvi", "norm": "domain"}, "scvi has no norm"),
        ({"model": "scalex", "warmup_epochs": 3}, "scalex has no warmup_epochs"),
        ({"model": "scalex", "label_key": "type"}, "scalex has no label_key"),
        ({"model": "scalex", "init": "model"}, "scalex has no init"),
        ({"model": "trvae", "arches": True}, "arches are settings of scvi"),
        ({"model": "totalvi", "protein_key": "nothing"}, "no obsm matrix 'nothing'"),
        ({"model": "scvi", "train_size": 1.5}, "train_size"),
    ],
)
def test_what_can_not_be_is_refused(
    settings: dict[str, Any], error: str, view: Collection, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=error):
        sx.train(view, tmp_path / "m", **settings)


def test_a_label_that_looks_like_none_is_warned_of(tmp_path: Path) -> None:
    x_ng, batch_n, _ = make_counts([40, 30])
    kind = np.where(np.arange(70) < 20, "unknown", "B")
    obs = pd.DataFrame({"batch": batch_n.astype(str), "kind": kind}, index=[f"c{i}" for i in range(70)])
    store = sx.convert(ad.AnnData(x_ng, obs=obs), tmp_path / "store", threads=1)
    settings = {"model": "scanvi", "label_key": "kind", "base_epochs": 0, "max_epochs": 1, "n_hidden": 8}
    with pytest.warns(StreamxWarning, match="'unknown' counts as a label.*\\n.*--unlabeled unknown"):
        sx.train(store, tmp_path / "taken", **settings)
    sx.train(store, tmp_path / "left_out", unlabeled="unknown", **settings)
    found = [load_model(tmp_path / name).schema.labels for name in ("taken", "left_out")]
    assert found == [("B", "unknown"), ("B",)]


def test_other_settings_are_another_model(view: Collection, tmp_path: Path) -> None:
    sx.train(view, tmp_path / "m", model="scvi", n_hidden=8, max_epochs=1)
    with pytest.raises(SettingsChangedError, match="max_epochs"):
        sx.train(view, tmp_path / "m", model="scvi", n_hidden=8, max_epochs=2)


def test_log_library_is_that_of_the_cells(view: Collection) -> None:
    x_ng, code_n = view.read(0, view.n_obs).toarray(), view.batch_codes
    mean_b, var_b = log_library(view, block=37)
    for b in range(3):
        log_n = np.log(x_ng[code_n == b].sum(1, dtype=np.float64))
        assert (mean_b[b], var_b[b]) == pytest.approx((log_n.mean(), log_n.var()))


def test_logistic_normal_latents_do_not_depend_on_neighbours() -> None:
    from streamx.config import ScviConfig
    from streamx.models.cells import Cells

    module = Scvi(12, 2, ScviConfig(n_hidden=8, latent_distribution="ln")).eval()
    x_ng = torch.poisson(torch.full((6, 12), 3.0), generator=torch.Generator().manual_seed(1))
    batch_n = torch.tensor([0, 1, 0, 1, 0, 1])
    with torch.no_grad():
        together = latent_of(module, Cells(x_ng, batch_n))
        alone = torch.cat([latent_of(module, Cells(x_ng[i : i + 1], batch_n[i : i + 1])) for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.sum(1), torch.ones(6))


def test_defaults_are_in_one_place() -> None:
    config, _ = run._configs({"model": "totalvi"})
    expected = {k: v for k, v in TRAINING["totalvi"].items() if v is not None}
    assert {name: getattr(config, name) for name in expected} == expected
