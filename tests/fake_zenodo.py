"""A Zenodo on this machine: depositions, buckets, records and files, with the faults that a test asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "s3cret-T0ken"
PAGE = 2  # depositions per page, whatever is asked for


@dataclass
class Fault:
    """What becomes of the next `times` requests that fit."""

    method: str
    path: str  # regular expression
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of the body after which the connection ends
    endless: bool = False  # zeros until the client hangs up (but for 64 MB: a disk is no place to fail)
    body: dict[str, Any] | None = None
    times: int = 1


class Zenodo:
    """State of the service, and all that it was asked."""

    def __init__(self) -> None:
        self.depositions: dict[int, dict[str, Any]] = {}
        self.files: dict[int, dict[str, bytes]] = {}
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.ranges = True
        self.wrong_checksum = False
        self.plain: dict[str, bytes] = {}  # path -> file that belongs to no record
        self.url = ""

    @property
    def api(self) -> str:
        return f"{self.url}/api"

    def new(self, metadata: dict[str, Any]) -> dict[str, Any]:
        number = 100 + len(self.depositions)
        self.depositions[number] = {"id": number, "submitted": False, "metadata": dict(metadata)}
        self.files[number] = {}
        self.depositions[number]["metadata"]["prereserve_doi"] = {"doi": f"10.5281/zenodo.{number}"}
        return self.shown(number)

    def shown(self, number: int) -> dict[str, Any]:
        entry = dict(self.depositions[number])
        entry["files"] = [
            {"filename": name, "filesize": len(data), "checksum": hashlib.md5(data).hexdigest()}
            for name, data in self.files[number].items()
        ]
        entry["links"] = {"html": f"{self.url}/uploads/{number}"}
        if entry["submitted"]:
            entry["links"] = {"record_html": f"{self.url}/records/{number}"}
            entry["doi"] = f"10.5281/zenodo.{number}"
        else:
            entry["links"]["bucket"] = f"{self.api}/files/bucket-{number}"
        return entry

    def record(self, number: int) -> dict[str, Any]:
        files = []
        for name, data in self.files[number].items():
            digest = "0" * 32 if self.wrong_checksum else hashlib.md5(data).hexdigest()
            link = f"{self.api}/records/{number}/files/{name}/content"
            files.append(
                {"key": name, "size": len(data), "checksum": f"md5:{digest}", "links": {"self": link}}
            )
        return {"id": number, "files": files}

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    zenodo: Zenodo
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        zenodo, path = self.zenodo, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        zenodo.asked.append((self.command, self.path, dict(self.headers.items())))
        for fault in zenodo.faults:
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                if fault.endless:
                    return self._endless()
                if fault.cut is None:
                    return self._json(fault.status, fault.body, fault.headers)
                return self._file(zenodo, path, fault.cut)
        if self.command == "GET" and not path.startswith("/api/deposit"):
            return self._read(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(401, {"message": f"no such token: {self.headers.get('Authorization')}"})
        return self._deposit(path, body)

    def _read(self, path: str) -> None:
        record = re.fullmatch(r"/api/records/(\d+)", path)
        if record and int(record[1]) in self.zenodo.files:
            return self._json(200, self.zenodo.record(int(record[1])))
        return self._file(self.zenodo, path)

    def _deposit(self, path: str, body: bytes) -> None:
        zenodo, base = self.zenodo, "/api/deposit/depositions"
        bucket = re.fullmatch(r"/api/files/bucket-(\d+)/(.+)", path)
        if bucket and self.command == "PUT":
            zenodo.files[int(bucket[1])][unquote(bucket[2])] = body
            sent = b"other" if zenodo.wrong_checksum else body
            checksum = f"md5:{hashlib.md5(sent).hexdigest()}"
            return self._json(201, {"key": bucket[2], "size": len(body), "checksum": checksum})
        if path == base and self.command == "POST":
            return self._json(201, zenodo.new(json.loads(body)["metadata"]))
        if path == base:
            page = int(parse_qs(urlsplit(self.path).query).get("page", ["1"])[0])
            numbers = list(zenodo.depositions)[(page - 1) * PAGE : page * PAGE]
            return self._json(200, [zenodo.shown(number) for number in numbers])
        one = re.fullmatch(rf"{base}/(\d+)(/actions/publish)?", path)
        if one is None or int(one[1]) not in zenodo.depositions:
            return self._json(404, {"message": "PID does not exist."})
        number = int(one[1])
        if self.command == "DELETE":
            del zenodo.depositions[number]
            return self._json(204, None)
        if self.command == "PUT":
            zenodo.depositions[number]["metadata"] |= json.loads(body)["metadata"]
        if one[2]:
            zenodo.depositions[number]["submitted"] = True
            return self._json(202, zenodo.shown(number))
        return self._json(200, zenodo.shown(number))

    def _file(self, zenodo: Zenodo, path: str, cut: int | None = None) -> None:
        found = re.fullmatch(r"/(?:api/)?records?/(\d+)/files/(.+?)(?:/content)?", path)
        data = zenodo.plain.get(path)
        if found and int(found[1]) in zenodo.files:
            data = zenodo.files[int(found[1])].get(unquote(found[2]))
        if data is None:
            return self._json(404, {"message": "not found"})
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and zenodo.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:] if cut is None else data[start : start + cut])
        if cut is not None:
            self.close_connection = True

    def _endless(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            for _ in range(64):
                self.wfile.write(bytes(1 << 20))

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Zenodo]:
    """The service on a free port, for the time of the block."""
    zenodo = Zenodo()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"zenodo": zenodo}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    zenodo.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield zenodo
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
