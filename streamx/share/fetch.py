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
from urllib.parse import unquote, urlsplit

from streamx.config import FetchConfig, build, parse_bytes
from streamx.errors import BadFileError, IntegrityError, UsageError
from streamx.interop.load import is_foreign
from streamx.share.archive import unpack
from streamx.share.http import Service, ask
from streamx.share.transfer import get_file
from streamx.share.zenodo import SANDBOX, ZENODO, service_of
from streamx.store.location import is_url
from streamx.store.manifest import dump
from streamx.train.model import CARD
from streamx.verify import verify

log = logging.getLogger("streamx")

ORIGIN = "origin.json"  # where a fetched model came from; not packed again
_DOI = re.compile(r"(?:doi:|https?://(?:dx\.)?doi\.org/)?10\.(5281|5072)/zenodo\.(\d+)", re.IGNORECASE)
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
        If it is none of these.
    """
    source = source.strip()
    doi = _DOI.fullmatch(source)
    if doi:
        test = sandbox or doi[1] == "5072"
        return Wanted(base_url or (SANDBOX if test else ZENODO), record=doi[2])
    if source.isdigit():
        return Wanted(base_url or (SANDBOX if sandbox else ZENODO), record=source)
    parts = urlsplit(source)
    if parts.scheme in ("https", "http") and parts.hostname:
        record = _RECORD.fullmatch(parts.path)
        known = {urlsplit(url).hostname for url in (ZENODO, SANDBOX, base_url or ZENODO)}
        if record and parts.hostname.removeprefix("www.") in known:
            api = base_url or f"{parts.scheme}://{parts.netloc.removeprefix('www.')}/api"
            return Wanted(api, record=record[1], file=record[2] and unquote(record[2]))
        return Wanted(base_url or "", url=source)
    raise UsageError(
        "is no DOI of Zenodo and no address",
        where=source,
        fix="10.5281/zenodo.NUMBER, https://zenodo.org/records/NUMBER, or the address of a zip file",
    )


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
    UsageError
        If the folder holds something else.
    """
    config: FetchConfig = build(FetchConfig, settings)
    if is_url(output):
        raise UsageError("fetch writes to a folder", where=str(output), fix="a folder on this machine")
    target = Path(output).expanduser().absolute()
    wanted = parse_source(source, base_url, sandbox=config.sandbox)
    patience: dict[str, Any] = {"timeout": config.timeout, "retry_seconds": config.retry_seconds}
    service = Service(wanted.base_url, **patience)
    if wanted.base_url:  # nobody else gets a token
        service = service_of(
            None, wanted.base_url, token_file=config.token_file, needs_token=False, **patience
        )
    limit = parse_bytes(config.limit)
    if target.exists() and not (target / ORIGIN).is_file():  # before a request that may take minutes
        raise _taken(target)
    file: dict[str, Any] = (
        {"key": None, "url": wanted.url} if wanted.url else _file_of(service, wanted, config)
    )
    origin = {"source": _cited(source), "file": file["key"], "checksum": file.get("checksum")}
    if target.exists():
        return _found(target, origin)
    work = target.with_name(target.name + ".part")
    _claim(work, origin)
    archive, folder = work / "archive.zip", work / "files"
    if not archive.exists():
        size, checksum = file.get("size"), file.get("checksum")
        get_file(service, file["url"], archive, size=size, checksum=checksum, progress=progress)
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
    """The folder of an unfinished download; what lies there of another one goes."""
    note = work / ORIGIN
    if work.exists() and not (note.is_file() and note.read_bytes() == dump(origin)):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    note.write_bytes(dump(origin))


def _cited(source: str) -> str:
    """The source as it may be kept: an address without query and user, where some put secrets."""
    return re.sub(r"//[^/]*@", "//", source.strip().partition("?")[0])


def _found(target: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """What is there already, if it is what is asked for."""
    try:
        before = json.loads((target / ORIGIN).read_bytes())
    except (OSError, ValueError):
        before = None
    if before != origin:
        raise _taken(target)
    log.info("%s holds this model already", target)
    return {"path": str(target), "model": _model_in(target)[1], **origin, "bytes": None, "status": "found"}


def _taken(target: Path) -> UsageError:
    return UsageError("is there already, and holds something else", where=str(target), fix="another folder")


def _file_of(service: Service, wanted: Wanted, config: FetchConfig) -> dict[str, Any]:
    """The archive among a record's files: the one that is named, else streamx' own, else the only zip."""
    where = f"{service.url}/records/{wanted.record}"
    record = ask(service, "GET", f"/records/{wanted.record}") or {}
    found = {}
    for entry in record.get("files") or []:
        key = entry.get("key") or entry.get("filename")
        links = entry.get("links") or {}
        url = links.get("content") or links.get("self") or links.get("download")
        size = entry.get("size", entry.get("filesize"))
        found[key] = {"key": key, "url": url, "size": size, "checksum": entry.get("checksum")}
    name = config.file or wanted.file
    if name is not None:
        fitting = [key for key in found if key == name]
    else:
        zips = [key for key in found if key.endswith(".zip")]
        fitting = [key for key in zips if key.startswith("streamx-")] or zips
    if len(fitting) != 1:
        what = f"holds no file {name!r}" if name else f"holds {len(fitting)} archives, and one is wanted"
        has = ", ".join(sorted(found)) or "none that may be read"
        raise BadFileError(what, where=where, fix=f"name one with --file; its files: {has}")
    return found[fitting[0]]


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
