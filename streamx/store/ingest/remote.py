"""Inputs in a bucket: copied to the scratch folder first, for HDF5 and text are read in many small pieces."""

from __future__ import annotations

import glob
import hashlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np

from streamx.errors import StorageError, UsageError
from streamx.store.bucket import Bucket
from streamx.store.ranges import LARGEST

PIECE, PIECES = LARGEST, 4  # bytes of one request, requests at once


@dataclass(frozen=True)
class Remote:
    """An object or a prefix in a bucket."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> Path:
        """Bucket and name, for what is decided by names alone."""
        return Path(self.url.partition("://")[2].rstrip("/"))


def expand_url(url: str) -> list[Remote]:
    """A URL, in whose last parts ``*`` may stand for anything but a slash -> what it names, sorted.

    Raises
    ------
    UsageError
        If nothing matches.
    """
    if not glob.has_magic(url):
        return [Remote(url)]
    parts = url.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    if fixed < 3:
        raise UsageError("the bucket has to be named", where=url, fix="s3://bucket/*.h5ad")
    base, pattern = "/".join(parts[:fixed]), parts[fixed:]
    found = {"/".join(key.split("/")[: len(pattern)]) for key in Bucket(base).list()}
    names = [
        name
        for name in found
        if name.count("/") == len(pattern) - 1
        and all(fnmatchcase(part, wanted) for part, wanted in zip(name.split("/"), pattern, strict=True))
    ]
    if not names:
        raise UsageError("nothing matches", where=url, fix="check the pattern; quote it in the shell")
    return [Remote(f"{base}/{name}") for name in sorted(names)]


def fetch(remote: Remote, scratch: Path) -> Path:
    """A local copy under the same name; one that is there already, of the same URL and bytes, serves.

    Raises
    ------
    UsageError
        If there is no such object, nor any below it.
    """
    home, _, name = remote.url.rstrip("/").rpartition("/")
    location = Bucket(home)
    keys = [name] if location.exists(name) else location.list(name)
    if not keys:
        raise UsageError("no such object", where=remote.url, fix="check the URL")
    digest = hashlib.blake2b(remote.url.encode(), digest_size=8).hexdigest()
    folder = scratch / "inputs" / digest
    for key in keys:
        _copy(location, key, folder / PurePosixPath(key))
    return folder / name


def _copy(location: Bucket, key: str, target: Path) -> None:
    before = location.stamp(key)
    stamp = target.with_name(f".{target.name}.stamp")
    if stamp.exists() and target.exists() and stamp.read_text() == before:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    size = location.size(key) or 0
    with target.open("wb") as stream:
        for low in range(0, size, PIECE * PIECES):
            high = min(low + PIECE * PIECES, size)
            buffer = np.empty(high - low, np.uint8)
            location.read_ranges(
                [(key, at, min(PIECE, high - at), at - low) for at in range(low, high, PIECE)], buffer
            )
            stream.write(buffer.data)
    if location.stamp(key) != before:
        raise StorageError("it was replaced while it was read", where=f"{location}/{key}", fix="run it again")
    stamp.write_text(before)
