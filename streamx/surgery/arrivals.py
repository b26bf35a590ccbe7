"""Query files as they come: into a folder, or onto a list."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from streamx.errors import UsageError
from streamx.query import Request, requests

log = logging.getLogger("streamx")

POLL_SECONDS = 1.0


def arrivals(
    place: Path, idle: float | None = None, pause: Callable[[float], None] = time.sleep
) -> Iterator[Request]:
    """Requests for files: those that are there, then those that come.

    Parameters
    ----------
    place
        A folder: its files and zarr folders (hidden ones are not looked at), each once it has the same size
        in two looks. Or a text file with one path per line, relative to its folder.
    idle
        Stop after so many seconds without a new one; None: never.

    Raises
    ------
    UsageError
        If there is no such place.
    """
    if not place.exists():
        raise UsageError("no such folder or list", where=str(place), fix="make it first, even if it is empty")
    log.info("watching %s", place)
    taken: set[str] = set()
    sizes: dict[str, int] = {}
    waited = 0.0
    while idle is None or waited < idle:
        found = {name: path for name, path in _listed(place) if name not in taken}
        before, sizes = sizes, {name: _size(path) for name, path in found.items()}
        ready = [n for n in sorted(found) if place.is_file() or before.get(n) == sizes[n] > 0]
        for name in ready:
            taken.add(name)
            yield from requests([str(found[name])])
        if ready:
            waited = 0.0
        else:
            pause(POLL_SECONDS)
            waited += POLL_SECONDS


def _listed(place: Path) -> list[tuple[str, Path]]:
    if place.is_dir():
        return [(path.name, path) for path in place.iterdir() if not path.name.startswith(".")]
    text = place.read_text(encoding="utf-8")
    lines = [line.strip() for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half there
    return [(line, place.parent / line) for line in lines if line]


def _size(path: Path) -> int:
    """Bytes; 0 of what is not there, or what is being renamed just now."""
    try:
        if path.is_dir():
            return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
        return path.stat().st_size
    except FileNotFoundError:
        return 0
