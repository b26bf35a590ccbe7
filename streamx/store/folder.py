"""A folder on a local disk as a :class:`~streamx.store.location.Location`."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.errors import IntegrityError, LockedError, StorageError, UsageError
from streamx.store.location import RESTORE, Bytes, ObjectTable, Put, Range, check_key, storage_error

if TYPE_CHECKING:
    from zarr.abc.store import Store


class Folder:
    """Objects are files; writers hold the lock of the journal, so there is one at a time.

    Parameters
    ----------
    root
        The folder; it need not exist yet.
    tmp
        Where half-written objects live until they are renamed into place. It must be on the same file
        system as `root`; by default a hidden file beside the object.
    """

    shared = False

    def __init__(self, root: str | Path, *, tmp: Path | None = None) -> None:
        self.root = Path(root)
        self.tmp = tmp

    def __str__(self) -> str:
        return str(self.root)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.root == other.root

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which may work in another folder."""
        return {"root": self.root.absolute(), "tmp": self.tmp and self.tmp.absolute()}

    def __hash__(self) -> int:
        return hash(self.root)

    @property
    def journal(self) -> Path:
        """Beside the folder itself, whatever links lead there: objects are renamed across."""
        real = self.root.resolve()
        if not real.name:
            raise UsageError("can't hold a collection", where=str(real), fix="name a folder")
        return real.with_name(real.name + ".journal")

    def path(self, key: str) -> Path:
        """Where an object lies."""
        return self.root / check_key(key, str(self.root))

    def below(self, prefix: str) -> Folder:
        return Folder(self.path(prefix), tmp=self.tmp)

    def staged(self, tmp: Path) -> Folder:
        return Folder(self.root, tmp=tmp)

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def size(self, key: str) -> int | None:
        try:
            return self.path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise IntegrityError("object is missing", where=f"{self.root}/{key}", fix=RESTORE) from None
        except OSError as error:
            raise StorageError(f"can't be read: {error.strerror}", where=f"{self.root}/{key}") from error

    def read_ranges(self, ranges: Sequence[Range], out: np.ndarray) -> None:
        for key, objects in groupby(ranges, key=itemgetter(0)):
            where, descriptor = f"{self.root}/{key}", self.descriptor(key)
            try:
                for _, start, size, at in objects:
                    if os.preadv(descriptor, [out[at : at + size].data], start) != size:
                        raise IntegrityError("object is cut short", where=where, fix=RESTORE)
            except OSError as error:
                raise StorageError(f"can't be read: {error.strerror}", where=where) from error
            finally:
                os.close(descriptor)

    def descriptor(self, key: str) -> int:
        where = f"{self.root}/{key}"
        try:
            return os.open(self.path(key), os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            raise IntegrityError("object is missing", where=where, fix=RESTORE) from None
        except OSError as error:
            raise StorageError(f"can't be read: {error.strerror}", where=where) from error

    def write(self, key: str, *data: Bytes) -> None:
        target = self.path(key)
        # one thread writes one object at a time; the object's own name might leave no room for more letters
        tmp = (self.tmp or target.parent) / f".{os.getpid()}-{threading.get_ident():x}.tmp"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            tmp.parent.mkdir(parents=True, exist_ok=True)
            with tmp.open("wb") as stream:
                for piece in data:
                    stream.write(piece)
            os.replace(tmp, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                tmp.unlink()
            raise storage_error(error, f"{self.root}/{key}") from error

    def write_all(self, produce: Callable[[Put], None]) -> None:
        produce(self.write)

    def replace(self, key: str, data: bytes, before: bytes | None) -> None:
        now = self.read(key) if self.exists(key) else None
        if now not in (before, data):
            raise LockedError("another process has written here", where=f"{self.root}/{key}")
        self.write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        target = self.path(key)
        tmp = target.parent / f".{os.getpid()}-{threading.get_ident():x}.new"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            tmp.write_bytes(data)
            try:
                os.link(tmp, target)  # unlike a rename, fails where there is one
            except FileExistsError:
                return tmp.stat().st_nlink > 1  # the answer to our link got lost on a network's file system
            return True
        except OSError as error:
            raise storage_error(error, f"{self.root}/{key}") from error
        finally:
            with contextlib.suppress(OSError):
                tmp.unlink()

    def put_tree(self, produce: Callable[[Put], None]) -> None:
        partial = Folder(self.root.with_name(f".{self.root.name}.partial"))
        shutil.rmtree(partial.root, ignore_errors=True)
        written = set[str]()

        def put(key: str, *data: Bytes) -> None:
            partial.write(key, *data)
            written.add(key)

        produce(put)
        if set(partial.list()) != written:  # another began after us, and took ours away
            raise LockedError("another process is writing here", where=str(self.root))
        if self.root.exists():
            shutil.rmtree(self.root)
        os.replace(partial.root, self.root)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.path(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        path = self.path(prefix)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> list[str]:
        base = self.path(prefix)
        found = (Path(folder) / name for folder, _, names in os.walk(base) for name in names)
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def sync(self) -> None:
        os.sync()

    def zarr(self, prefix: str, expected: ObjectTable | None = None) -> Store:
        from streamx.store.strict import strict_store

        return strict_store(self, prefix, expected or {})
