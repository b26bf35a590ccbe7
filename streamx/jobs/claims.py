"""Who works on a query: at most one process, and nobody for long whose process has died.

A claim is an object that only one process can create: ``claims/<query>.<number>.json``. The highest number
holds. If its holder is dead, anybody may create the next one, and again only one can. Of a holder on this
machine its process tells whether it lives; on another one the claim itself does, which a thread of the holder
writes anew every `BEAT` seconds. That is watched by our own clock: clocks of machines differ. Who was silent
for so long that another took over (asleep, or its disk hung) finds out by :func:`holds` before it records.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from streamx.errors import IntegrityError
from streamx.store.location import Location
from streamx.store.manifest import dump

CLAIMS = "claims"
BEAT, LEASE = 10.0, 60.0

Seen = dict[str, tuple[bytes, float]]  # claims of other machines: their bytes, and since when


@contextlib.contextmanager
def claimed(out: Location, name: str, seen: Seen) -> Iterator[str | None]:
    """Our claim to a query, for the time of a ``with`` block; None if somebody else has it.

    `seen` remembers, from call to call, claims whose holders can't be asked.
    """
    key = _take(out, name, seen)
    if key is None:
        yield None
        return
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(out, key, ended), daemon=True)
    beat.start()
    try:
        yield key
    finally:
        ended.set()
        beat.join()
        out.delete(*(other for other in held(out).get(name, ()) if other <= key))


def holds(out: Location, key: str) -> bool:
    """Whether a claim of ours still is the one that holds."""
    return held(out).get(_query_of(key), [""])[-1] == key


def held(out: Location) -> dict[str, list[str]]:
    """Keys of all claims by query, the one that holds last."""
    found: dict[str, list[str]] = {}
    for key in out.list(CLAIMS):
        if key.endswith(".json"):
            found.setdefault(_query_of(key), []).append(key)
    return found


def _query_of(key: str) -> str:
    return key.removeprefix(f"{CLAIMS}/").rsplit(".", 2)[0]


def _take(out: Location, name: str, seen: Seen) -> str | None:
    before = held(out).get(name, [])
    if before and alive(out, before[-1], seen):
        return None
    number = int(before[-1].rsplit(".", 2)[1]) + 1 if before else 0
    key = f"{CLAIMS}/{name}.{number:06d}.json"
    if not out.create(key, dump(_myself())):
        return None
    if holds(out, key):
        return key
    out.delete(key)  # a dead one that we had seen was swept, and a later one holds
    return None


def _beat(out: Location, key: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(Exception):  # a beat that fails is made good by the next one
            if not holds(out, key):
                return
            out.write(key, dump(_myself()))


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    who = {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "begun": _begun(pid)}
    return who | {"time": time.time()}


def _machine() -> str:
    """Where a process number means one process: containers may share the name of their host."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux only
        found += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(found)


def _begun(pid: int) -> float:
    """When a process began, in seconds since the start of the machine: wall clocks are set meanwhile."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def alive(out: Location, key: str, seen: Seen | None = None) -> bool:
    """Whether the holder of a claim lives; of another machine, without `seen`, that is supposed."""
    try:
        data = out.read(key)
    except IntegrityError:  # it has just finished
        return False
    holder = json.loads(data)
    if holder.get("machine") == _machine():
        try:
            return abs(_begun(holder["pid"]) - holder["begun"]) < 2  # both are rounded to a second
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
