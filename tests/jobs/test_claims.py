"""A query has one holder at a time, and none for long after its death."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from streamx.jobs import claims
from streamx.jobs.claims import Seen, alive, claimed, held, holds, sweep
from streamx.jobs.records import read_record, write_record
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


def test_the_clock_is_set_meanwhile(out: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall clocks, and with them when a process seems to have begun, jump; a living holder stays one."""
    with claimed(out, "q", {}) as ours:
        assert ours
        for name in ("boot_time", "Process.create_time"):
            owner, _, attribute = f"psutil.{name}".rpartition(".")
            true = getattr(psutil.Process if "Process" in owner else psutil, attribute)
            monkeypatch.setattr(f"psutil.{name}", lambda *of, true=true: true(*of) + 3600)
        assert alive(out, ours)


def test_a_process_of_another_container_is_no_process_of_ours(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same host name; its number may be that of one here, or of none."""
    monkeypatch.setattr(claims, "_machine", lambda: "this host, elsewhere")
    with claimed(out, "q", {}) as ours:
        assert ours
        monkeypatch.undo()
        assert alive(out, ours, {})
        holder = json.loads(out.read(ours))
        out.write(ours, json.dumps(holder | {"pid": 2**22 + 1}).encode())
        assert alive(out, ours, {})
        sweep(out)
        assert list(held(out)) == ["q"]


def test_who_was_taken_for_dead_leaves_the_other_alone(out: Folder) -> None:
    seen = Seen()
    with claimed(out, "q", seen) as first:
        assert first
        assert holds(out, first)
        out.write(first, json.dumps(json.loads(out.read(first)) | {"begun": -1.0}).encode())  # as if dead
        with claimed(out, "q", seen) as second:
            assert second
            assert not holds(out, first)
            assert holds(out, second)
            out.delete(first)  # as the first one does in the end
            assert holds(out, second)
    assert held(out) == {}


def test_a_claim_below_another_is_none(out: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our look and our claim, a dead one was swept and another process has taken the query."""
    out.create("claims/q.000001.json", b"{}")
    monkeypatch.setattr(claims, "alive", lambda *_: False)
    looks, look = [{}], claims.held
    monkeypatch.setattr(claims, "held", lambda out: looks.pop() if looks else look(out))
    with claimed(out, "q", {}) as ours:
        assert ours is None
    assert look(out) == {"q": ["claims/q.000001.json"]}


def test_a_failure_never_replaces_what_is_done(out: Folder) -> None:
    done, failed = ({"name": "q", "error": error} for error in (None, {"what": "late"}))
    write_record(out, failed)
    assert read_record(out, "q") == failed
    write_record(out, done)
    write_record(out, failed)
    assert read_record(out, "q") == done


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
