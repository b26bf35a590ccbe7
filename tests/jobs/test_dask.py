"""The workers of a dask cluster map, convert and preprocess; what comes out is what comes out without."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mapping_jobs import SETTINGS, digests, make_queries, make_reference

import streamx as sx
from streamx.cluster import active_client, client_of, run_spread
from streamx.demo import DATA
from streamx.errors import BadValuesError, StorageError, StreamxWarning, UsageError
from streamx.jobs.claims import held
from streamx.preprocess import view
from streamx.store.folder import Folder

distributed = pytest.importorskip("distributed")


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamx.cluster.CONNECT_SECONDS", 0.3)
    with client_of(None) as client:
        assert client is None
    for dask in ("local:0", "local:x", "nowhere"):
        with pytest.raises(UsageError), client_of(dask):
            pass
    with pytest.raises(StorageError, match="no dask scheduler"), client_of("tcp://127.0.0.1:9"):
        pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_reference(folder)
    make_queries(folder / "queries", 3)
    return folder


@pytest.mark.timeout(900)  # a cluster is several processes that import everything
def test_a_job_whose_worker_is_killed(home: Path) -> None:
    files = sorted((home / "queries").iterdir())
    sx.map(home / "model", files, home / "whole", **SETTINGS)
    out, killed = home / "out", list[int]()

    def kill_the_first_worker() -> None:
        place = Folder(out)
        while not killed:
            for keys in held(place).values():
                killed.append(json.loads(place.read(keys[-1]))["pid"])
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=kill_the_first_worker)
    watcher.start()
    found = sx.map(home / "model", files, out, dask="local:2", **SETTINGS)
    watcher.join()
    assert found["done"] == 3
    assert killed != [os.getpid()]
    assert digests(out) == digests(home / "whole")


def kill_a_worker_once(journal: Path, client: Any) -> threading.Thread:
    """After the first step that is recorded there."""
    pids = list(client.run(os.getpid).values())

    def watch() -> None:
        while not any(journal.glob("records/*.json")):
            time.sleep(0.001)
        os.kill(pids[0], signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    return watcher


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.timeout(900)
def test_convert_and_preprocess_while_workers_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamx.store.slabs.MAX_SLAB_ROWS", 64)
    monkeypatch.setattr(view, "MAX_SLAB_ROWS", 64)
    files = sorted(DATA.glob("*.h5ad"))
    sx.convert(files, tmp_path / "alone" / "store")
    sx.preprocess(tmp_path / "alone" / "store", tmp_path / "alone" / "view", n_top_features=200)
    for name in ("store", "view"):
        with client_of("local:2") as client:
            watcher = kill_a_worker_once(tmp_path / "spread" / f"{name}.journal", client)
            if name == "store":
                sx.convert(files, tmp_path / "spread" / "store")
            else:
                sx.preprocess(tmp_path / "spread" / "store", tmp_path / "spread" / "view", n_top_features=200)
            watcher.join()
    assert tree(tmp_path / "spread") == tree(tmp_path / "alone")


def test_a_broken_file_is_named_and_left_out(tmp_path: Path) -> None:
    """What is wrong with an input travels back from the worker that read it."""
    import h5py

    files = make_queries(tmp_path, 2)
    with h5py.File(files[1], "r+") as file:
        file["X/data"][100] = -1
    with client_of("local:1"):
        with pytest.raises(BadValuesError, match="negative"):
            sx.convert(files, tmp_path / "store")
        with pytest.warns(StreamxWarning, match="left out"):
            store = sx.convert(files, tmp_path / "store", on_error="skip")
    assert store.n_obs == 60


def test_tasks_that_stay_and_tasks_that_go() -> None:
    assert run_spread([os.getpid] * 2, [True, True], 1, "here") == [os.getpid()] * 2
    with client_of("local:1") as client:
        assert active_client() is client
        (worker,) = client.run(os.getpid).values()
        assert run_spread([os.getpid] * 3, [True, False, True], 1, "there") == [worker, os.getpid(), worker]
        assert client.submit(active_client).result() is None  # a task waits for no other
