"""Who works on a query: at most one process, and nobody for long whose process has died.

A claim is an object that only one process can create: ``claims/<query>.<number>.json``. The highest number
holds. If its holder is dead, anybody may create the next one, and again only one can. Of a holder on this
machine its process tells whether it lives; on another one the claim itself does, which a thread of the holder
writes anew every `BEAT` seconds. That is watched by our own clock: clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from streamx.errors import IntegrityError
from streamx.store.location import Location
from streamx.store.manifest import dump

CLAIMS = "claims"
BEAT, LEASE = 10.0, 60.0

Seen = dict[str, tuple[bytes, float]]  # claims of other machines: their bytes, and since when


@contextlib.contextmanager
def claimed(out: Location, name: str, seen: Seen) -> Iterator[bool]:
    """Whether the query is ours, for the time of a ``with`` block.

    `seen` remembers, from call to call, claims whose holders can't be asked.
    """
    key = _take(out, name, seen)
    if key is None:
        yield False
        return
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(out, key, ended), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        ended.set()
        beat.join()
        out.delete(*held(out)[name])


def held(out: Location) -> dict[str, list[str]]:
    """Keys of all claims by query, the one that holds last."""
    found: dict[str, list[str]] = {}
    for key in out.list(CLAIMS):
        if key.endswith(".json"):
            found.setdefault(key.removeprefix(f"{CLAIMS}/").rsplit(".", 2)[0], []).append(key)
    return found


def _take(out: Location, name: str, seen: Seen) -> str | None:
    before = held(out).get(name, [])
    if before and alive(out, before[-1], seen):
        return None
    number = int(before[-1].rsplit(".", 2)[1]) + 1 if before else 0
    key = f"{CLAIMS}/{name}.{number:06d}.json"
    return key if out.create(key, dump(_myself())) else None


def _beat(out: Location, key: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(Exception):  # a beat that fails is made good by the next one
            out.write(key, dump(_myself()))


def _myself() -> dict[str, Any]:
    begun = psutil.Process().create_time()
    return {"host": socket.gethostname(), "pid": os.getpid(), "begun": begun, "time": time.time()}


def alive(out: Location, key: str, seen: Seen | None = None) -> bool:
    """Whether the holder of a claim lives; of another machine, without `seen`, that is supposed."""
    try:
        data = out.read(key)
    except IntegrityError:  # it has just finished
        return False
    holder = json.loads(data)
    if holder["host"] == socket.gethostname():
        try:
            return abs(psutil.Process(holder["pid"]).create_time() - holder["begun"]) < 1
        except psutil.NoSuchProcess:
            return False
    if seen is None:
        return True
    before, since = seen.get(key, (b"", 0.0))
    if data != before:
        seen[key] = (data, time.monotonic())
        return True
    return time.monotonic() - since < LEASE


def sweep(out: Location) -> None:
    """Remove claims of this machine's processes that have died."""
    for keys in held(out).values():
        if not alive(out, keys[-1]):
            out.delete(*keys)
