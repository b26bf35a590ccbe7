"""Depositions and files on Zenodo, with the names and arguments of ``scarches.zenodo`` (documented Dec 2020).

Where they differ from scArches': the token travels in a header and may come from the environment
(``ZENODO_TOKEN``; for the sandbox ``ZENODO_SANDBOX_TOKEN``); errors are named; ``base_url`` chooses the
service (:data:`ZENODO`, :data:`SANDBOX`); files go to the deposition's bucket in pieces (the documented way
holds them in memory, and ends at 100 MB); ``publish_deposition`` returns the link that its documentation
promises; ``get_all_deposition_ids`` reads all pages; ``delete_deposition`` knows an answer without a body;
``download_file`` makes folders when told to and checks what it got; archives are unpacked with suspicion.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from streamx.errors import BadFileError, StorageError, UsageError
from streamx.share.archive import pack, unpack
from streamx.share.http import Service, ask, read_token, split
from streamx.share.transfer import get_file, md5_of, put_file
from streamx.store.location import open_location

ZENODO = "https://zenodo.org/api"
SANDBOX = "https://sandbox.zenodo.org/api"
PAGE = 100  # depositions per page, at most: the service may give fewer
LIMIT = 50 * 10**9  # bytes of an unpacked model: what Zenodo takes as one record


def service_of(
    access_token: str | None = None,
    base_url: str = ZENODO,
    *,
    token_file: str | Path | None = None,
    timeout: float = 60.0,
    retry_seconds: float = 120.0,
    needs_token: bool = True,
) -> Service:
    """The service, with the token that is given, in a file, or in the environment.

    Raises
    ------
    UsageError
        If there is none and one is needed.
    """
    sandbox = urlsplit(base_url).hostname == urlsplit(SANDBOX).hostname
    variables = ("ZENODO_SANDBOX_TOKEN",) if sandbox else ("ZENODO_TOKEN",)
    token = read_token(access_token, variables, token_file)
    if token is None and needs_token:
        raise UsageError(
            "no access token",
            where=base_url,
            fix=f"make one (Zenodo, Applications, deposit:write) and export {variables[0]}=...",
        )
    return Service(base_url.rstrip("/"), token, timeout, retry_seconds)


def create_deposition(
    access_token: str | None,
    upload_type: str,
    title: str,
    description: str,
    *,
    base_url: str = ZENODO,
    **kwargs: Any,
) -> str:
    """Make a deposition, a draft; its number.

    Parameters
    ----------
    access_token
        None: from the environment.
    upload_type
        Such as ``dataset``, ``software`` or ``other``.
    kwargs
        Further metadata, such as ``creators=[{"name": "Doe, Jane"}]``, ``keywords``, ``license``.
    """
    metadata = {"upload_type": upload_type, "title": title, "description": description, **kwargs}
    service = service_of(access_token, base_url)
    return str(ask(service, "POST", "/deposit/depositions", {"metadata": metadata})["id"])


def update_deposition(
    deposition_id: str, access_token: str | None, metadata: dict[str, Any], *, base_url: str = ZENODO
) -> None:
    """Replace a draft's metadata, given as such or as ``{"metadata": {...}}``."""
    nested = metadata if set(metadata) == {"metadata"} else {"metadata": metadata}
    ask(service_of(access_token, base_url), "PUT", _deposition(deposition_id), nested)


def delete_deposition(deposition_id: str, access_token: str | None, *, base_url: str = ZENODO) -> None:
    """Delete a draft; what is published stays."""
    ask(service_of(access_token, base_url), "DELETE", _deposition(deposition_id))


def publish_deposition(deposition_id: str, access_token: str | None, *, base_url: str = ZENODO) -> str:
    """Publish a draft, for good; the link of the record."""
    service = service_of(access_token, base_url)
    return record_link(ask(service, "POST", f"{_deposition(deposition_id)}/actions/publish"), service)


def get_all_deposition_ids(access_token: str | None, *, base_url: str = ZENODO) -> list[str]:
    """Numbers of all depositions of the token's owner."""
    return [str(entry["id"]) for entry in all_depositions(service_of(access_token, base_url))]


def upload_file(
    file_path: str | Path,
    deposition_id: str,
    access_token: str | None,
    *,
    base_url: str = ZENODO,
    progress: bool = True,
) -> str:
    """Put a file into a draft; the link that it has once that is published.

    A file that is there already with the same checksum is not sent again.

    Raises
    ------
    IntegrityError
        If the service got other bytes than were sent.
    UsageError
        If the deposition is published already.
    """
    service = service_of(access_token, base_url)
    return put_into(service, deposition_id, Path(file_path), progress=progress)


