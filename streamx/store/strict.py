"""A location as a read-only zarr store in which a lost or cut object is an error, and not zeros."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer

from streamx.errors import IntegrityError
from streamx.store.location import RESTORE, Location, ObjectTable, describe


def strict_store(location: Location, prefix: str, expected: ObjectTable) -> Store:
    """See :meth:`streamx.store.location.Location.zarr`."""
    return StrictStore(location, prefix, expected)


class StrictStore(Store):
    """zarr's verbs in terms of ours; each call runs on one of asyncio's threads."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, location: Location, prefix: str, expected: ObjectTable) -> None:
        super().__init__(read_only=True)
        self.location, self.prefix, self.expected = location, prefix, expected

    def __str__(self) -> str:
        return f"{self.location}/{self.prefix}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StrictStore) and str(self) == str(other)

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key) if part)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Buffer | None:
        value = await asyncio.to_thread(self._get, self._key(key), byte_range)
        return None if value is None else prototype.buffer.from_bytes(value)

    def _get(self, key: str, byte_range: Any) -> bytes | None:
        known = self.expected.get(key)
        try:
            if byte_range is None:
                value = self.location.read(key)
            else:
                size = known[0] if known else self.location.size(key)
                if size is None:
                    return None
                start, stop = _ends(byte_range, size)
                out = np.empty(stop - start, np.uint8)
                self.location.read_ranges([(key, start, stop - start, 0)], out)
                return out.tobytes()
        except IntegrityError:
            if known is None and not self.location.exists(key):  # nobody said that it must
                return None
            raise
        if known is not None and len(value) != known[0]:  # zarr reads an empty zarr shard as zeros
            raise IntegrityError("object is cut short", where=f"{self.location}/{key}", fix=RESTORE)
        if known is not None and key.endswith("zarr.json") and describe(value) != list(known):
            raise IntegrityError("metadata are damaged", where=f"{self.location}/{key}", fix=RESTORE)
        return value

    async def get_partial_values(
        self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self.location.exists, self._key(key))

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        base = f"{self.prefix}/" if self.prefix else ""
        for key in await asyncio.to_thread(self.location.list, self.prefix):
            if key.startswith(base + prefix):
                yield key[len(base) :]

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        base = self._key(prefix.rstrip("/"))
        keys = await asyncio.to_thread(self.location.list, base)
        for name in sorted({key[len(base) :].lstrip("/").split("/", 1)[0] for key in keys}):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()


def _ends(byte_range: Any, size: int) -> tuple[int, int]:
    """First byte, and the one after the last, that zarr asks for in an object of this size."""
    if isinstance(byte_range, SuffixByteRequest):
        return max(0, size - byte_range.suffix), size
    if isinstance(byte_range, OffsetByteRequest):
        return min(byte_range.offset, size), size
    assert isinstance(byte_range, RangeByteRequest)
    return min(byte_range.start, size), max(min(byte_range.end, size), min(byte_range.start, size))
