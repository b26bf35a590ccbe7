"""Interrupted runs: refused with other settings, stopped by signals and full disks, one writer at a time."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from store_samples import assert_holds, sample, tree, with_names, written

import streamx as sx
from streamx.errors import (
    BadFileError,
    BadValuesError,
    GeneError,
    IncompleteError,
    InputError,
    LockedError,
    ResourceError,
    SettingsChangedError,
    StorageError,
    UsageError,
)
from streamx.store import convert as convert_module
from streamx.store import pack
from streamx.store.convert import _DECISIVE, convert_files
from streamx.store.folder import Folder
from streamx.store.journal import Journal


class Stop(BaseException):
    pass


def files(folder: Path) -> list[Path]:
    made = []
    for i, key in enumerate("ab"):
        adata = with_names(sample(60 + i, 9, i, donor=["x", "y", "z"] * 20 + ["x"] * i), key)
        proteins = np.ones((adata.n_obs, 2), dtype=np.float32)
        adata.obsm["protein_expression"] = proteins
        adata.layers["counts"] = adata.X.copy()
        made.append(written(adata, folder / f"{key}.h5ad"))
    return made


def fail_at(
    patch: pytest.MonkeyPatch, k: int, error: Callable[[], BaseException], operation: str = "write"
) -> None:
    """The k-th write and all that follow raise: tasks that run meanwhile get no further either."""
    done, original = itertools.count(1), getattr(Folder, operation)

    def failing(self: Folder, *args: Any) -> Any:
        if next(done) >= k:
            raise error()
        return original(self, *args)

    patch.setattr(Folder, operation, failing)


def stopped(inputs: Any, place: Path, k: int = 12, **settings: Any) -> None:
    """A conversion that was stopped at its k-th write."""
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, k, Stop)
        with pytest.raises(Stop):
            sx.convert(inputs, place, **settings)
    with pytest.raises(IncompleteError, match="resume"):
        sx.open(place)


class TestChangedSettings:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("batch_key", "donor"),
            ("join", "outer"),
            ("layer", "counts"),
            ("obsm", ()),
            ("strip_versions", True),
            ("duplicate_genes", "sum"),
            ("allow_float", True),
            ("preset", "speed"),
            ("shard_rows", 31),
            ("seed", 1),
        ],
    )
    def test_each_is_named(self, tmp_path: Path, field: str, value: Any) -> None:
        inputs = files(tmp_path)
        stopped(inputs, tmp_path / "store", threads=1)
        before = tree(tmp_path / "store", tmp_path / "store.journal")
        with pytest.raises(SettingsChangedError, match=rf"another settings\.{field}: .* -> .*") as caught:
            sx.convert(inputs, tmp_path / "store", **{field: value})
        assert str(tmp_path / "store.journal") in (caught.value.fix or "")
        after = tree(tmp_path / "store", tmp_path / "store.journal")
        before.pop(".journal/lock"), after.pop(".journal/lock")
        assert after == before
        sx.convert(inputs, tmp_path / "store")
        assert not (tmp_path / "store.journal").exists()

    def test_all_decisive_settings_are_tested(self) -> None:
        marks = self.test_each_is_named.pytestmark  # type: ignore[attr-defined]
        tested = {field for field, _ in marks[0].args[1]} | {"modality"}  # which needs an h5mu file
        assert tested == set(_DECISIVE)
        free = {"on_error", "memory", "threads", "obs_map"}
        assert {f.name for f in dataclasses.fields(convert_module.ConvertConfig)} - tested == free

    def test_obs_map_counts_by_content(self, tmp_path: Path) -> None:
        inputs, names = files(tmp_path), tmp_path / "map.json"
        names.write_text("{}")
        stopped(inputs, tmp_path / "store", obs_map=str(names))
        names.write_text(json.dumps({"a": {"donor": "patient"}}))
        with pytest.raises(SettingsChangedError, match=r"settings\.obs_map"):
            sx.convert(inputs, tmp_path / "store", obs_map=str(names))

    def test_changed_input(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        stopped(inputs, tmp_path / "store")
        adata = ad.read_h5ad(inputs[1])
        adata.X.data[0] += 1
        adata.write_h5ad(inputs[1])
        with pytest.raises(SettingsChangedError, match=r"another inputs\.b\.checksum"):
            sx.convert(inputs, tmp_path / "store")
        with pytest.raises(SettingsChangedError, match=r"another inputs\.b"):
            sx.convert(inputs[:1], tmp_path / "store", batch_key="donor")

    def test_another_format_of_the_same_store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = files(tmp_path)
        stopped(inputs, tmp_path / "store")
        monkeypatch.setattr(convert_module, "FORMAT", 99)
        with pytest.raises(SettingsChangedError, match="another format: 2 -> 99"):
            sx.convert(inputs, tmp_path / "store")

    @pytest.mark.parametrize("k", [3, 6, 20])
    def test_memory_and_threads_may_change(
        self, tmp_path: Path, tiny_geometry: None, monkeypatch: pytest.MonkeyPatch, k: int
    ) -> None:
        """Other slabs, some under the names of those that a former run has laid down."""
        inputs = files(tmp_path)
        sx.convert(inputs, tmp_path / "whole", shard_rows=50)
        monkeypatch.setattr("streamx.store.slabs.MIN_SLAB_ROWS", 7)
        stopped(inputs, tmp_path / "store", k, shard_rows=50, memory="100KB", threads=2)
        stopped(inputs, tmp_path / "store", k, shard_rows=50, memory="40KB", threads=1)
        sx.convert(inputs, tmp_path / "store", shard_rows=50, memory="250KB")
        assert tree(tmp_path / "store") == tree(tmp_path / "whole")

    def test_a_finished_store(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        sx.convert(inputs, tmp_path / "store")
        before = tree(tmp_path / "store")
        assert sx.convert(inputs, tmp_path / "store", memory="1GB", threads=1).generation == 1
        with pytest.raises(UsageError, match="exists already"):
            sx.convert(inputs, tmp_path / "store", seed=3)
        assert tree(tmp_path / "store") == before
        assert not (tmp_path / "store.journal").exists()


class TestOtherPlaces:
    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "thesis.txt").write_text("years of work")
        with pytest.raises(UsageError, match="holds other files"):
            sx.convert(inputs, tmp_path / "store")
        assert os.listdir(tmp_path / "store") == ["thesis.txt"]
        assert not (tmp_path / "store.journal").exists()
        with pytest.raises(BadFileError, match="is no streamx store"):
            sx.open(tmp_path / "store")

    def test_an_empty_folder_and_folders_to_be_made(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        (tmp_path / "store").mkdir()
        sx.convert(inputs, tmp_path / "store")
        sx.convert(inputs, tmp_path / "x" / "y" / "store")
        assert tree(tmp_path / "store") == tree(tmp_path / "x" / "y" / "store")

    def test_a_relative_path_and_a_link(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = files(tmp_path)
        real = tmp_path / "elsewhere" / "real"
        real.mkdir(parents=True)
        (tmp_path / "link").symlink_to(real)
        sx.convert(inputs, tmp_path / "link")
        assert os.listdir(real.parent) == ["real"]
        monkeypatch.chdir(real)
        with pytest.raises(UsageError, match="exists already"):
            sx.convert(inputs, ".", seed=1)
        monkeypatch.chdir(tmp_path)
        sx.convert(inputs, "relative")
        assert tree(tmp_path / "relative") == tree(real)

    def test_a_place_that_can_hold_nothing(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        (tmp_path / "file").write_text("x")
        with pytest.raises(UsageError, match="holds other files"):
            sx.convert(inputs, tmp_path / "file")
        with pytest.raises(StorageError, match="can't be written"):
            sx.convert(inputs, tmp_path / "file" / "store")
        with pytest.raises(UsageError, match="can't hold"):
            sx.convert(inputs, "/")
        if Path("/proc/self").exists():
            with pytest.raises(StorageError):
                sx.convert(inputs, "/proc/none/store")
        with pytest.raises((BadFileError, IncompleteError)):
            sx.open(tmp_path / "file")

    def test_append_to_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(BadFileError, match="does not exist"):
            sx.convert(files(tmp_path), tmp_path / "store", append=True)
        assert not (tmp_path / "store.journal").exists()

    def test_an_incomplete_store(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        stopped(inputs, tmp_path / "store", 30)
        with pytest.raises(IncompleteError, match="interrupted"):
            sx.convert(inputs, tmp_path / "store", append=True)
        (tmp_path / "store.journal").rename(tmp_path / "gone")
        with pytest.raises(IncompleteError):
            sx.open(tmp_path / "store")
        with pytest.raises(UsageError, match="holds other files"):
            sx.convert(inputs, tmp_path / "store")

    @pytest.mark.parametrize(
        "settings", [{"shard_rows": 0}, {"memory": "none"}, {"preset": "fast"}, {"sed": 1}]
    )
    def test_bad_settings(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            sx.convert(files(tmp_path), tmp_path / "store", **settings)
        assert not (tmp_path / "store.journal").exists()


class TestStops:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_resumes_after(self, tmp_path: Path, error: type[BaseException]) -> None:
        inputs = files(tmp_path)
        sx.convert(inputs, tmp_path / "whole", shard_rows=50)
        for k in (2, 9, 40):
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, k, error)
                with pytest.raises(error):
                    sx.convert(inputs, tmp_path / "store", shard_rows=50, threads=2)
        sx.convert(inputs, tmp_path / "store", shard_rows=50)
        assert tree(tmp_path / "store") == tree(tmp_path / "whole")

    def test_sigterm(self, tmp_path: Path) -> None:
        """It stops soon, says so, and the same command takes it up."""
        inputs = [
            str(written(with_names(sample(4001, 60, i), f"f{i}"), tmp_path / f"{i}.h5ad")) for i in range(2)
        ]
        command = [
            sys.executable,
            "-m",
            "streamx.cli.main",
            "convert",
            *inputs,
            "-o",
            str(tmp_path / "store"),
        ]
        command += ["--shard-rows", "101", "--threads", "2"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        begun = time.monotonic()
        while not (tmp_path / "store" / "shards").exists():
            assert process.poll() is None
            assert time.monotonic() - begun < 60
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - sent < 10
        assert process.returncode == 143
        assert "stopped" in said
        assert "Traceback" not in said
        with pytest.raises(IncompleteError):
            sx.open(tmp_path / "store")
        store = sx.convert(inputs, tmp_path / "store", shard_rows=101)
        assert store.n_obs == 8002
        assert sx.verify(tmp_path / "store")["ok"]


class TestFullDisk:
    def test_at_any_write(self, tmp_path: Path, tiny_geometry: None) -> None:
        """Each 5th write of a conversion finds the disk full."""
        inputs = files(tmp_path)
        sx.convert(inputs, tmp_path / "whole", shard_rows=101)
        expected = tree(tmp_path / "whole")
        place = tmp_path / "store"
        for k in itertools.count(1, 5):
            with pytest.MonkeyPatch.context() as patch:
                done = itertools.count(1)

                def full(
                    source: Any, target: Any, k: int = k, done: Any = done, rename: Any = os.replace
                ) -> None:
                    if next(done) == k:
                        Path(source).write_bytes(b"half")
                        raise OSError(errno.ENOSPC, "No space left on device")
                    rename(source, target)

                patch.setattr(os, "replace", full)
                try:
                    sx.convert(inputs, place, shard_rows=101)
                except ResourceError as caught:
                    error = caught
                else:
                    break
            assert "disk is full" in error.what
            assert "free some space" in (error.fix or "")
            assert not list(tmp_path.rglob("*.tmp"))
            with pytest.raises((IncompleteError, BadFileError)):
                sx.open(place)
        assert k > 20
        assert tree(place) == expected
        assert not (tmp_path / "store.journal").exists()

    def test_before_anything(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = files(tmp_path)

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            with pytest.raises(ResourceError, match="disk is full"):
                sx.convert(inputs, tmp_path / "store")
        sx.convert(inputs, tmp_path / "store")

    def test_for_real(self, tmp_path: Path) -> None:
        """A file size limit instead of a full disk: the kernel refuses in the middle of a write."""
        adata = with_names(sample(3000, 200, 0, density=0.9, high=60_000), "x")
        path = written(adata, tmp_path / "big.h5ad")
        script = (
            "import resource, signal, sys, streamx as sx\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "try: sx.convert(sys.argv[1], sys.argv[2], batch_key='kind')\n"
            "except sx.errors.StorageError as error: print(error.exit_code, error)\n"
        )
        script = script.replace("sx.errors", "streamx.errors").replace(
            "streamx as sx", "streamx as sx, streamx.errors"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, str(path), str(tmp_path / "store")], capture_output=True, text=True
        )
        assert run.stdout.startswith("5 "), run.stderr[-2000:]
        assert "File too large" in run.stdout
        assert_holds(sx.convert(path, tmp_path / "store", batch_key="kind"), {"big": adata})


def _convert(inputs: list[Path], place: Path, seed: int, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        sx.convert(inputs, place, seed=seed, shard_rows=17, threads=1)
        results.put((seed, "won"))
    except Exception as error:
        results.put((seed, f"{type(error).__name__}: {error}"))


class TestTwoWriters:
    def test_the_other_says_who(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        with Journal(Folder(tmp_path / "store")):
            with pytest.raises(LockedError, match=f"process {os.getpid()} on ") as caught:
                sx.convert(inputs, tmp_path / "store")
            assert caught.value.exit_code == 5
            with pytest.raises(IncompleteError):
                sx.open(tmp_path / "store")
        assert_holds(sx.convert(inputs, tmp_path / "store"), {p.stem: ad.read_h5ad(p) for p in inputs})
        for work in (
            lambda: sx.convert(inputs, tmp_path / "store", append=True),
            lambda: sx.annotate(
                tmp_path / "store", ad.read_h5ad(inputs[0]).obs[["donor"]].rename(columns={"donor": "d"})
            ),
        ):
            with Journal(Folder(tmp_path / "store")), pytest.raises(LockedError):
                work()

    def test_a_lock_of_the_dead_is_none(self, tmp_path: Path) -> None:
        inputs = files(tmp_path)
        (tmp_path / "store.journal").mkdir()
        (tmp_path / "store.journal" / "lock").write_text("process 1 on mars")
        sx.convert(inputs, tmp_path / "store")
        assert not (tmp_path / "store.journal").exists()

    def test_threads(self, tmp_path: Path) -> None:
        self.race(tmp_path, threading.Thread, threading.Barrier(4), _Results(), 4)

    def test_processes(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.race(tmp_path, context.Process, context.Barrier(3), context.Queue(), 3)

    def race(self, folder: Path, worker: Any, barrier: Any, results: Any, n: int) -> None:
        """Several writers, two kinds of settings: one store, untouched by those who lost."""
        inputs = files(folder)
        place = folder / "store"
        workers = [worker(target=_convert, args=(inputs, place, i % 2, barrier, results)) for i in range(n)]
        for one in workers:
            one.start()
        outcomes = [results.get(timeout=120) for _ in workers]
        for one in workers:
            one.join()
        winners = {seed for seed, outcome in outcomes if outcome == "won"}
        assert len(winners) == 1, outcomes
        for _, outcome in outcomes:
            assert outcome.startswith(("won", "LockedError", "UsageError: ")), outcome
        sx.convert(inputs, folder / "alone", seed=winners.pop(), shard_rows=17)
        assert tree(place) == tree(folder / "alone")
        assert not (folder / "store.journal").exists()

    def test_the_second_sees_what_the_first_did(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Opened before, locked after another's commit: two appends in turn never lose one."""
        inputs = files(tmp_path)
        sx.convert(inputs[:1], tmp_path / "store", batch_key="donor")
        third = written(with_names(sample(7, 9, 5, donor=["new"] * 7), "c"), tmp_path / "c.h5ad")
        lock = convert_module.Journal
        meanwhile = [True]

        def late(location: Folder) -> Journal:
            if meanwhile.pop() if meanwhile else False:
                sx.convert(inputs[1:], tmp_path / "store", append=True)
            return lock(location)

        monkeypatch.setattr(convert_module, "Journal", late)
        store = sx.convert([third], tmp_path / "store", append=True)
        assert (store.generation, store.n_obs) == (3, 60 + 61 + 7)
        assert store.batches == ["x", "y", "z", "new"]
        assert sx.verify(tmp_path / "store")["ok"]


