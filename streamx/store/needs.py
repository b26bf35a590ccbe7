"""What a collection will take, before it is written: memory at the peak, disk with all that is laid down.

Everything follows from a sample of the rows and the plan of the work; a run that can't succeed is refused
with the numbers. Constants are measured: `benchmarks/scale.py` compares what was predicted and what was used.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from streamx.errors import ResourceError
from streamx.memory import available_bytes, resident_bytes
from streamx.store import layout
from streamx.store.encode import column_chunk, matrix_chunk
from streamx.store.obs import Obs
from streamx.store.spill import Slab
from streamx.store.text import Text

SLAB_BYTES = 17  # of memory per value of a slab, while it is read, moved to its columns and sorted
ROW_BYTES = 48  # of disk per cell: order, place, end, hash of the name
CHUNKS_AT_ONCE = 128  # of a zarr shard, whose values are gathered and encoded while all of its bytes wait
SAMPLE_ROWS = 4096
SAMPLED_FILES = 16  # whose rows show how the values compress
SURE = 0.7  # a prediction is right within 30 %


@dataclass(frozen=True)
class Needs:
    """Bytes: of memory at the peak (mapped files apart), of disk while it works, of disk afterwards."""

    memory_bytes: int
    disk_bytes: int
    output_bytes: int

    @property
    def elsewhere(self) -> Needs:
        """The same, where the output goes to another place."""
        return Needs(self.memory_bytes, self.disk_bytes - self.output_bytes, 0)


@dataclass(frozen=True)
class Sample:
    """Some rows, and how many values all rows have together.

    Attributes
    ----------
    x_ng
        Rows over the genes of the collection.
    nnz
        Values of all rows, estimated.
    dense_row_bytes
        Of the dense matrices of a row.
    """

    x_ng: sparse.csr_matrix
    nnz: int
    dense_row_bytes: int = 0


def sample_of(seen: Sequence[sparse.csr_matrix], lengths: Sequence[int], dense_row_bytes: int) -> Sample:
    """Rows of some of the files, and the values of all of them by the share of rows that was seen."""
    nnz = sum(found.nnz / found.shape[0] * n for found, n in zip(seen, lengths, strict=True))
    some = sparse.vstack(seen[:SAMPLED_FILES], format="csr")
    if some.dtype.kind == "f" and (some.data == np.rint(some.data)).all():
        some = some.astype(np.int64)
    some.sort_indices()
    return Sample(some, int(nnz), dense_row_bytes)


def at_once(shard_values: int, memory: int, threads: int) -> int:
    """How many zarr shards are encoded at the same time."""
    return max(1, min(threads, memory // (24 * max(1, shard_values))))


def needs_of(
    sample: Sample,
    obs: Obs,
    slabs: Sequence[Slab],
    *,
    preset: str = "default",
    shard_rows: int = 1 << 20,
    memory: int,
    threads: int,
) -> Needs:
    """Predict what :func:`streamx.store.pack.write_part` will take for these rows."""
    n_obs, n_vars = obs.n_obs, sample.x_ng.shape[1]
    counts = sample.x_ng.dtype.kind in "ui"
    maximum = int(sample.x_ng.data.max(initial=0)) if counts else 0
    value = layout.smallest_unsigned(maximum) if counts else sample.x_ng.dtype
    index = layout.index_dtype(n_vars)
    per_value = _encoded(sample.x_ng, preset, index, value)
    stored, laid = _row_bytes(obs)
    spilled = sample.nnz * (index.itemsize + value.itemsize) + n_obs * (16 + sample.dense_row_bytes)
    output = sample.nnz * per_value + n_obs * (2 * stored + sample.dense_row_bytes / 2 + 2)
    per_row = sample.nnz / max(1, n_obs)
    chunk = layout.chunk_values(n_obs, sample.nnz)
    shard = layout.shard_values(chunk, int(per_row * min(shard_rows, n_obs)))
    reading = threads * SLAB_BYTES * per_row * max((len(slab.rows) for slab in slabs), default=0)
    gathered = min(shard, chunk * CHUNKS_AT_ONCE) * (max(index.itemsize, value.itemsize) + 1)
    writing = at_once(shard, memory, threads) * (gathered + shard * per_value)
    return Needs(
        resident_bytes() + int(max(reading, writing)),
        int(spilled + output + n_obs * (laid + ROW_BYTES)),
        int(output),
    )


def refuse(needs: Needs, place: Path, already: int = 0) -> None:
    """Stop before the work where it can't end well.

    Parameters
    ----------
    place
        Folder that will be written, which need not exist.
    already
        Bytes that an interrupted run has laid down.

    Raises
    ------
    ResourceError
        If memory or disk are too small by more than the prediction's error.
    """
    there = place.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    wanted = needs.disk_bytes - already
    if SURE * wanted > free:
        raise ResourceError(
            f"about {wanted / 1e9:.1f} GB of disk are needed (of which {needs.output_bytes / 1e9:.1f} GB "
            f"stay), {free / 1e9:.1f} GB are free",
            where=str(place),
            fix="free some space, or write to another disk",
        )
    more, there_is = needs.memory_bytes - resident_bytes(), available_bytes()
    if SURE * more > there_is:
        raise ResourceError(
            f"about {more / 1e9:.1f} GB of memory are needed, {there_is / 1e9:.1f} GB are available",
            where=str(place),
            fix=f"--memory {max(100, int(there_is / 2e6))}MB, or fewer --threads",
        )


def _encoded(x_ng: sparse.csr_matrix, preset: str, index: np.dtype, value: np.dtype) -> float:
    """Bytes per value, indices included, of a sample in its layout on disk."""
    if not x_ng.nnz:
        return float(index.itemsize + value.itemsize)
    chunk = layout.chunk_values(x_ng.shape[0], x_ng.nnz)
    total = 0
    for name, values, dtype in (("indices", x_ng.indices, index), ("data", x_ng.data, value)):
        encode, values = matrix_chunk(preset, name, dtype), values.astype(dtype)
        total += sum(len(encode(values[low : low + chunk])) for low in range(0, len(values), chunk))
    return total / x_ng.nnz


def _row_bytes(obs: Obs) -> tuple[float, float]:
    """Bytes per cell of names and columns: compressed, and as they are laid down."""
    n = min(obs.n_obs, SAMPLE_ROWS)
    if not n:
        return 0.0, 0.0
    encoded = raw = 0
    for values, missing in ((obs.names(0, n), None), *(read(0, n) for read in obs.columns.values())):
        encoded += len(column_chunk(values, n))
        raw += 8 * n + int(values.ends[-1] - values.ends[0]) if isinstance(values, Text) else values.nbytes
        if missing is not None:
            encoded, raw = encoded + len(column_chunk(missing, n)), raw + n
    return encoded / n, raw / n
