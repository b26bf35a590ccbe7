"""One step of writing: objects are encoded, put in place and journaled; what is done already is kept.

A step may go to another process: it holds places, and where the rows lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamx.errors import IntegrityError
from streamx.memory import give_back
from streamx.store.encode import matrix_chunk, matrix_shard
from streamx.store.journal import Journal
from streamx.store.location import Bytes, Location, ObjectTable, Put, describe
from streamx.store.needs import CHUNKS_AT_ONCE
from streamx.store.plan import ShardPlan
from streamx.store.spill import Spill


@dataclass(frozen=True)
class Steps:
    """Where a part is written, and the journal of what is done and unharmed."""

    location: Location
    journal: Journal

    def run(self, name: str, prefix: str, encode: Callable[[Put], None]) -> ObjectTable:
        """Objects of the step, as :func:`~streamx.store.location.describe` has them."""
        done = self.journal.find(name)
        if done and all(self._unharmed(key, expected) for key, expected in done.items()):
            return done
        table: ObjectTable = {}

        def described(put: Put) -> None:
            def noted(key: str, *data: Bytes) -> None:
                put(f"{prefix}/{key}", *data)
                table[f"{prefix}/{key}"] = describe(*data)

            encode(noted)

        self.location.write_all(described)
        table = {key: table[key] for key in sorted(table)}
        self.journal.record(name, table)
        give_back()
        return table

    def _unharmed(self, key: str, expected: list[Any]) -> bool:
        try:
            return describe(self.location.read(key)) == expected
        except IntegrityError:
            return False


@dataclass(frozen=True)
class MatrixWriter:
    """Writes the zarr shards of the matrix."""

    steps: Steps
    rows: Spill
    preset: str
    index_dtype: np.dtype
    data_dtype: np.dtype

    def write(self, plan: ShardPlan, k: int) -> ObjectTable:
        """Zarr shard k of `indices` and of `data`."""

        def encode(put: Put) -> None:
            low, high = plan.cuts[k]
            for name, dtype in (("indices", self.index_dtype), ("data", self.data_dtype)):
                values = self._values(plan, name, dtype, low, high)
                chunk = matrix_chunk(self.preset, name, dtype)
                put(f"X/{name}/c/{k}", *matrix_shard(values, plan.chunk, plan.shard // plan.chunk, chunk))

        return self.steps.run(f"{plan.path[7:-5]}-{k}", plan.path, encode)

    def _values(
        self, plan: ShardPlan, name: str, dtype: np.dtype, low: int, high: int
    ) -> Iterator[np.ndarray]:
        """Values low..high of a shard, some chunks at a time."""
        step = plan.chunk * CHUNKS_AT_ONCE
        cuts = [(first, min(first + step, high)) for first in range(low, high, step)]
        rows = [plan.rows(*cut) for cut in cuts]
        ranges = [(plan.first + start, plan.first + stop) for start, stop in rows]
        found = self.rows.each_values(name, ranges, dtype)
        for (first, last), (start, _), values in zip(cuts, rows, found, strict=True):
            offset = int(plan.ends[start] - plan.ends[0])
            yield values[first - offset : last - offset]
