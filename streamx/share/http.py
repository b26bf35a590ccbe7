"""Requests to a web service by the standard library: bearer token, retries, bodies that pass in pieces.

The token travels in a header, and only to the service that it is for: no other host, no redirect and no
error text gets it.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, quote, urlsplit

import streamx
from streamx.errors import BadFileError, InputError, StorageError, StreamxError, UsageError
from streamx.threads import pause

log = logging.getLogger("streamx")

RETRIED = (429, 500, 502, 503, 504)
LONGEST_MESSAGE = 1 << 16  # bytes of an error's body that are looked at
LONGEST_ANSWER = 1 << 26  # bytes of JSON that are read
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OPEN_ERRORS = (OSError, http.client.HTTPException)  # HTTPError, URLError and timeouts are OSErrors


@dataclass(frozen=True)
class Service:
    """A web service.

    Attributes
    ----------
    url
        What its addresses begin with, such as ``https://zenodo.org/api``.
    token
        Sent to this host, with nothing else in the clear; None: none.
    timeout
        Seconds without an answer or another byte.
    retry_seconds
        For how long a request that fails is repeated, ever more slowly.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retry_seconds: float = 120.0


def read_token(given: str | None, variables: tuple[str, ...], file: str | Path | None = None) -> str | None:
    """A token: the one given, or the first line of a file, or an environment variable's.

    Raises
    ------
    UsageError
        If the file can't be read, or the token holds what no header can.
    """
    token = given
    if not token and file is not None:
        try:
            token = Path(file).expanduser().read_text().strip().partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("no token can be read", where=str(file), fix="a file with one line") from error
    token = token or next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if token is None:
        return None
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError("the token has characters that no token has", fix="copy it again")
    return token


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what has to be the same for the token to be sent."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def split(url: Any) -> SplitResult:
    """The parts of an address that may be asked: of the web, in the characters that travel.

    Raises
    ------
    UsageError
        If it is none, or holds a user or password, which would end in logs.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):
        known = False
    if not known:
        text = str(url).partition("?")[0][:200]
        raise UsageError("is no address", where=text.rpartition("@")[2], fix="https://...")
    if "@" in parts.netloc:
        raise UsageError(
            "the address holds a user", where=parts.hostname, fix="leave it out; tokens come from a file"
        )
    kept = "%/:?#[]@!$&'()*+,;=~"  # quoted already, or with a meaning
    return parts._replace(path=quote(parts.path, kept), query=quote(parts.query, kept))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows what only reads; the token stays with its host, and nothing goes from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        to, come = origin(newurl), origin(req.full_url)
        downgraded = come[0] == "https" and to[0] != "https"
        if req.get_method() not in ("GET", "HEAD") or to[0] not in ("http", "https") or downgraded:
            raise urllib.error.HTTPError(req.full_url, code, "redirect refused", headers, fp)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and to != come:
            new.remove_header("Authorization")
        return new


_opener = urllib.request.build_opener(_Redirects)


@contextmanager
def send(
    service: Service,
    method: str,
    url: str,
    *,
    body: Callable[[], Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[http.client.HTTPResponse]:
    """One request, repeated while that may help; the answer, to be read within the block.

    Parameters
    ----------
    url
        In full, or what follows the service's.
    body
        Makes the body anew for each attempt: bytes, or a stream (then name its ``Content-Length``).

    Raises
    ------
    UsageError
        If the service refuses the token or the request; if the token would go out in the clear.
    BadFileError
        If there is no such thing.
    StorageError
        If it can't be reached, or keeps failing.
    """
    parts = split(service.url + url if isinstance(url, str) and url.startswith("/") else url)
    url = parts.geturl()
    if parts.scheme == "http" and service.url.startswith("https:"):
        raise BadFileError(
            "leads from https to http, where anyone may change it", where=redacted(url, service)
        )
    named = dict(headers or {}) | {"User-Agent": f"streamx/{streamx.__version__}"}
    if service.token is not None and origin(url) == origin(service.url):
        if origin(url)[0] != "https" and origin(url)[1] not in LOOPBACK:
            raise UsageError("a token is only sent by https", where=redacted(url, service))
        named["Authorization"] = f"Bearer {service.token}"
    response = _opened(service, method, url, body, named)
    try:
        yield response
    finally:
        response.close()


def _opened(
    service: Service, method: str, url: str, body: Callable[[], Any] | None, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    wait, spent = FIRST_PAUSE, 0.0
    while True:
        data = None if body is None else body()
        request = urllib.request.Request(url, data, dict(headers), method=method)
        try:
            return _opener.open(request, timeout=service.timeout)
        except (*OPEN_ERRORS, ValueError) as error:  # a redirect may lead to what is no address
            again = _may_pass(error, method)
            asked = _asked_pause(error)
            failure = _named(error, service, method, url)
        finally:
            if data is not None and not isinstance(data, bytes):
                data.close()
        rest = max(wait, asked)
        if not again or spent + rest > service.retry_seconds:
            raise failure
        log.info("%s: %s; tried again in %.1f s", failure.where, failure.what, rest)
        if pause(rest):
            raise failure
        wait, spent = min(2 * wait, LONGEST_PAUSE), spent + rest


def _may_pass(error: Exception, method: str) -> bool:
    """Whether repeating can help. A POST that may have been done must not be done twice."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == 429 or (error.code in RETRIED and method != "POST")
    reason = getattr(error, "reason", error)
    lasts = isinstance(reason, (ValueError, http.client.InvalidURL, ssl.SSLCertVerificationError))
    return method != "POST" and not lasts