class _Results(list):
    def put(self, item: Any) -> None:
        self.append(item)

    def get(self, timeout: float) -> Any:
        until = time.monotonic() + timeout
        while not self and time.monotonic() < until:
            time.sleep(0.01)
        return self.pop()


class TestBadInputs:
    def bad(self, folder: Path, what: str) -> Path:
        adata = with_names(sample(41, 9, 7), "bad")
        if what == "values":
            adata.X.data[-1] = 0.5
        elif what == "genes":
            adata.var_names = [*adata.var_names[:-1], "g0"]
        elif what == "cut":
            path = written(adata, folder / "m_bad.h5ad")
            path.write_bytes(path.read_bytes()[:-3000])
            return path
        return written(adata, folder / "m_bad.h5ad")

    @pytest.mark.parametrize(
        ("what", "error"), [("values", BadValuesError), ("genes", GeneError), ("cut", BadFileError)]
    )
    def test_stop_leaves_nothing(self, tmp_path: Path, what: str, error: type[InputError]) -> None:
        inputs = [*files(tmp_path), self.bad(tmp_path, what)]
        with pytest.raises(error, match="m_bad"):
            sx.convert(inputs, tmp_path / "store")
        assert sorted(os.listdir(tmp_path)) == ["a.h5ad", "b.h5ad", "m_bad.h5ad"]

    @pytest.mark.parametrize("what", ["values", "genes", "cut"])
    def test_skip_makes_the_store_of_the_others(self, tmp_path: Path, what: str) -> None:
        inputs = files(tmp_path)
        dense = with_names(sample(30, 9, 9, donor=["x"] * 30), "z")
        dense.X = sparse.csc_matrix(dense.X)  # read through a spill, which must outlive the failure
        inputs += [written(dense, tmp_path / "z.h5ad"), self.bad(tmp_path, what)]
        with pytest.warns(sx.errors.StreamxWarning, match="left out"):
            done = convert_files(inputs, tmp_path / "store", on_error="skip")
        assert len(done.skipped) == 1
        assert "m_bad" in str(done.skipped[0])
        good = {p.stem: ad.read_h5ad(p) for p in inputs[:3]}
        assert_holds(done.collection, good)
        assert sx.verify(tmp_path / "store")["ok"]
        assert not (tmp_path / "store.journal").exists()
        with pytest.warns(sx.errors.StreamxWarning, match="left out"):
            again = convert_files(inputs, tmp_path / "store", on_error="skip")  # finished: nothing is done
        assert len(again.skipped) == 1
        assert again.collection.generation == 1

    def test_skip_resumes(self, tmp_path: Path) -> None:
        inputs = [*files(tmp_path), self.bad(tmp_path, "values")]
        for k in (4, 9, 15, 30):
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, k, Stop)
                with pytest.raises(Stop):
                    sx.convert(inputs, tmp_path / "store", on_error="skip", threads=1)
        with pytest.warns(sx.errors.StreamxWarning, match="left out"):
            store = sx.convert(inputs, tmp_path / "store", on_error="skip")
        assert_holds(store, {p.stem: ad.read_h5ad(p) for p in inputs[:2]})

    def test_skip_that_was_interrupted_and_then_is_no_skip(self, tmp_path: Path) -> None:
        """Nothing is left of what the first run wrote without the bad input."""
        inputs = [*files(tmp_path), self.bad(tmp_path, "values")]
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, 60, Stop)
            with pytest.raises(Stop):
                sx.convert(inputs, tmp_path / "store", on_error="skip", threads=1)
        assert list((tmp_path / "store").rglob("*"))
        with pytest.raises(BadValuesError):
            sx.convert(inputs, tmp_path / "store")
        assert not tree(tmp_path / "store")
        assert not (tmp_path / "store.journal").exists()
        sx.convert(inputs[:2], tmp_path / "store")

    def test_all_are_bad(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no input is left"):
            sx.convert([self.bad(tmp_path, "values")], tmp_path / "store", batch_key="kind", on_error="skip")
        assert os.listdir(tmp_path) == ["m_bad.h5ad"]

    def test_an_error_found_late_leaves_the_store_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = files(tmp_path)
        sx.convert(inputs[:1], tmp_path / "store", batch_key="donor")
        before = tree(tmp_path / "store")
        with monkeypatch.context() as patch:

            def cant(*args: Any) -> None:
                raise InputError("can't be stored")

            patch.setattr(pack._Writer, "part_obs", cant)
            with pytest.raises(InputError, match="can't be stored"):
                sx.convert(inputs[1:], tmp_path / "store", append=True)
            assert tree(tmp_path / "store") == before
            with pytest.raises(InputError, match="can't be stored"):
                sx.convert(inputs, tmp_path / "new")
            assert not tree(tmp_path / "new")
        sx.convert(inputs, tmp_path / "new")

    def test_what_an_abandoned_append_left_is_swept(self, tmp_path: Path) -> None:
        """The journal was removed by hand, as the error advises; other files follow."""
        inputs = files(tmp_path)
        for place in ("store", "whole"):
            sx.convert(inputs[:1], tmp_path / place, batch_key="donor")
        other = written(with_names(sample(130, 9, 5, donor=["n"] * 130), "c"), tmp_path / "c.h5ad")
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, 150, Stop)
            with pytest.raises(Stop):
                sx.convert([other], tmp_path / "store", append=True, shard_rows=20, threads=1)
        with pytest.raises(SettingsChangedError, match=r"inputs\.b"):
            sx.convert(inputs[1:], tmp_path / "store", append=True)
        Folder(tmp_path).delete_tree("store.journal")
        assert not sx.verify(tmp_path / "store")["ok"]
        for place in ("store", "whole"):
            sx.convert(inputs[1:], tmp_path / place, append=True)
        assert tree(tmp_path / "store") == tree(tmp_path / "whole")
        assert sx.verify(tmp_path / "store")["ok"]


def test_inputs_that_end_in_their_own_checksums(tmp_path: Path) -> None:
    """Shards of a store as inputs: one that differs in a count of the same width is another input."""
    one = with_names(sample(9, 7, 0, donor=["d"] * 9), "c")
    two = one.copy()
    two.X.data[0] += 1
    shards = {}
    for i, adata in enumerate((one, two)):
        store = sx.convert({"a": adata}, tmp_path / str(i), batch_key="donor", preset="speed")
        shards[str(i)] = store.path / "shards" / "000000.zarr"
    sources = convert_module.open_sources(shards, scratch=tmp_path / "scratch", memory=1 << 20)
    assert len({source.checksum() for source in sources}) == 2
