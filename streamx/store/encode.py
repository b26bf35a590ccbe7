"""Chunks and zarr shards as bytes, made without zarr.

zarr-python spends ten times longer on each chunk's bookkeeping than the compressor on its values. These are
the bytes that it would write (tested): a chunk is padded with zeros, filtered, compressed and followed by its
CRC-32C; a zarr shard is its chunks and, last, offset and length of each with a CRC-32C of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import google_crc32c
import numpy as np

from streamx.store import layout
from streamx.store.text import Text

ABSENT = 2**64 - 1  # offset and length of a chunk that lies beyond the end of the array
Values = np.ndarray | Text


def checked(data: bytes) -> bytes:
    """The bytes and their CRC-32C."""
    return data + google_crc32c.value(data).to_bytes(4, "little")


def column_chunk(values: Values, rows: int) -> bytes:
    """A chunk of `rows` rows of anything that is not the matrix: zeros or empty texts follow its values."""
    from numcodecs.zstd import compress

    missing = rows - len(values)
    if isinstance(values, Text):
        if missing:
            ends = np.concatenate([values.ends, np.full(missing, values.ends[-1], np.int64)])
            values = Text(ends, values.data)
        raw = values.framed()
    else:
        little: np.dtype = values.dtype.newbyteorder("<")
        raw = np.ascontiguousarray(values, dtype=little)
        if missing:
            raw = np.concatenate([raw, np.zeros((missing, *raw.shape[1:]), raw.dtype)])
    return checked(compress(raw, layout.ZSTD_LEVEL))


def matrix_chunk(preset: str, which: str, dtype: np.dtype) -> Callable[[np.ndarray], bytes]:
    """What makes a whole chunk of `indices` or `data` of its values."""
    from numcodecs import blosc
    from numcodecs.delta import Delta

    choice = layout.PRESETS[preset]
    spec = choice.indices if which == "indices" else choice.data
    delta = Delta(dtype=dtype.str) if choice.delta and which == "indices" else None
    shuffles = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}

    def encode(values: np.ndarray) -> bytes:
        if delta is not None:
            values = delta.encode(values)
        if spec is None:
            return checked(values.tobytes())
        name, level, shuffle = spec
        return checked(
            blosc.compress(values, name.encode(), level, shuffles[shuffle], 0, typesize=dtype.itemsize)
        )

    return encode


def shard_of(chunks: Iterable[bytes], n_chunks: int) -> list[bytes]:
    """A zarr shard for `n_chunks` chunks, of which the first ones exist; in pieces."""
    index = np.full((n_chunks, 2), ABSENT, dtype="<u8")
    parts, at = [], 0
    for k, chunk in enumerate(chunks):
        parts.append(chunk)
        index[k] = at, len(chunk)
        at += len(chunk)
    return [*parts, checked(index.tobytes())]


def matrix_shard(
    pieces: Iterable[np.ndarray], chunk: int, n_chunks: int, encode: Callable[[np.ndarray], bytes]
) -> list[bytes]:
    """A zarr shard of a flat array that comes in pieces of whole chunks, the last as it is; in pieces."""

    def chunks() -> Iterable[bytes]:
        for values in pieces:
            for low in range(0, len(values), chunk):
                piece = values[low : low + chunk]
                if len(piece) < chunk:
                    piece = np.concatenate([piece, np.zeros(chunk - len(piece), values.dtype)])
                yield encode(piece)

    return shard_of(chunks(), n_chunks)


def offsets_shard(ends: np.ndarray, chunk: int) -> list[bytes]:
    """The one zarr shard of an indptr (from 0), in pieces; its layout is that of `offset_geometry`."""
    from numcodecs import blosc

    def chunks() -> Iterable[bytes]:
        for low in range(0, len(ends), chunk):
            values = np.zeros(chunk, np.int64)
            piece = ends[low : low + chunk]
            values[: len(piece)] = piece - ends[0]
            yield checked(blosc.compress(values, b"zstd", 3, blosc.SHUFFLE, 0, typesize=8))

    return shard_of(chunks(), -(-len(ends) // chunk))
