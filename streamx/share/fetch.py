"""``fetch``: a published model as a folder, checked byte by byte before it is there at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from streamx.config import FetchConfig, build, parse_bytes
from streamx.errors import BadFileError, InputError, IntegrityError, UsageError
from streamx.interop.load import is_foreign
from streamx.share.archive import unpack
from streamx.share.http import LOOPBACK, Service, ask, split
from streamx.share.transfer import get_file
from streamx.share.zenodo import SANDBOX, ZENODO, service_of
from streamx.store.location import is_url
from streamx.store.manifest import dump
from streamx.train.model import CARD
from streamx.verify import verify

log = logging.getLogger("streamx")

ORIGIN = "origin.json"  # where a fetched model came from; not packed again
_PARTS = {ORIGIN, "archive.zip", "archive.zip.part", "files"}  # of an unfinished download
_DOI = re.compile(r"(?:doi:|https?://(?:dx\.)?doi\.org/)?10\.(5281|5072)/zenodo\.(\d+)", re.IGNORECASE)
_CHECKSUM = re.compile(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}")
_RECORD = re.compile(r"/(?:records?|deposit|uploads)/(\d+)(?:/files/([^/?]+?))?(?:/content)?/?")


@dataclass(frozen=True)
class Wanted:
    """What an address names: a record of a service (and a file of it); or a file anywhere, of no service."""

    base_url: str
    record: str | None = None
    file: str | None = None
    url: str | None = None


def parse_source(source: str, base_url: str | None = None, *, sandbox: bool = False) -> Wanted:
    """A DOI, a record's number or address, or the address of an archive.

    Raises
    ------
    UsageError
        If it is none of these, or a DOI of others.
    """
    source = source.strip()
    doi = _DOI.fullmatch(source)
    if doi:
        test = sandbox or doi[1] == "5072"
        return Wanted(base_url or (SANDBOX if test else ZENODO), record=doi[2])
    if source.isdigit():
        return Wanted(base_url or (SANDBOX if sandbox else ZENODO), record=source)
    if source.startswith(("https://", "http://")) and not _is_resolver(parts := split(source)):
        record = _RECORD.fullmatch(parts.path)
        services = {urlsplit(url).hostname: url for url in (ZENODO, SANDBOX, base_url or ZENODO)}
        host = (parts.hostname or "").removeprefix("www.")
        if record and host in services:  # by https, whatever the link says
            api = base_url or services[host]
            return Wanted(api, record=record[1], file=record[2] and unquote(record[2]))
        return Wanted(base_url or "", url=source)
    raise UsageError(
        "is no DOI of Zenodo and no address",
        where=source,
        fix="10.5281/zenodo.NUMBER, https://zenodo.org/records/NUMBER, or the address of a zip file",
    )


def _is_resolver(parts: SplitResult) -> bool:
    """Whether an address leads to a page about something, and not to the thing."""
    return parts.hostname in ("doi.org", "dx.doi.org", "hdl.handle.net")


def fetch(
    source: str,
    output: str | Path,
    *,
    base_url: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Download a published model, check it, and unpack it into a new folder.

    The download lies in ``<output>.part`` meanwhile and is gone on with by the same call; the folder appears
    when every byte is right. Nothing in the archive is run.

    Parameters
    ----------
    source
        A DOI (``10.5281/zenodo.123``), a record's number or address, or the address of a zip file.
    output
        Folder of the model. One that holds this very archive is left as it is.
    base_url
        Another service with Zenodo's interface.
    settings
        Fields of :class:`~streamx.config.FetchConfig`.

    Returns
    -------
    ``path, model`` (its kind), ``source, file, bytes, checksum, status`` (``fetched`` or ``found``).

    Raises
    ------
    BadFileError
        If there is no such record or no model in it, or the archive would write elsewhere.
    IntegrityError
        If bytes differ from what the service, the archive or the model says of them.
    ResourceError
        If the archive, or what is in it, has more bytes than allowed.
    UsageError
        If the folder holds something else; for an address by http without a checksum.
    """
    config: FetchConfig = build(FetchConfig, settings)
    if is_url(output):
        raise UsageError("fetch writes to a folder", where=str(output), fix="a folder on this machine")
    if config.checksum and not _CHECKSUM.fullmatch(config.checksum):
        raise UsageError(f"{config.checksum!r} is no checksum", fix="md5: or sha256:, and the digits")
    target, limit = Path(output).expanduser().absolute(), parse_bytes(config.limit)
    wanted = parse_source(source, base_url, sandbox=config.sandbox)
    patience: dict[str, Any] = {"timeout": config.timeout, "retry_seconds": config.retry_seconds}
    service = Service(wanted.base_url, **patience)
    if wanted.base_url:  # nobody else gets a token
        service = service_of(
            None, wanted.base_url, token_file=config.token_file, needs_token=False, **patience
        )
    if os.path.lexists(target) and not (target / ORIGIN).is_file():  # before requests that may take minutes
        raise _taken(target)
    file = _plain_file(wanted.url, config) if wanted.url else _file_of(service, wanted, config)
    checksum = config.checksum or file["checksum"]
    origin = {"source": _cited(source), "file": file["key"], "checksum": checksum}
    work = target.with_name(target.name + ".part")
    if os.path.lexists(target):
        return _found(target, work, origin)
    _claim(work, origin)
    archive, folder = work / "archive.zip", work / "files"
    if not archive.exists():
        of = {"size": file["size"], "checksum": checksum, "limit": limit}
        get_file(service, file["url"], archive, **of, progress=progress)
    n_bytes = archive.stat().st_size
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        unpack(archive, folder, limit)
        root, kind = _model_in(folder)
    except (BadFileError, IntegrityError):
        shutil.rmtree(work)  # the next call gets it anew
        raise
    (root / ORIGIN).write_bytes(dump(origin))
    os.replace(root, target)
    shutil.rmtree(work)
    return {"path": str(target), "model": kind, **origin, "bytes": n_bytes, "status": "fetched"}


