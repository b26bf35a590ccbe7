"""Ranges of objects as requests to a service: a plan on plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamx.store.location import Range

MERGE_GAP = 1 << 14  # bytes that cost less than another request
LARGEST = 1 << 24  # bytes up to which ranges become one request


@dataclass(frozen=True)
class Request:
    """Bytes start..stop of an object, and which (start, size, where in the buffer) of them are wanted."""

    key: str
    start: int
    stop: int
    parts: tuple[tuple[int, int, int], ...]


def merge(ranges: Sequence[Range], gap: int = MERGE_GAP, largest: int = LARGEST) -> list[Request]:
    """Ranges as requests: those of one object with at most `gap` bytes between them become one. Pure.

    None grows beyond :data:`LARGEST` bytes in this way: several at once are faster than one.
    """
    requests: list[Request] = []
    for key, start, size, at in sorted(ranges):
        last = requests[-1] if requests else None
        near = last is not None and last.key == key and start <= last.stop + gap
        if last is not None and near and start + size - last.start <= largest:
            parts = (*last.parts, (start, size, at))
            requests[-1] = replace(last, stop=max(last.stop, start + size), parts=parts)
        else:
            requests.append(Request(key, start, start + size, ((start, size, at),)))
    return requests
