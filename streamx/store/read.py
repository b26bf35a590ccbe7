"""Reading: a pure plan over row ranges, and what every read goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from streamx.errors import IntegrityError, StreamxError, UsageError
from streamx.store.frame import Group
from streamx.store.layout import expect_warnings
from streamx.store.location import Location, ObjectTable

RESTORE = "`streamx verify` names the objects; restore them from a copy, or convert again"


@dataclass(frozen=True)
class Read:
    """Rows start..stop of shard number `shard`."""

    shard: int
    start: int
    stop: int


def plan_reads(ranges: Sequence[tuple[int, int]], shard_starts: np.ndarray) -> list[Read]:
    """Row ranges of the collection -> row ranges of its shards, in the order asked for. Pure.

    Parameters
    ----------
    ranges
        (start, stop) rows of the collection.
    shard_starts
        First row of each shard and, last, the number of rows.

    Raises
    ------
    UsageError
        If a range leaves the collection.
    """
    reads: list[Read] = []
    for start, stop in ranges:
        if not 0 <= start <= stop <= shard_starts[-1]:
            raise UsageError(f"rows {start}..{stop}, but there are {shard_starts[-1]}")
        while start < stop:
            shard = int(np.searchsorted(shard_starts, start, side="right")) - 1
            end = min(stop, int(shard_starts[shard + 1]))
            reads.append(Read(shard, start - int(shard_starts[shard]), end - int(shard_starts[shard])))
            start = end
    return reads


@contextmanager
def integrity(where: str, fix: str = RESTORE) -> Iterator[None]:
    """zarr's and numcodecs' many words for damaged bytes, as one; and what to do about them."""
    try:
        yield
    except (StreamxError, MemoryError):
        raise
    except Exception as error:
        raise IntegrityError(
            f"stored bytes are damaged ({type(error).__name__}: {error})",
            where=where,
            fix=fix,
        ) from error


def open_group(location: Location, path: str, expected: ObjectTable) -> Group:
    import zarr

    expect_warnings()
    with integrity(f"{location}/{path}"):
        return zarr.open_group(location.zarr(path, expected), mode="r", zarr_format=3)
