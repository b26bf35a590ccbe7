"""One contract for every kind of location; then what only a bucket can do wrong."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faults import Proxy
from hypothesis import given
from hypothesis import strategies as st

from streamx.errors import IntegrityError, LockedError, StorageError, StreamxError, UsageError
from streamx.store.bucket import Bucket
from streamx.store.folder import Folder
from streamx.store.location import Location, describe, each, follow, open_location, relative
from streamx.store.ranges import merge

QUICK = {"timeout": 1.0, "retry_seconds": 3.0}
ODD = ["a/b/c", "cell type/zarr.json", "über%20#1~é?&+", "x{y}:*", "c/0/.hidden"]


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, bucket: Callable[..., Bucket]) -> Location:
    return Folder(tmp_path / "store") if request.param == "folder" else bucket()


def test_objects(place: Location) -> None:
    assert place.list() == []
    assert (place.exists("a"), place.size("a")) == (False, None)
    place.write("a", b"one", memoryview(b"two"))
    assert (place.exists("a"), place.size("a"), place.read("a")) == (True, 6, b"onetwo")
    place.write("a", b"")
    assert (place.exists("a"), place.size("a"), place.read("a")) == (True, 0, b"")
    place.delete("a")
    place.delete("a")
    assert not place.exists("a")
    place.sync()


def test_names(place: Location) -> None:
    for key in ODD:
        place.write(key, key.encode())
    assert place.list() == sorted(ODD)
    assert [place.read(key) for key in ODD] == [key.encode() for key in ODD]
    assert place.list("a") == ["a/b/c"]
    assert place.list("a/b") == ["a/b/c"]
    assert place.list("a/b/c") == []
    below = place.below("a")
    assert (below.list(), below.read("b/c")) == (["b/c"], b"a/b/c")
    place.write("ab", b"")
    assert place.list("a") == ["a/b/c"]  # a prefix is a folder's name, not some letters
    for key in ("/etc/passwd", "../x", "a/../../x", "\\x", "a\0"):
        for verb in (place.read, place.exists, place.size, place.delete, place.delete_tree, place.below):
            with pytest.raises(StorageError, match="leaves the store"):
                verb(key)
        with pytest.raises(StorageError, match="leaves the store"):
            place.write(key, b"")


def test_delete_tree(place: Location) -> None:
    for key in ("a/x", "a/b/y", "ab/z", "c"):
        place.write(key, b"1")
    place.delete_tree("a")
    place.delete_tree("c")
    place.delete_tree("nothing")
    assert place.list() == ["ab/z"]


def test_ranges(place: Location) -> None:
    whole = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    place.write("x", whole.tobytes())
    place.write("y", whole[::-1].tobytes())
    ranges = [("x", 0, 10, 5), ("x", 99_990, 10, 15), ("y", 500, 70_000, 25), ("x", 10, 5, 0), ("y", 3, 0, 0)]
    out = np.zeros(70_025, np.uint8)
    place.read_ranges(ranges, out)
    for key, start, size, at in ranges:
        source = whole if key == "x" else whole[::-1]
        np.testing.assert_array_equal(out[at : at + size], source[start : start + size])
    place.read_ranges([], out)
    for broken in (("nothing", 0, 1, 0), ("x", 99_999, 2, 0), ("x", 200_000, 1, 0)):
        with pytest.raises(IntegrityError):
            place.read_ranges([("y", 0, 4, 4), broken], out)
    with pytest.raises(IntegrityError, match="missing"):
        place.read("nothing")


def test_replace(place: Location) -> None:
    place.replace("m", b"1", None)
    place.replace("m", b"1", None)  # it is that already
    place.replace("m", b"2", b"1")
    for before in (None, b"1"):
        with pytest.raises(LockedError, match="another process"):
            place.replace("m", b"3", before)
    assert place.read("m") == b"2"
    with pytest.raises(LockedError):
        place.replace("other", b"3", b"2")
    assert place.list() == ["m"]


def test_put_tree(place: Location) -> None:
    below = place.below("q.zarr")
    below.put_tree(each({"zarr.json": b"{}", "obs/zarr.json": b"1", "obs/x/c/0": b"2"}))
    below.put_tree(each({"zarr.json": b"{2}", "obs/zarr.json": b"3"}))
    assert {key: place.read(key) for key in place.list()} == {
        "q.zarr/zarr.json": b"{2}",
        "q.zarr/obs/zarr.json": b"3",
    }


def test_value(place: Location) -> None:
    """A location is a value: equal to another of the same place, also after a trip to another process."""
    place.write("a", b"1")
    again = pickle.loads(pickle.dumps(place))
    assert again == place
    assert hash(again) == hash(place)
    assert again.read("a") == b"1"
    assert again.below("x") != place
    assert open_location(place) is place
    assert str(place) == str(place.root)


def test_relations(place: Location, tmp_path: Path) -> None:
    for other in (
        place.below("a"),
        follow(place, "../view"),
        Folder(tmp_path / "b"),
        Bucket("s3://other/x/y"),
    ):
        assert follow(place, relative(other, place)) == other
    assert relative(follow(place, "../view"), place) == "../view"
    assert str(tmp_path) not in relative(place.below("a"), place)


def test_zarr(place: Location) -> None:
    """What zarr asks of a store: metadata, listing, ranges; a lost object is an error if it is expected."""
    import zarr

    from streamx.store.draft import Draft

    draft = Draft()
    draft.group("", {"a": 1})
    draft.group("g", {})
    values = np.arange(1000, dtype=np.int32)
    draft.array("x", values)
    sharded = draft.empty("g/y", (1000,), np.int32, chunks=(10,), shards=(100,))
    sharded[:] = values
    objects = {f"s.zarr/{key}": data for key, data in draft.take().items()}
    for key, data in objects.items():
        place.write(key, data)
    expected = {key: describe(data) for key, data in objects.items()}
    for known in (expected, {}):
        group = zarr.open_group(place.zarr("s.zarr", known), mode="r", zarr_format=3)
        assert group.attrs["a"] == 1
        assert sorted(group) == ["g", "x"]
        assert sorted(group["g"]) == ["y"]
        np.testing.assert_array_equal(group["x"][:], values)
        np.testing.assert_array_equal(group["g/y"][:], values)
        np.testing.assert_array_equal(group["g/y"][395:411], values[395:411])
    place.delete("s.zarr/g/y/c/3")
    group = zarr.open_group(place.zarr("s.zarr", expected), mode="r", zarr_format=3)
    with pytest.raises(IntegrityError, match=r"g/y/c/3.*missing"):
        group["g/y"][:]
    place.write("s.zarr/g/y/c/3", objects["s.zarr/g/y/c/2"][:-9])
    with pytest.raises(IntegrityError):
        group["g/y"][:]


RANGES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 200), st.integers(0, 50)), max_size=20)


@given(RANGES, st.integers(0, 30))
def test_merged_ranges(wanted: list[tuple[str, int, int]], gap: int) -> None:
    """Every byte asked for is in one request, no two requests of an object are close, none is too long."""
    at = np.concatenate([[0], np.cumsum([size for _, _, size in wanted])]).tolist()
    ranges = [(*one, at[i]) for i, one in enumerate(wanted)]
    requests = merge(ranges, gap)
    parts = sorted((r.key, *part) for r in requests for part in r.parts)
    assert parts == sorted(ranges)
    for request in requests:
        assert request.start == min(start for start, _, _ in request.parts)
        assert request.stop == max(start + size for start, size, _ in request.parts)
    for a, b in pairwise(requests):
        assert a.key < b.key or a.stop + gap < b.start


def test_one_request_per_run(bucket: Callable[..., Bucket], proxy: Proxy) -> None:
    place = bucket(endpoint=proxy.url)
    place.write("x", bytes(1 << 20))
    proxy.reset()
    out = np.ones(300, np.uint8)
    place.read_ranges([("x", 100 * i, 100, 100 * i) for i in range(3)], out)
    assert [(one.method, one.n_bytes) for one in proxy.seen] == [("GET", 300)]
    assert not out.any()
    proxy.reset()
    place.read_ranges([("x", 100_000 * i, 100, 100 * i) for i in range(3)], out)
    assert [(one.method, one.n_bytes) for one in proxy.seen] == [("GET", 100)] * 3


def test_requests_overlap_and_are_bounded(bucket: Callable[..., Bucket], proxy: Proxy) -> None:
    place = bucket(endpoint=proxy.url, concurrency=8)
    place.write("x", bytes(1 << 20))
    proxy.reset(latency=0.2)
    begun = time.monotonic()
    place.read_ranges([("x", 60_000 * i, 10, 10 * i) for i in range(16)], np.empty(160, np.uint8))
    assert 0.4 <= time.monotonic() - begun < 1.6  # 16 in two rounds, not in one, nor in 16


@pytest.mark.parametrize("kind", ["503", "reset", "lost", "short", "hang"])
def test_faults_that_pass(bucket: Callable[..., Bucket], proxy: Proxy, kind: str) -> None:
    """Each verb meets the fault twice and succeeds the third time, more slowly."""
    place = bucket(endpoint=proxy.url, timeout=0.3, retry_seconds=20)
    left = [0]

    def twice(method: str, path: str) -> str:
        left[0] -= 1
        return kind if left[0] >= 0 else ""

    out = np.empty(3, np.uint8)
    verbs: list[Callable[[], object]] = [
        lambda: place.write("a/x", b"abcdef"),
        lambda: place.read("a/x"),
        lambda: place.read_ranges([("a/x", 1, 3, 0)], out),
        lambda: place.size("a/x"),
        lambda: place.list("a"),
        lambda: place.replace("m", b"1", None),
        lambda: place.replace("m", b"2", b"1"),
        lambda: place.delete_tree("m"),
        lambda: place.delete("a/x"),
    ]
    for verb in verbs:
        left[0] = 2
        proxy.reset(choose=twice)
        begun = time.monotonic()
        verb()
        met = proxy.counts[kind]
        assert met == 2 or kind == "short"  # an answer without a body can't be cut
        assert met < 2 or time.monotonic() - begun > 0.15
    assert out.tobytes() == b"bcd"
    assert place.list() == []


@pytest.mark.parametrize("kind", ["503", "reset", "hang"])
def test_total_failure_ends(bucket: Callable[..., Bucket], proxy: Proxy, kind: str) -> None:
    place = bucket(endpoint=proxy.url, timeout=0.2, retry_seconds=1.5)
    proxy.reset(shares={kind: 1.0})
    for verb in (place.read, place.list, lambda key: place.write(key, b"x")):
        proxy.reset()
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"no answer within 1\.5 s") as caught:
            verb("a")
        assert time.monotonic() - begun < 3.5  # an upload that hangs: 1.5 s, and five times 0.2
        assert 2 <= len(proxy.seen) < 10  # repeated, ever more slowly
        assert "again" in str(caught.value)


@pytest.mark.parametrize("kind", ["403", "404"])
def test_a_refusal_is_no_absence(bucket: Callable[..., Bucket], proxy: Proxy, kind: str) -> None:
    """R15: at once, and never as an empty answer."""
    place = bucket(endpoint=proxy.url)
    place.write("x", b"abc")
    proxy.reset(shares={kind: 1.0})
    expected = StorageError if kind == "403" else IntegrityError
    for verb in (lambda: place.read("x"), lambda: place.read_ranges([("x", 0, 1, 0)], np.empty(1, np.uint8))):
        with pytest.raises(expected):
            verb()
    with pytest.raises(StorageError):
        place.list()
    with pytest.raises(StorageError):
        place.write("y", b"")
    assert len(proxy.seen) == 4
    if kind == "403":
        for verb in (lambda: place.exists("x"), lambda: place.delete("x")):
            with pytest.raises(StorageError, match="denied") as caught:
                verb()
            assert "AWS_ACCESS_KEY_ID" in str(caught.value)


def test_no_such_bucket() -> None:
    place = open_location("s3://nobody/store")
    for verb in (lambda: place.write("x", b""), lambda: place.list(), lambda: place.replace("m", b"", None)):
        with pytest.raises(StorageError, match="no such bucket"):
            verb()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://x/y", "no scheme"),
        ("https://x/y", "no scheme"),
        ("s3://", "form"),
        ("s3://key:hush@bucket/x", "form"),
        ("s3://bucket/x?token=hush", "form"),
        ("s3://bucket/../x", "leaves"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(StreamxError, match=words) as caught:
        open_location(url)
    assert "hush" not in str(caught.value)


def test_schemes_and_options() -> None:
    for url in ("s3://bucket/a/b/", "gs://bucket/a/b", "az://container/a/b"):
        place = open_location(url, anonymous=True)
        assert str(place) == url.rstrip("/")
    with pytest.raises(UsageError, match="unknown setting 'colour'"):
        open_location("s3://bucket/x", colour="red")
    with pytest.raises(UsageError, match="buckets only"):
        open_location("folder", endpoint="http://x")
    assert open_location("s3://bucket").journal != open_location("s3://bucket/bucket").journal
    for url in ("gs://bucket/a", "az://container/a"):
        settings = {"account_name": "somebody"} if url.startswith("az") else {}
        assert open_location(url, anonymous=True, settings=settings)._client is not None


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install 'streamx\[cloud\]'"):
        open_location("s3://bucket/x")


def test_secrets_stay_secret(server: str, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """R34: neither in the repr, nor in any error."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    keys = {"access_key_id": "AKIAhush1", "secret_access_key": "hush2"}
    place = Bucket(f"{url}/x", endpoint=proxy.url, settings=keys, retry_seconds=0.3)
    place.write("a", b"1")
    assert pickle.loads(pickle.dumps(place)).read("a") == b"1"
    said = [repr(place), str(place), repr(place.config)]
    for kind in ("503", "403", "404", "reset"):
        proxy.reset(shares={kind: 1.0})
        with pytest.raises(StreamxError) as caught:
            place.read("a")
        said += [str(caught.value), repr(caught.value.__cause__)]
    with pytest.raises(UsageError) as wrong:
        Bucket(f"{url}/x", settings={"hush3": "hush4"}).read("a")
    assert not [text for text in (*said, str(wrong.value)) if "hush" in text]
    assert keys["secret_access_key"] not in str(place.journal)


def test_no_credentials(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in words, not after minutes of asking a metadata service that isn't there."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="no credentials") as caught:
        open_location(url).read("a")
    assert "AWS_SKIP_SIGNATURE" in str(caught.value)
