"""Pickles of every kind that tools write come out as they were; nothing in them is ever run."""

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from streamx.errors import BadFileError
from streamx.interop.unpickle import Opaque, read_pickle, read_torch

PLAIN: dict[str, Any] = {
    "numbers": [0, -1, 2**70, 1.5, float("inf"), True, None],
    "texts": ["", "Zürich", b"", b"\x00\xff", ("a", ("b",))],
    "sets": [{1, 2}, frozenset({"x"}), set()],
    "nested": {1: {("a", 2): [{}]}},
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "default": collections.defaultdict(list, {"k": [1]}),
    "scalars": [np.int64(-3), np.float32(0.5), np.bool_(True), np.str_("x")],
}
ARRAYS = [
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(["a", "bcd"], dtype=object),
    np.array([["a", 1], [None, 2.5]], dtype=object),
    np.array(["a", "bcd"]),
    np.array([b"ab", b"c"]),
    np.array([True, False]),
    np.array([1, 2], dtype=">i4"),
    np.zeros((0, 4), np.float16),
    np.array([], dtype=object),
    np.array(3.5),
]


def written(path: Path, value: Any, how: int | str) -> Callable[[], Any]:
    """Write by a pickle protocol or by torch; gives what reads it."""
    if how == "torch":
        torch.save(value, path)
        return lambda: read_torch(path)
    path.write_bytes(pickle.dumps(value, protocol=int(how)))
    return lambda: read_pickle(path)


@pytest.mark.parametrize("how", [2, 3, 4, "torch"])
def test_plain_values(tmp_path: Path, how: int | str) -> None:
    got = written(tmp_path / "f", PLAIN, how)()
    assert got == PLAIN
    assert list(got["ordered"]) == ["b", "a"]
    assert type(got["ordered"]) is dict
    assert [type(s) for s in got["scalars"]] == [int, float, bool, str]
    assert [type(v) for v in got["sets"]] == [set, frozenset, set]


@pytest.mark.parametrize("how", [2, 3, 4, "torch"])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays(tmp_path: Path, array: np.ndarray, how: int | str) -> None:
    got = written(tmp_path / "f", {"a": array}, how)()["a"]
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    np.testing.assert_array_equal(got, array)


