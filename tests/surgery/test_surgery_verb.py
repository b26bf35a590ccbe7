"""``surgery``: the reference stays, order and split of files do not matter, kills leave nothing half done."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from views import make_counts

import streamx as sx
from streamx.cli.main import invoke
from streamx.errors import (
    BadValuesError,
    SettingsChangedError,
    StreamxWarning,
    UsageError,
)
from streamx.mapping import read_reference
from streamx.models.grow import batch_tables, selected
from streamx.store.folder import Folder
from streamx.surgery.arrivals import arrivals
from streamx.train.model import load_model
from streamx.train.surgery import join_last

KINDS: dict[str, dict[str, Any]] = {
    "scvi": {"arches": True, "n_hidden": 16},
    "scanvi": {"arches": True, "n_hidden": 16, "label_key": "type", "base_epochs": 2},
    "totalvi": {"n_hidden": 16, "n_latent": 5, "use_batch_norm": "none"},
    "trvae": {"hidden_layer_sizes": (16, 8), "latent_dim": 5},
}
FAST: dict[str, Any] = {"batch_key": "batch", "max_epochs": 3, "minibatch_size": 32, "min_features": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of five batches: three of the reference, two new ones, one of these also in two halves."""
    folder = tmp_path_factory.mktemp("surgery")
    x_ng, batch_n, type_n = make_counts([150, 120, 90, 100, 80], 30, seed=3)
    rng = np.random.default_rng(5)
    obs = pd.DataFrame(
        {"batch": [f"b{b}" for b in batch_n], "type": [f"t{t}" for t in type_n]},
        index=[f"cell{i}" for i in range(len(batch_n))],
    )
    cells = ad.AnnData(x_ng, obs=obs, var=pd.DataFrame(index=[f"GENE{g}" for g in range(30)]))
    cells.obsm["protein_expression"] = pd.DataFrame(
        rng.poisson(3 * (1 + type_n[:, None] * np.arange(6)[None])).astype(np.float32),
        index=obs.index,
        columns=[f"P{p}" for p in range(6)],
    )
    cells[batch_n < 3].copy().write_h5ad(folder / "reference.h5ad")
    for b in (3, 4):
        cells[batch_n == b].copy().write_h5ad(folder / f"q{b}.h5ad")
    third = cells[batch_n == 3]
    third[::2].copy().write_h5ad(folder / "half1.h5ad")
    third[1::2].copy().write_h5ad(folder / "half2.h5ad")
    sx.convert([folder / "reference.h5ad"], folder / "store", batch_key="batch")
    sx.preprocess(folder / "store", folder / "view", profile="counts", n_top_features=0, min_cells=0)
    for kind, settings in KINDS.items():
        sx.train(folder / "view", folder / kind, model=kind, max_epochs=3, minibatch_size=32, **settings)
    return folder


def latents(updated: Path, name: str) -> pd.DataFrame:
    cells = ad.read_zarr(updated / "added" / f"{name}.zarr")
    [key] = [key for key in cells.obsm if key.startswith("X_")]
    return pd.DataFrame(cells.obsm[key], index=cells.obs_names)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("kind", KINDS)
def test_reference_keeps_its_bits_and_new_cells_join_it(kind: str, home: Path, tmp_path: Path) -> None:
    before = digests(home / kind)
    [report] = sx.surgery(home / kind, home / "q3.h5ad", tmp_path / "u", **FAST)
    assert digests(home / kind) == before
    assert (report["status"], list(report["learnt"]), report["n_cells"]) == ("done", ["b3"], 100)
    old, new = load_model(home / kind), load_model(tmp_path / "u")
    assert new.batches == ("b0", "b1", "b2", "b3")
    for name, value in old.module.state_dict().items():
        grown = new.module.state_dict()[name]
        same = grown if grown.shape == value.shape else grown[tuple(slice(n) for n in value.shape)]
        assert (same == value).all(), name
    reference = read_reference(tmp_path / "u")
    assert reference.n_cells == 460
    np.testing.assert_array_equal(reference.latent_nk[:360], read_reference(home / kind).latent_nk)
    assert sx.verify(tmp_path / "u")["ok"]
    # the reference's cells, mapped by the updated model, have the latents that they had
    out = {"batch_key": "batch", "min_features": 0}
    for model, name in ((home / kind, "before"), (tmp_path / "u", "after")):
        sx.project(model, {name: home / "reference.h5ad"}, tmp_path / name, **out)
    z = [ad.read_zarr(tmp_path / name / f"{name}.zarr").obsm[f"X_{kind}"] for name in ("before", "after")]
    np.testing.assert_array_equal(*z)


