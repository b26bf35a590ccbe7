"""A model folder as one zip file and back. What comes from others is read as data that may be hostile.

The archive holds the folder's files as they are, sorted, without times: the same folder gives the same bytes.
Last comes ``streamx-files.json``: size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import stat
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from streamx.errors import BadFileError, IntegrityError, ResourceError
from streamx.store.location import Location, storage_error
from streamx.store.manifest import dump

MANIFEST = "streamx-files.json"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold
MOST_FILES = 200_000
DIRECTORY = 256 * MOST_FILES  # bytes of the archive's own directory, which zipfile reads as a whole
PIECE = 1 << 20
FORMAT = 1


def pack(location: Location, path: Path, extra: dict[str, bytes], skip: Sequence[str] = ()) -> str:
    """Write the objects of a folder or bucket into a zip file; SHA-256 of what they are.

    Parameters
    ----------
    extra
        Files to put in besides, or instead of those of the same name.
    skip
        Names to leave out.

    Returns
    -------
    SHA-256 of the list of names, sizes and SHA-256: two folders with the same files have the same.
    """
    keys = {key for key in location.list() if key not in skip and key != MANIFEST}
    files: dict[str, list[Any]] = {}
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for key in sorted(keys | set(extra)):
                pieces = iter([extra[key]]) if key in extra else _pieces(location, key)
                files[key] = _add(archive, key, pieces)
            listed = dump({"format": FORMAT, "files": files})
            _add(archive, MANIFEST, iter([listed]))
    except OSError as error:
        raise storage_error(error, str(path)) from error
    return hashlib.sha256(listed).hexdigest()


def _pieces(location: Location, key: str) -> Iterator[bytes]:
    """An object's bytes; of a file a MiB at a time."""
    descriptor = location.descriptor(key)
    if descriptor < 0:
        yield location.read(key)
        return
    with os.fdopen(descriptor, "rb") as stream:
        while data := stream.read(PIECE):
            yield data


def _add(archive: zipfile.ZipFile, key: str, pieces: Iterator[bytes]) -> list[Any]:
    """One file into the archive: its size and SHA-256."""
    info = zipfile.ZipInfo(key, EPOCH)
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    size, digest = 0, hashlib.sha256()
    with archive.open(info, "w", force_zip64=True) as out:
        for data in pieces:
            out.write(data)
            digest.update(data)
            size += len(data)
    return [size, digest.hexdigest()]


def safe_name(name: str) -> str | None:
    """A member's name as a relative path below the target; None for a folder.

    Raises
    ------
    BadFileError
        If it leads elsewhere, on any system: absolute, with ``..``, a drive, a backslash, control characters;
        or is longer than disks take.
    """
    path = PurePosixPath(name)
    bad = (
        not name
        or name.startswith("/")
        or ".." in path.parts
        or "\\" in name
        or re.match(r"[A-Za-z]:", name)
        or any(unicodedata.category(letter) == "Cc" for letter in name)
        or len(name.encode()) > 4096
        or any(len(part.encode()) > 255 for part in path.parts)  # longer than disks take
    )
    if bad:
        raise BadFileError(f"a file in it is called {name[:200]!r}, which leads out of the folder")
    return None if name.endswith("/") else str(path)


