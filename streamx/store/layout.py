"""Every number of the layout on disk: dtypes, codecs, chunk and shard geometry.

The matrix of a shard is one CSR group of AnnData-Zarr v3. Indices and data share one chunk grid: a chunk
holds about 64 rows' values, a *zarr shard* about 64 k rows' (at most 16.8 M values, so that one fits in
memory several times). Presets follow measurements on synthetic atlases of 2,000 and 20,000 genes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

ROWS_PER_CHUNK = 64
CHUNKS_PER_SHARD = 1024
# blosc's bitshuffle works on blocks of 8 x typesize bytes; a chunk that is no multiple of 1,024 values
# silently skips it.
VALUES_MULTIPLE = 1024
MAX_SHARD_VALUES = 1 << 24
OFFSETS_PER_CHUNK = 1 << 13  # of indptr: few enough to decode for one block of rows
# obs columns: one chunk is what a reader of a few rows decodes, a zarr shard of them is one file
OBS_ROWS_PER_CHUNK = 1 << 16
OBS_CHUNKS_PER_SHARD = 16
OBSM_ROWS_PER_CHUNK = 1 << 13
OBSM_ROWS_PER_SHARD = 1 << 16
ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Preset:
    """Codecs of one layout: (compressor, level, shuffle) of each array; None stores plain bytes."""

    indices: tuple[str, int, str] | None
    data: tuple[str, int, str] | None
    delta: bool = False


PRESETS = {
    "default": Preset(indices=("lz4", 3, "shuffle"), data=("lz4", 5, "bitshuffle")),
    "compact": Preset(indices=("lz4", 3, "shuffle"), data=("lz4", 5, "bitshuffle"), delta=True),
    "remote": Preset(indices=("zstd", 3, "shuffle"), data=("zstd", 3, "bitshuffle"), delta=True),
    "speed": Preset(indices=None, data=None),
}


def smallest_unsigned(maximum: int) -> np.dtype:
    """The narrowest unsigned dtype that holds `maximum` exactly."""
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        if maximum <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise OverflowError(maximum)


def index_dtype(n_vars: int) -> np.dtype:
    """uint16 while every gene index fits, else uint32."""
    return np.dtype(np.uint16) if n_vars <= 1 << 16 else np.dtype(np.uint32)


def chunk_values(n_rows: int, nnz: int) -> int:
    """Values per chunk: about 64 rows' worth, a multiple of 1,024."""
    per_row = nnz / max(n_rows, 1)
    return max(1, round(ROWS_PER_CHUNK * per_row / VALUES_MULTIPLE)) * VALUES_MULTIPLE


def shard_values(chunk: int, nnz: int) -> int:
    """Values per zarr shard: whole chunks, about 64 k rows' worth, no more than the matrix has."""
    chunks = min(CHUNKS_PER_SHARD, max(1, MAX_SHARD_VALUES // chunk), max(1, -(-nnz // chunk)))
    return chunk * chunks


def matrix_codecs(preset: str, which: str, dtype: np.dtype) -> dict[str, Any]:
    """Arguments for ``zarr.create_array``: filters and compressors, with an inner crc32c on every chunk.

    Zarr's default codecs detect no flipped bit in the data; the checksum does.
    """
    from zarr.codecs import BloscCodec, Crc32cCodec

    choice = PRESETS[preset]
    spec = choice.indices if which == "indices" else choice.data
    compressors: list[Any] = [Crc32cCodec()]
    if spec is not None:
        name, level, shuffle = spec
        compressors.insert(
            0,
            BloscCodec(typesize=dtype.itemsize, cname=name, clevel=level, shuffle=shuffle, blocksize=0),  # type: ignore[arg-type]
        )
    filters = None
    if choice.delta and which == "indices":
        from zarr.codecs.numcodecs import Delta

        filters = [Delta(dtype=dtype.str)]
    return {"filters": filters, "compressors": compressors}


def offset_geometry(n: int) -> dict[str, Any]:
    """Arguments for ``zarr.create_array`` of an indptr with n entries: one object, read in small chunks."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    chunk = max(1, min(n, OFFSETS_PER_CHUNK))
    codec = BloscCodec(typesize=8, cname="zstd", clevel=3, shuffle="shuffle", blocksize=0)
    return {"chunks": (chunk,), "shards": (-(-n // chunk) * chunk,), "compressors": [codec, Crc32cCodec()]}


def column_codecs() -> dict[str, Any]:
    """Codecs of everything that is not the matrix: obs, var, obsm."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return {"compressors": [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]}


def expect_warnings() -> None:
    """zarr warns at every array of strings or with delta that other readers might not know it: no news here.

    This filters them in the whole process: ``catch_warnings`` is not safe in threads, whose ends may leave
    every warning switched off.
    """
    for message in ("Numcodecs codecs are not in the Zarr", "The data type .* does not have a Zarr V3 spec"):
        warnings.filterwarnings("ignore", message=message)
