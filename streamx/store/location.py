"""A place that holds named objects: a folder now, a bucket by the same verbs.

Everything that streamx writes goes through :meth:`Location.write` (whole objects, atomically) and
:meth:`Location.delete`: one choke point, which is what makes `kill -9` at every operation testable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from streamx.errors import IntegrityError, ResourceError, StorageError, UsageError

if TYPE_CHECKING:
    from zarr.abc.store import Store

RESTORE = "restore it from a copy, or convert again"


Bytes = bytes | memoryview
ObjectTable = dict[str, list[Any]]  # key -> [bytes, CRC-32], as :func:`describe` gives them


def crc32c(data: bytes | memoryview) -> str:
    """CRC-32C (Castagnoli) of the bytes, eight hexadecimal digits; see :func:`describe` for objects."""
    return f"{google_crc32c.value(bytes(data)):08x}"


def describe(*data: Bytes) -> list[Any]:
    """Length and CRC-32 of an object that is given in pieces: ``[bytes, eight hexadecimal digits]``.

    Not CRC-32C, although zarr has it: zarr appends it to chunks and shard indices, and the CRC of bytes that
    end in their own CRC is a constant. All our objects of one length would have the same.
    """
    crc, size = 0, 0
    for piece in data:
        crc, size = zlib.crc32(piece, crc), size + memoryview(piece).nbytes
    return [size, f"{crc:08x}"]


class Location:
    """A folder on a local disk, read and written as whole objects under relative keys.

    Parameters
    ----------
    root
        The folder; it need not exist yet.
    tmp
        Where half-written objects live until they are renamed into place. It must be on the same file
        system as `root`; by default a hidden file beside the object.
    """

    def __init__(self, root: str | Path, *, tmp: str | Path | None = None) -> None:
        self.root = Path(root)
        self.tmp = Path(tmp) if tmp is not None else None

    def __str__(self) -> str:
        return str(self.root)

    def path(self, key: str) -> Path:
        """Where an object lies; a key can't leave the root (R35)."""
        if key.startswith(("/", "\\")) or ".." in Path(key).parts:
            raise StorageError(f"object name {key!r} leaves the store", where=str(self.root))
        return self.root / key

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def read(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError:
            raise IntegrityError("object is missing", where=f"{self.root}/{key}") from None
        except OSError as error:
            raise StorageError(f"can't be read: {error.strerror}", where=f"{self.root}/{key}") from error

    def read_ranges(self, ranges: Sequence[tuple[str, int, int, int]], out: np.ndarray) -> None:
        """Parts of objects, side by side in one buffer.

        Parameters
        ----------
        ranges
            (key, first byte, bytes, where in `out`) of each.
        out
            uint8, filled.

        Raises
        ------
        IntegrityError
            If an object is missing, or ends too soon.
        """
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
        """A file descriptor to read an object from, the caller's to close; -1 where objects have none.

        Raises
        ------
        IntegrityError
            If the object is missing.
        """
        where = f"{self.root}/{key}"
        try:
            return os.open(self.path(key), os.O_RDONLY)
        except FileNotFoundError:
            raise IntegrityError("object is missing", where=where, fix=RESTORE) from None
        except OSError as error:
            raise StorageError(f"can't be read: {error.strerror}", where=where) from error

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None if there is none."""
        try:
            return self.path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, *data: Bytes) -> None:
        """Put a whole object (the pieces, joined) in place: a reader sees the old one or the new one."""
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

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """Delete the object of this name, or all below it."""
        path = self.path(prefix)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all objects below a prefix, sorted."""
        base = self.path(prefix) if prefix else self.root
        found = (Path(folder) / name for folder, _, names in os.walk(base) for name in names)
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def sync(self) -> None:
        """Everything written so far survives a power cut."""
        os.sync()

    def zarr(self, prefix: str, expected: ObjectTable | None = None) -> Store:
        """A read-only zarr store over a prefix.

        Parameters
        ----------
        prefix
            Key of the zarr hierarchy's root.
        expected
            What must exist, as in the manifest (keys relative to this location). zarr reads a lost object as
            zeros; here it is an :class:`~streamx.errors.IntegrityError`, and so is changed metadata, which
            no codec protects.
        """
        return _strict_store(self.path(prefix), prefix, expected or {})


def storage_error(error: OSError, where: str) -> StorageError | ResourceError:
    """What the operating system says about a failed write, as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            "the disk is full", where=where, fix="free some space and run the same command again"
        )
    return StorageError(
        f"can't be written: {error.strerror or error}",
        where=where,
        fix="mend it and run the same command again",
    )


def _length(byte_range: Any, size: int) -> int:
    """How many bytes of an object of this size zarr's request asks for."""
    if byte_range is None:
        return size
    if hasattr(byte_range, "suffix"):
        return min(byte_range.suffix, size)
    if hasattr(byte_range, "offset"):
        return max(0, size - byte_range.offset)
    return max(0, min(byte_range.end, size) - byte_range.start)


def _strict_store(root: Path, prefix: str, expected: ObjectTable) -> Store:
    from zarr.storage import LocalStore, WrapperStore

    class StrictStore(WrapperStore[LocalStore]):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            value = await self._store.get(key, prototype, byte_range)
            known = expected.get(f"{prefix}/{key}")
            if known is None:
                return value
            if value is None:
                raise IntegrityError("object is missing", where=str(root / key), fix=RESTORE)
            if len(value) != _length(byte_range, known[0]):  # zarr reads an empty zarr shard as zeros
                raise IntegrityError("object is cut short", where=str(root / key), fix=RESTORE)
            if key.endswith("zarr.json") and byte_range is None and describe(value.to_bytes()) != known:
                raise IntegrityError("metadata are damaged", where=str(root / key), fix=RESTORE)
            return value

    return StrictStore(LocalStore(root, read_only=True))


def open_location(place: str | Path | Location, **options: Any) -> Location:
    """The location that a path names."""
    if isinstance(place, Location):
        return place
    if "://" in str(place):
        raise UsageError(
            f"{place} is a URL; this version reads and writes local folders",
            fix="copy it to a local folder first",
        )
    return Location(Path(place).expanduser(), **options)
