"""A prefix in a bucket (S3, Google, Azure) as a :class:`~streamx.store.location.Location`, through obstore.

Every request goes through :meth:`Bucket._try`, which repeats what may succeed later (5xx, resets, short
bodies, time-outs) ever more slowly until a deadline, and says anything else in our words. Nothing that a
server answers is ever taken for an absent object but a plain 404.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from streamx.config import BucketConfig, build
from streamx.errors import IntegrityError, LockedError, StorageError, StreamxError, UsageError
from streamx.store.answers import (
    CREDENTIALS,
    NO_BUCKET,
    NO_OBJECT,
    ShortAnswer,
    final_error,
    reason,
    status_of,
)
from streamx.store.location import RESTORE, SCHEMES, Bytes, ObjectTable, Put, Range, check_key
from streamx.store.ranges import Request, merge
from streamx.threads import pause, run_all

if TYPE_CHECKING:
    from zarr.abc.store import Store

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
CONNECT_SECONDS = 5.0
UPLOADS = 5  # times the time-out: the answer comes after the last byte was sent
SHORT_ANSWERS = 3  # in a row: then the object itself is short
BYTES_AT_ONCE = 1 << 26  # of objects that wait to be put together
ENDPOINTS = {"s3": "endpoint", "gs": "base_url", "az": "endpoint"}


def cache_folder() -> Path:
    """Where work on buckets keeps its journals and scratch files: they are as large as the data.

    ``$STREAMX_SCRATCH``, else ``$XDG_CACHE_HOME/streamx``, else ``~/.cache/streamx``.
    """
    chosen = os.environ.get("STREAMX_SCRATCH")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamx"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder there that goes with its use."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        yield Path(folder)


class Bucket:
    """Objects of a bucket under a prefix; others may write there too, so that names and the marker decide.

    Parameters
    ----------
    url
        ``s3://bucket/prefix``; keys and tokens have no place in it.
    options
        Fields of :class:`streamx.config.BucketConfig`.

    Raises
    ------
    UsageError
        If the URL is none of ours, or obstore is not installed.
    """

    shared = True

    def __init__(self, url: str, **options: Any) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise UsageError(
                f"{parts.scheme}:// is no scheme that streamx knows",
                fix=f"a folder, or {', '.join(f'{scheme}://' for scheme in SCHEMES)}",
            )
        if "@" in parts.netloc or parts.query or not parts.netloc:
            raise UsageError(  # the URL may hold a secret, so it is not shown
                f"the {parts.scheme}:// URL is not of the form {parts.scheme}://bucket/prefix",
                fix="credentials belong into environment variables",
            )
        try:
            import obstore  # noqa: F401
        except ImportError:
            raise UsageError("buckets need obstore", where=url, fix="pip install 'streamx[cloud]'") from None
        self.bucket = f"{parts.scheme}://{parts.netloc}"
        self.prefix = check_key(url[len(self.bucket) :].strip("/"), url)
        self.config: BucketConfig = build(BucketConfig, options)

    def __str__(self) -> str:
        return self.root

    def __repr__(self) -> str:
        return f"Bucket({self.root!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bucket) and (self.root, self.config) == (other.root, other.config)

    def __hash__(self) -> int:
        return hash(self.root)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; connections stay here."""
        return {name: value for name, value in vars(self).items() if name not in ("_client", "_uploads")}

    @property
    def root(self) -> str:
        return f"{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def journal(self) -> Path:
        digest = hashlib.blake2b(f"{self.root} {self._endpoint}".encode(), digest_size=6).hexdigest()
        return cache_folder() / f"{self.root.rpartition('/')[2]}-{digest}.journal"

    def at(self, url: str) -> Bucket:
        """Another place, reached in the same way."""
        other = Bucket(url)
        other.config = self.config
        return other

    def below(self, prefix: str) -> Bucket:
        return self.at(f"{self.root}/{check_key(prefix, self.root)}")

    def staged(self, tmp: Path) -> Bucket:
        return self

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        import obstore

        try:
            return self._try(key, lambda: int(obstore.head(self._client, key)["size"]))
        except FileNotFoundError:
            return None

    def stamp(self, key: str) -> str:
        """Text that changes when the object does."""
        import obstore

        meta = self._try(key, lambda: obstore.head(self._client, key), NO_OBJECT)
        return f"{meta['size']} {meta['e_tag']} {meta['last_modified']}"

    def read(self, key: str) -> bytes:
        return self._read(key)[0]

    def _read(self, key: str) -> tuple[bytes, Any]:
        """An object, and what a later write can be bound to."""
        import obstore

        def get() -> tuple[bytes, Any]:
            answer = obstore.get(self._client, key)
            data, meta = answer.bytes(), answer.meta
            if len(data) != meta["size"]:
                raise ShortAnswer
            return bytes(data), {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}

        return self._try(key, get, NO_OBJECT)

    def read_ranges(self, ranges: Sequence[Range], out: np.ndarray) -> None:
        """One request per range, or for several that lie side by side; some at once."""
        requests = merge(ranges)
        run_all([partial(self._read_range, request, out) for request in requests], self._at_once(requests))

    def _at_once(self, requests: Sequence[Any]) -> int:
        return max(1, min(self.config.concurrency, len(requests)))

    def _read_range(self, request: Request, out: np.ndarray) -> None:
        import obstore

        def get() -> np.ndarray:
            data = obstore.get_range(
                self._client, request.key, start=request.start, length=request.stop - request.start
            )
            if len(data) != request.stop - request.start:
                raise ShortAnswer
            return np.frombuffer(memoryview(data), np.uint8)

        if request.stop > request.start:
            data = self._try(request.key, get, NO_OBJECT)
            for start, size, at in request.parts:
                out[at : at + size] = data[start - request.start : start - request.start + size]

    def descriptor(self, key: str) -> int:
        return -1

    def write(self, key: str, *data: Bytes) -> None:
        import obstore

        whole = data[0] if len(data) == 1 else b"".join(data)
        self._try(key, lambda: obstore.put(self._uploads, key, whole, use_multipart=False), NO_BUCKET)

    def write_all(self, produce: Callable[[Put], None]) -> None:
        waiting: list[Callable[[], None]] = []
        size = 0

        def flush() -> None:
            nonlocal size
            run_all(waiting, self._at_once(waiting))
            waiting.clear()
            size = 0

        def put(key: str, *data: Bytes) -> None:
            nonlocal size
            waiting.append(partial(self.write, key, *data))
            size += sum(memoryview(piece).nbytes for piece in data)
            if size > BYTES_AT_ONCE:
                flush()

        produce(put)
        flush()

    def replace(self, key: str, data: bytes, before: bytes | None) -> None:
        """A conditional PUT: of several writers, the bucket lets one win."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        now, version = self._read(key) if self.exists(key) else (None, None)
        if now == data:
            return
        if now == before:
            mode: Any = "create" if version is None else version
            put = partial(obstore.put, self._uploads, key, data, mode=mode, use_multipart=False)
            try:
                self._try(key, put, NO_BUCKET)
                return
            except (AlreadyExistsError, PreconditionError):
                if self.exists(key) and self.read(key) == data:  # ours, if its answer was lost on the way
                    return
        raise LockedError(
            "another process has written here meanwhile",
            where=f"{self.root}/{key}",
            fix="run the same command again: it goes on from what is there now",
        )

    def create(self, key: str, data: bytes) -> bool:
        try:
            self.replace(key, data, None)
        except LockedError:
            return False
        return True

    def put_tree(self, produce: Callable[[Put], None]) -> None:
        self.delete("zarr.json")
        before = set(self.list())
        root: list[Bytes] = []

        def all_but_the_root(put: Put) -> None:
            def sorted_out(key: str, *data: Bytes) -> None:
                before.discard(key)
                root.extend(data) if key == "zarr.json" else put(key, *data)

            produce(sorted_out)

        self.write_all(all_but_the_root)
        self.delete(*sorted(before))
        self.write("zarr.json", *root)

    def delete(self, *keys: str) -> None:
        import obstore

        paths = [check_key(key, self.root) for key in keys]
        if not paths:
            return
        try:
            self._try(paths[0], lambda: obstore.delete(self._client, paths))
        except FileNotFoundError:  # some services say so, and where they do, one by one
            for path in paths if len(paths) > 1 else ():
                self.delete(path)

    def delete_tree(self, prefix: str) -> None:
        self.delete(*([prefix] if prefix else []), *self.list(prefix))

    def list(self, prefix: str = "") -> list[str]:
        import obstore

        found = lambda: [  # noqa: E731
            entry["path"] for page in obstore.list(self._client, prefix or None) for entry in page
        ]
        return sorted(self._try(prefix, found, NO_BUCKET))

    def sync(self) -> None:
        """What a bucket has accepted is durable."""

    def zarr(self, prefix: str, expected: ObjectTable | None = None) -> Store:
        from streamx.store.strict import strict_store

        return strict_store(self, prefix, expected or {})

    @property
    def _endpoint(self) -> str:
        return self.config.endpoint or os.environ.get("AWS_ENDPOINT_URL", "")

    @cached_property
    def _client(self) -> Any:
        return self._connected(timedelta(seconds=self.config.timeout))

    @cached_property
    def _uploads(self) -> Any:
        """A client that does not take a long body for a server that is silent."""
        return self._connected(timedelta(seconds=UPLOADS * self.config.timeout))

    def _connected(self, silence: timedelta) -> Any:
        from obstore.store import AzureStore, GCSStore, S3Store

        scheme, name = self.bucket.split("://")
        config = self.config
        settings = dict(config.settings)
        if config.endpoint:
            settings[ENDPOINTS[scheme]] = config.endpoint
        if config.region and scheme == "s3":
            settings["region"] = config.region
        if config.anonymous is not None:
            settings["skip_signature"] = config.anonymous
        plain = self._endpoint.startswith("http://") if config.allow_http is None else config.allow_http
        client = {
            "timeout": max(silence, timedelta(seconds=config.retry_seconds)),
            "read_timeout": silence,
            "connect_timeout": timedelta(seconds=min(config.timeout, CONNECT_SECONDS)),
            **({"allow_http": True} if plain else {}),
        }
        make: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
        retry = {"max_retries": 0, "retry_timeout": timedelta(seconds=config.retry_seconds)}
        try:
            return make(
                name, prefix=self.prefix or None, config=settings, client_options=client, retry_config=retry
            )
        except Exception as error:  # obstore's words might hold the settings
            raise UsageError(
                f"the settings of the bucket are not understood ({type(error).__name__})",
                where=self.root,
                fix=CREDENTIALS[scheme],
            ) from None

    def _try(
        self, key: str, request: Callable[[], T], absent: tuple[type[StreamxError], str, str] | None = None
    ) -> T:
        """The answer to a request, repeated until it comes or its time is over.

        `absent` is what a 404 means; by default it is a :class:`FileNotFoundError`.
        """
        from obstore.exceptions import BaseError

        where = f"{self.root}/{check_key(key, self.root)}".rstrip("/")
        deadline = time.monotonic() + self.config.retry_seconds
        longest, short = FIRST_PAUSE, 0
        while True:
            try:
                return request()
            except ShortAnswer as error:
                short += 1
                if short == SHORT_ANSWERS:
                    raise IntegrityError("object is cut short", where=where, fix=RESTORE) from None
                failure: Exception = error
            except (BaseError, OSError, ValueError) as error:
                if isinstance(error, FileNotFoundError) or status_of(error) == 404:
                    if absent is None:
                        raise FileNotFoundError from None
                    kind, what, fix = absent
                    raise kind(what, where=where, fix=fix) from None
                final = final_error(error, where, CREDENTIALS[self.bucket[:2]])
                if final is not None:
                    raise final from None
                failure = error
            wait = longest * random.uniform(0.5, 1)
            if time.monotonic() + wait > deadline:
                raise StorageError(
                    f"no answer within {self.config.retry_seconds:g} s ({reason(failure)})",
                    where=where,
                    fix="run the same command again when the service answers",
                ) from None
            if pause(wait):
                raise StorageError("stopped", where=where) from None
            longest = min(2 * longest, LONGEST_PAUSE)
