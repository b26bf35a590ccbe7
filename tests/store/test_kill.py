"""Killed at every operation: what is there is refused or whole, and a second run gives the same bytes.

A kill is simulated twice. As the state of the disk before each operation (what SIGKILL leaves: no handler
runs), with a torn temporary file added; and as an exception that no handler may swallow, after which every
further operation fails too.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from store_samples import sample, tree, with_names, written

import streamx as sx
from streamx.errors import BadFileError, IncompleteError
from streamx.store.folder import Folder

OPERATIONS = ("write", "delete", "delete_tree", "sync")


class Killed(BaseException):
    pass


def every_operation(monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any]) -> None:
    """Call `before` at the start of each operation of any Location, the journal's too."""
    for name in OPERATIONS:
        original = getattr(Folder, name)

        def operation(self: Folder, *args: Any, _original: Any = original) -> Any:
            before()
            return _original(self, *args)

        monkeypatch.setattr(Folder, name, operation)


def snapshots(place: Path, into: Path, work: Callable[[Path], Any]) -> list[Path]:
    """The store and its journal as they are before each operation of the work, and after it."""
    taken: list[Path] = []

    def take() -> None:
        copy = into / f"{len(taken):04d}"
        for folder in (place, journal(place)):
            if folder.exists():
                shutil.copytree(folder, copy / folder.name)
        copy.mkdir(exist_ok=True, parents=True)
        taken.append(copy)

    with pytest.MonkeyPatch.context() as patch:
        every_operation(patch, take)
        work(place)
    take()
    return taken


def journal(place: Path) -> Path:
    return place.with_name(place.name + ".journal")


def tear(copy: Path) -> None:
    """Half-written temporary files, where a write would have them."""
    place = journal(copy / "store")
    for folder in [place, place / "records", place / "tmp", *place.glob("spill/*")]:
        if place.exists():
            folder.mkdir(exist_ok=True)
            (folder / ".4711-1.tmp").write_bytes(b"torn")


def files() -> dict[str, ad.AnnData]:
    made = {"a": with_names(sample(9, 7, 0), "a"), "b": with_names(sample(4, 7, 1), "b")}
    for adata in made.values():
        del adata.obs["kind"]  # each column is ten more operations
    return made


def convert(place: Path) -> None:
    sx.convert(files(), place, shard_rows=11, threads=1)


def append(place: Path) -> None:
    sx.convert(
        {"c": with_names(sample(11, 7, 2, note=["x"] * 11), "c")},
        place,
        append=True,
        shard_rows=17,
        threads=1,
    )


def annotate(place: Path) -> None:
    sx.annotate(place, pd.DataFrame({"label": ["x", "y"]}, index=["a0", "b3"]))


STEPS: dict[str, tuple[list[Callable[[Path], None]], Callable[[Path], None]]] = {
    "convert": ([], convert),
    "append": ([convert], append),
    "annotate": ([convert], annotate),
    "append after annotate": ([convert, annotate], append),
}
SLOW = {"append after annotate": pytest.mark.slow}


@pytest.mark.parametrize("step", [pytest.param(step, marks=SLOW.get(step, ())) for step in STEPS])
def test_killed_at_every_operation(tmp_path: Path, tiny_geometry: None, step: str) -> None:
    first, last = STEPS[step]
    place = tmp_path / "store"
    for work in first:
        work(place)
    before = sx.open(place) if first else None
    taken = snapshots(place, tmp_path / "taken", last)
    whole = tree(place)
    assert not journal(place).exists()
    assert len(taken) > (15 if step == "annotate" else 50)
    seen = set()
    for copy in taken:
        killed = copy / "store"
        tear(copy)
        try:
            found = sx.open(killed)
        except (IncompleteError, BadFileError):
            assert before is None  # never while there was something to read
            seen.add("refused")
        else:
            seen.add(found.generation)
            assert found.generation in (before.generation if before else 1, len(first) + 1)
            found.read(0, found.n_obs)
            assert len(found.obs) == found.n_obs
        last(killed)
        assert tree(killed) == whole
        assert os.listdir(copy) == ["store"]
    assert seen == ({"refused", 1} if before is None else {before.generation, before.generation + 1})
    assert sx.verify(killed)["ok"]