def _claim(work: Path, origin: dict[str, Any]) -> None:
    """The folder of an unfinished download; what lies there of another download goes, and nothing else."""
    note = work / ORIGIN
    if os.path.lexists(work):
        strange = work.is_symlink() or not work.is_dir() or {path.name for path in work.iterdir()} - _PARTS
        if strange:
            raise UsageError(
                "is in the way: downloads lie there until they are whole",
                where=str(work),
                fix="move it, or give another -o",
            )
        if not note.is_file() or note.read_bytes() != dump(origin):
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    note.write_bytes(dump(origin))


def _cited(source: str) -> str:
    """The source as it may be kept: an address without query and user, where some put secrets."""
    return re.sub(r"//[^/]*@", "//", source.strip().partition("?")[0])


def _found(target: Path, work: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """What is there already, if it is what is asked for."""
    try:
        before = json.loads((target / ORIGIN).read_bytes())
    except (OSError, ValueError):
        before = None
    if before != origin:
        raise _taken(target)
    if (work / ORIGIN).is_file():  # killed between the last two steps
        _claim(work, origin)
        shutil.rmtree(work)
    log.info("%s holds this model already", target)
    return {"path": str(target), "model": _model_in(target)[1], **origin, "bytes": None, "status": "found"}


def _plain_file(url: str, config: FetchConfig) -> dict[str, Any]:
    """A file of no service, which says neither size nor checksum."""
    parts = split(url)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and config.checksum is None:
        raise UsageError(
            "by http anyone on the way may change it",
            where=_cited(url),
            fix="https://..., or say what it must be: --checksum sha256:...",
        )
    return {"key": None, "url": url, "size": None, "checksum": None}


def _taken(target: Path) -> UsageError:
    return UsageError("is there already, and holds something else", where=str(target), fix="another folder")


def _file_of(service: Service, wanted: Wanted, config: FetchConfig) -> dict[str, Any]:
    """The archive among a record's files: the one that is named, else streamx' own, else the only zip."""
    where = f"{service.url}/records/{wanted.record}"
    record = ask(service, "GET", f"/records/{wanted.record}") or {}
    try:
        found = {file["key"]: file for file in map(_listed, record.get("files") or [])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError("its list of files can't be read", where=where) from error
    name = config.file or wanted.file
    if name is not None:
        fitting = [key for key in found if key == name]
    else:
        zips = [key for key in found if key.endswith(".zip")]
        fitting = [key for key in zips if key.startswith("streamx-")] or zips
    if len(fitting) != 1:
        what = f"holds no file {name!r}" if name else f"holds {len(fitting)} archives, and one is wanted"
        names = sorted(found, key=lambda key: (not key.endswith(".zip"), key))
        has = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        has = has or "none that may be read"
        raise BadFileError(what, where=where, fix=f"name one with --file; its files: {has}")
    return found[fitting[0]]


def _listed(entry: dict[str, Any]) -> dict[str, Any]:
    """A file as a record lists it; its size and checksum may be missing."""
    links = entry.get("links") or {}
    size, checksum = entry.get("size", entry.get("filesize")), entry.get("checksum")
    return {
        "key": str(entry.get("key") or entry["filename"]),
        "url": links.get("content") or links.get("self") or links.get("download"),
        "size": None if size is None else int(size),
        "checksum": None if checksum is None else str(checksum),
    }


def _model_in(folder: Path) -> tuple[Path, str]:
    """Where in a folder the model lies (there, or in the only folder in it), and its kind, once verified.

    Raises
    ------
    BadFileError
        If there is none.
    IntegrityError
        If its bytes are not those that were written.
    """
    inner = [path for path in folder.iterdir() if path.is_dir()]
    for root in (folder, *(inner if len(inner) == 1 else ())):
        if (root / CARD).is_file():
            checked = verify(root)
            if not checked["ok"]:
                wrong = checked["errors"][0]
                raise IntegrityError(f"{wrong['object']}: {wrong['error']}", where=str(folder))
            return root, str(json.loads((root / CARD).read_bytes())["model"])
        if is_foreign(root):
            return root, "another tool's"
    raise BadFileError("holds no model", where=str(folder), fix="is it the right file?")
