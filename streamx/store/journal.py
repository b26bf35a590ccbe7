"""The journal of an unfinished commit: who writes, with which settings, and what is done already.

It lies beside the store (``STORE.journal``), never inside, and is removed when the commit has succeeded.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from streamx.errors import LockedError, SettingsChangedError
from streamx.store.location import Location
from streamx.store.manifest import dump


class Journal:
    """An exclusive lock, the run's fingerprint, and one small record per finished step.

    Parameters
    ----------
    store
        The folder that is being written.
    fingerprint
        Settings and inputs: a run may only be resumed with the same.

    Raises
    ------
    LockedError
        If another process is writing there.
    SettingsChangedError
        If an unfinished run was started with other settings or inputs; names the field.
    """

    def __init__(self, store: Location, fingerprint: dict[str, Any]) -> None:
        root = journal_path(store.root)
        self._lock: int | None = _lock(root)
        self.location = type(store)(root)
        self.scratch = root / "spill"
        self.tmp = root / "tmp"
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True, exist_ok=True)
        data = dump(fingerprint)
        if self.location.exists("settings.json"):
            before = json.loads(self.location.read("settings.json"))
            field = first_difference(before, json.loads(data))
            if field:
                self.release()
                raise SettingsChangedError(
                    f"an unfinished run was started with another {field}",
                    where=str(store),
                    fix=f"run it with the same settings and inputs, or start over: rm -r {root.name}"
                    " (and the unfinished store)",
                )
        else:
            self.location.write("settings.json", data)

    def find(self, name: str) -> Any | None:
        """What :meth:`record` wrote under this name, or None."""
        key = f"records/{name}.json"
        return json.loads(self.location.read(key)) if self.location.exists(key) else None

    def record(self, name: str, payload: Any) -> None:
        """A step is done."""
        self.location.write(f"records/{name}.json", dump(payload))

    def remove(self) -> None:
        """The commit has succeeded: forget it all."""
        shutil.rmtree(self.location.root, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let go of the lock; a later run resumes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def journal_path(store: Path) -> Path:
    return store.with_name(store.name + ".journal")


def _lock(root: Path) -> int:
    """An advisory lock that the kernel drops when the process dies, however it dies."""
    import fcntl

    path = root / "lock"
    while True:
        root.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another run has just finished and removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise LockedError(
                f"another process is writing here ({holder or 'unknown'})",
                where=str(root),
                fix="wait until it has finished, or stop it, then run the command again",
            ) from None
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def first_difference(a: Any, b: Any, name: str = "") -> str | None:
    """The first field in which two JSON values differ, as ``settings.join: 'inner' -> 'outer'``."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            found = first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if a == b else f"{name}: {_short(a)} -> {_short(b)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
