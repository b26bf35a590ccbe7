"""Stores in a bucket: the same content as in a folder, and never a mixture, whoever dies or writes too."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from faults import Proxy
from store_samples import assert_holds, sample, with_names, written

import streamx as sx
from streamx.errors import (
    BadFileError,
    IncompleteError,
    IntegrityError,
    LockedError,
    StorageError,
    UsageError,
)
from streamx.store.bucket import Bucket
from streamx.store.folder import Folder
from streamx.store.journal import Journal
from streamx.store.manifest import is_unfinished, read_generation

Make = Callable[..., Bucket]
OPERATIONS = ("write", "replace", "delete", "delete_tree")
LONG = (pytest.mark.slow, pytest.mark.timeout(900))


class Killed(BaseException):
    pass


def files() -> dict[str, ad.AnnData]:
    made = {"a": with_names(sample(9, 7, 0), "a"), "b": with_names(sample(4, 7, 1), "b")}
    for adata in made.values():
        del adata.obs["kind"]  # each column is ten more operations
    return made


def more() -> dict[str, ad.AnnData]:
    return {"c": with_names(sample(11, 7, 2, note=["x"] * 11), "c")}


def small(place: Bucket) -> None:
    sx.convert({"a": files()["a"]}, place, batch_key="_streamx_file", threads=1)


def convert(place: Bucket) -> None:
    sx.convert(files(), place, shard_rows=11, threads=1)


def append(place: Bucket) -> None:
    sx.convert(more(), place, append=True, shard_rows=17, threads=1)


def annotate(place: Bucket) -> None:
    sx.annotate(place, pd.DataFrame({"label": ["x", "y"]}, index=["a0", "b3"]))


def label(place: Bucket) -> None:
    sx.annotate(place, pd.DataFrame({"label": ["x"]}, index=["a0"]))


def objects(place: Any) -> dict[str, bytes]:
    return {key: place.read(key) for key in place.list()}


def everything(place: Any) -> list[Any]:
    """All that can be read of a store, as plain values."""
    store = sx.open(place)
    obs = store.obs.astype(object)
    return [
        store.read(0, store.n_obs).toarray().tolist(),
        obs.where(obs.notna(), None).to_numpy().tolist(),
        list(store.obs_names),
        list(store.var_names),
        store.batches,
        store.measured_bg.tolist(),
    ]


def untagged(key: str) -> str:
    """The object's name in a folder, where a lock makes the run's digest unnecessary."""
    return key[: key.index("-")] + key[key.index("-") + 13 :] if is_unfinished(key) else key


def test_same_content_as_in_a_folder(bucket: Make, tmp_path: Path) -> None:
    """Every shard, byte by byte; only names and manifests differ."""
    place, folder = bucket(), Folder(tmp_path / "store")
    for where in (place, folder):
        convert(where)
        append(where)
        annotate(where)
        sx.open(where)
    ours, theirs = objects(place), objects(folder)
    assert {untagged(key) for key in ours} == set(theirs)
    for key, data in ours.items():
        if key.split("/")[0] in ("shards", "obs", "tables"):
            assert data == theirs[untagged(key)], key
    assert everything(place) == everything(folder)
    assert_holds(sx.open(place), {**files(), **more()})
    assert sx.verify(place) == {"ok": True, "objects": len(ours), "errors": []}
    lazy = sx.open(place).to_anndata(lazy=True)
    np.testing.assert_array_equal(lazy.X.compute().toarray(), sx.open(folder).read(0, 24).toarray())
    summary = sx.open(place).summary()
    assert summary == sx.open(folder).summary()
    assert str(sx.open(place).path) == str(place)


def test_a_name_for_each_run(bucket: Make) -> None:
    """What could differ has another name; what is the same, the same one."""
    first, second, other = bucket("a"), bucket("b"), bucket("c")
    convert(first)
    convert(second)
    sx.convert(more(), other, threads=1, batch_key="_streamx_file")
    assert objects(first) == objects(second)
    tagged = [{key for key in place.list() if is_unfinished(key)} for place in (first, other)]
    assert len(tagged[0]) == len(first.list()) - 1  # all but the marker
    assert not tagged[0] & tagged[1]


def test_plain_anndata_reads_it(bucket: Make) -> None:
    """A shard in a bucket, by zarr's own path and without our code."""
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    place = bucket()
    convert(place)
    path = sx.open(place).parts[0].shards[0].path
    name, _, prefix = place.root.removeprefix("s3://").partition("/")
    settings = {"client_options": {"allow_http": True}, "virtual_hosted_style_request": False}
    store = ObjectStore(S3Store(name, prefix=f"{prefix}/{path}", **settings), read_only=True)
    adata = ad.read_zarr(store)
    np.testing.assert_array_equal(adata.X.toarray(), sx.open(place).read(0, 11).toarray())


