"""transfer and metrics on disk: what is written, what is read, and a death at every write."""

from __future__ import annotations

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from sklearn.neighbors import KNeighborsClassifier

import streamx as sx
from streamx.errors import (
    BadFileError,
    BadValuesError,
    EmptyError,
    IncompleteError,
    IntegrityError,
    UsageError,
)
from streamx.metrics import score_latent
from streamx.store.amend import amend
from streamx.store.folder import Folder
from streamx.store.latents import write_latents


def space(rng, n, shift=0.0):
    labels = rng.integers(4, size=n)
    latent = rng.normal(size=(n, 6)) + 2.5 * np.eye(4, 6)[labels] + shift
    return latent.astype(np.float32), np.array(["B", "NK", "T", "mono"])[labels]


@pytest.fixture
def mapped(tmp_path):
    """A model's reference (300 cells, 2 batches) and two mapped queries, as train and project write them."""
    rng = np.random.default_rng(0)
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    latent, labels = space(rng, 300)
    given = pd.Categorical(np.where(np.arange(300) % 6 == 0, "unknown", labels))
    obs = pd.DataFrame({"study": pd.Categorical(np.repeat(["s1", "s2"], 150)), "kind": given})
    obs.index = [f"r{i}" for i in range(300)]
    uns = {"streamx": {"model": "abc", "norm": "domain", "batch_key": "study"}}
    write_latents(model / "reference.zarr", obs, {"X_scalex": latent}, uns)
    (model / "model.json").write_text(json.dumps({"batch_key": "study"}))
    for name, n in (("q1", 80), ("q2", 50)):
        latent, labels = space(rng, n, 0.3)
        latent[3] = np.nan
        obs = pd.DataFrame(
            {"truth": labels, "n_genes": np.arange(n)}, index=[f"{name}-{i}" for i in range(n)]
        )
        write_latents(out / f"{name}.zarr", obs, {"X_scalex": latent}, {"streamx": {"model": "abc"}})
    return model, out


def read(path):
    return anndata.read_zarr(path)


def test_transfer_writes_predictions_into_every_query(mapped):
    model, out = mapped
    found = sx.transfer(model, out, label_key="kind", truth_key="truth")
    reference = read(model / "reference.zarr")
    known = (reference.obs["kind"] != "unknown").to_numpy()
    judge = KNeighborsClassifier().fit(reference.obsm["X_scalex"][known], reference.obs["kind"][known])
    hits = total = 0
    for name, n in (("q1", 80), ("q2", 50)):
        query = read(out / f"{name}.zarr")
        assert list(query.obs.columns) == ["truth", "n_genes", "kind_pred", "kind_uncertainty"]
        keep = np.arange(n) != 3
        np.testing.assert_array_equal(
            query.obs["kind_pred"][keep], judge.predict(query.obsm["X_scalex"][keep])
        )
        assert query.obs["kind_pred"].iloc[3] == "Unknown"
        assert query.obs["kind_uncertainty"].iloc[3] == 1
        assert query.obs["kind_uncertainty"].dtype == np.float32
        assert list(query.obs["kind_pred"].cat.categories) == ["B", "NK", "T", "Unknown", "mono"]
        hits += (query.obs["kind_pred"].astype(str) == query.obs["truth"].astype(str)).sum()
        total += n
    assert (found["n_cells"], found["n_unknown"], found["knn_recall"]) == (130, 2, 1.0)
    assert found["accuracy"] == pytest.approx(hits / total)
    assert [query["name"] for query in found["queries"]] == ["q1", "q2"]
    assert [query["n_scored"] for query in found["queries"]] == [80, 50]
    assert {"balanced_accuracy", "macro_f1"} <= set(found) & set(found["queries"][0])
    json.dumps(found, allow_nan=False)


def contents(path):
    return {key: (path / key).read_bytes() for key in Folder(path).list()}