def download_file(
    link: str,
    save_path: str | Path,
    make_dir: bool = False,
    *,
    checksum: str | None = None,
    progress: bool = True,
) -> tuple[str, dict[str, str] | None]:
    """Get a file; its path, and the headers of the answer (None: the file was there already, and is kept).

    Parameters
    ----------
    make_dir
        Make the folder that it goes to.
    checksum
        ``md5:...`` or ``sha256:...`` that it must have.

    Raises
    ------
    UsageError
        If the folder does not exist.
    """
    path = Path(save_path).expanduser()
    if make_dir:
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        raise UsageError("no such folder", where=str(path.parent), fix="make it, or make_dir=True")
    if path.exists():
        return str(path), None
    headers = get_file(Service(_host(link)), link, path, checksum=checksum, progress=progress)
    return str(path), headers


def upload_model(
    model: Any,
    deposition_id: str,
    access_token: str | None,
    model_name: str | None = None,
    *,
    base_url: str = ZENODO,
    progress: bool = True,
) -> str:
    """Put a model into a draft, as ``scarches-<model_name>.zip``; the link that it has once published.

    Parameters
    ----------
    model
        A folder (also in a bucket); or an object with a ``save``, such as :class:`streamx.SCVI`.
    model_name
        Default: the folder's name, or the object's class.
    """
    service = service_of(access_token, base_url)
    with tempfile.TemporaryDirectory(prefix="streamx-") as scratch:
        if hasattr(model, "save"):
            folder: Any = Path(scratch) / "model"
            model.save(folder)
            name = type(model).__name__.lower()
        else:
            folder = model
            name = str(model).rstrip("/").rpartition("/")[2]
        location = open_location(folder)
        if not location.list():
            raise BadFileError("holds no model", where=str(folder))
        path = Path(scratch) / f"scarches-{model_name or name}.zip"
        pack(location, path, {})
        return put_into(service, deposition_id, path, progress=progress)


def download_model(
    download_link: str,
    save_path: str | Path = "./",
    make_dir: bool = False,
    *,
    limit: int = LIMIT,
    progress: bool = True,
) -> str:
    """Get a model's archive and unpack it; the folder that holds the model.

    Its files go into `save_path`, where none may be in their way. Nothing is run; load it with ``SCVI.load``
    and the like. :func:`streamx.fetch` takes the number of a record, and verifies the model.

    Raises
    ------
    BadFileError
        If it is no zip file, or one that would write elsewhere.
    ResourceError
        If it has more bytes than `limit`, packed or unpacked.
    """
    target = Path(save_path).expanduser()
    if make_dir:
        target.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        raise UsageError("no such folder", where=str(target), fix="make it, or make_dir=True")
    with tempfile.TemporaryDirectory(prefix=".streamx-", dir=target) as scratch:
        archive, folder = Path(scratch) / "downloaded_model.zip", Path(scratch) / "files"
        folder.mkdir()
        get_file(Service(_host(download_link)), download_link, archive, limit=limit, progress=progress)
        unpack(archive, folder, limit)
        there = [path.name for path in folder.iterdir() if (target / path.name).exists()]
        if there:
            raise UsageError(f"holds {min(there)!r} already", where=str(target), fix="another folder")
        found = list(folder.iterdir())
        for path in found:
            shutil.move(path, target / path.name)
    alone = len(found) == 1 and (target / found[0].name).is_dir()
    return str(target / found[0].name if alone else target)


# -- what `publish` and `fetch` use too ----------------------------------------------------------------


def all_depositions(service: Service) -> list[dict[str, Any]]:
    """Depositions of the token's owner, page by page until one brings nothing new."""
    found: dict[Any, dict[str, Any]] = {}
    page = 1
    while True:
        entries = ask(service, "GET", f"/deposit/depositions?page={page}&size={PAGE}") or []
        new = {entry["id"]: entry for entry in entries if entry["id"] not in found}
        if not new:
            return list(found.values())
        found |= new
        page += 1


def put_into(service: Service, deposition_id: str, path: Path, *, progress: bool) -> str:
    """As :func:`upload_file`."""
    entry = ask(service, "GET", _deposition(deposition_id))
    link = f"{service.url.removesuffix('/api')}/record/{deposition_id}/files/{quote(path.name)}?download=1"
    sizes = {file.get("filename", file.get("key")): file for file in entry.get("files") or []}
    there = sizes.get(path.name)
    if there is not None and str(there.get("checksum")).removeprefix("md5:") == md5_of(path)[4:]:
        return link
    if entry.get("submitted"):
        raise UsageError(
            "is published, and takes no more files",
            where=f"deposition {deposition_id}",
            fix="create_deposition makes a new one",
        )
    bucket = (entry.get("links") or {}).get("bucket")
    if bucket is None:
        raise StorageError("the service names no place for its files", where=f"deposition {deposition_id}")
    put_file(service, path, f"{bucket}/{quote(path.name)}", progress=progress)
    return link


def record_link(entry: dict[str, Any], service: Service) -> str:
    """Where people find a deposition."""
    links = entry.get("links") or {}
    found = links.get("record_html") or links.get("html") or links.get("latest_html")
    return str(found or f"{service.url.removesuffix('/api')}/records/{entry['id']}")


def _deposition(number: str) -> str:
    return f"/deposit/depositions/{quote(str(number), safe='')}"


def _host(link: str) -> str:
    parts = split(link)
    return f"{parts.scheme}://{parts.netloc}"
