"""The journal of an unfinished commit: who writes, with which settings, and what is done already.

It lies beside the store (``STORE.journal``), never inside, and is removed when the commit has succeeded. That
of a store in a bucket lies in the local cache: a run is resumed on the machine where it began, and keeps out
others of this machine only; :mod:`streamx.store.manifest` says what happens between machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from streamx.errors import InputError, LockedError, SettingsChangedError, StreamxError, UsageError
from streamx.store.folder import Folder
from streamx.store.location import Location, storage_error
from streamx.store.manifest import MARKER, dump, read_generation, sweep

SETTINGS, LOCK = "settings.json", "lock"


class Journal:
    """An exclusive lock, the run's fingerprint, and one small record per finished step.

    Use it in a ``with`` block: whoever holds the lock may look at the store and change it. What was begun is
    kept for a later run, unless there is nothing to keep, or an :class:`InputError` or :class:`UsageError`
    says that the input or the settings have to change.

    Parameters
    ----------
    store
        The place that is being written.
    fingerprint
        If given, :meth:`begin` with it.

    Raises
    ------
    LockedError
        If another process (or thread) is writing there.
    """

    def __init__(self, store: Location, fingerprint: dict[str, Any] | None = None) -> None:
        self.store = store
        self.location = Folder(store.journal)
        self.tmp = self.location.root / "tmp"
        self.ingest = self.location.root / "ingest"
        self.rows = self.location.root / "rows"  # arrays over cells; every run makes them anew
        self._begun = False
        self._lock: int | None = _lock(self.location.root)
        if fingerprint is not None:
            try:
                self.begin(fingerprint)
            except BaseException:
                self.release()
                raise

    def __getstate__(self) -> dict[str, Any]:
        """For a process that does a step of the run: the lock stays with the one that has it."""
        return vars(self) | {"_lock": None}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        hopeless = isinstance(error, (InputError, UsageError))
        try:
            idle = isinstance(error, StreamxError) and not self.location.list("records")
            if self._lock is not None and self._begun and (hopeless or idle):
                sweep(self.store, read_generation(self.store) if self.store.exists(MARKER) else None)
                self.remove()
            elif self.fingerprint is None:
                self.remove()
        finally:
            self.release()

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """Settings and inputs of the unfinished run, or None."""
        return json.loads(self.location.read(SETTINGS)) if self.location.exists(SETTINGS) else None

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Begin a run, or go on with the one that was interrupted.

        Raises
        ------
        SettingsChangedError
            If an unfinished run was started with other settings or inputs; names the field.
        """
        data = dump(fingerprint)
        self.forget_finished()
        before = self.fingerprint
        if before is None:
            self.clear(keep=(self.ingest.name,))
            self.location.write(SETTINGS, data)
        field = first_difference(before, json.loads(data)) if before is not None else None
        if field:
            raise SettingsChangedError(
                f"an unfinished run was started with another {field}",
                where=str(self.store),
                fix="run it with the same settings and inputs; or give it up: rm -r "
                + " ".join(str(place) for place in self._all()),
            )
        self.location.delete_tree("tmp")
        self._begun = True

    def _all(self) -> list[Location]:
        """What to remove, to give the run up: no store that others read, nor objects of a bucket."""
        alone = not self.store.shared and not self.store.exists(MARKER)
        return [self.location, *([self.store] if alone else [])]

    def forget_finished(self) -> None:
        """A run that was killed between its commit and its end has left a journal, and nothing to do."""
        if self.fingerprint is None or not self.store.exists(MARKER):
            return
        state = read_generation(self.store)
        committed = [state.fingerprint, *({"annotate": overlay["digest"]} for overlay in state.overlays[-1:])]
        if self.fingerprint in committed:
            self.clear(keep=(self.ingest.name,))
            self.location.delete(SETTINGS)

    def laid_down(self) -> int:
        """Bytes that an interrupted run has left here and in the store."""
        folders = [root for root in (self.location.root, self.store.root) if isinstance(root, Path)]
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def find(self, name: str) -> Any | None:
        """What :meth:`record` wrote under this name, or None."""
        key = f"records/{name}.json"
        return json.loads(self.location.read(key)) if self.location.exists(key) else None

    def record(self, name: str, payload: Any) -> None:
        """A step is done."""
        self.location.write(f"records/{name}.json", dump(payload))

    def clear(self, keep: tuple[str, ...] = ()) -> None:
        """Forget all steps, but neither the lock nor, yet, what they were for."""
        for name in sorted(os.listdir(self.location.root)):
            if name not in (SETTINGS, LOCK, *keep):
                self.location.delete_tree(name)

    def remove(self) -> None:
        """The commit has succeeded: forget it all, the lock last, so that nobody else begins meanwhile."""
        if self._lock is None:
            return
        self.clear()
        self.location.delete(SETTINGS)
        self.location.delete(LOCK)
        with contextlib.suppress(OSError):  # the next one is here already
            self.location.root.rmdir()
        self._begun = False
        self.release()

    def release(self) -> None:
        """Let go of the lock; a later run resumes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(root: Path) -> int:
    """An advisory lock that the kernel drops when the process dies, however it dies."""
    import fcntl

    path = root / LOCK
    attempts = 100
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            attempts -= 1
            if isinstance(error, FileNotFoundError) and attempts:
                continue  # another run has just finished and removed the folder
            raise storage_error(error, str(root)) from error
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
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            raise storage_error(error, str(path)) from error
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor
        except FileNotFoundError:  # likewise: what we have locked is deleted
            pass
        except OSError as error:
            os.close(descriptor)
            raise storage_error(error, str(path)) from error
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
