"""``publish``: a model's folder as a record on Zenodo; killed at any point, the same call goes on."""

from __future__ import annotations

import html
import logging
import tempfile
from pathlib import Path
from typing import Any

from streamx.config import PublishConfig, build
from streamx.errors import BadFileError, UsageError
from streamx.interop.load import is_foreign
from streamx.share.archive import pack
from streamx.share.fetch import ORIGIN
from streamx.share.http import Service, ask
from streamx.share.zenodo import SANDBOX, ZENODO, all_depositions, put_into, record_link, service_of
from streamx.store.location import Location, open_location
from streamx.train.card import README, portable, render
from streamx.train.model import CARD, read_card, seal

log = logging.getLogger("streamx")


def publish(
    model: str | Path | Location,
    *,
    base_url: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Put a model on Zenodo: its folder as one archive, with its card as README and description.

    The draft that a call began is found again by a keyword, the SHA-256 of the list of its files: the same
    call goes on with it, and a model that is published already is not published again.

    Parameters
    ----------
    model
        What ``train`` or ``surgery`` wrote, or another tool's folder.
    base_url
        Another service with Zenodo's interface (default: Zenodo, or its sandbox).
    settings
        Fields of :class:`~streamx.config.PublishConfig`. The token comes from ``ZENODO_TOKEN`` (sandbox:
        ``ZENODO_SANDBOX_TOKEN``) or from ``token_file``.

    Returns
    -------
    ``deposition, doi`` (of a draft: the one that it will have), ``link, file, bytes, status`` (``published``,
    ``draft``, or ``found``: it was published before).

    Raises
    ------
    UsageError
        If there is no token, or no creator for a record that is to be published.
    BadFileError
        If it is no model.
    """
    config: PublishConfig = build(PublishConfig, settings)
    location = open_location(model)
    card = read_card(location)
    if card is None and (location.shared or not is_foreign(Path(location.root))):
        raise BadFileError("is no model", where=str(location), fix="give what `streamx train -o` wrote")
    if not config.creator and not config.draft:
        raise UsageError("Zenodo wants to know who made it", fix='--creator "Doe, Jane", or --draft')
    service = service_of(
        None,
        base_url or (SANDBOX if config.sandbox else ZENODO),
        token_file=config.token_file,
        timeout=config.timeout,
        retry_seconds=config.retry_seconds,
    )
    name = config.name or str(location.root).rstrip("/").rpartition("/")[2]
    if not name or "/" in name or "\\" in name:
        raise UsageError(f"{name!r} is no name for an archive", fix="--name with letters and digits")
    text = "" if card is None else render(card)
    with tempfile.TemporaryDirectory(prefix="streamx-") as scratch:
        path = Path(scratch) / f"streamx-{name}.zip"
        extra = {} if card is None else {README: text.encode(), CARD: seal(portable(card))}
        digest = pack(location, path, extra, skip=(ORIGIN,))
        entry = _deposition_for(service, f"streamx-files:{digest[:40]}", _metadata(config, name, card, text))
        number = str(entry["id"])
        facts = {"deposition": number, "file": path.name, "bytes": path.stat().st_size}
        if entry.get("submitted"):
            log.info("%s is published already", number)
            return facts | _addresses(entry, service) | {"status": "found"}
        put_into(service, number, path, progress=progress)
    if config.draft:
        return facts | _addresses(entry, service) | {"status": "draft"}
    done = ask(service, "POST", f"/deposit/depositions/{number}/actions/publish")
    return facts | _addresses(done, service) | {"status": "published"}


def _deposition_for(service: Service, mark: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The deposition of these files: the one that there is, its metadata brought up to date, or a new one."""
    body = {"metadata": metadata | {"keywords": ["single-cell", "streamx", mark]}}
    for entry in all_depositions(service):
        if mark in (entry.get("metadata") or {}).get("keywords", ()):
            if entry.get("submitted"):
                return entry
            return dict(ask(service, "PUT", f"/deposit/depositions/{entry['id']}", body))
    return dict(ask(service, "POST", "/deposit/depositions", body))


def _metadata(config: PublishConfig, name: str, card: dict[str, Any] | None, text: str) -> dict[str, Any]:
    """What people read about the record; the card as text, its marks of HTML escaped."""
    kind = "model" if card is None else f"{card['model']} model"
    given = {
        "upload_type": config.upload_type,
        "title": config.title or f"{name}: {kind} for single-cell reference mapping",
        "description": config.description or f"<pre>{html.escape(text)}</pre>",
        "creators": [{"name": person} for person in config.creator],
        "license": config.license,
    }
    return {key: value for key, value in given.items() if value}


def _addresses(entry: dict[str, Any], service: Service) -> dict[str, Any]:
    """DOI and link, as the service gives them."""
    reserved = (entry.get("metadata") or {}).get("prereserve_doi") or {}
    return {"doi": entry.get("doi") or reserved.get("doi"), "link": record_link(entry, service)}