def test_a_kept_index_gets_the_added_cells(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "scvi", tmp_path / "model")
    sx.project(
        home / "scvi", {"q": home / "reference.h5ad"}, tmp_path / "out", batch_key="batch", min_features=0
    )
    asked = {"label_key": "type", "index": "ivf", "threads": 1}
    sx.transfer(tmp_path / "model", tmp_path / "out", **asked)
    [before] = (tmp_path / "model" / "neighbors").iterdir()
    sx.surgery(tmp_path / "model", home / "q4.h5ad", tmp_path / "u", **FAST)
    assert [path.name for path in (tmp_path / "u" / "neighbors").iterdir()] == [before.name]
    sx.project(
        tmp_path / "u", {"q": home / "reference.h5ad"}, tmp_path / "out2", batch_key="batch", min_features=0
    )
    sx.transfer(tmp_path / "u", tmp_path / "out2", **asked)
    [after] = (tmp_path / "u" / "neighbors").iterdir()
    [n_before, n_after] = (int(path.name.split("-")[2], 16) for path in (before, after))
    assert (n_before, n_after) == (360, 440)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_come_in_any_order(kind: str, home: Path, tmp_path: Path) -> None:
    for names in (["q3", "q4"], ["q4", "q3"]):
        for name in names:  # one call each: within a call files are taken by name
            sx.surgery(home / kind, home / f"{name}.h5ad", tmp_path / names[0], **FAST)
    for name in ("q3", "q4"):
        a, b = latents(tmp_path / "q3", name), latents(tmp_path / "q4", name)
        np.testing.assert_allclose(a, b.loc[a.index], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_refit_takes_a_batch_in_any_split(kind: str, home: Path, tmp_path: Path) -> None:
    sx.surgery(home / kind, home / "q3.h5ad", tmp_path / "whole", refit=True, **FAST)
    for name in ("half2", "q4", "half1"):
        sx.surgery(home / kind, home / f"{name}.h5ad", tmp_path / "split", refit=True, **FAST)
    added = sorted(path.name for path in (tmp_path / "split" / "added").iterdir())
    halves = pd.concat([latents(tmp_path / "split", n.removesuffix(".zarr")) for n in added if "half" in n])
    whole = latents(tmp_path / "whole", "q3")
    np.testing.assert_allclose(whole, halves.loc[whole.index], atol=1e-6)
    assert load_model(tmp_path / "split").batches == ("b0", "b1", "b2", "b3", "b4")


def test_known_batch_is_only_projected(home: Path, tmp_path: Path) -> None:
    sx.surgery(home / "scvi", home / "half1.h5ad", tmp_path / "u", **FAST)
    before = load_model(tmp_path / "u").id
    [report] = sx.surgery(home / "scvi", home / "half2.h5ad", tmp_path / "u", **FAST)
    assert (report["learnt"], report["projected"]) == ({}, ["b3"])
    assert load_model(tmp_path / "u").id == before
    with pytest.raises(UsageError, match="its cells are not here"):
        sx.surgery(home / "scvi", {"again": home / "half2.h5ad"}, tmp_path / "u", refit=True, **FAST)


class Killed(BaseException):
    pass


def test_killed_at_any_write_it_ends_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [home / "q3.h5ad", home / "q4.h5ad"]
    sx.surgery(home / "scvi", files, tmp_path / "whole", **FAST)
    wanted = {name: d for name, d in digests(tmp_path / "whole").items() if "zarr.json" not in name}
    write, left = Folder.write, [0]

    def dying(self: Folder, key: str, *data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write(self, key, *data)

    monkeypatch.setattr(Folder, "write", dying)
    rng, kills = np.random.default_rng(0), 0
    for _ in range(40):
        left[0] = int(rng.integers(1, 60))
        try:
            sx.surgery(home / "scvi", files, tmp_path / "killed", checkpoint_seconds=0, **FAST)
            break
        except Killed:
            kills += 1
            if (tmp_path / "killed" / "model.json").exists():
                load_model(tmp_path / "killed")  # never half a model
    monkeypatch.undo()
    sx.surgery(home / "scvi", files, tmp_path / "killed", checkpoint_seconds=0, **FAST)
    assert kills >= 3
    found = digests(tmp_path / "killed")
    assert {name: found.get(name) for name in wanted} == wanted
    assert not (tmp_path / "killed.journal").exists()


def test_a_file_that_was_mended_is_learnt_from_the_beginning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill, then other cells under the same names of file and batch: nothing of the former ones is left."""
    write, settings = Folder.write, {**FAST, "batch_key": None, "checkpoint_seconds": 0}

    def dying(self: Folder, key: str, *data: bytes) -> None:
        if key.startswith("batch-") and "epoch-000002" in key:
            raise Killed
        write(self, key, *data)

    monkeypatch.setattr(Folder, "write", dying)
    with pytest.raises(Killed):
        sx.surgery(home / "scvi", {"new": home / "q3.h5ad"}, tmp_path / "killed", **settings)
    monkeypatch.undo()
    for name in ("killed", "whole"):
        sx.surgery(home / "scvi", {"new": home / "q4.h5ad"}, tmp_path / name, **settings)
    found, expected = (latents(tmp_path / name, "new") for name in ("killed", "whole"))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_same_call_again_does_nothing(home: Path, tmp_path: Path) -> None:
    sx.surgery(home / "scvi", home / "q3.h5ad", tmp_path / "u", **FAST)
    before = digests(tmp_path / "u")
    [report] = sx.surgery(home / "scvi", home / "q3.h5ad", tmp_path / "u", **FAST)
    assert report["status"] == "skipped"
    assert digests(tmp_path / "u") == before
    [report] = sx.surgery(home / "scvi", home / "q3.h5ad", tmp_path / "u", new_labels="keep", **FAST)
    assert report["status"] == "skipped"  # what the error on a later file's labels asks for
    with pytest.raises(SettingsChangedError, match="q3 was added with another"):
        sx.surgery(home / "scvi", {"q3": home / "q4.h5ad"}, tmp_path / "u", **FAST)
    with pytest.raises(SettingsChangedError, match="not made from this reference"):
        sx.surgery(home / "trvae", home / "q4.h5ad", tmp_path / "u", **FAST)


def test_labels_transfer_from_all_cells_of_the_update(home: Path, tmp_path: Path) -> None:
    sx.surgery(home / "scanvi", home / "q3.h5ad", tmp_path / "u", **FAST)
    unlabelled = ad.read_h5ad(home / "q4.h5ad")
    del unlabelled.obs["type"]
    sx.surgery(home / "scanvi", {"q4": unlabelled}, tmp_path / "u", **FAST)
    sx.project(
        tmp_path / "u", {"q": home / "half1.h5ad"}, tmp_path / "out", batch_key="batch", min_features=0
    )
    found = sx.transfer(tmp_path / "u", tmp_path / "out", label_key="type", truth_key="type")
    assert found["accuracy"] > 0.6
    assert read_reference(tmp_path / "u").column("type").isna().sum() == 80


def test_new_labels_are_refused_or_kept(home: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(home / "q3.h5ad")
    cells.obs["type"] = ["t0"] * 50 + ["unheard of"] * 50
    with pytest.raises(BadValuesError, match="unheard of"):
        sx.surgery(home / "scanvi", {"q": cells}, tmp_path / "u", **FAST)
    [report] = sx.surgery(home / "scanvi", {"q": cells}, tmp_path / "u2", new_labels="keep", **FAST)
    assert report["status"] == "done"
    assert load_model(tmp_path / "u2").schema.labels == ("t0", "t1", "t2", "t3")
    assert "unheard of" in set(read_reference(tmp_path / "u2").column("type"))


def test_what_can_not_be_is_refused(home: Path, tmp_path: Path) -> None:
    sx.preprocess(home / "store", tmp_path / "view", n_top_features=0, min_features=0, min_cells=0)
    sx.train(tmp_path / "view", tmp_path / "scalex", max_iteration=4, n_hidden=8)
    with pytest.raises(UsageError, match="SCALEX has no surgery"):
        sx.surgery(tmp_path / "scalex", home / "q3.h5ad", tmp_path / "u")
    with pytest.raises(UsageError, match="moves weights"):
        sx.surgery(home / "scvi", home / "q3.h5ad", tmp_path / "u", unfrozen=True)
    with pytest.raises(UsageError, match="unknown setting 'weight_decay'"):
        sx.surgery(home / "scvi", home / "q3.h5ad", tmp_path / "u", weight_decay=0.1)
    sx.train(home / "view", tmp_path / "plain", model="scvi", n_hidden=8, max_epochs=1)
    with pytest.warns(StreamxWarning, match="sees no batches"):
        sx.surgery(tmp_path / "plain", home / "q3.h5ad", tmp_path / "u", **FAST)


def test_broken_file_is_left_out_when_asked(home: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.h5ad").write_bytes(b"nothing")
    line = ["surgery", home / "scvi", tmp_path / "broken.h5ad", home / "q3.h5ad", "-o", tmp_path / "u"]
    options = ["--batch-key", "batch", "--max-epochs", "1", "--min-features", "0", "--on-error", "skip"]
    result = invoke([*map(str, line), *options])
    assert [report["status"] for report in result["queries"]] == ["failed", "done"]


def test_files_that_arrive(home: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    shutil.copy(home / "q3.h5ad", inbox)
    sleeps: list[float] = []

    def pause(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 2:
            shutil.copy(home / "q4.h5ad", inbox)

    found = [request.name for request in arrivals(inbox, idle=3, pause=pause)]
    assert found == ["q3", "q4"]
    lines = tmp_path / "list.txt"
    lines.write_text(f"{home}/q3.h5ad\n{home}/q4.h5")  # the last line is not finished
    assert [request.name for request in arrivals(lines, idle=2, pause=sleeps.append)] == ["q3"]
    with pytest.raises(UsageError, match="no such folder or list"):
        next(arrivals(tmp_path / "nowhere"))
    reports = sx.surgery(home / "scvi", [], tmp_path / "u", watch=lines, idle=0.5, **FAST)
    assert [report["name"] for report in reports] == ["q3"]


def test_what_is_renamed_while_it_is_looked_at_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that grows: its writer renames an object between the listing and the look."""
    (tmp_path / "inbox" / "q.zarr").mkdir(parents=True)
    (tmp_path / "inbox" / "q.zarr" / "zarr.json").write_text("{}")
    rglob, looks = Path.rglob, [0]

    def with_one_that_is_gone(self: Path, pattern: str) -> Any:
        looks[0] += 1
        return [*rglob(self, pattern), *([Vanished(self / "gone")] if looks[0] == 1 else [])]

    class Vanished(type(tmp_path)):  # type: ignore[misc]
        def is_file(self) -> bool:
            return True

    monkeypatch.setattr(Path, "rglob", with_one_that_is_gone)
    assert [r.name for r in arrivals(tmp_path / "inbox", idle=4, pause=lambda s: None)] == ["q"]
    assert looks[0] >= 3


def test_card_names_every_file(home: Path, tmp_path: Path) -> None:
    sx.surgery(home / "scvi", [home / "q3.h5ad", home / "q4.h5ad"], tmp_path / "u", **FAST)
    card = json.loads((tmp_path / "u" / "model.json").read_text())
    assert [entry["name"] for entry in card["surgery"]] == ["q3", "q4"]
    assert card["origin"] == load_model(home / "scvi").id
    assert len(card["earlier"]) == 2
    weights = [path.name for path in (tmp_path / "u").glob("model*.safetensors")]
    assert weights == [card["weights"]]


@pytest.mark.parametrize("kind", KINDS)
def test_missing_genes_are_zero_or_left_out(kind: str, home: Path, tmp_path: Path) -> None:
    """Without a fifth of the genes, both ways work; the reference's weights keep their bits in both."""
    cells = ad.read_h5ad(home / "q3.h5ad")[:, 6:].copy()
    options = FAST | {"max_epochs": 15}
    losses = {}
    for mask in (False, True):
        updated = tmp_path / str(mask)
        [report] = sx.surgery(home / kind, {"q3": cells}, updated, mask_missing=mask, **options)
        assert report["gene_overlap"] == pytest.approx(0.8)
        losses[mask] = report["learnt"]["b3"]["loss"]
    assert losses[True] != losses[False]
    old, new = (load_model(folder).module.state_dict() for folder in (home / kind, tmp_path / "True"))
    for name, value in old.items():  # widened again: the reference's weights, bit for bit
        grown = new[name]
        same = grown if grown.shape == value.shape else grown[tuple(slice(n) for n in value.shape)]
        assert (same == value).all(), name


def test_refit_of_files_with_different_genes(home: Path, tmp_path: Path) -> None:
    halves = [ad.read_h5ad(home / f"half{n}.h5ad") for n in (1, 2)]
    options = FAST | {"refit": True, "mask_missing": True}
    sx.surgery(home / "scvi", {"one": halves[0][:, 3:].copy()}, tmp_path / "u", **options)
    [report] = sx.surgery(home / "scvi", {"two": halves[1][:, :-3].copy()}, tmp_path / "u", **options)
    assert report["learnt"]["b3"]["cells"] == 100


@pytest.fixture(scope="module")
def sites(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scVI with a covariate of two levels, and a query b3 with two more of them."""
    folder = tmp_path_factory.mktemp("sites")
    for name, levels in (("reference", "s0 s1"), ("q3", "s1 s2 s9"), ("q4", "s2"), ("half2", "s0 s7")):
        cells = ad.read_h5ad(home / f"{name}.h5ad")
        cells.obs["site"] = np.resize(levels.split(), cells.n_obs)
        cells.write_h5ad(folder / f"{name}.h5ad")
    sx.convert([folder / "reference.h5ad"], folder / "store", batch_key="batch")
    sx.preprocess(folder / "store", folder / "view", profile="counts", n_top_features=0, min_cells=0)
    settings = {"category_keys": ("site",), "max_epochs": 2, "minibatch_size": 32}
    sx.train(folder / "view", folder / "scvi", model="scvi", **KINDS["scvi"], **settings)
    return folder


def test_levels_of_covariates_come_with_new_batches(sites: Path, tmp_path: Path) -> None:
    [report] = sx.surgery(sites / "scvi", sites / "q3.h5ad", tmp_path / "u", **FAST)
    assert report["learnt"]["b3"]["levels"] == {"site": ["s2", "s9"]}
    [report] = sx.surgery(sites / "scvi", sites / "q4.h5ad", tmp_path / "u", **FAST)
    assert "levels" not in report["learnt"]["b4"]
    assert load_model(tmp_path / "u").schema.categories == (("site", ("s0", "s1", "s2", "s9")),)
    assert sx.verify(tmp_path / "u")["ok"]
    out = {"batch_key": "batch", "min_features": 0}
    for model, name in ((sites / "scvi", "before"), (tmp_path / "u", "after")):
        sx.project(model, {name: sites / "reference.h5ad"}, tmp_path / name, **out)
    z = [ad.read_zarr(tmp_path / name / f"{name}.zarr").obsm["X_scvi"] for name in ("before", "after")]
    np.testing.assert_array_equal(*z)
    sx.project(tmp_path / "u", {"again": sites / "q3.h5ad"}, tmp_path / "again", **out)
    again = ad.read_zarr(tmp_path / "again" / "again.zarr")
    np.testing.assert_allclose(
        latents(tmp_path / "u", "q3").loc[again.obs_names], again.obsm["X_scvi"], atol=1e-6
    )


def test_levels_that_no_new_batch_brings_are_refused(sites: Path, tmp_path: Path) -> None:
    sx.surgery(sites / "scvi", sites / "q3.h5ad", tmp_path / "u", **FAST)
    before = load_model(tmp_path / "u").id
    both = ad.concat([ad.read_h5ad(sites / f"{name}.h5ad") for name in ("half2", "q4")])
    with pytest.raises(BadValuesError, match="25 cells have no known site, the first 's7'"):
        sx.surgery(sites / "scvi", {"both": both}, tmp_path / "u", **FAST)
    assert load_model(tmp_path / "u").id == before
    with pytest.raises(UsageError, match="can't bring levels of a covariate \\(site = s2, site = s9\\)"):
        sx.surgery(sites / "scvi", sites / "q3.h5ad", tmp_path / "v", refit=True, **FAST)


def test_a_model_of_one_batch_learns_the_same(home: Path) -> None:
    """What is trained has the new batch's values alone; they go back to their place."""
    for kind in KINDS:
        module = load_model(home / kind).module
        grown = selected(module, [0, 2, 1])
        alone = selected(grown, [2])
        with torch.no_grad():
            for parameter in alone.parameters():
                parameter += 1
        join_last(grown, alone)
        tables = batch_tables(module)
        for name, value in module.named_parameters():
            new = grown.state_dict()[name]
            if name in tables:
                kept = value.index_select(tables[name], torch.tensor([0, 2]))
                assert torch.equal(new.narrow(tables[name], 0, 2), kept), name
                new, value = new.select(tables[name], 2), value.select(tables[name], 1)
            assert torch.equal(new, value + 1), name