def _asked_pause(error: Exception) -> float:
    """Seconds that the service asks to wait; 0 if it does not say."""
    if isinstance(error, urllib.error.HTTPError):
        try:
            return max(0.0, float(error.headers.get("Retry-After", 0)))
        except (ValueError, AttributeError):
            return 0.0
    return 0.0


def _named(error: Exception, service: Service, method: str, url: str) -> StreamxError:
    """What went wrong, in words that hold no token."""
    where = f"{method} {redacted(url, service)}"
    if not isinstance(error, urllib.error.HTTPError):
        reason = getattr(error, "reason", None) or error
        return StorageError(
            redacted(f"can't be reached: {reason}", service),
            where=where,
            fix="look at the network, and run the same command again",
        )
    with error:
        said = redacted(_message(error), service)
    what = f"answered {error.code}: {said}" if said else f"answered {error.code}"
    if error.code in (401, 403):
        fix = "a token of this service that may write deposits, in the environment or a file (--token-file)"
        return UsageError(what, where=where, fix=fix)
    if error.code in (404, 410):
        return BadFileError(what, where=where, fix="look at the number or address")
    if error.code in RETRIED or 300 <= error.code < 400:
        return StorageError(what, where=where, fix="run the same command again, later")
    return UsageError(what, where=where)


def _message(error: urllib.error.HTTPError) -> str:
    """The service's own words: ``message`` and ``errors`` of its JSON."""
    try:
        said = json.loads(error.read(LONGEST_MESSAGE))
        found = [str(said["message"])]
        for item in said.get("errors", []):
            words = item.get("messages") or [item.get("message", "")]
            found.append(f"{item.get('field', '')}: {' '.join(map(str, words))}")
    except (*OPEN_ERRORS, ValueError, KeyError, TypeError, AttributeError):
        return "" if error.reason is None else str(error.reason)
    return "; ".join(found)


def redacted(text: str, service: Service) -> str:
    """The text without the token, and an address without its query, where others put theirs."""
    if "://" in text.partition(" ")[0]:
        text = text.partition("?")[0]
    return text if not service.token else text.replace(service.token, "***")


def ask(service: Service, method: str, url: str, value: Any = None) -> Any:
    """Send a value as JSON, and return the answer's; None where it has no body.

    Raises
    ------
    InputError
        If the answer is no JSON. Otherwise as :func:`send`.
    """
    body = None if value is None else json.dumps(value).encode()
    headers = {"Accept": "application/json"} | ({} if body is None else {"Content-Type": "application/json"})
    with send(service, method, url, body=None if body is None else lambda: body, headers=headers) as response:
        return parsed(response, service, f"{method} {redacted(url, service)}")


def parsed(response: http.client.HTTPResponse, service: Service, where: str) -> Any:
    """An answer's JSON; None where it has no body.

    Raises
    ------
    InputError
        If it is none.
    StorageError
        If the connection breaks.
    """
    try:
        data = response.read(LONGEST_ANSWER)
        if response.length:  # what is still to come
            if len(data) == LONGEST_ANSWER:
                raise InputError(f"answered more than {LONGEST_ANSWER:,} bytes", where=where)
            raise http.client.IncompleteRead(data, response.length)
        return json.loads(data) if data.strip() else None
    except (ValueError, RecursionError) as error:
        raise InputError("answered something that is no JSON", where=where) from error
    except OPEN_ERRORS as error:
        raise StorageError(redacted(f"the answer broke off: {error}", service), where=where) from None
