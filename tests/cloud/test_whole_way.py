"""From files to labels with everything in a bucket: what comes out is what comes out of folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from faults import Proxy
from views import make_counts

import streamx as sx
from streamx.cli.main import invoke, main
from streamx.errors import (
    BadFileError,
    IncompleteError,
    IntegrityError,
    SettingsChangedError,
    StorageError,
    StreamxWarning,
)
from streamx.mapping import read_queries
from streamx.store.bucket import Bucket
from streamx.store.location import Location, open_location
from streamx.train.model import load_model

Make = Callable[..., Bucket]
RNA: dict[str, Any] = {"min_features": 3, "min_cells": 1, "n_top_features": 20, "threads": 1}
SMALL: dict[str, Any] = {"max_iteration": 24, "n_hidden": 16, "threads": 1, "progress": False}


def cells(sizes: list[int], seed: int, prefix: str) -> ad.AnnData:
    x_ng, batch_n, type_n = make_counts(sizes, seed=seed)
    obs = pd.DataFrame(
        {"batch": [f"{prefix}{b}" for b in batch_n], "type": [f"type{t}" for t in type_n]},
        index=[f"{prefix}-{i}" for i in range(len(batch_n))],
    )
    return ad.AnnData(x_ng, obs=obs, var=pd.DataFrame(index=[f"GENE{g}" for g in range(x_ng.shape[1])]))


@pytest.fixture(scope="module")
def reference() -> ad.AnnData:
    return cells([180, 120], 0, "r")


@pytest.fixture(scope="module")
def query() -> ad.AnnData:
    return cells([90], 5, "q")


@pytest.fixture
def places(bucket: Make, tmp_path: Path) -> tuple[Location, Location]:
    return open_location(tmp_path / "here"), bucket("there")


def minibatches(view: Location, **options: Any) -> list[tuple[np.ndarray, ...]]:
    loader = sx.Loader(view, 64, seed=3, block_rows=16, blocks_per_fetch=4, **options)
    return [(mb.x_ng, mb.batch_n, mb.row_n) for mb in loader.at(2)]


def test_the_whole_way(
    places: tuple[Location, Location], reference: ad.AnnData, query: ad.AnnData, tmp_path: Path
) -> None:
    results: list[dict[str, Any]] = []
    for home in places:
        store = sx.convert({"ref": reference}, home.below("store"), batch_key="batch", threads=1)
        view = sx.preprocess(store, home.below("view"), **RNA)
        trained = sx.train(view, home.below("model"), **SMALL)
        again = sx.train(view, home.below("model"), **SMALL)
        assert (again.epochs, again.loss) == (trained.epochs, trained.loss)
        with pytest.raises(SettingsChangedError, match="lr"):
            sx.train(view, home.below("model"), **SMALL, lr=1.0)
        model = load_model(home.below("model"))
        out = home.below("mapped")
        reports = sx.project(model, {"q": query}, out, progress=False, min_query_cells=20)
        skipped = sx.project(model, {"q": query}, out, progress=False, min_query_cells=20)
        assert [r["status"] for r in (*reports, *skipped)] == ["done", "skipped"]
        labelled = sx.transfer(home.below("model"), out, label_key="type", truth_key="type", threads=1)
        scores = sx.metrics(home.below("model"), out, label_key="type", threads=1)
        sx.annotate(out, pd.DataFrame({"donor": "d"}, index=query.obs_names))
        mapped = read_queries(out)[0]
        results.append(
            {
                "selected": list(view.var_names),
                "maxima": view.scale_bg.tolist(),
                "weights": model.id,
                "history": home.read("model/history.csv"),
                "latents": mapped.latent_nk.tobytes(),
                "predicted": mapped.column("type_pred").astype(str).tolist(),
                "donor": mapped.column("donor").astype(str).tolist(),
                "accuracy": labelled["accuracy"],
                "mixing": scores["batch_entropy_mixing"],
                "minibatches": [[a.tobytes() for a in mb] for mb in minibatches(home.below("view"))],
            }
        )
    assert results[0] == results[1]
    assert all(sx.verify(home.below(name))["ok"] for home in places for name in ("store", "view"))
    assert not list((tmp_path / "scratch").rglob("*"))  # no journal, no scratch file is left


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_same_minibatches(places: tuple[Location, Location], reference: ad.AnnData, prefetch: int) -> None:
    """R17: local or remote, for any prefetch depth and number of threads."""
    for home in places:
        sx.convert({"ref": reference}, home.below("store"), batch_key="batch", threads=1)
    here, there = (
        minibatches(home.below("store"), prefetch=p, threads=t)
        for home, p, t in zip(places, (2, prefetch), (1, max(1, prefetch)), strict=True)
    )
    assert len(here) == len(there) == 5
    for a, b in zip(here, there, strict=True):
        for mine, theirs in zip(a, b, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_an_update_follows_its_store(places: tuple[Location, Location], reference: ad.AnnData) -> None:
    """The view knows its store relative to itself, in a bucket too; or in full, if it is elsewhere."""
    here, there = places
    more = cells([60], 8, "n")
    found = []
    for store, view in ((here, here), (there, there), (there, here)):
        store, view = store.below(f"store-{len(found)}"), view.below(f"view-{len(found)}")
        sx.convert({"ref": reference}, store, batch_key="batch", threads=1)
        sx.preprocess(store, view, **RNA)
        sx.convert({"more": more}, store, append=True, batch_key="batch", threads=1)
        about = invoke(["info", str(view.root)])
        assert (about["store_generation"], about["store_generation_now"]) == (1, 2)
        with pytest.warns(StreamxWarning, match="a fresh selection would replace"):
            updated = invoke(["preprocess", "--update", str(view.root), "--threads", "1"])
        assert updated["n_cells"] == 360
        found.append(sx.open(view).read(0, 360).toarray())
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert sx.open(there.below("view-1")).view["store"] == "../store-1"
    assert sx.open(here.below("view-2")).view["store"] == str(there.below("store-2"))


def test_on_the_command_line(
    url: str, reference: ad.AnnData, query: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """URLs where folders may stand; the environment says how to reach the service."""
    reference.write_h5ad(tmp_path / "ref.h5ad")
    inputs = open_location(f"{url}/inputs")
    query.write_h5ad(tmp_path / "q.h5ad")
    inputs.write("q.h5ad", (tmp_path / "q.h5ad").read_bytes())
    (tmp_path / "labels.csv").write_text("cell,tissue\nr-0,lung\n")
    for line in (
        f"convert {tmp_path}/ref.h5ad -o {url}/store --batch-key batch --threads 1",
        f"annotate {url}/store {tmp_path}/labels.csv",
        f"preprocess {url}/store -o {url}/view --min-features 3 --n-top-features 20 --threads 1",
        f"train {url}/view -o {url}/model --max-iteration 8 --n-hidden 8 --threads 1",
        f"project {url}/model {url}/inputs/q.h5ad -o {url}/mapped --min-query-cells 20",
        f"transfer {url}/model {url}/mapped --label-key type --threads 1",
        f"verify {url}/store",
        f"info {url}/model",
        f"info {url}/store",
    ):
        assert main([*line.split(" "), "--json"]) == 0, line
        result = json.loads(capsys.readouterr().out)
    assert result["n_cells"] == 300
    assert "tissue" in result["obs_columns"]
    assert main(["info", f"{url}/nothing", "--json"]) == BadFileError.exit_code
    assert json.loads(capsys.readouterr().out)["where"] == f"{url}/nothing"


def test_interrupted_training_goes_on(
    places: tuple[Location, Location], reference: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = places[1]
    store = sx.convert({"ref": reference}, there.below("store"), batch_key="batch", threads=1)
    view = sx.preprocess(store, there.below("view"), **RNA)
    whole = load_model(sx.train(view, there.below("whole"), **SMALL).path)
    for fails_at in (1, 3, 20, 40):
        model, done, write = there.below(f"model-{fails_at}"), [0], Bucket.write

        def dies(
            self: Bucket, key: str, *data: Any, done: Any = done, at: int = fails_at, write: Any = write
        ) -> None:
            done[0] += 1
            if done[0] == at:
                raise KeyboardInterrupt
            write(self, key, *data)

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "write", dies)
            with pytest.raises(KeyboardInterrupt):
                sx.train(view, model, **SMALL)
        with pytest.raises(IncompleteError):
            load_model(model)
        sx.train(view, model, **SMALL)
        assert load_model(model).id == whole.id
        assert not model.journal.exists()


def test_a_query_is_whole_or_not_there(
    places: tuple[Location, Location],
    reference: ad.AnnData,
    query: ad.AnnData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = places[1]
    store = sx.convert({"ref": reference}, there.below("store"), batch_key="batch", threads=1)
    sx.train(sx.preprocess(store, there.below("view"), **RNA), there.below("model"), **SMALL)
    write, out = Bucket.write, there.below("mapped")
    for k in (0, 1, 7, 12):
        left = [k]

        def dies(self: Bucket, key: str, *data: Any, left: Any = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            write(self, key, *data)

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "write", dies)
            with pytest.raises(KeyboardInterrupt):
                sx.project(there.below("model"), {"q": query}, out, progress=False, min_query_cells=20)
        assert not out.exists("q.zarr/zarr.json")
    (report,) = sx.project(there.below("model"), {"q": query}, out, progress=False, min_query_cells=20)
    assert report["status"] == "done"
    assert np.isfinite(read_queries(out)[0].latent_nk).any()


def test_an_epoch_with_faults(bucket: Make, proxy: Proxy, reference: ad.AnnData) -> None:
    """R14 while training reads: the same minibatches; R15: a refusal ends the epoch."""
    place = bucket(endpoint=proxy.url, retry_seconds=20)
    sx.convert({"ref": reference}, place, batch_key="batch", threads=1)
    proxy.reset()
    clean = minibatches(place, prefetch=2, threads=2)
    without = len(proxy.seen)
    proxy.reset(shares={"503": 0.05, "reset": 0.02, "short": 0.01}, seed=2)
    for _ in range(5):
        for a, b in zip(minibatches(place, prefetch=2, threads=2), clean, strict=True):
            np.testing.assert_array_equal(a[0], b[0])
    assert 5 * without < len(proxy.seen) <= 10 * without
    proxy.reset(shares={}, choose=lambda method, path: "403" if "/X/data/c/" in path else "")
    with pytest.raises(StorageError, match="denied"):
        minibatches(place)
    proxy.reset(choose=lambda method, path: "404" if "/X/data/c/" in path else "")
    with pytest.raises(IntegrityError, match="missing"):
        minibatches(place)
