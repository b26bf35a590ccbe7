"""A place that holds named objects: a folder on a disk or a prefix in a bucket, by the same verbs.

Everything that streamx writes goes through :meth:`Location.write` (whole objects, atomically),
:meth:`Location.replace` and :meth:`Location.delete`: one choke point, which is what makes `kill -9` at every
operation testable.
"""

from __future__ import annotations

import errno
import os
import posixpath
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import google_crc32c
import numpy as np

from streamx.errors import ResourceError, StorageError, UsageError

if TYPE_CHECKING:
    from zarr.abc.store import Store

RESTORE = "restore it from a copy, or convert again"
SCHEMES = ("s3", "gs", "az")

Bytes = bytes | memoryview
ObjectTable = dict[str, list[Any]]  # key -> [bytes, CRC-32], as :func:`describe` gives them
Range = tuple[str, int, int, int]  # key, first byte, bytes, where in the buffer
Put = Callable[..., None]  # takes an object's key and its bytes, in pieces


class Location(Protocol):
    """Whole objects under relative keys; :class:`~streamx.store.folder.Folder` or
    :class:`~streamx.store.bucket.Bucket`.

    Attributes
    ----------
    root
        The folder's path, or the bucket's URL.
    shared
        Whether others may write at the same time, with no lock that would tell. Then the names of a run's
        objects are its own, and :meth:`replace` of the marker alone decides.
    """

    shared: bool

    def __hash__(self) -> int: ...

    @property
    def root(self) -> Path | str: ...

    @property
    def journal(self) -> Path:
        """Local folder for the journal of an unfinished commit: beside the folder, or in the cache."""

    def below(self, prefix: str) -> Location:
        """The location of all keys that begin with `prefix/`."""

    def staged(self, tmp: Path) -> Location:
        """The same place, with half-written objects under `tmp` where there are any (on its file system)."""

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None if there is none."""

    def read(self, key: str) -> bytes:
        """A whole object.

        Raises
        ------
        IntegrityError
            If there is none.
        StorageError
            If it can't be read.
        """

    def read_ranges(self, ranges: Sequence[Range], out: np.ndarray) -> None:
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
        StorageError
            If one can't be read.
        """

    def descriptor(self, key: str) -> int:
        """A file descriptor to read an object from, the caller's to close; -1 where objects have none.

        Raises
        ------
        IntegrityError
            If the object is missing.
        """

    def write(self, key: str, *data: Bytes) -> None:
        """Put a whole object (the pieces, joined) in place: a reader sees the old one or the new one."""

    def write_all(self, produce: Callable[[Put], None]) -> None:
        """Put in place what `produce` puts, in any order; in a bucket many at once."""

    def replace(self, key: str, data: bytes, before: bytes | None) -> None:
        """Write an object if it still is what it was (None: if there is none), or is `data` already.

        Raises
        ------
        LockedError
            If another process has put something else there.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; of several who try at once, one gets True."""

    def put_tree(self, produce: Callable[[Put], None]) -> None:
        """Put a whole zarr hierarchy here, instead of all that was here: no reader sees half of it.

        In a bucket its ``zarr.json`` goes first and comes last: meanwhile there is none.
        """

    def delete(self, *keys: str) -> None:
        """Delete these objects, as far as there are any."""

    def delete_tree(self, prefix: str) -> None:
        """Delete the object of this name, or all below it."""

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all objects below a prefix, sorted."""

    def sync(self) -> None:
        """Everything written so far survives a power cut."""

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


def open_location(place: str | Path | Location, **options: Any) -> Location:
    """The location that a path or URL names.

    Parameters
    ----------
    place
        A folder, or ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``.
    options
        Of a bucket: fields of :class:`streamx.config.BucketConfig`. What is not given is taken from the
        usual environment variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``GOOGLE_...``,
        ``AZURE_STORAGE_...``).

    Raises
    ------
    UsageError
        If the scheme is unknown, or the extra ``cloud`` is not installed.
    """
    from streamx.store.bucket import Bucket
    from streamx.store.folder import Folder

    if not isinstance(place, (str, os.PathLike)):
        return place
    if is_url(place):
        return Bucket(str(place), **options)
    if options:
        raise UsageError(f"{', '.join(options)}: for buckets only", where=str(place))
    return Folder(Path(place).expanduser())


def is_url(place: Any) -> bool:
    """Whether this names a place in a bucket (or somewhere else that is no folder)."""
    return isinstance(place, str) and "://" in place


def is_there(place: Location) -> bool:
    """Whether there is such a folder, or anything under such a prefix."""
    return bool(place.list()) if place.shared else Path(place.root).exists()


def local_folder(place: Any) -> Path:
    """The folder that a path names.

    Raises
    ------
    UsageError
        If it is a URL.
    """
    if is_url(place):
        raise UsageError("only a folder will do here", where=str(place), fix="write locally, then copy it")
    return Path(place)


def relative(place: Location, start: Location) -> str:
    """Where a place lies as seen from another: relative on one disk and in one bucket, else in full."""
    from streamx.store.bucket import Bucket
    from streamx.store.folder import Folder

    if isinstance(place, Folder) and isinstance(start, Folder):
        return Path(os.path.relpath(place.root.resolve(), start.root.resolve())).as_posix()
    if isinstance(place, Bucket) and isinstance(start, Bucket) and place.bucket == start.bucket:
        return posixpath.relpath(f"/{place.prefix}", f"/{start.prefix}")
    return str(place.root.resolve() if isinstance(place, Folder) else place)


def follow(start: Location, relation: str) -> Location:
    """The place that :func:`relative` described as seen from `start`."""
    from streamx.store.bucket import Bucket
    from streamx.store.folder import Folder

    if isinstance(start, Bucket):
        if is_url(relation):
            return start.at(relation)
        if not posixpath.isabs(relation):
            path = posixpath.normpath(posixpath.join(f"/{start.prefix}", relation))
            return start.at(f"{start.bucket}{path}")
    elif isinstance(start, Folder) and not is_url(relation):
        return Folder((start.root / relation).resolve())
    return open_location(relation)


def check_key(key: str, where: str) -> str:
    """The key, if it does not lead out of the location (R35)."""
    if key.startswith(("/", "\\")) or ".." in PurePosixPath(key).parts or "\0" in key:
        raise StorageError(f"object name {key!r} leaves the store", where=where)
    return key


def crc32c(data: bytes | memoryview) -> str:
    """CRC-32C (Castagnoli) of the bytes, eight hexadecimal digits; see :func:`describe` for objects."""
    return f"{google_crc32c.value(bytes(data)):08x}"


def each(objects: Mapping[str, bytes]) -> Callable[[Put], None]:
    """Objects that are in memory, for :meth:`Location.write_all`."""

    def produce(put: Put) -> None:
        for key, data in objects.items():
            put(key, data)

    return produce


def describe(*data: Bytes) -> list[Any]:
    """Length and CRC-32 of an object that is given in pieces: ``[bytes, eight hexadecimal digits]``.

    Not CRC-32C, although zarr has it: zarr appends it to chunks and shard indices, and the CRC of bytes that
    end in their own CRC is a constant. All our objects of one length would have the same.
    """
    crc, size = 0, 0
    for piece in data:
        crc, size = zlib.crc32(piece, crc), size + memoryview(piece).nbytes
    return [size, f"{crc:08x}"]


def storage_error(error: OSError, where: str) -> StorageError | ResourceError:
    """What the operating system says about a failed write, as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            "the disk is full", where=where, fix="free some space and run the same command again"
        )
    in_the_way = error.errno in (errno.EEXIST, errno.ENOTDIR)
    return StorageError(
        f"can't be written: {error.strerror or error}",
        where=where,
        fix="choose another place" if in_the_way else "mend it and run the same command again",
    )
