"""Values of a sharded array, read without zarr: the shard's index once, then one read per run of chunks.

zarr-python spends more time on each chunk's bookkeeping than the decoder on its values: 0.6 CPU seconds for
the counts of 50,000 cells x 20,000 genes, which take 0.3 here. Only the layouts that streamx writes are
known; for any other :func:`open_values` gives None, and zarr reads them. Every checksum is verified.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamx.errors import IntegrityError
from streamx.store.location import RESTORE, Location, ObjectTable, crc32c, describe

ABSENT = 2**64 - 1  # offset of a chunk that holds the fill value only
CHECKSUM = 4
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclass(frozen=True)
class Values:
    """A one-dimensional array in zarr shards.

    Attributes
    ----------
    prefix
        Key of the array below the location.
    n
        Values.
    shard, chunk
        Values per zarr shard and per chunk.
    compressed
        Whether chunks are blosc frames (else plain bytes).
    expected
        Objects that must exist.
    """

    location: Location
    prefix: str
    dtype: np.dtype
    n: int
    shard: int
    chunk: int
    compressed: bool
    expected: ObjectTable
    _indexes: dict[int, np.ndarray] = field(default_factory=dict)

    def read(self, low: int, high: int) -> np.ndarray:
        """Values low..high.

        Raises
        ------
        IntegrityError
            If bytes are missing or not those that were written.
        """
        out = np.empty(high - low, dtype=self.dtype)
        for number in range(low // self.shard, -(-high // self.shard)):
            first = number * self.shard
            a, b = max(low, first), min(high, first + self.shard, self.n)
            self._read_shard(number, a - first, b - first, out[a - low : b - low])
        return out

    def _read_shard(self, number: int, low: int, high: int, out: np.ndarray) -> None:
        key = f"{self.prefix}/c/{number}"
        try:
            descriptor = os.open(self.location.path(key), os.O_RDONLY)
        except FileNotFoundError:
            if key in self.expected:
                raise self._damaged(key, "object is missing") from None
            out[:] = 0  # a shard of zeros alone is not written
            return
        try:
            index = self._index(number, key, descriptor)
            chunks = np.arange(low // self.chunk, -(-high // self.chunk))
            stored = chunks[index[chunks, 0] != ABSENT]
            if len(stored) < len(chunks):
                out[:] = 0
            if len(stored):
                begin = int(index[stored, 0].min())
                end = int((index[stored, 0] + index[stored, 1]).max())
                raw = os.pread(descriptor, end - begin, begin)
                for k in stored.tolist():
                    offset, size = int(index[k, 0]) - begin, int(index[k, 1])
                    self._decode(raw[offset : offset + size], size, k * self.chunk - low, out, key)
        finally:
            os.close(descriptor)

    def _decode(self, frame: bytes, size: int, at: int, out: np.ndarray, key: str) -> None:
        """One chunk into `out`, where its first value belongs at position `at` (perhaps outside)."""
        body, checksum = frame[:-CHECKSUM], frame[-CHECKSUM:]
        if len(frame) != size or crc32c(body) != f"{int.from_bytes(checksum, 'little'):08x}":
            raise self._damaged(key, "a chunk's bytes are not those that were written")
        inside = at >= 0 and at + self.chunk <= len(out)
        target = out[at : at + self.chunk] if inside else np.empty(self.chunk, dtype=self.dtype)
        if self.compressed:
            from numcodecs import blosc

            blosc.decompress(body, target)
        else:
            target[:] = np.frombuffer(body, dtype=self.dtype)
        if not inside:
            a, b = max(at, 0), min(at + self.chunk, len(out))
            out[a:b] = target[a - at : b - at]

    def _index(self, number: int, key: str, descriptor: int) -> np.ndarray:
        """Offset and size of each chunk of a shard, uint64 (n_chunks, 2)."""
        index = self._indexes.get(number)
        if index is None:
            length = self.shard // self.chunk * 16 + CHECKSUM
            raw = os.pread(descriptor, length, max(0, os.fstat(descriptor).st_size - length))
            body = raw[:-CHECKSUM]
            if len(raw) != length or crc32c(body) != f"{int.from_bytes(raw[-CHECKSUM:], 'little'):08x}":
                raise self._damaged(key, "the index of its chunks is damaged")
            index = self._indexes[number] = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
        return index

    def _damaged(self, key: str, what: str) -> IntegrityError:
        return IntegrityError(what, where=f"{self.location}/{key}", fix=RESTORE)


def open_values(location: Location, prefix: str, expected: ObjectTable) -> Values | None:
    """The array at a prefix, or None if it is not of a layout that is known here.

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
    shard, chunk, compressed = geometry
    import zarr.codecs.blosc  # noqa: F401  (switches off blosc's own threads, as for all of zarr)

    dtype = np.dtype(about["data_type"])
    return Values(location, prefix, dtype, about["shape"][0], shard, chunk, compressed, expected)


def _known_geometry(about: dict[str, Any]) -> tuple[int, int, bool] | None:
    """Values per shard and chunk, and whether they are compressed; None for a layout of others."""
    try:
        (sharding,) = about["codecs"]
        inner = sharding["configuration"]
        chunk_codecs = inner["codecs"]
        names = [codec["name"] for codec in chunk_codecs]
        (shard,), (chunk,) = about["chunk_grid"]["configuration"]["chunk_shape"], inner["chunk_shape"]
        known = (
            len(about["shape"]) == 1
            and np.dtype(about["data_type"]).kind in "uif"
            and about["fill_value"] == 0
            and about["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            and sharding["name"] == "sharding_indexed"
            and inner["index_location"] == "end"
            and inner["index_codecs"] == _INDEX_CODECS
            and chunk_codecs[0] in (_INDEX_CODECS[0], {"name": "bytes"})  # one byte has no order
            and names in (["bytes", "blosc", "crc32c"], ["bytes", "crc32c"])
            and shard % chunk == 0
        )
    except (KeyError, ValueError, TypeError, IndexError):
        return None
    return (shard, chunk, "blosc" in names) if known else None
