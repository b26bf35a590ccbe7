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
from mapping_jobs import digests, make_queries, make_reference

import streamx as sx
from streamx.cluster import client_of
from streamx.errors import StorageError, UsageError
from streamx.jobs.claims import held
from streamx.store.folder import Folder

distributed = pytest.importorskip("distributed")

SETTINGS: dict[str, Any] = {
    "label_key": "type",
    "min_query_cells": 20,
    "max_cells": 200,
    "resolution": "1",
    "progress": False,
}


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
