"""Mapping jobs: what they write, what they skip, what they refuse, and that deaths change nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import psutil
import pytest
from mapping_jobs import SETTINGS, digests, make_queries, make_reference

import streamx as sx
from streamx.cli import map as map_verb
from streamx.cli.main import main
from streamx.errors import BadFileError, PartialError, SettingsChangedError, StorageError, UsageError
from streamx.jobs import run, spread
from streamx.jobs.claims import claimed, held
from streamx.store.folder import Folder

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def counts_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference(tmp_path_factory.mktemp("counts"), "scvi")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_queries(tmp_path_factory.mktemp("queries"), 4)


@pytest.fixture(scope="module")
def whole(reference: Path, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, uninterrupted; its neighbours in the folder are as in the tests below."""
    out = tmp_path_factory.mktemp("whole") / "out"
    place_beside(out, reference)
    sx.map(out.parent / "model", files, out, **SETTINGS)
    return out


def place_beside(out: Path, reference: Path) -> Path:
    """The reference beside the output, as the plan names one by its way to the other."""
    (out.parent / "model").symlink_to(reference)
    return out.parent / "model"


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "records" / f"{name}.json").read_text())


def test_a_query_is_what_the_single_verbs_make(
    reference: Path, files: list[str], whole: Path, tmp_path: Path
) -> None:
    sx.project(reference, files[1], tmp_path / "one", min_query_cells=20, threads=1, **QUIET)
    labelled = sx.transfer(reference, tmp_path / "one", label_key="type", truth_key="type", threads=1)
    scores = sx.metrics(
        reference,
        tmp_path / "one",
        label_key="type",
        truth_key="type",
        max_cells=200,
        resolution="1",
        threads=1,
    )
    mine, alone = (ad.read_zarr(folder / "q01.zarr") for folder in (whole, tmp_path / "one"))
    np.testing.assert_array_equal(mine.obsm["X_scalex"], alone.obsm["X_scalex"])
    assert mine.obs.equals(alone.obs)
    found = record(whole, "q01")
    assert found["metrics"] == json.loads(json.dumps(scores))
    assert found["transfer"]["accuracy"] == labelled["accuracy"]
    assert found["labels"] == mine.obs["type_pred"].value_counts().loc[lambda n: n > 0].sort_index().to_dict()
    assert (found["batches"], found["n_cells"], found["error"]) == ({"q01": 60}, 60, None)
    assert found["source"] == [files[1]]
    timings = json.loads((whole / "timings" / "q01.json").read_text())
    assert timings["seconds"] > 0
    assert timings["worker"] == os.getpid()


