"""A mapping job whose reference, queries and output lie in a bucket gives what it gives in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mapping_jobs import SETTINGS, make_queries, make_reference

import streamx as sx
from streamx.errors import StorageError
from streamx.jobs.claims import claimed, held
from streamx.store.bucket import Bucket
from streamx.store.location import Location, open_location


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_reference(folder)
    make_queries(folder / "queries", 2)
    return folder


def contents(out: Location) -> dict[str, bytes]:
    """What follows from inputs and settings; the records but for where the files were."""
    found = {key: out.read(key) for key in out.list() if not key.startswith(("timings/", "map.json"))}
    for key in found:
        if key.startswith("records/"):
            record = json.loads(found[key])
            record["source"] = [Path(source).name for source in record["source"]]
            found[key] = json.dumps(record).encode()
    return found


def upload(home: Path, url: str) -> list[str]:
    target = open_location(url)
    for path in [*(home / "model").rglob("*"), *(home / "queries").iterdir()]:
        if path.is_file():
            target.write(path.relative_to(home).as_posix(), path.read_bytes())
    return [f"{url}/queries/{path.name}" for path in sorted((home / "queries").iterdir())]


def test_in_a_bucket(home: Path, url: str, tmp_path: Path) -> None:
    upload(home, url)
    sx.map(home / "model", sorted((home / "queries").iterdir()), tmp_path / "out", **SETTINGS)
    found = sx.map(f"{url}/model", f"{url}/queries/*.h5ad", f"{url}/out", **SETTINGS)
    assert found["done"] == 2
    there, here = (contents(open_location(place)) for place in (f"{url}/out", tmp_path / "out"))
    assert sorted(there) == sorted(here)
    assert there == here
    assert sx.status(f"{url}/out") == found
    assert not list((tmp_path / "scratch").rglob("*"))


def test_stopped_in_a_bucket(home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = upload(home, url)
    sx.map(f"{url}/model", files, f"{url}/whole", **SETTINGS)
    write = Bucket.write
    for fails_at in (2, 30, 55):
        out, done = f"{url}/out-{fails_at}", [0]

        def dies(self: Bucket, key: str, *data: Any, done: Any = done, at: int = fails_at) -> None:
            done[0] += 1
            if done[0] == at:
                raise KeyboardInterrupt
            write(self, key, *data)

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "write", dies)
            with pytest.raises(KeyboardInterrupt):
                sx.map(f"{url}/model", files, out, **SETTINGS)
        sx.map(f"{url}/model", files, out, **SETTINGS)
        assert contents(open_location(out)) == contents(open_location(f"{url}/whole"))


@pytest.mark.timeout(900)
def test_killed_in_a_bucket(home: Path, url: str) -> None:
    """A worker, and then the coordinator; the job is taken up by another call."""
    files = upload(home, url)
    sx.map(f"{url}/model", files, f"{url}/whole", **SETTINGS)
    place = open_location(f"{url}/out")
    words = ["map", f"{url}/model", *files, "-o", f"{url}/out", "--label-key", "type", "--truth-key", "type"]
    words += ["--min-query-cells", "20", "--max-cells", "200", "--resolution", "1", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "streamx", *words], stdout=subprocess.DEVNULL)
    while not (claims := held(place)):
        assert process.poll() is None
        time.sleep(0.05)
    worker = json.loads(place.read(next(iter(claims.values()))[-1]))["pid"]
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    while not place.list("records"):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert sx.map(f"{url}/model", files, f"{url}/out", **SETTINGS)["done"] == 2
    assert contents(place) == contents(open_location(f"{url}/whole"))


def test_claims_in_a_bucket(bucket: Any) -> None:
    out = bucket("out")
    assert out.create("a", b"mine")
    assert not out.create("a", b"yours")
    assert out.read("a") == b"mine"
    with claimed(out, "q", {}) as first, claimed(out, "q", {}) as second:
        assert first is not None
        assert second is None
    assert held(out) == {}


def test_a_bucket_that_refuses_ends_the_job(home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = upload(home, url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError):
        sx.map(home / "model", files, open_location(f"{url}/out", retry_seconds=0.2), **SETTINGS)