def every_operation(monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any]) -> None:
    """Call `before` at the start of each operation on the bucket, and on the journal."""
    for kind, name in itertools.product((Bucket, Folder), OPERATIONS):
        original = getattr(kind, name)

        def operation(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            before()
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, operation)


def dies_at(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the k-th operation on every one fails, those of handlers too."""
    count = itertools.count()

    def die() -> None:
        if next(count) >= k:
            raise Killed

    every_operation(monkeypatch, die)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ([], small),
        ([small], label),
        pytest.param([], convert, marks=LONG),
        pytest.param([convert], append, marks=LONG),
    ],
    ids=["small", "annotate", "convert", "append"],
)
def test_killed_at_every_operation(
    bucket: Make, first: list[Callable[[Bucket], None]], last: Callable[[Bucket], None]
) -> None:
    """R1, R2: what is there is refused or whole; a second run gives the same objects, no more and no less."""
    whole = bucket("whole")
    for work in [*first, last]:
        work(whole)
    expected, operations = objects(whole), 0
    for k in itertools.count():
        place = bucket(f"killed-{k}")
        for work in first:
            work(place)
        with pytest.MonkeyPatch.context() as patch:
            dies_at(k, patch)
            try:
                last(place)
                died = False
            except Killed:
                died = True
        try:
            found = sx.open(place)
            assert found.generation in (len(first), len(first) + 1)
            assert found.read(0, found.n_obs).shape[0] == len(found.obs)
        except (IncompleteError, BadFileError):
            assert not first  # never while there was something to read
        last(place)
        assert objects(place) == expected
        assert not place.journal.exists()
        if not died:
            break
        operations += 1
    assert operations > (10 if last is label else 50)
    assert sx.verify(place)["ok"]


def test_resumed_elsewhere(bucket: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has no journal the run begins anew, over the same names."""
    whole, place = bucket("whole"), bucket()
    convert(whole)
    with pytest.MonkeyPatch.context() as patch:
        dies_at(40, patch)
        with pytest.raises(Killed):
            convert(place)
    assert place.list()
    with pytest.raises(IncompleteError):
        sx.open(place)
    monkeypatch.setenv("STREAMX_SCRATCH", str(tmp_path / "elsewhere"))
    convert(place)
    assert objects(place) == objects(whole)


def test_other_files_are_not_touched(bucket: Make) -> None:
    place = bucket()
    place.write("notes.txt", b"mine")
    with pytest.raises(UsageError, match="holds other files"):
        convert(place)
    assert place.list() == ["notes.txt"]
    place.delete("notes.txt")
    convert(place)
    place.write("notes.txt", b"mine")
    append(place)
    assert place.read("notes.txt") == b"mine"
    assert sx.verify(place)["errors"] == [{"object": "notes.txt", "error": "not in the manifest"}]


def elsewhere(tmp_path: Path, work: Callable[[], Any]) -> Any:
    """Do the work as another machine would: with no knowledge of this one's journals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMX_SCRATCH", str(tmp_path / "another machine"))
        return work()


def at_the_end(place: Bucket, act: Callable[[], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Let `act` happen when the next writer of this place is about to put its marker."""

    def arrange(patch: pytest.MonkeyPatch) -> None:
        original, acted = Bucket.replace, []

        def replace(self: Bucket, *args: Any) -> None:
            if self == place and not acted:
                acted.append(True)
                act()
            original(self, *args)

        patch.setattr(Bucket, "replace", replace)

    return arrange


def test_two_writers(bucket: Make, tmp_path: Path) -> None:
    """R12: on two machines, up to the marker side by side. One wins, the other is told, then goes on."""
    place = bucket()
    convert(place)
    other = {"d": with_names(sample(5, 7, 3), "d")}
    overtake = at_the_end(
        place, lambda: elsewhere(tmp_path, lambda: sx.convert(other, place, append=True, threads=1))
    )
    with pytest.MonkeyPatch.context() as patch:
        overtake(patch)
        with pytest.raises(LockedError, match="another process") as caught:
            append(place)
    assert "again" in str(caught.value)
    assert_holds(sx.open(place), {**files(), **other})
    assert sx.verify(place)["ok"]
    append(place)
    assert sx.open(place).generation == 3
    assert_holds(sx.open(place), {**files(), **other, **more()})
    assert sx.verify(place)["ok"]
    assert sx.verify(place)["objects"] == len(place.list())  # nothing is left of the run that lost


def test_two_writers_of_a_new_store(bucket: Make, tmp_path: Path) -> None:
    place = bucket()
    other = {"d": with_names(sample(5, 7, 3, batch=["d"] * 5), "d")}
    with pytest.MonkeyPatch.context() as patch:
        at_the_end(place, lambda: elsewhere(tmp_path, lambda: sx.convert(other, place, threads=1)))(patch)
        with pytest.raises(LockedError):
            convert(place)
    assert_holds(sx.open(place), other)
    with pytest.raises(UsageError, match="exists already"):
        convert(place)


def test_two_writers_of_the_same(bucket: Make, tmp_path: Path) -> None:
    """The same command on two machines: both succeed, and there is one store."""
    place, whole = bucket(), bucket("whole")
    convert(whole)
    with pytest.MonkeyPatch.context() as patch:
        at_the_end(place, lambda: elsewhere(tmp_path, lambda: convert(place)))(patch)
        convert(place)
    assert objects(place) == objects(whole)


def test_a_writer_that_was_taken_for_dead(bucket: Make, tmp_path: Path) -> None:
    """It wakes up after another has committed and swept: its objects are gone, and it can't win."""
    place = bucket()
    convert(place)
    before = set(place.list())
    other = {"d": with_names(sample(5, 7, 3), "d")}
    with pytest.MonkeyPatch.context() as patch:
        dies_at(70, patch)
        with pytest.raises(Killed):
            append(place)
    left = set(place.list()) - before
    assert left
    assert sx.verify(place)["ok"]  # they may belong to a run that is under way
    elsewhere(tmp_path, lambda: sx.convert(other, place, append=True, threads=1))
    assert not left & set(place.list())
    assert_holds(sx.open(place), {**files(), **other})
    append(place)
    assert_holds(sx.open(place), {**files(), **other, **more()})
    assert sx.verify(place)["ok"]


def test_one_machine_has_a_lock(bucket: Make) -> None:
    place = bucket()
    with Journal(place), pytest.raises(LockedError, match="another process is writing here"):
        convert(place)
    convert(place)


def test_objects_that_vanish_before_the_commit(bucket: Make) -> None:
    """A person with a broom: nothing is committed that is not there, and the next run mends it."""
    place, whole = bucket(), bucket("whole")
    convert(whole)
    with pytest.MonkeyPatch.context() as patch:
        original = Bucket.list

        def swept(self: Bucket, prefix: str = "") -> list[str]:
            found = original(self, prefix)
            victim = [key for key in found if key.startswith("shards/") and key.endswith("data/c/0")]
            if victim and any(key.startswith("parts/") for key in found):
                self.delete(victim[0])
                return original(self, prefix)
            return found

        patch.setattr(Bucket, "list", swept)
        with pytest.raises(StorageError, match="gone"):
            convert(place)
    with pytest.raises(IncompleteError):
        sx.open(place)
    convert(place)
    assert objects(place) == objects(whole)


def test_readers_keep_their_generation(bucket: Make) -> None:
    place = bucket()
    convert(place)
    reader = sx.open(place)
    values = reader.read(0, 13).toarray()
    with pytest.MonkeyPatch.context() as patch:
        every_operation(patch, lambda: np.testing.assert_array_equal(reader.read(0, 13).toarray(), values))
        append(place)
    assert sx.open(place).n_obs == 24


SHARES = {"503": 0.05, "reset": 0.02, "short": 0.01}


def test_with_faults_the_same_store(bucket: Make, proxy: Proxy, tiny_geometry: None) -> None:
    """R14: 5 % 503, 2 % resets, 1 % short bodies: the same objects, at most twice the requests."""
    clean, place = bucket("clean", endpoint=proxy.url), bucket("faulty", endpoint=proxy.url)

    def work(where: Bucket) -> list[Any]:
        convert(where)
        append(where)
        annotate(where)
        assert sx.verify(where)["ok"]
        return everything(where)

    expected = work(clean)
    without = len(proxy.seen)
    proxy.reset(shares=SHARES, seed=1)
    assert work(place) == expected
    counts = proxy.counts
    assert min(counts["503"], counts["reset"], counts["short"]) > 2
    assert without < len(proxy.seen) <= 2 * without
    proxy.reset(shares={})
    assert objects(place) == objects(clean)


@pytest.mark.parametrize("kind", ["403", "404"])
def test_refused_or_lost_chunks_are_no_zeros(bucket: Make, proxy: Proxy, kind: str) -> None:
    """R15: of the matrix, of obs, of indptr; the error names the object."""
    place = bucket(endpoint=proxy.url)
    convert(place)
    expected = IntegrityError if kind == "404" else StorageError
    readers: dict[str, Callable[[], Any]] = {
        "X/data/c/": lambda: sx.open(place).read(0, 5),
        "X/indices/c/": lambda: sx.open(place).read(0, 5),
        "X/indptr/c/": lambda: sx.open(place).read(0, 5),
        "_streamx_file_row/c/": lambda: sx.open(place).obs,
        "var/_index/c/": lambda: sx.open(place).var,
        "zarr.json": lambda: sx.open(place).read(0, 5),
    }
    for part, reader in readers.items():
        proxy.reset(choose=lambda method, path, part=part: kind if part in path else "")
        with pytest.raises(expected) as caught:
            reader()
        assert part in str(caught.value)
    proxy.reset(choose=None)
    assert sx.open(place).read(0, 5).shape == (5, 7)


def test_each_lost_or_cut_object(bucket: Make) -> None:
    """R9 in a bucket: verify names it; what reads it raises an error of ours, or gives the same."""
    place = bucket()
    convert(place)
    expected = everything(place)
    keys = place.list()
    for key in random.Random(0).sample(keys, 12):
        whole = place.read(key)
        for cut in (None, whole[: len(whole) // 2]):
            place.delete(key) if cut is None else place.write(key, cut)
            report = sx.verify(place)
            assert not report["ok"]
            with contextlib.suppress(IntegrityError, BadFileError, IncompleteError):
                assert everything(place) == expected
        place.write(key, whole)
    assert everything(place) == expected


def test_total_failure_leaves_a_run_to_resume(bucket: Make, proxy: Proxy) -> None:
    place, whole = bucket(endpoint=proxy.url, retry_seconds=1.0, timeout=0.5), bucket("whole")
    convert(whole)
    left = [30]

    def later(method: str, path: str) -> str:
        left[0] -= 1
        return "503" if left[0] < 0 else ""

    proxy.reset(choose=later)
    with pytest.raises(StorageError, match="no answer within 1 s"):
        convert(place)
    proxy.reset(choose=None)
    assert place.journal.exists()
    convert(place)
    assert objects(place) == objects(whole)
    assert not place.journal.exists()


def test_inputs_from_a_bucket(bucket: Make, url: str, tmp_path: Path) -> None:
    """Files, a pattern, a folder of AnnData-Zarr: copied first, the same store as of local ones."""
    local = tmp_path / "inputs"
    local.mkdir()
    for key, adata in files().items():
        written(adata, local / f"{key}.h5ad")
    sx.convert(more(), tmp_path / "c", batch_key="_streamx_file")  # any zarr of AnnData will do as an input
    inputs = bucket("inputs")
    for path in local.iterdir():
        inputs.write(path.name, path.read_bytes())
    shard = Folder(tmp_path / "c/shards/000000.zarr")
    for key in shard.list():
        inputs.write(f"c.zarr/{key}", shard.read(key))
    for given, count in (
        ([f"{url}/inputs/*.h5ad"], 13),
        ([f"{url}/inputs/a.h5ad", f"{url}/inputs/c.zarr"], 20),
    ):
        names = ["a.h5ad", "b.h5ad"] if count == 13 else ["a.h5ad"]
        paths: list[Any] = [local / name for name in names] + ([shard.root] if count == 20 else [])
        expected = sx.convert(dict(zip(["a", "bc"[count == 20]], paths, strict=True)), tmp_path / f"e{count}")
        found = sx.convert(given, tmp_path / f"f{count}")
        assert found.n_obs == expected.n_obs == count
        assert everything(found.location) == everything(expected.location)
    assert not (tmp_path / "f13.journal").exists()
    for wrong in (f"{url}/inputs/nothing.h5ad", f"{url}/inputs/*.csv"):
        with pytest.raises(UsageError, match=r"no such object|nothing matches"):
            sx.convert([wrong], tmp_path / "x")


def test_generation_says_which_run(bucket: Make) -> None:
    place = bucket()
    convert(place)
    marker = json.loads(place.read("streamx.json"))
    state = read_generation(place)
    assert marker["path"] == f"generations/000001{state.tag}.json"
    assert len(state.tag) == 13