def test_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    value = {
        "plain": base,
        "view": base.reshape(4, 6)[1:, ::2].t(),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "empty": torch.zeros(0, 5),
        "strange": torch.tensor([True, False]),
        "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
        "net": torch.nn.Linear(3, 2).state_dict(),  # an ordered dict with an attribute
    }
    torch.save(value, tmp_path / "f")
    got = read_torch(tmp_path / "f")
    net, want = got.pop("net"), value.pop("net")
    for name, tensor in value.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
        assert not got[name].requires_grad
    assert all(torch.equal(net[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("how", [2, 4, "torch"])
def test_objects_of_pandas_are_not_rebuilt(tmp_path: Path, how: int | str) -> None:
    frame = pd.DataFrame({"loss": [3.0, 2.0]}, index=pd.RangeIndex(2, name="epoch"))
    kinds = pd.Categorical(["a", "b", "a"])
    got = written(tmp_path / "f", {"history": frame, "kinds": kinds, "after": [1]}, how)()
    assert isinstance(got["history"], Opaque)
    assert got["history"].name.endswith("DataFrame")
    assert isinstance(got["kinds"], Opaque)
    assert got["after"] == [1]


class Bomb:
    """Runs a command when unpickled as usual."""

    def __init__(self, function: Any = os.mkdir, *arguments: Any) -> None:
        self.call = function, arguments or ("exploded",)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class State:
    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return collections.OrderedDict, (), self.state


POSITIONS: dict[str, Callable[[Any], Any]] = {
    "root": lambda bomb: bomb,
    "value": lambda bomb: {"a": {"b": [1, bomb]}},
    "key": lambda bomb: {bomb: 1},
    "tuple": lambda bomb: (1, (2, bomb)),
    "set": lambda bomb: {1, bomb},
    "array": lambda bomb: {"a": np.array([1, bomb], dtype=object)},
    "attribute of a dict": lambda bomb: State({"_metadata": bomb}),
    "cell of a frame": lambda bomb: pd.DataFrame({"a": [bomb]}),
    "name of an index": lambda bomb: pd.Index(["a"], name=bomb),
    "beside tensors": lambda bomb: {"w": torch.ones(2), "x": bomb},
}
CALLS = [
    (os.mkdir, ("exploded",)),
    (eval, ("__import__('os').mkdir('exploded')",)),
    (exec, ("import os; os.mkdir('exploded')",)),
    (getattr, ("", "join")),
    (__import__, ("os",)),
    (io.open, ("exploded", "w")),
    (torch.load, ("f",)),
    (np.load, ("f",)),
    (pickle.loads, (b"",)),
    (pd.read_pickle, ("f",)),
    (map, (len, [""])),
]


@pytest.mark.parametrize("how", [2, 4, "torch"])
@pytest.mark.parametrize("place", POSITIONS)
def test_code_in_every_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, how: int | str
) -> None:
    monkeypatch.chdir(tmp_path)
    if place == "beside tensors" and how != "torch":
        how = "torch"
    read = written(tmp_path / "f", POSITIONS[place](Bomb()), how)
    with pytest.raises(BadFileError, match=r"holds code, which is never run: \w+\.mkdir") as caught:
        read()
    assert caught.value.where == str(tmp_path / "f")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_every_other_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[Any, tuple[Any, ...]]
) -> None:
    monkeypatch.chdir(tmp_path)
    read = written(tmp_path / "f", {"a": Bomb(call[0], *call[1])}, 4)
    with pytest.raises(BadFileError, match="holds code"):
        read()
    assert not (tmp_path / "exploded").exists()


def test_tensors_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for value in (torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        torch.save({"w": value}, tmp_path / "f")
        with pytest.raises(BadFileError, match="holds code"):
            read_torch(tmp_path / "f")
    (tmp_path / "g").write_bytes(pickle.dumps({"w": torch.ones(2)}))  # torch.load inside a plain pickle
    with pytest.raises(BadFileError, match=r"torch\.storage\._load_from_bytes"):
        read_pickle(tmp_path / "g")


PROGRAMS = {
    # an allowed name with arguments that would fill memory
    "array of 100 GB": b"cnumpy.core.multiarray\n_reconstruct\n(I100000000000\nI1\ntR.",
    "array without its bytes": b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I9\nt"
    b"cnumpy\ndtype\n(Vf4\ntRI0\nC\x02abtb.",
    "memo of 16 GB": b"]r\xff\xff\xff\x7f.",
    "extension": b"\x80\x02\x82\x01.",
    "state on an allowed name": b"c_codecs\nencode\n}(X\x01\x00\x00\x00aK\x01ub.",
    "encoding": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7tR.",
    "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x1dOrderedDict.__init__.__globals__\x93.",
    "persistent": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ.",
    "list in itself": b"]\x94h\x00a.",
    "deep": b"]" * 500 + b"a" * 499 + b".",
    "key as deep as the stack": b"\x80\x02}N" + b"\x85" * 2_000_000 + b"Ns.",
    "key of 2^40 values": b"\x80\x02})" + b"\x32\x86" * 40 + b"Ns.",
    "long key, often": b"\x80\x02}(" + b"N" * 20_000 + b"tq\x000" + b"(" + b"h\x00N" * 1_000 + b"u.",
    "cut short": pickle.dumps(PLAIN)[:-5],
    "empty": b"",
    "no pickle": b"gene,count\nCD3E,4\n",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs(tmp_path: Path, name: str) -> None:
    (tmp_path / "f").write_bytes(PROGRAMS[name])
    with pytest.raises(BadFileError, match=f"{tmp_path / 'f'}: "):
        read_pickle(tmp_path / "f")


def test_allowed_names_make_nothing(tmp_path: Path) -> None:
    """Of plain types only what is written out is made."""
    (tmp_path / "f").write_bytes(b"c__builtin__\nbytearray\n(I100000000000\ntR.")
    got = read_pickle(tmp_path / "f")
    assert isinstance(got, Opaque)
    assert (got.name, got.parts) == ("__builtin__.bytearray", [100_000_000_000])


def test_shared_parts_do_not_unfold(tmp_path: Path) -> None:
    value: list[Any] = ["x"]
    for _ in range(50):
        value = [value, value]  # 2^50 leaves
    (tmp_path / "f").write_bytes(pickle.dumps(value))
    assert read_pickle(tmp_path / "f")[0][1][0][0] is not None


def rebuilt(path: Path, change: Callable[[dict[str, bytes]], None], compression: int = 0) -> Path:
    """A file of torch with two weights, its entries changed."""
    torch.save({"a": torch.arange(4.0), "b": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
        root = next(name for name in entries if name.endswith("data.pkl")).removesuffix("data.pkl")
    parts = {name.removeprefix(root): raw for name, raw in entries.items()}
    change(parts)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in parts.items():
            archive.writestr(root + name, raw)
    return path


def swap(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(parts: dict[str, bytes]) -> None:
        assert old in parts["data.pkl"]
        parts["data.pkl"] = parts["data.pkl"].replace(old, new, 1)

    return change


SIZE_4 = b"K\x04\x85"
CHANGES: dict[str, Callable[[dict[str, bytes]], None]] = {
    "storage too short": lambda parts: parts.update({"data/0": parts["data/0"][:-4]}),
    "storage too long": lambda parts: parts.update({"data/0": parts["data/0"] * 2}),
    "storage absent": lambda parts: parts.pop("data/1") and None,
    "no program": lambda parts: parts.pop("data.pkl") and None,
    "tensor beyond its storage": swap(SIZE_4, b"K\x05\x85"),
    "tensor of 4 GB": swap(SIZE_4, b"J\xff\xff\xff\x3f\x85"),
    "negative size": swap(SIZE_4, b"J\xfe\xff\xff\xff\x85"),
    "size that is no number": swap(SIZE_4, b"N\x85"),
    "big-endian": lambda parts: parts.update({"byteorder": b"big   "}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_must_fit_their_bytes(tmp_path: Path, name: str) -> None:
    path = rebuilt(tmp_path / "f", CHANGES[name])
    with pytest.raises(BadFileError, match=f"{path}: can't be read"):
        read_torch(path)


def test_archives(tmp_path: Path) -> None:
    whole = rebuilt(tmp_path / "f", lambda parts: None)
    assert torch.equal(read_torch(whole)["a"], torch.arange(4.0))
    packed = rebuilt(tmp_path / "g", lambda parts: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadFileError):  # what is packed could unfold without limit
        read_torch(packed)
    torch.save({"a": torch.ones(2)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(BadFileError, match=r"torch before 1\.6"):
        read_torch(tmp_path / "old")
    with pytest.raises(BadFileError):
        read_torch(tmp_path / "absent")


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    path = rebuilt(tmp_path / "f", lambda parts: None)
    raw = path.read_bytes()
    first = raw.find(struct.pack("<4f", 0, 1, 2, 3))
    assert first > 0
    path.write_bytes(raw[: first + 5] + bytes([raw[first + 5] ^ 1]) + raw[first + 6 :])
    with pytest.raises(BadFileError, match="CRC"):
        read_torch(path)
