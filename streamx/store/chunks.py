"""A one-dimensional sharded array as addresses: where the bytes of each of its chunks lie.

zarr-python spends more time on each chunk's bookkeeping than the decoder on its values. Only the layouts that
streamx writes are known; for any other :func:`open_chunks` gives None, and zarr reads them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from streamx.errors import IntegrityError
from streamx.store.kept import Kept
from streamx.store.location import RESTORE, Location, ObjectTable, crc32c, describe

ABSENT = 2**64 - 1  # offset of a chunk that holds the fill value only
CHECKSUM = 4
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclass(frozen=True)
class Frames:
    """Where the bytes of some chunks lie.

    Attributes
    ----------
    shard_k
        Zarr shard of each chunk, int64.
    frame_k3
        (descriptor, first byte, bytes), int64; descriptor -1 where objects have none. No bytes: all zeros.
    files
        What keeps the descriptors open.
    """

    shard_k: np.ndarray
    frame_k3: np.ndarray
    files: list[Any] = field(default_factory=list)


class Chunks:
    """A sharded array of known layout.

    Attributes
    ----------
    prefix
        Key of the array below the location.
    n, chunk, per_shard
        Values; values per chunk; chunks per zarr shard.
    coding
        (chunks are blosc frames, values are stored as differences).
    """

    def __init__(
        self,
        location: Location,
        prefix: str,
        dtype: np.dtype,
        n: int,
        chunk: int,
        per_shard: int,
        coding: tuple[bool, bool],
        expected: ObjectTable,
        kept: Kept,
    ) -> None:
        self.location, self.prefix, self.dtype, self.n = location, prefix, dtype, n
        self.chunk, self.per_shard, self.coding = chunk, per_shard, coding
        self.expected, self.kept = expected, kept

    def index(self, shard: int) -> np.ndarray | None:
        """First byte and bytes of each chunk of a zarr shard, unsigned (n_chunks, 2); None: only zeros."""
        read = partial(_read_index, self.location, self.prefix, self.per_shard, self.expected, shard)
        return self.kept.parts.get((self.prefix, shard), read)

    def _file(self, shard: int) -> _File:
        return self.kept.files.get((self.prefix, shard), partial(_File, self.location, self.prefix, shard))

    def frames(self, number_k: np.ndarray) -> Frames:
        """Where the bytes of these chunks, ascending, lie.

        Raises
        ------
        IntegrityError
            If a zarr shard is missing, or its index is not what was written.
        """
        shard_k, within_k = np.divmod(number_k, self.per_shard)
        frame_k3 = np.zeros((len(number_k), 3), np.int64)
        files = []
        cuts = np.append(np.flatnonzero(np.diff(shard_k, prepend=-1)), len(shard_k)).tolist()
        for low, high in pairwise(cuts):
            index = self.index(int(shard_k[low]))
            if index is not None:
                file = self._file(int(shard_k[low]))
                files.append(file)
                frame_k3[low:high, 0] = file.descriptor
                frame_k3[low:high, 1:] = index[within_k[low:high]]
        return Frames(shard_k, frame_k3, files)

    def ranges(self, frames: Frames, at: int) -> tuple[list[tuple[str, int, int, int]], np.ndarray, int]:
        """Without descriptors: one range per run of chunks, side by side in a buffer from `at` on.

        Returns
        -------
        What :meth:`Location.read_ranges` takes; frames (k, 3) in the buffer; where the buffer ends.
        """
        first_k, size_k = frames.frame_k3[:, 1], frames.frame_k3[:, 2]
        begins = np.ones(len(first_k), bool)
        begins[1:] = (frames.shard_k[1:] != frames.shard_k[:-1]) | (first_k[1:] != first_k[:-1] + size_k[:-1])
        run_k = np.cumsum(begins) - 1
        before_k = np.cumsum(size_k) - size_k
        given_k3 = np.stack([np.full_like(size_k, -1), at + before_k, size_k], axis=1)
        starts = np.flatnonzero(begins)
        bytes_r = np.bincount(run_k, weights=size_k).astype(np.int64)
        ranges = [
            (self.object_of(shard), first, size, at + before)
            for shard, first, size, before in zip(
                frames.shard_k[starts].tolist(),
                first_k[starts].tolist(),
                bytes_r.tolist(),
                before_k[starts].tolist(),
                strict=True,
            )
            if size
        ]
        return ranges, given_k3, at + int(size_k.sum())

    def object_of(self, shard: int) -> str:
        """Key of a zarr shard."""
        return f"{self.prefix}/c/{shard}"

    def damaged(self, shard: int, what: str) -> IntegrityError:
        return IntegrityError(what, where=f"{self.location}/{self.object_of(shard)}", fix=RESTORE)


class _File:
    """A descriptor, open for as long as somebody holds this; -1 where objects have none."""

    def __init__(self, location: Location, prefix: str, shard: int) -> None:
        self.descriptor = location.descriptor(f"{prefix}/c/{shard}")

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)


def _read_index(
    location: Location, prefix: str, per_shard: int, expected: ObjectTable, shard: int
) -> np.ndarray | None:
    """See :meth:`Chunks.index`."""
    key = f"{prefix}/c/{shard}"
    size = expected[key][0] if key in expected else location.size(key)
    if size is None:
        return None
    raw = np.empty(per_shard * 16 + CHECKSUM, np.uint8)
    if size >= len(raw):
        location.read_ranges([(key, size - len(raw), len(raw), 0)], raw)
        body, checksum = raw[:-CHECKSUM], raw[-CHECKSUM:]
    if size < len(raw) or crc32c(body.data) != f"{int.from_bytes(checksum.tobytes(), 'little'):08x}":
        raise IntegrityError("the index of its chunks is damaged", where=f"{location}/{key}", fix=RESTORE)
    index = body.view("<u8").reshape(-1, 2)
    return np.where(index == ABSENT, 0, index).astype(np.uint32 if size < 1 << 32 else np.int64)


def open_chunks(location: Location, prefix: str, expected: ObjectTable, kept: Kept) -> Chunks | None:
    """The array at a prefix, or None if it is not of a layout that is known here.

    Parameters
    ----------
    expected
        Objects that must exist, from the manifest.
    kept
        What was read before, and open files.

    Raises
    ------
    IntegrityError
        If its metadata are missing or damaged.
    """
    key = f"{prefix}/zarr.json"
    raw = location.read(key)
    if key in expected and describe(raw) != list(expected[key]):
        raise IntegrityError("metadata are damaged", where=f"{location}/{key}", fix=RESTORE)
    about = json.loads(raw)
    geometry = _known_geometry(about)
    if geometry is None:
        return None
    shard, chunk, coding = geometry
    dtype = np.dtype(about["data_type"])
    return Chunks(location, prefix, dtype, about["shape"][0], chunk, shard // chunk, coding, expected, kept)


def _known_geometry(about: dict[str, Any]) -> tuple[int, int, tuple[bool, bool]] | None:
    """Values per zarr shard and chunk, and how chunks are coded; None for a layout of others."""
    try:
        (sharding,) = about["codecs"]
        inner = sharding["configuration"]
        codecs = inner["codecs"]
        names = [codec["name"] for codec in codecs]
        delta = names[0] == "numcodecs.delta"
        if delta:
            stored = {codecs[0]["configuration"].get(name) for name in ("dtype", "astype")}
            delta_known = {np.dtype(name) for name in stored - {None}} == {np.dtype(about["data_type"])}
            codecs, names = codecs[1:], names[1:]
        (shard,), (chunk,) = about["chunk_grid"]["configuration"]["chunk_shape"], inner["chunk_shape"]
        known = (
            len(about["shape"]) == 1
            and np.dtype(about["data_type"]).kind in ("ui" if delta else "uif")
            and about["fill_value"] == 0
            and about["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            and sharding["name"] == "sharding_indexed"
            and inner["index_location"] == "end"
            and inner["index_codecs"] == _INDEX_CODECS
            and codecs[0] in (_INDEX_CODECS[0], {"name": "bytes"})  # one byte has no order
            and names in (["bytes", "blosc", "crc32c"], ["bytes", "crc32c"])
            and shard % chunk == 0
            and (not delta or delta_known)
        )
    except (KeyError, ValueError, TypeError, IndexError):
        return None
    return (shard, chunk, ("blosc" in names, delta)) if known else None