@pytest.mark.parametrize("step", ["convert", "append"])
def test_an_exception_at_any_operation(tmp_path: Path, tiny_geometry: None, step: str) -> None:
    """Handlers that run on the way out neither spoil what is there nor keep the lock."""
    first, last = STEPS[step]
    whole = tmp_path / "whole"
    for work in [*first, last]:
        work(whole)
    for k in itertools.count(3, 7):
        place = tmp_path / str(k) / "store"
        for work in first:
            work(place)
        count = itertools.count()

        def die(count: Any = count, k: int = k) -> None:
            if next(count) >= k:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            every_operation(patch, die)
            try:
                last(place)
            except Killed:
                died = True
            else:
                died = False
        last(place)
        assert tree(place) == tree(whole)
        assert os.listdir(place.parent) == ["store"]
        if not died:
            break
    assert k > 60


def test_harmed_after_the_kill(tmp_path: Path, tiny_geometry: None) -> None:
    """What the journal says was done is compared with the bytes, and done again."""
    place = tmp_path / "store"
    taken = snapshots(place, tmp_path / "taken", convert)
    whole = tree(place)
    rng = random.Random(0)
    for copy in taken[20::9]:
        some = [p for p in copy.rglob("*") if p.is_file() and p.name not in ("settings.json", "streamx.json")]
        some = [p for p in some if "records" not in p.parts and p.stat().st_size]
        if (copy / "store" / "streamx.json").exists():
            break
        for harmed in rng.sample(some, min(5, len(some))):
            data = bytearray(harmed.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            harmed.write_bytes(data if rng.random() < 0.7 else data[: len(data) // 2])
        convert(copy / "store")
        assert tree(copy / "store") == whole


SCRIPT = """
import os, sys
os.sync = lambda: None
import streamx as sx
from streamx.store import draft, layout
layout.ROWS_PER_CHUNK, layout.VALUES_MULTIPLE, layout.CHUNKS_PER_SHARD = 2, 8, 3
print("ready", flush=True)
sx.convert(sys.argv[2:], sys.argv[1], shard_rows=97, threads=2)
"""


def kill_for_real(folder: Path, times: int, seed: int) -> None:
    """SIGKILL at random times, until a run gets through; then the bytes are compared."""
    rng = random.Random(seed)
    inputs = [str(written(with_names(sample(211, 13, i), f"f{i}-"), folder / f"f{i}.h5ad")) for i in range(2)]

    def start(place: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(place), *inputs],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        with process.stdout as said:
            said.readline()
        return process

    begun = time.monotonic()
    assert start(folder / "whole").wait() == 0
    lasts = time.monotonic() - begun
    kills, place = 0, folder / "0"
    while kills < times:
        process = start(place)
        time.sleep(rng.uniform(0, lasts * 0.6))
        process.send_signal(signal.SIGKILL)
        done = process.wait() == 0
        kills += not done
        try:
            sx.open(place)
            opened = True
        except (IncompleteError, BadFileError):
            opened = False
        if opened:
            assert start(place).wait() == 0
            assert tree(place) == tree(folder / "whole")
            assert not journal(place).exists()
            place = folder / str(kills + 1000)
    assert start(place).wait() == 0
    assert tree(place) == tree(folder / "whole")
    assert sx.verify(place)["ok"]


def test_a_few_real_kills(tmp_path: Path) -> None:
    kill_for_real(tmp_path, 5, seed=0)


@pytest.mark.slow
def test_twenty_real_kills(tmp_path: Path) -> None:
    kill_for_real(tmp_path, 20, seed=1)


def test_readers_keep_their_generation(tmp_path: Path, tiny_geometry: None) -> None:
    """A reader that opened before an append, at any point of it, reads what it opened."""
    place = tmp_path / "store"
    convert(place)
    reader, lazy = sx.open(place), sx.open(place)
    values, obs = reader.read(0, 13).toarray(), reader.obs
    with pytest.MonkeyPatch.context() as patch:

        def look() -> None:
            np.testing.assert_array_equal(reader.read(0, 13).toarray(), values)

        every_operation(patch, look)
        append(place)
    annotate(place)
    assert (lazy.generation, lazy.shape) == (1, (13, 7))  # opened, but read only now
    pd.testing.assert_frame_equal(lazy.obs, obs)
    np.testing.assert_array_equal(lazy.read(0, 13).toarray(), values)
    assert (sx.open(place).generation, sx.open(place).n_obs) == (3, 24)