def plan_extraction(members: Sequence[zipfile.ZipInfo], limit: int) -> dict[str, zipfile.ZipInfo]:
    """What is to be written where, or why nothing is: decided before the first byte.

    Parameters
    ----------
    limit
        Bytes that all files together may have.

    Raises
    ------
    BadFileError
        For names that lead out of the folder, links, devices, encrypted files, a name that occurs twice or is
        a file and a folder at once.
    ResourceError
        If the files would be more or larger than allowed.
    """
    if len(members) > MOST_FILES:
        raise ResourceError(f"{len(members):,} files, and {MOST_FILES:,} are allowed")
    found: dict[str, zipfile.ZipInfo] = {}
    for info in members:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise BadFileError(f"{info.filename[:200]!r} is a link or device, which a model does not need")
        if info.flag_bits & 1:
            raise BadFileError(f"{info.filename[:200]!r} is encrypted")
        name = safe_name(info.filename)
        if name is None:
            continue
        if name in found:
            raise BadFileError(f"{name[:200]!r} is in it twice")
        found[name] = info
    for name in found:
        if any(str(parent) in found for parent in PurePosixPath(name).parents):
            raise BadFileError(f"{name[:200]!r} lies in a folder that is a file")
    total = sum(info.file_size for info in found.values())
    if total > limit:
        raise ResourceError(
            f"{total:,} bytes when unpacked, and {limit:,} are allowed",
            fix="a larger --limit, if you trust it",
        )
    return found


class _Capped(io.FileIO):
    """A file of which no more is read at once than a directory may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY:
            raise ResourceError(f"its directory has {size:,} bytes, and {DIRECTORY:,} are allowed")
        return super().read(size)


def unpack(path: Path, folder: Path, limit: int) -> None:
    """Unpack a zip file into a new folder; nothing is written outside of it, nothing is run.

    Every file is compared with the archive's own list, if it has one, and with zip's checksum.

    Raises
    ------
    BadFileError
        If it is no zip file, or one as :func:`plan_extraction` refuses.
    IntegrityError
        If a file is not what the list says, or is missing.
    ResourceError
        If it needs more bytes than allowed, or than the disk has.
    """
    try:
        with _Capped(path) as stream, zipfile.ZipFile(stream) as archive:
            plan = plan_extraction(archive.infolist(), limit)
            listed = _listed(archive, plan.pop(MANIFEST, None), plan)
            _room_for(folder, sum(info.file_size for info in plan.values()))
            left = limit
            for name, info in plan.items():
                size, digest = _extract(archive, info, folder / name, left)
                left -= size
                if listed is not None and listed.pop(name, None) != [size, digest]:
                    raise IntegrityError(f"{name!r} is not what the archive's list says", where=str(path))
            if listed:
                raise IntegrityError(f"{min(listed)!r} is missing", where=str(path))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise BadFileError(f"is no sound zip file: {error}", where=str(path)) from error
    except BadFileError as error:
        raise BadFileError(error.what, where=str(path), fix="don't use it; ask who made it") from None


def _listed(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo | None, plan: dict[str, zipfile.ZipInfo]
) -> dict[str, list[Any]] | None:
    """The archive's own list of files; None if it has none (another tool made it)."""
    if info is None:
        return None
    longest = 4096 + sum(12 * len(name) + 256 for name in plan)  # JSON takes at most 12 bytes a character
    if info.file_size > longest:
        raise ValueError(f"its list of {len(plan):,} files has {info.file_size:,} bytes")
    with archive.open(info) as stream:
        try:
            return dict(json.loads(stream.read())["files"])
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its list of files can't be read: {error}") from None


def _room_for(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ResourceError(
            f"needs {size:,} bytes, {free:,} are free", where=str(folder), fix="another disk, or make room"
        )


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, left: int) -> tuple[int, str]:
    """One file: its size and SHA-256. Bytes are counted as they come: a header may lie."""
    size, digest = 0, hashlib.sha256()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as stream, target.open("xb") as out:
            for data in _read(stream):
                size += len(data)
                if size > left:
                    raise ResourceError(f"{info.filename!r} is larger than it says", fix="don't use it")
                digest.update(data)
                out.write(data)
    except (FileExistsError, NotADirectoryError) as error:  # capitals or accents tell them apart elsewhere
        raise BadFileError(f"{info.filename!r} and another name in it are one name on this disk") from error
    except OSError as error:
        raise storage_error(error, str(target)) from error
    return size, digest.hexdigest()


def _read(stream: IO[bytes]) -> Iterator[bytes]:
    while data := stream.read(PIECE):
        yield data
