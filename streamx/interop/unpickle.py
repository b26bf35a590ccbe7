"""Pickles from strangers, read without running anything.

A pickle is a program that names functions and calls them. Here every name that such files need stands for an
inert node, which keeps what it is given; any other name is refused. Only when the program has ended are the
nodes of tensors and arrays turned into values, by code that checks sizes against bytes. What the result holds
is plain: numbers, texts, lists, dicts, numpy arrays, tensors; objects of pandas stay :class:`Opaque`.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamx.errors import BadFileError
from streamx.interop.program import DEEPEST, LARGEST, Refused, bounded

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PLAIN_DTYPE = re.compile(r"[biufc]\d+|U\d+|S\d+|O8?|\?")


class Opaque:
    """An object that is not rebuilt: its name, and what it would have been made from.

    Attributes
    ----------
    name
        Such as ``pandas.core.indexes.base.Index``.
    parts
        Its arguments, then its states, as plain values.
    """

    def __init__(self, name: str, parts: list[Any]) -> None:
        self.name, self.parts = name, parts

    def __repr__(self) -> str:
        return f"<{self.name}, not rebuilt>"


def read_pickle(path: Path) -> Any:
    """The value of a plain pickle.

    Raises
    ------
    BadFileError
        If it is absent, damaged, too large, or names anything that is not on the list.
    """
    return _guarded(path, lambda: _value(bounded(path.read_bytes()), _no_storage))


def read_torch(path: Path) -> Any:
    """The value of a file of ``torch.save``; tensors on the CPU, which may share memory with each other.

    Raises
    ------
    BadFileError
        As :func:`read_pickle`; also for the layout that torch wrote before 1.6, and if sizes in it do not fit
        its bytes.
    """

    def read() -> Any:
        if not zipfile.is_zipfile(path):
            raise ValueError("not written by torch.save, or by torch before 1.6")
        with zipfile.ZipFile(path) as archive:
            storages = _Storages(archive, path.stat().st_size)
            return _value(storages.program(), storages.read)

    return _guarded(path, read)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Refused as error:
        raise BadFileError(
            f"holds code, which is never run: {first_line(error)}",
            where=str(path),
            fix="get the model from a source that you trust, as its program wrote it",
        ) from None
    except Exception as error:
        # A pickle is a program: damaged, it can fail in any way.
        raise BadFileError(f"can't be read: {first_line(error)}", where=str(path)) from None


class _Storages:
    """The bytes of the tensors of a file of torch: entries ``data/0``, ... beside ``data.pkl``."""

    def __init__(self, archive: zipfile.ZipFile, n_bytes: int) -> None:
        self._archive, self._left = archive, n_bytes
        self._entries = {info.filename: info for info in archive.infolist()}
        programs = [name for name in self._entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(programs) != 1:
            raise ValueError("not written by torch.save")
        self._root = programs[0].removesuffix("data.pkl")
        self._found: dict[str, Tensor] = {}
        if self._entries.get(f"{self._root}byteorder") and self._bytes("byteorder", 6) != b"little":
            raise ValueError("bytes of a big-endian machine")

    def program(self) -> bytes:
        info = self._entries[f"{self._root}data.pkl"]
        if info.file_size > LARGEST:
            raise ValueError(f"{info.file_size:,} bytes of settings")
        return bounded(self._archive.read(info))

    def read(self, key: str, dtype: torch.dtype, n: int) -> Tensor:
        if key not in self._found:
            raw = self._bytes(f"data/{key}", n * dtype.itemsize)
            self._found[key] = (
                torch.frombuffer(bytearray(raw), dtype=dtype) if n else torch.empty(0, dtype=dtype)
            )
        stored = self._found[key]
        if stored.dtype != dtype or len(stored) != n:
            raise ValueError(f"tensor {key} of two kinds")
        return stored

    def _bytes(self, name: str, n_bytes: int) -> bytes:
        """An entry stored as it is, of this size: none then unfolds to more than the file has."""
        info = self._entries[self._root + name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != n_bytes:
            raise ValueError(f"{name} has {info.file_size:,} bytes, expected {n_bytes:,}")
        self._left -= n_bytes
        if self._left < 0:
            raise ValueError("more tensors than bytes")
        return self._archive.read(info)


def _no_storage(key: str, dtype: torch.dtype, n: int) -> Tensor:
    raise Refused("tensors in a plain pickle")


class _Node:
    """Stands for a call or an object: keeps the arguments and states, does nothing."""

    name = ""

    def __new__(cls, *parts: Any) -> _Node:
        node = super().__new__(cls)
        node.parts = list(parts)
        return node

    def __init__(self, *parts: Any) -> None:
        self.parts: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)


class _Dict(dict[Any, Any]):
    """For ordered and default dicts; their attributes (torch's _metadata) and factories are dropped."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(parts[-1] if parts and isinstance(parts[-1], (list, dict)) else ())

    def __setstate__(self, state: Any) -> None:
        pass


def _names() -> dict[tuple[str, str], type]:
    """Every name that is allowed -> the class that stands for it."""
    pandas = (
        *("pandas.core.frame.DataFrame", "pandas.core.series.Series", "pandas.DataFrame", "pandas.Series"),
        *("pandas.core.indexes.base._new_Index", "pandas.core.indexes.base.Index"),
        *("pandas.indexes.base._new_Index", "pandas.indexes.base.Index", "pandas.Index"),
        *("pandas.core.indexes.range.RangeIndex", "pandas.RangeIndex"),
        *("pandas.core.indexes.numeric.Int64Index", "pandas.core.indexes.numeric.Float64Index"),
        "pandas.core.internals.managers.BlockManager",
        "pandas.core.internals.managers.SingleBlockManager",
        *("pandas._libs.internals._unpickle_block", "pandas.core.internals.blocks.new_block"),
        *("pandas._libs.arrays.__pyx_unpickle_NDArrayBacked", "pandas._libs.missing.NA", "pandas.NA"),
        *("pandas.core.arrays.string_.StringArray", "pandas.arrays.StringArray"),
        *("pandas.core.arrays.string_.StringDtype", "pandas.StringDtype"),
        *("pandas.core.arrays.categorical.Categorical", "pandas.Categorical"),
        *("pandas.core.dtypes.dtypes.CategoricalDtype", "pandas.CategoricalDtype"),
    )
    plain = (
        "list",
        "tuple",
        "set",
        "frozenset",
        "dict",
        "bytes",
        "bytearray",
        "slice",
        "int",
        "float",
        "str",
    )
    nodes = [
        *pandas,
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in plain if name != "dict"),
        *("numpy.dtype", "numpy.ndarray", "_codecs.encode"),
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
        *(f"torch.{name}" for name in _STORAGES),
    ]
    dicts = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
    split = {name: tuple(name.rsplit(".", 1)) for name in (*nodes, *dicts)}
    classes = {name: _Dict if name in dicts else type("Node", (_Node,), {"name": name}) for name in split}
    return {(split[name][0], split[name][1]): found for name, found in classes.items()}


