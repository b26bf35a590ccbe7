"""Files over the wire, in pieces: sent with their checksum taken on the way; fetched, and gone on with."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from streamx.errors import IntegrityError, ResourceError, StorageError
from streamx.share.http import FIRST_PAUSE, LONGEST_PAUSE, OPEN_ERRORS, Service, parsed, redacted, send
from streamx.store.location import storage_error
from streamx.threads import pause

PIECE = 1 << 20
PATIENCE = 5  # times the timeout: a service looks at a large upload before it answers


def md5_of(path: Path) -> str:
    """``md5:`` and 32 hexadecimal digits, as Zenodo writes them."""
    with path.open("rb") as stream:
        return f"md5:{hashlib.file_digest(stream, _md5).hexdigest()}"


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)  # a checksum; R34's trust comes from https and the manifest


@contextmanager
def _bar(name: str, total: int | None, progress: bool) -> Iterator[Any]:
    with tqdm(
        total=total,
        desc=name,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if progress else True,
    ) as bar:
        yield bar


class _Sent:
    """A stream whose bytes are counted by a bar as they are read."""

    def __init__(self, stream: IO[bytes], bar: Any) -> None:
        self.stream, self.bar = stream, bar

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(PIECE if size > 0 else size)  # http.client asks for 8 or 16 kB
        self.bar.update(len(data))
        return data

    def close(self) -> None:
        self.stream.close()


def put_file(service: Service, path: Path, url: str, *, progress: bool = True) -> Any:
    """PUT a file, a MiB at a time; the service's answer, which must name the checksum that was sent.

    Raises
    ------
    IntegrityError
        If the service holds other bytes than those of the file.
    """
    size, checksum = path.stat().st_size, md5_of(path)
    with _bar(f"upload {path.name}", size, progress) as bar:

        def body() -> _Sent:
            bar.reset(total=size)
            return _Sent(path.open("rb"), bar)

        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        patient = replace(service, timeout=PATIENCE * service.timeout)
        with send(patient, "PUT", url, body=body, headers=headers) as response:
            answer = parsed(response, service, redacted(url, service)) or {}
    if answer.get("checksum") not in (None, checksum, checksum.removeprefix("md5:")):
        raise IntegrityError(
            f"the service got {answer['checksum']}, the file has {checksum}",
            where=redacted(url, service),
            fix="run the same command again",
        )
    return answer


def get_file(
    service: Service,
    url: str,
    path: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """GET a file, a MiB at a time, into ``<path>.part``, which takes the place of `path` when it is right.

    A part that is there already is gone on with, where the server lets one (``Range``) and a checksum will
    tell whether both halves are of one file.

    Parameters
    ----------
    size, checksum
        What the service says of it: bytes; ``md5:...`` (or ``sha256:...``). A server's own ETag of that
        form counts too.
    limit
        Bytes that it may have; a server that sends on and on is not listened to for longer.

    Returns
    -------
    The headers of the answer.

    Raises
    ------
    IntegrityError
        If the bytes are not those that the service describes.
    ResourceError
        If they are more than allowed.
    StorageError
        If the connection keeps breaking, or the disk is full.
    """
    if limit is not None and size is not None and size > limit:
        raise _too_large(size, limit, redacted(url, service))
    most = (size, limit)
    part = path.with_name(path.name + ".part")
    had = part.stat().st_size if part.exists() else 0
    if had and (checksum is None or (size is not None and had > size)):
        part.unlink()
        had = 0
    headers = _fill(service, url, part, most, progress)
    checksum = checksum or _etag_checksum(headers)
    wrong = _difference(part, size, checksum)
    if wrong and had:  # the part was of something else: once more from the start
        part.unlink()
        headers = _fill(service, url, part, most, progress)
        wrong = _difference(part, size, checksum)
    if wrong:
        part.unlink()
        raise IntegrityError(wrong, where=redacted(url, service), fix="run the same command again")
    os.replace(part, path)
    return headers


Most = tuple[int | None, int | None]  # bytes that were announced, and that are allowed


def _too_large(size: int, limit: int, where: str) -> ResourceError:
    return ResourceError(
        f"{size:,} bytes or more, and {limit:,} are allowed",
        where=where,
        fix="a larger --limit, if you trust it",
    )


def _fill(service: Service, url: str, part: Path, most: Most, progress: bool) -> dict[str, str]:
    """Bytes into the part until it is whole; taken up where a connection broke."""
    wait, spent = FIRST_PAUSE, 0.0
    while True:
        had = part.stat().st_size if part.exists() else 0
        if had and had == most[0]:
            return {}
        try:
            return _append(service, url, part, had, most, progress)
        except OPEN_ERRORS as error:
            of_the_wire = (ConnectionError, TimeoutError, ssl.SSLError)
            if isinstance(error, OSError) and error.errno and not isinstance(error, of_the_wire):
                raise storage_error(error, str(part)) from error
            if part.exists() and part.stat().st_size > had:
                wait, spent = FIRST_PAUSE, 0.0  # it does move
            if spent + wait > service.retry_seconds or pause(wait):
                raise StorageError(
                    f"the download broke off: {type(error).__name__}",
                    where=redacted(url, service),
                    fix="run the same command again: it goes on from where it is",
                ) from None
            wait, spent = min(2 * wait, LONGEST_PAUSE), spent + wait


def _append(service: Service, url: str, part: Path, had: int, most: Most, progress: bool) -> dict[str, str]:
    size, limit = most
    name = part.name.removesuffix(".part")
    headers = {"Range": f"bytes={had}-"} if had else {}
    with send(service, "GET", url, headers=headers) as response:
        begins = re.match(rf"bytes {had}-", response.headers.get("Content-Range", ""))
        if response.status == 206 and begins is None:
            raise ConnectionError("another part than was asked for")
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        start = had if resumed else 0
        total = None if length is None else start + int(length)
        if limit is not None and (total or 0) > limit:
            raise _too_large(total or 0, limit, redacted(url, service))
        with part.open("ab" if resumed else "wb") as out, _bar(f"download {name}", total, progress) as bar:
            bar.update(start)
            while data := response.read(PIECE):
                out.write(data)
                bar.update(len(data))
                if size is not None and out.tell() > size:
                    return {}  # more than was announced: wrong, however it goes on
                if limit is not None and out.tell() > limit:
                    raise _too_large(out.tell(), limit, redacted(url, service))
            if total is not None and out.tell() != total:
                raise ConnectionError(f"{out.tell():,} of {total:,} bytes")
        return dict(response.headers.items())


def _etag_checksum(headers: dict[str, str]) -> str | None:
    tag = {name.lower(): value for name, value in headers.items()}.get("etag", "").strip('"')
    return tag if re.fullmatch(r"md5:[0-9a-f]{32}", tag) else None


def _difference(path: Path, size: int | None, checksum: str | None) -> str | None:
    """How a file differs from what is said of it."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{found:,} bytes, and {size:,} were announced"
    if checksum is None:
        return None
    kind, _, digits = checksum.rpartition(":")
    if kind not in ("", "md5", "sha256"):
        return f"a checksum of an unknown kind, {kind!r}"
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, _md5 if kind != "sha256" else "sha256").hexdigest()
    return None if got == digits else f"checksum {got}, and {digits} was announced"
