"""A query has one holder at a time, and none for long after its death."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from streamx.jobs import claims
from streamx.jobs.claims import Seen, alive, claimed, held, sweep
from streamx.store.folder import Folder


@pytest.fixture
def out(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


def test_one_at_a_time(out: Folder) -> None:
    with claimed(out, "q", {}) as first:
        assert first
        with claimed(out, "q", {}) as second, claimed(out, "q.1", {}) as other:
            assert not second
            assert other
        assert list(held(out)) == ["q"]
    assert held(out) == {}


def test_of_many_one_wins(out: Folder) -> None:
    ready, won = threading.Barrier(8), []

    def attempt(number: int) -> None:
        ready.wait()
        if out.create("claims/q.000000.json", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in won] == [out.read("claims/q.000000.json")]
    assert out.list() == ["claims/q.000000.json"]


def test_a_process_that_was_killed_holds_nothing(out: Folder, tmp_path: Path) -> None:
    code = (
        "import os\nfrom pathlib import Path\nfrom streamx.jobs.claims import claimed\n"
        "from streamx.store.folder import Folder\n"
        f"with claimed(Folder(Path({str(tmp_path / 'out')!r})), 'q', {{}}) as ours:\n"
        "    assert ours\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert held(out) == {"q": ["claims/q.000000.json"]}
    with claimed(out, "q", {}) as ours:
        assert ours
        assert held(out)["q"] == ["claims/q.000000.json", "claims/q.000001.json"]
        sweep(out)  # the second one lives
        assert len(held(out)["q"]) == 2
    assert held(out) == {}


def test_another_machine_is_watched(out: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process can't be asked: the claim counts as long as it is written anew."""
    now, seen = [1000.0], Seen()
    monkeypatch.setattr("streamx.jobs.claims.time.monotonic", lambda: now[0])
    holder = {"host": "elsewhere", "pid": 1, "begun": 0.0, "time": 0.0}
    key = "claims/q.000000.json"
    for beat in range(3):
        out.write(key, json.dumps(holder | {"time": beat}).encode())
        assert alive(out, key, seen)
        now[0] += claims.LEASE - 1
        assert alive(out, key, seen)
    now[0] += 1
    assert not alive(out, key, seen)
    assert alive(out, key)  # who has not watched can't tell
    with claimed(out, "q", seen) as ours:
        assert ours


def test_the_beat(out: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with claimed(out, "q", {}):
        first = out.read("claims/q.000000.json")
        for _ in range(500):
            if out.read("claims/q.000000.json") != first:
                break
            threading.Event().wait(0.01)
        assert out.read("claims/q.000000.json") != first