_ALLOWED = _names()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        node = _Node(*pid)
        node.name = "storage"
        return node


Storage = Callable[[str, torch.dtype, int], Tensor]


def _value(program: bytes, storage: Storage) -> Any:
    return _Values(storage).of(_Unpickler(io.BytesIO(program)).load(), 0)


class _Values:
    """Turns nodes into values, each once: a small file may name one list a thousand times."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[int, Any] = {}

    def of(self, value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} times")
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return value
        if isinstance(value, type):  # a name that is not called, such as the list of defaultdict(list)
            return Opaque(getattr(value, "name", "dict"), [])
        if id(value) not in self._known:
            # A cycle is as deep as one likes, and ends above.
            self._known[id(value)] = self._made(value, depth + 1)
        return self._known[id(value)]

    def _made(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return {self.of(key, depth): self.of(item, depth) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(self.of(item, depth) for item in value)
        if not isinstance(value, _Node) or value.name == "storage":
            raise Refused(f"a {type(value).__name__} by itself")
        if value.name == "_codecs.encode":
            text, encoding = value.parts
            return _latin1(text, encoding)
        leaf = value.name.rpartition(".")[2]
        if value.name.startswith("torch.") and leaf == "_rebuild_tensor_v2":
            return self._tensor(*value.parts[:4])
        if value.name.startswith("torch.") and leaf == "_rebuild_parameter":
            return self.of(value.parts[0], depth)
        if value.name.startswith("numpy.") and leaf == "_reconstruct":
            return self._array(value.parts, depth)
        if value.name.startswith("numpy.") and leaf == "scalar":
            kind, raw = value.parts
            return np.frombuffer(self.of(raw, depth), _dtype(kind), count=1)[0].item()
        parts = [self.of(part, depth) for part in value.parts]
        if leaf in ("set", "frozenset", "list", "tuple", "bytes") and value.name.startswith(
            ("builtins", "__b")
        ):
            return _built(leaf, parts)
        return Opaque(value.name, parts)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        if not isinstance(storage, _Node) or storage.name != "storage":
            raise ValueError("a tensor without its storage")
        _, kind, key, _, n = storage.parts
        numbers = (n, offset, *size, *stride)
        if not all(type(i) is int and i >= 0 for i in numbers) or len(size) != len(stride):
            raise ValueError("a tensor of impossible size")
        if math.prod(size) > max(n, 1):
            raise ValueError("a tensor larger than its storage")
        flat = self._storage(str(key), _STORAGES[kind.name.rpartition(".")[2]], n)
        return flat.as_strided(tuple(size), tuple(stride), offset)  # which refuses to reach beyond

    def _array(self, parts: list[Any], depth: int) -> np.ndarray:
        if len(parts) != 4 or not isinstance(parts[3], tuple):
            raise ValueError("an array without values")
        _, shape, kind, fortran, raw = parts[3]
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array of impossible shape")
        dtype = _dtype(kind)
        order: Literal["F", "C"] = "F" if fortran else "C"
        if dtype.hasobject:
            if not isinstance(raw, list) or len(raw) != math.prod(shape):
                raise ValueError("an array whose values do not fit its shape")
            flat = np.empty(len(raw), dtype=object)
            flat[:] = [self.of(item, depth) for item in raw] if raw else []
            return flat.reshape(shape, order=order)
        raw = self.of(raw, depth)
        if not isinstance(raw, bytes) or len(raw) != math.prod(shape) * dtype.itemsize:
            raise ValueError("an array whose bytes do not fit its shape")
        return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _dtype(node: Any) -> np.dtype:
    """numpy's plain types; not structured ones, nor dates."""
    if not isinstance(node, _Node) or node.name != "numpy.dtype" or not node.parts:
        raise ValueError("an array of unknown type")
    kind = node.parts[0]
    state = node.parts[-1] if isinstance(node.parts[-1], tuple) else (3, "|")
    if not isinstance(kind, str) or not _PLAIN_DTYPE.fullmatch(kind) or state[1] not in ("<", ">", "|", "="):
        raise ValueError(f"an array of type {kind!r}")
    return np.dtype(kind).newbyteorder(state[1])


def _latin1(text: Any, encoding: Any) -> bytes:
    """How bytes are written for the older pickle protocols."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("_codecs.encode with unusual arguments")
    return text.encode("latin1")


def _built(leaf: str, parts: list[Any]) -> Any:
    if leaf == "bytes":
        if parts:
            raise Refused("bytes with arguments")
        return b""
    build: Any = {"set": set, "frozenset": frozenset, "list": list, "tuple": tuple}[leaf]
    if len(parts) > 1 or (parts and not isinstance(parts[0], (list, tuple))):
        raise Refused(f"{leaf} with unusual arguments")
    return build(*parts)