def test_status_and_a_second_call(
    whole: Path, files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(whole)
    monkeypatch.setattr(run, "_mapped", lambda *_: pytest.fail("a finished query is mapped again"))
    found = sx.map(whole.parent / "model", files, whole, **SETTINGS)
    assert digests(whole) == before
    assert (found["n_queries"], found["done"], found["failed"], found["n_cells"]) == (4, 4, 0, 240)
    assert main(["status", str(whole), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert main(["status", str(whole)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-4:]] == [[f"q0{i}", "done"] for i in range(4)]


def test_a_later_call_adds_files_and_maps_its_own_alone(
    whole: Path, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "out", whole.parent / "model"
    begun = sx.map(model, files[:1], out, **SETTINGS)
    found = sx.map(model, files[1:3], out, **SETTINGS)
    assert [query["name"] for query in begun["queries"]] == ["q00"]
    assert [query["name"] for query in found["queries"]] == ["q01", "q02"]
    sx.map(model, [files[3], files[0]], out, **SETTINGS)
    assert digests(out) == digests(whole)
    assert (sx.status(out)["n_queries"], sx.status(out)["done"]) == (4, 4)


def test_what_was_planned_stays(whole: Path, files: list[str], tmp_path: Path) -> None:
    model = whole.parent / "model"
    with pytest.raises(SettingsChangedError, match=r"settings\.project\.min_features: null -> 1"):
        sx.map(model, files, whole, **SETTINGS, min_features=1)
    with pytest.raises(SettingsChangedError, match="another file of q00"):
        sx.map(model, {"q00": files[1]}, whole, **SETTINGS)
    with pytest.raises(UsageError, match="no obs column 'nothing'"):
        sx.map(model, files, tmp_path / "out", label_key="nothing", **QUIET)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"map\.json"):
        sx.status(tmp_path)
    with pytest.raises(UsageError, match="view or model"):
        sx.map(model, files, model, **QUIET)


def test_a_query_that_fails_is_recorded(
    reference: Path, files: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    model = place_beside(out, reference)
    broken = tmp_path / "broken.h5ad"
    broken.write_text("no HDF5")
    words = ["map", model, *files[:2], broken, "-o", out, "--label-key", "type", "--truth-key", "type"]
    words += ["--min-query-cells", "20", "--max-cells", "200", "--resolution", "1", "--json"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([str(word) for word in words]) == PartialError.exit_code
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["failed"]) == (2, 1)
    row = next(row for row in found["queries"] if row["name"] == "broken")
    assert row["status"] == "failed"
    assert "not an HDF5 file" in row["error"]
    assert record(out, "broken")["error"]["kind"] == "BadFileError"
    assert (out / "records" / "q00.json").read_bytes() == (whole / "records" / "q00.json").read_bytes()

    broken.write_bytes(Path(files[2]).read_bytes())  # mended
    assert main([str(word) for word in words]) == 0
    assert record(out, "broken")["error"] is None


def test_a_file_that_has_changed(reference: Path, files: list[str], tmp_path: Path) -> None:
    model, mine = place_beside(tmp_path / "out", reference), tmp_path / "mine.h5ad"
    shutil.copyfile(files[0], mine)
    settings = {"metrics": False, "min_query_cells": 20}
    sx.map(model, [mine], tmp_path / "out", **settings, **QUIET)
    os.utime(mine, (1, 1))  # the same bytes
    assert sx.map(model, [mine], tmp_path / "out", **settings, **QUIET)["done"] == 1
    shutil.copyfile(files[1], mine)
    with pytest.raises(SettingsChangedError, match="its file has changed"):
        sx.map(model, [mine], tmp_path / "out", **settings, **QUIET)


def test_files_of_one_name(reference: Path, files: list[str], tmp_path: Path) -> None:
    for number in range(2):
        home = tmp_path / f"run{number}" / "outs"
        home.mkdir(parents=True)
        shutil.copyfile(files[number], home / "cells.h5ad")
    found = sx.map(reference, tmp_path / "run*" / "outs" / "*.h5ad", tmp_path / "out", metrics=False, **QUIET)
    assert [row["name"] for row in found["queries"]] == ["run0_outs_cells", "run1_outs_cells"]
    assert found["done"] == 2


@pytest.mark.parametrize("fails_at", [1, 4, 23, 44, 61, 75, 83, 90])
def test_stopped_at_any_write(
    reference: Path,
    files: list[str],
    whole: Path,
    tmp_path: Path,
    fails_at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    model = place_beside(out, reference)
    done, write = [0], Folder.write

    def dies(self: Folder, key: str, *data: Any) -> None:
        done[0] += 1
        if done[0] == fails_at:
            raise KeyboardInterrupt
        write(self, key, *data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            sx.map(model, files, out, **SETTINGS)
    states = [row["status"] for row in sx.status(out)["queries"]]
    assert set(states) <= {"done", "waiting"}
    assert "waiting" in states
    sx.map(model, files, out, **SETTINGS)
    assert digests(out) == digests(whole)


def test_parts_and_a_plan_in_a_file(
    reference: Path, files: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "out", tmp_path / "job.json"
    model = place_beside(out, reference)
    words = ["map", model, *files, "-o", out, "--plan", plan, "--label-key", "type", "--truth-key", "type"]
    words += ["--min-query-cells", "20", "--max-cells", "200", "--resolution", "1", "--json"]
    assert main([str(word) for word in words]) == 0
    assert json.loads(capsys.readouterr().out)["n_queries"] == 4
    assert [row["status"] for row in sx.status(out)["queries"]] == ["waiting"] * 4
    for number, names in ((2, ["q01"]), (1, ["q00", "q03"]), (3, ["q02"])):
        assert main(["map", "--plan", str(plan), "--task", f"{number}/3", "--json"]) == 0
        assert [row["name"] for row in json.loads(capsys.readouterr().out)["queries"]] == names
    assert digests(out) == digests(whole)
    capsys.readouterr()
    beside = ["map", "--plan", str(plan), "--task", "1/3"]
    for more in (["--label-key", "type"], ["-o", str(out)], [str(model), files[0]], ["--metrics"]):
        with contextlib.suppress(SystemExit):  # argparse knows no --metrics
            assert main([*beside, *more]) == UsageError.exit_code
        assert "the plan says" in capsys.readouterr().err or more == ["--metrics"]
    assert main([*beside, "--workers", "2", "--memory", "1GB"]) == 0
    assert digests(out) == digests(whole)
    assert main(["map", str(model), "--json"]) == UsageError.exit_code
    assert main(["map", "--plan", str(tmp_path / "none.json"), "--task", "1/2", "--json"]) == 2


def test_what_another_process_has_is_waited_for(
    reference: Path, files: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two queries are held elsewhere: of these one is finished there, the other given up."""
    out = tmp_path / "out"
    model = place_beside(out, reference)
    monkeypatch.setattr("streamx.jobs.call.POLL_SECONDS", 0.05)
    mapped, mapping = list[str](), run._mapped

    def noted(job: Any, query: Any) -> dict[str, Any]:
        mapped.append(query["name"])
        return mapping(job, query)

    monkeypatch.setattr(run, "_mapped", noted)
    call = threading.Thread(target=sx.map, args=(model, files, out), kwargs=SETTINGS)
    with claimed(Folder(out), "q01", {}), claimed(Folder(out), "q02", {}):
        call.start()
        assert wait_for(lambda: (out / "records" / "q03.json").exists())
        rows = {row["name"]: row for row in sx.status(out)["queries"]}
        assert {name: row["status"] for name, row in rows.items()} == {
            "q00": "done",
            "q01": "running",
            "q02": "running",
            "q03": "done",
        }
        assert rows["q01"]["by"].endswith(f":{os.getpid()}")
        shutil.copytree(whole / "q01.zarr", out / "q01.zarr")
        shutil.copyfile(whole / "records" / "q01.json", out / "records" / "q01.json")
    call.join()
    assert mapped == ["q00", "q03", "q02"]
    assert digests(out) == digests(whole)


def test_queries_that_others_have_in_work_are_not_done() -> None:
    assert map_verb.exit_code({"done": 3, "failed": 0, "running": 0, "waiting": 0}) == 0
    for state in ("failed", "running", "waiting"):
        assert map_verb.exit_code({"done": 2, state: 1}) == PartialError.exit_code
    assert map_verb.exit_code({"plan": "job.json", "queries": []}) == 0


def test_a_query_twice_and_two_of_one_name(reference: Path, files: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q00\.h5ad is given twice"):
        sx.map(reference, [files[0], files[0]], tmp_path / "out", **QUIET)
    with pytest.raises(UsageError, match="two queries are called 'q00'"):
        sx.map(reference, [files[0], f"q00={files[1]}"], tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()
    with pytest.raises(StorageError, match="can't be written"):
        sx.map(reference, [files[0]], Path(files[1]), **QUIET)  # a file for a folder


def test_a_plan_that_is_damaged(reference: Path, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "map.json").write_text("{")
    with pytest.raises(BadFileError, match="is no JSON"):
        sx.status(tmp_path / "out")
    with pytest.raises(BadFileError, match="is no JSON"):
        sx.map(reference, files, tmp_path / "out", **QUIET)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_records_that_can_not_be_written(
    reference: Path, files: list[str], tmp_path: Path, workers: int
) -> None:
    """That ends the job, in words, also when a worker meets it: no query is to blame."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "records").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="can't be written"):
        sx.map(reference, files[:2], out, workers=workers, metrics=False, **QUIET)
    assert held(Folder(out)) == {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(reference: Path, files: list[str], whole: Path, tmp_path: Path, times: int) -> None:
    out = tmp_path / "out"
    words = ["map", place_beside(out, reference), *files, "-o", out, "--label-key", "type"]
    words += ["--truth-key", "type", "--min-query-cells", "20", "--max-cells", "200", "--resolution", "1"]
    command = [sys.executable, "-m", "streamx", *map(str, words), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: held(Folder(out)), process)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; the same command takes it up again" in told
    assert "Traceback" not in told
    assert sx.map(out.parent / "model", files, out, **SETTINGS)["done"] == 4
    assert digests(out) == digests(whole)


SLEEPER = """
import os, signal, sys
from pathlib import Path
import streamx as sx
from mapping_jobs import SETTINGS
from streamx.jobs import claims
from streamx.store.folder import Folder

claims._machine = lambda: "elsewhere"
model, out, at, *files = sys.argv[1:]
write, done = Folder.write, [0]

def sleeps(self, key, *data):
    done[0] += 1
    if done[0] == int(at):
        os.kill(os.getpid(), signal.SIGSTOP)
    write(self, key, *data)

Folder.write = sleeps
print(sx.map(model, files, out, **SETTINGS)["done"])
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("at", [2, 12, 30, 45])
def test_a_machine_that_sleeps_and_wakes(
    reference: Path, files: list[str], whole: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps while it writes a query's claim, cells or labels; another takes the query over."""
    monkeypatch.setattr("streamx.jobs.claims.LEASE", 0.5)
    monkeypatch.setattr("streamx.jobs.call.POLL_SECONDS", 0.1)
    out = tmp_path / "out"
    model = place_beside(out, reference)
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(sx.__file__).parent.parent)])
    sleeper = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(model), str(out), str(at), *files],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    stopped = psutil.Process(sleeper.pid)
    assert wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED, sleeper)
    assert sx.map(model, files, out, **SETTINGS)["done"] == 4
    assert without_halves(out) == digests(whole)
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.communicate(timeout=120)[0] == b"4\n"
    assert sleeper.returncode == 0
    assert without_halves(out) == digests(whole)


def without_halves(out: Path) -> dict[str, str]:
    """Digests, without what a process that was taken over has half-written beside the query."""
    halves = (".scratch-", ".q")  # .q00.zarr.partial
    return {name: digest for name, digest in digests(out).items() if not name.startswith(halves)}


def wait_for(happens: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    for _ in range(6000):
        found = happens()
        if found or (process is not None and process.poll() is not None):
            return found
        time.sleep(0.01)
    return None


@pytest.mark.timeout(900)
def test_a_worker_and_the_coordinator_are_killed(
    reference: Path, files: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = place_beside(out, reference)
    words = ["map", model, *files, "-o", out, "--label-key", "type", "--truth-key", "type"]
    words += ["--min-query-cells", "20", "--max-cells", "200", "--resolution", "1", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "streamx", *map(str, words)], stdout=subprocess.DEVNULL)
    place = Folder(out)

    def holder() -> int | None:
        for keys in held(place).values():
            with_it = json.loads(place.read(keys[-1]))
            return int(with_it["pid"])
        return None

    worker = wait_for(holder, process)
    assert worker not in (None, process.pid)
    os.kill(worker, signal.SIGKILL)
    assert wait_for(lambda: list(out.glob("records/*.json")), process)
    process.kill()
    process.wait()
    assert sx.status(out)["done"] < 4
    found = sx.map(model, files, out, **SETTINGS)
    assert found["done"] == 4
    assert digests(out) == digests(whole)


@pytest.mark.timeout(900)
def test_workers_that_make_the_index_at_once(reference: Path, files: list[str], tmp_path: Path) -> None:
    """Both find none beside the reference; one is left, and labels are those of one process."""
    settings = {"label_key": "type", "min_query_cells": 20, "index": "ivf", "metrics": False}
    for workers in (1, 2):
        home = tmp_path / str(workers)
        shutil.copytree(reference, home / "model")
        found = sx.map(home / "model", files[:2], home / "out", workers=workers, **settings, **QUIET)
        assert found["done"] == 2
    kept = [digests(tmp_path / workers / "model" / "neighbors") for workers in "12"]
    assert kept[0] == kept[1]
    assert len({name.split("/")[0] for name in kept[0]}) == 1
    assert digests(tmp_path / "1" / "out") == digests(tmp_path / "2" / "out")


def test_workers_that_die_over_a_query(
    reference: Path, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up after a few, the others are mapped."""

    class Dead(spread._Worker):
        def give(self, query: Any) -> None:
            super().give(query)
            if query["name"] == "q01":
                self.process.kill()

    monkeypatch.setattr(spread, "_Worker", Dead)
    monkeypatch.setattr(spread, "DEATHS", 1)
    model = place_beside(tmp_path / "out", reference)
    found = sx.map(model, files[:2], tmp_path / "out", workers=2, metrics=False, **QUIET)
    assert [row["status"] for row in found["queries"]] == ["done", "failed"]
    assert "died over it, the last by signal 9" in found["queries"][1]["error"]


@pytest.mark.parametrize("mode", ["per-query", "incremental"])
def test_surgery(
    reference: Path, counts_reference: Path, files: list[str], tmp_path: Path, mode: str
) -> None:
    settings = {"label_key": "type", "surgery": mode, "max_epochs": 1, "metrics": False, "device": "cpu"}
    found = sx.map(counts_reference, files[:2], tmp_path / "out", **settings, **QUIET)
    assert found["done"] == 2
    assert record(tmp_path / "out", "q01")["surgery"]["learnt"].keys() == {"q01"}
    names = {"per-query": ["q00.model", "q01.model"], "incremental": ["updated.model"]}[mode]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.model")) == names
    cells = ad.read_zarr(tmp_path / "out" / "q01.zarr")
    assert np.isfinite(cells.obsm["X_scvi"]).any()
    assert "type_pred" in cells.obs
    before = digests(tmp_path / "out")
    sx.map(counts_reference, files[:2], tmp_path / "out", **settings, **QUIET)
    assert digests(tmp_path / "out") == before
    if mode == "incremental":
        with pytest.raises(UsageError, match="queries of its job in their order"):
            sx.map(counts_reference, files[:3], tmp_path / "out", **settings, **QUIET)
    # the other verbs know these latents for those of the reference's space, and another reference's not
    scores = sx.metrics(counts_reference, tmp_path / "out", label_key="type", resolution="1", threads=1)
    assert scores["n_cells"] + scores["n_without_latent"] == 200 + 120
    with pytest.raises(UsageError, match="was mapped with another model"):
        sx.metrics(reference, tmp_path / "out", label_key="type")


def test_surgery_is_refused_where_it_can_not_be(
    reference: Path, counts_reference: Path, files: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="SCALEX has no surgery"):
        sx.map(reference, files, tmp_path / "out", surgery="per-query", **QUIET)
    with pytest.raises(UsageError, match="in their order"):
        sx.map(counts_reference, files, tmp_path / "out", surgery="incremental", task="1/2", **QUIET)
