"""In a bucket: what the plan of a read will ask for, many requests at once instead of one after the other.

Afterwards it lies in the caches of the matrices, where the plan finds it. In a folder there is no need.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from streamx.store.read import Read
from streamx.threads import run_all

if TYPE_CHECKING:
    from streamx.store.matrix import Matrix

AT_ONCE = 32  # small requests


def plan_ahead(matrix_of: Callable[[int], Matrix], reads: Sequence[Read]) -> None:
    """Metadata of the shards, then row offsets, then the indexes of the zarr shards that hold the values."""
    matrices = {read.shard: matrix_of(read.shard) for read in reads}
    if not any(matrix.location.shared for matrix in matrices.values()):
        return
    _each({shard: matrix.open for shard, matrix in matrices.items()})
    _each(
        {
            (read.shard, number): partial(matrices[read.shard].offsets, number)
            for read in reads
            for number in matrices[read.shard].offset_chunks(read.start, read.stop)
        }
    )
    wanted: dict[Hashable, Callable[[], Any]] = {}
    for read in reads:
        matrix = matrices[read.shard]
        first, *_, last = matrix.row_offsets(read.start, read.stop).tolist()
        for which, chunks in enumerate(matrix.values or ()):
            size = chunks.chunk * chunks.per_shard
            for shard in range(first // size, -(-last // size)):
                wanted[read.shard, which, shard] = partial(chunks.index, shard)
    _each(wanted)


def _each(calls: dict[Any, Callable[[], Any]]) -> None:
    run_all(list(calls.values()), min(AT_ONCE, len(calls)))