def test_transfer_again_replaces(mapped):
    model, out = mapped
    sx.transfer(model, out, label_key="kind")
    once = contents(out)
    sx.transfer(model, out, label_key="kind")
    assert contents(out) == once
    weighted = sx.transfer(model, out, label_key="kind", method="weighted", threshold=0.2, probabilities=True)
    query = read(out / "q1.zarr")
    assert weighted["queries"][0]["n_unknown"] == (query.obs["kind_pred"] == "Unknown").sum() > 1
    shares = query.obsm["kind_probabilities"]
    assert list(query.uns["kind_labels"]) == ["B", "NK", "T", "mono"]
    assert shares.shape == (80, 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(1 - shares.max(axis=1)[4:], query.obs["kind_uncertainty"][4:], atol=1e-6)
    sx.transfer(model, out, label_key="kind")
    assert contents(out) == once  # no stale probabilities


@pytest.mark.filterwarnings("ignore::UserWarning")  # anndata and zarr about formats
def test_what_anndata_wrote_can_be_amended_too(mapped):
    model, out = mapped
    cells = read(out / "q1.zarr")
    shutil.rmtree(out / "q1.zarr")
    with anndata.settings.override(zarr_write_format=3):
        cells.write_zarr(out / "q1.zarr", convert_strings_to_categoricals=False)
    assert sx.transfer(model, out, label_key="kind")["n_cells"] == 130
    again = read(out / "q1.zarr")
    assert list(again.obs.columns) == [*cells.obs.columns, "kind_pred", "kind_uncertainty"]
    pd.testing.assert_frame_equal(again.obs[list(cells.obs.columns)], cells.obs)


def test_levels_thresholds_and_novelty_are_written_and_reported(mapped, capsys):
    from streamx.cli.main import main

    model, out = mapped
    kinds = read(model / "reference.zarr").obs["kind"].astype(object)
    lineage = kinds.map({"B": "lymphoid", "NK": "lymphoid", "T": "lymphoid", "mono": "myeloid"})
    amend(model / "reference.zarr", {"lineage": pd.Series(pd.Categorical(lineage.to_numpy()))})
    sx.transfer(model, out, label_key="kind")
    once = contents(out)
    found = sx.transfer(
        model, out, label_key="kind", within=["lineage"], keep=0.9, novelty=True, truth_key="truth"
    )
    names = ["lineage_pred", "lineage_uncertainty", "kind_pred", "kind_uncertainty", "kind_novelty"]
    for name in ("q1", "q2"):
        obs = read(out / f"{name}.zarr").obs
        assert list(obs.columns) == ["truth", "n_genes", *names]
        known = obs["kind_pred"] != "Unknown"
        within = obs["kind_pred"][known].astype(str).eq("mono").map({True: "myeloid", False: "lymphoid"})
        assert (obs["lineage_pred"][known].astype(str) == within).all()
        assert obs["kind_novelty"].between(0, 1).all()
        assert obs["kind_novelty"].iloc[3] == 1  # no latent
        limit = found["thresholds"]["kind"]["value"]
        assert (obs["kind_uncertainty"][known] <= limit).all()
    assert set(found["thresholds"]) == {"lineage", "kind"}
    assert found["thresholds"]["kind"]["kept"] >= 0.9
    assert found["n_novel"] == sum(query["n_novel"] for query in found["queries"]) >= 2
    assert set(found["per_label"]) == {"B", "NK", "T", "mono"}
    recall = [label["recall"] for label in found["per_label"].values()]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recall))
    words = ["--label-key", "kind", "--within", "lineage", "--keep", "0.9", "--novelty"]
    assert main(["transfer", str(model), str(out), *words, "--truth-key", "truth", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: said[name] for name in found} == found
    sx.transfer(model, out, label_key="lineage")
    sx.transfer(model, out, label_key="kind")
    assert "kind_novelty" not in read(out / "q1.zarr").obs
    for name in ("lineage_pred", "lineage_uncertainty"):
        for query in ("q1", "q2"):
            amend(out / f"{query}.zarr", {name: None})
    assert {key: contents(out)[key] for key in once if "/c/" in key} == {
        key: once[key] for key in once if "/c/" in key
    }
    with pytest.raises(UsageError, match="threshold and keep given"):
        sx.transfer(model, out, label_key="kind", threshold=0.5, keep=0.9)
    with pytest.raises(BadValuesError, match="lies within both"):
        sx.transfer(model, out, label_key="kind", within="study")


def test_the_index_of_a_large_reference_is_kept(mapped, monkeypatch, caplog):
    from streamx.neighbors import ivf

    model, out = mapped
    once = sx.transfer(model, out, label_key="kind", index="ivf")
    assert once["index"] == "ivf"
    assert once["knn_recall"] >= 0.95
    (folder,) = (model / "neighbors").iterdir()
    kept, predicted = contents(folder), contents(out)
    with monkeypatch.context() as patch:
        patch.delattr(ivf, "build_lists")
        assert sx.transfer(model, out, label_key="kind", index="ivf") == once
    sx.transfer(model, out, label_key="study", index="ivf")  # of more cells
    assert len(list((model / "neighbors").iterdir())) == 2
    points = next(folder.glob("lists-*-flat-*.npy"))
    points.write_bytes(points.read_bytes()[:-1] + b"x")
    sx.transfer(model, out, label_key="kind", index="ivf")
    assert "made again" in caplog.text
    assert contents(folder) == kept
    again = contents(out)
    assert all(again[key] == predicted[key] for key in predicted if "/obs/kind" in key)


def test_an_index_that_cannot_be_kept_is_made(mapped):
    model, out = mapped
    (model / "neighbors").write_text("in the way")
    assert sx.transfer(model, out, label_key="kind", index="ivf")["index"] == "ivf"


def test_one_query_and_open_cells(mapped):
    from streamx.mapping import read_queries, read_reference

    model, out = mapped
    whole = sx.transfer(model, out, label_key="kind")
    reference, second = read_reference(model), read_queries(out)[1]
    alone = sx.transfer(reference, second, label_key="kind")
    assert alone["queries"] == whole["queries"][1:]
    assert "latent_nk" not in vars(second)  # streamed


def views(path, kinds):
    """The columns as readers with and without consolidated metadata see them."""
    for consolidated in kinds:
        group = zarr.open_group(path, mode="r", use_consolidated=consolidated)
        columns = list(group["obs"].attrs["column-order"])
        frame = anndata.io.read_elem(group["obs"])
        obsm = {key: np.asarray(group["obsm"][key][:]) for key in group["obsm"]}
        yield columns, frame, obsm


class Killed(BaseException):
    pass


def amend_until(monkeypatch, path, stop, **what):
    """Run `amend`, dying at its `stop`-th write or delete; True if it lived."""
    count = 0

    def dying(verb):
        def operation(self, *args):
            nonlocal count
            if count == stop:
                raise Killed
            count += 1
            return verb(self, *args)

        return operation

    with monkeypatch.context() as patch:
        for name in ("write", "delete", "delete_tree"):
            patch.setattr(Folder, name, dying(getattr(Folder, name)))
        try:
            amend(path, **what)
        except Killed:
            return False
    return True


@pytest.mark.filterwarnings("ignore:Object at")  # chunks of what was never finished
@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize("again", [False, True])
def test_death_at_every_write_leaves_a_right_file(mapped, monkeypatch, again, consolidated):
    path = mapped[1] / "q1.zarr"
    kinds = (True, False) if consolidated else (False,)
    if not consolidated:
        root = json.loads((path / "zarr.json").read_text())
        del root["consolidated_metadata"]
        (path / "zarr.json").write_text(json.dumps(root))

    def what(seed):
        rng = np.random.default_rng(seed)
        names = ["x", "y"] if seed else ["only"]
        return {
            "obs": {
                "kind_pred": pd.Series(pd.Categorical(rng.choice(names, 80))),
                "kind_uncertainty": pd.Series(rng.random(80).astype(np.float32) + 1),
            },
            "obsm": {"kind_probabilities": rng.random((80, 2)).astype(np.float32) + 1},
            "uns": {"kind_labels": names},
        }

    old, new = what(0), what(1)
    if again:
        amend(path, **old)
    stop, lived = 0, False
    while not lived:
        lived = amend_until(monkeypatch, path, stop, **new)
        for columns, frame, obsm in views(path, kinds):
            assert columns[:2] == ["truth", "n_genes"]
            if len(columns) > 2:
                matches = [
                    (frame["kind_pred"].astype(str).to_numpy() == w["obs"]["kind_pred"].astype(str)).all()
                    and (frame["kind_uncertainty"].to_numpy() == w["obs"]["kind_uncertainty"]).all()
                    for w in (old, new)
                ]
                assert matches.count(True) == 1
            if "kind_probabilities" in obsm:
                assert any(
                    np.array_equal(obsm["kind_probabilities"], w["obsm"]["kind_probabilities"])
                    for w in (old, new)
                )
        stop += 1
        assert stop < 200
    assert stop > 10
    for columns, frame, _ in views(path, kinds):
        assert columns[2:] == ["kind_pred", "kind_uncertainty"]
        assert (frame["kind_uncertainty"].to_numpy() == new["obs"]["kind_uncertainty"]).all()
    assert not [key for key in Folder(path).list() if key.endswith(".tmp")]


def test_metrics_of_reference_and_queries(mapped):
    model, out = mapped
    reference, queries = read(model / "reference.zarr"), [read(out / f"{name}.zarr") for name in ("q1", "q2")]
    alone = sx.metrics(model, label_key="kind", resolution="1")
    expected = score_latent(
        reference.obsm["X_scalex"], reference.obs["study"], reference.obs["kind"], resolution=1.0
    )
    assert {name: alone[name] for name in expected.measures} == expected.values
    together = sx.metrics(model, out, label_key="kind", resolution="1")
    expected = score_latent(
        np.concatenate([cells.obsm["X_scalex"] for cells in (reference, *queries)]),
        [*reference.obs["study"], *["q1"] * 80, *["q2"] * 50],
        [*reference.obs["kind"], *[""] * 130],
        resolution=1.0,
    )
    assert together["ilisi"] == expected["ilisi"]
    assert together["clisi"] == expected["clisi"]
    assert together["n_without_latent"] == 2
    json.dumps(together, allow_nan=False)
    with pytest.raises(UsageError, match="transfer MODEL OUT first"):
        sx.metrics(model, out, label_key="kind", truth_key="truth", resolution="1")
    report = sx.transfer(model, out, label_key="kind", truth_key="truth")
    scored = sx.metrics(model, out, label_key="kind", truth_key="truth", resolution="1")
    assert scored["accuracy"] == report["accuracy"]
    assert [query["accuracy"] for query in scored["queries"]] == [q["accuracy"] for q in report["queries"]]
    assert scored["clisi"] != together["clisi"]  # true labels of the queries count


def test_a_query_batch_never_aliases_a_reference_batch(mapped):
    from streamx.mapping import batches_of, read_queries, read_reference

    model, out = mapped
    amend(out / "q1.zarr", {"study": pd.Series(pd.Categorical(["s1"] * 40 + ["mine"] * 40))})
    parts = batches_of(read_reference(model), read_queries(out))
    assert [sorted(set(part)) for part in parts] == [["s1", "s2"], ["mine", "q1: s1"], ["q2"]]


def test_settings_that_cannot_be(mapped):
    model, out = mapped
    with pytest.raises(UsageError, match="one of study, kind"):
        sx.transfer(model, out, label_key="type")
    with pytest.raises(UsageError, match="no query has the obs column 'type'"):
        sx.transfer(model, out, label_key="kind", truth_key="type")
    with pytest.raises(UsageError, match="unknown setting"):
        sx.transfer(model, out, label="kind")
    with pytest.raises(UsageError, match="a number, or best"):
        sx.metrics(model, resolution="high")
    with pytest.raises(UsageError, match="one of study, kind"):
        sx.metrics(model, batch_key="nothing")
    with pytest.raises(UsageError, match="name OUT"):
        sx.metrics(model, truth_key="truth")
    for bad in ({"max_cells": 0}, {"seed": -1}, {"threads": -1}):
        with pytest.raises(UsageError, match="at least"):
            sx.metrics(model, **bad)
    with pytest.raises(UsageError, match="a finite number"):
        sx.transfer(model, out, label_key="kind", threshold=float("nan"))
    with pytest.raises(EmptyError, match="no reference cell has a label"):
        sx.transfer(model, out, label_key="study", unlabeled=("s1", "s2"))


@pytest.mark.parametrize("damaged", ["obsm/X_scalex", "obs/kind"])
def test_damaged_bytes_are_named_as_that(mapped, damaged):
    model, out = mapped
    inside = (model / "reference.zarr" / damaged).rglob("*")
    chunk = max((p for p in inside if p.is_file() and p.name != "zarr.json"), key=str)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{damaged}: stored bytes are damaged"):
        sx.transfer(model, out, label_key="kind")


def test_folders_that_cannot_be(mapped, tmp_path):
    model, out = mapped
    with pytest.raises(UsageError, match="no such model"):
        sx.transfer(tmp_path / "nothing", out)
    with pytest.raises(UsageError, match="no such folder"):
        sx.transfer(model, tmp_path / "nothing", label_key="kind")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyError, match="no mapped query"):
        sx.transfer(model, tmp_path / "empty", label_key="kind")
    with pytest.raises(BadFileError, match="is no model"):
        sx.transfer(tmp_path / "empty", out, label_key="kind")
    before = sorted(path.name for path in (model / "reference.zarr" / "obs").iterdir())
    with pytest.raises(UsageError, match="is a model, and no folder of mapped queries"):
        sx.transfer(model, model, label_key="kind")
    assert sorted(path.name for path in (model / "reference.zarr" / "obs").iterdir()) == before
    with pytest.raises(UsageError, match="name the folder that it lies in"):
        sx.transfer(model, out / "q1.zarr", label_key="kind")
    (out / "q0.zarr").mkdir()
    with pytest.raises(BadFileError, match=r"q0\.zarr"):
        sx.transfer(model, out, label_key="kind")
    (out / "q0.zarr").rmdir()
    write_latents(
        out / "q3.zarr",
        pd.DataFrame(index=["a"]),
        {"X_scalex": np.zeros((1, 6), dtype=np.float32)},
        {"streamx": {"model": "other"}},
    )
    with pytest.raises(UsageError, match="mapped with another model"):
        sx.transfer(model, out, label_key="kind")
    (model / "model.json").unlink()
    with pytest.raises(IncompleteError, match="has not finished"):
        sx.metrics(model)
