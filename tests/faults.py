"""A proxy between a client and a bucket that counts what passes and does what networks and services do.

It runs its own event loop on a thread. Every request is answered by the upstream server, one of each
connection, unless the proxy decides otherwise; what it decides is a function of a seeded generator and the
request, so that a test can ask for 5 % of this and 2 % of that and always get the same.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

KINDS = ("503", "403", "404", "reset", "lost", "short", "hang")  # lost: done, but the answer never comes


@dataclass(frozen=True)
class Seen:
    """One request: method, path, bytes of the answer's body, and the fault that it met, or ''."""

    method: str
    path: str
    n_bytes: int
    fault: str


@dataclass
class Proxy:
    """Faults between a client and `upstream` (a URL); in a ``with`` block it serves at `url`.

    Attributes
    ----------
    shares
        Share of the requests that meets each of :data:`KINDS`.
    choose
        (method, path) -> a kind or '', asked first.
    latency
        Seconds that pass before each answer.
    seen
        All requests, in the order of their answers.
    """

    upstream: str
    shares: dict[str, float] = field(default_factory=dict)
    choose: Callable[[str, str], str] | None = None
    latency: float = 0.0
    seed: int = 0
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        self._random = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def counts(self) -> Counter[str]:
        """Requests by method, and by fault."""
        return Counter([one.method for one in self.seen] + [one.fault for one in self.seen if one.fault])

    def reset(self, **changes: object) -> None:
        """Forget what was seen, and change how to behave."""
        self.seen.clear()
        for name, value in changes.items():
            setattr(self, name, value)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=256)
            self._port = server.sockets[0].getsockname()[1]
            started.set()
            await self._stop.wait()
            server.close()
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0.01)  # for what a closed connection has left to do

        self._loop.run_until_complete(serve())
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort() if self._stop.is_set() else writer.close()

    def _fault(self, method: str, path: str) -> str:
        if self.choose is not None:
            chosen = self.choose(method, path)
            if chosen:
                return chosen
        value = self._random.random()
        for kind, share in self.shares.items():
            if value < share:
                return kind
            value -= share
        return ""

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        body = await _body(reader, head)
        fault = self._fault(method, path)
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault == "hang":
            self.seen.append(Seen(method, path, 0, fault))
            await asyncio.sleep(3600)
        if fault == "reset":
            self.seen.append(Seen(method, path, 0, fault))
            writer.transport.abort()
            return False
        if fault in ("503", "403", "404"):
            code = {"503": "SlowDown", "403": "AccessDenied", "404": "NoSuchKey"}[fault]
            answer = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            self.seen.append(Seen(method, path, len(answer), fault))
            writer.write(
                f"HTTP/1.1 {fault} {code}\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer
            )
            return True
        head, answer = await self._upstream(head, body)
        if fault == "lost":
            self.seen.append(Seen(method, path, 0, fault))
            writer.transport.abort()
            return False
        sent = answer[: len(answer) // 2] if fault == "short" else answer
        self.seen.append(Seen(method, path, len(sent), fault if len(sent) < len(answer) else ""))
        writer.write(head + sent)
        await writer.drain()
        return len(sent) == len(answer)

    async def _upstream(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Head and body of the real answer."""
        place = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(head + body)
            await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
            bodiless = head.startswith(b"HEAD") or answer.split(b" ", 2)[1] == b"204"
            return answer, b"" if bodiless else await _body(reader, answer)
        finally:
            writer.close()


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    headers = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    assert b"chunked" not in headers.get(b"transfer-encoding", b"")
    return await reader.readexactly(int(headers.get(b"content-length", b"0")))
