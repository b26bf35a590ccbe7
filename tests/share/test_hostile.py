"""Services, records and addresses that mean ill or are broken: an error with a name, and nothing is left."""

from __future__ import annotations

import hashlib
import ssl
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from fake_zenodo import TOKEN, Fault, Zenodo

import streamx as sx
from streamx.errors import (
    BadFileError,
    InputError,
    IntegrityError,
    ResourceError,
    StorageError,
    StreamxError,
    UsageError,
)
from streamx.share import http, transfer
from streamx.share.fetch import parse_source
from streamx.share.http import Service, ask

QUICK: dict[str, Any] = {"retry_seconds": 0.1, "timeout": 5.0}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where models are fetched to; what is left there is looked at."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def fetched(zenodo: Zenodo, home: Path, source: str = "100", **more: Any) -> dict[str, Any]:
    return sx.fetch(source, home / "got", base_url=zenodo.api, progress=False, **QUICK, **more)


def listing(zenodo: Zenodo, monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    """Record 100 is this."""
    zenodo.files[100] = {}
    monkeypatch.setattr(zenodo, "record", lambda number: record)


def file(url: Any, **more: Any) -> dict[str, Any]:
    return {"files": [{"key": "a.zip", "links": {"self": url}} | more]}


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "data:text/plain,PK",
        "ftp://127.0.0.1/a.zip",
        "a.zip",
        "//127.0.0.1/a.zip",
        "http://127.0.0.1:99999/a.zip",
        "http://[bad/a.zip",
        "http://jane:secret@127.0.0.1/a.zip",
        "",
        None,
        3,
    ],
)
def test_files_that_lie_elsewhere_than_on_the_web(
    url: Any, zenodo: Zenodo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing(zenodo, monkeypatch, file(url))
    with pytest.raises(StreamxError) as found:
        fetched(zenodo, home)
    assert "secret" not in str(found.value)
    assert found.value.exit_code in (2, 3)
    assert [path for path in home.rglob("*") if path.name.startswith("archive")] == []


@pytest.mark.parametrize(
    "record",
    [
        [],
        [1],
        "text",
        {"files": 3},
        {"files": [None]},
        {"files": [{}]},
        {"files": {"enabled": True}},
        file("/records/1", size="many"),
        {"files": [{"key": "a.zip", "links": "self"}]},
    ],
)
def test_records_of_another_shape(
    record: Any, zenodo: Zenodo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing(zenodo, monkeypatch, record)
    with pytest.raises(InputError):
        fetched(zenodo, home)
    assert list(home.iterdir()) == []


def test_an_answer_that_is_too_deep_or_too_long(zenodo: Zenodo, monkeypatch: pytest.MonkeyPatch) -> None:
    zenodo.plain["/api/deep"] = b"[" * 100_000
    zenodo.plain["/api/long"] = b" " * 2_000
    monkeypatch.setattr(http, "LONGEST_ANSWER", 1_000)
    for name, match in (("deep", "more than 1,000"), ("long", "more than 1,000")):
        with pytest.raises(InputError, match=match):
            ask(Service(zenodo.api, **QUICK), "GET", f"/{name}")
    monkeypatch.undo()
    with pytest.raises(InputError, match="no JSON"):
        ask(Service(zenodo.api, **QUICK), "GET", "/deep")
    zenodo.plain["/api/cut"] = b'{"id": 1}'
    zenodo.faults.append(Fault("GET", "/api/cut", cut=4))
    with pytest.raises(StorageError, match="broke off"):
        ask(Service(zenodo.api, **QUICK), "GET", "/cut")


def test_a_download_without_end(zenodo: Zenodo, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left where it exceeds what was announced, or what is allowed."""
    zenodo.faults.append(Fault("GET", "/endless", endless=True, times=100))
    listing(zenodo, monkeypatch, file(f"{zenodo.url}/endless", size=3 << 20))
    with pytest.raises(IntegrityError, match="3,145,728 were announced"):
        fetched(zenodo, home)
    listing(zenodo, monkeypatch, file(f"{zenodo.url}/endless"))
    with pytest.raises(ResourceError, match="5,000,000 are allowed"):
        fetched(zenodo, home, limit="5MB")
    assert max(path.stat().st_size for path in home.rglob("*")) <= 6 << 20
    listing(zenodo, monkeypatch, file(f"{zenodo.url}/endless", size=6_000_000))
    asked = len(zenodo.asked)
    with pytest.raises(ResourceError, match="6,000,000 bytes or more"):
        fetched(zenodo, home, limit="5MB")
    assert len(zenodo.asked) == asked + 1  # the record alone
    with pytest.raises(ResourceError, match="are allowed"):
        sx.zenodo.download_model(f"{zenodo.url}/endless", home, limit=1 << 20, progress=False)


@pytest.mark.parametrize("where", ["http://[bad", "file:///etc/passwd", "http://127.0.0.1:99999/x"])
def test_a_redirect_to_what_is_no_address(where: str, zenodo: Zenodo, home: Path) -> None:
    zenodo.faults.append(Fault("GET", "/moved", 302, {"Location": where}, times=100))
    with pytest.raises(StorageError):
        transfer.get_file(Service(zenodo.api, TOKEN, **QUICK), f"{zenodo.url}/moved", home / "file")
    assert list(home.iterdir()) == []
    assert len(zenodo.asked) == 1


def test_from_https_to_http() -> None:
    with pytest.raises(BadFileError, match="from https to http"):
        ask(
            Service("https://zenodo.example/api", TOKEN), "GET", "http://zenodo.example/api/records/1/files/a"
        )


def test_a_certificate_that_is_wrong_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def opened(request: Any, timeout: float) -> None:
        calls.append(request.full_url)
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, "certificate verify failed"))

    monkeypatch.setattr(http._opener, "open", opened)
    with pytest.raises(StorageError, match="certificate verify failed"):
        ask(Service("https://zenodo.example/api"), "GET", "/records/1")
    assert len(calls) == 1


def test_how_long_a_service_asks_to_wait(zenodo: Zenodo, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(http, "pause", lambda seconds: pauses.append(seconds))
    for after in ("7", "Wed, 21 Oct 2026 07:28:00 GMT", "-3", "nan"):
        zenodo.faults.append(Fault("GET", "/api/x", 429, {"Retry-After": after}))
    zenodo.plain["/api/x"] = b"{}"
    assert ask(Service(zenodo.api, retry_seconds=100), "GET", "/x") == {}
    assert pauses == [7, 0.02, 0.02, 0.02]  # as said; else one's own
    zenodo.faults.append(Fault("GET", "/api/x", 503, {"Retry-After": "3600"}))
    with pytest.raises(StorageError, match="answered 503"):
        ask(Service(zenodo.api, retry_seconds=100), "GET", "/x")
    assert len(pauses) == 4


def test_a_folder_of_somebody_else_is_left_alone(zenodo: Zenodo, home: Path) -> None:
    zenodo.new({})
    zenodo.files[100] = {"a.zip": b"PK"}
    (home / "got.part").mkdir()
    (home / "got.part" / "thesis.tex").write_text("years")
    (home / "other").mkdir()
    with pytest.raises(UsageError, match="is in the way"):
        fetched(zenodo, home)
    assert (home / "got.part" / "thesis.tex").read_text() == "years"
    (home / "got.part" / "thesis.tex").rename(home / "other" / "archive.zip")
    (home / "got.part").rmdir()
    (home / "got.part").symlink_to(home / "other")
    with pytest.raises(UsageError, match="is in the way"):
        fetched(zenodo, home)
    assert (home / "other" / "archive.zip").read_text() == "years"
    (home / "got.part").unlink()
    (home / "got").symlink_to(home / "nowhere")
    with pytest.raises(UsageError, match="something else"):
        fetched(zenodo, home)
    assert not (home / "nowhere").exists()


def test_http_needs_a_checksum(zenodo: Zenodo, home: Path) -> None:
    with pytest.raises(UsageError, match="anyone on the way"):
        sx.fetch("http://models.example/lung.zip?key=secret", home / "got", **QUICK)
    with pytest.raises(UsageError, match="is no checksum"):
        sx.fetch("http://models.example/lung.zip", home / "got", checksum="abc", **QUICK)
    zenodo.plain["/lung.zip"] = b"PK no archive"
    url = f"{zenodo.url}/lung.zip"
    with pytest.raises(IntegrityError, match="was announced"):
        sx.fetch(url, home / "got", checksum="sha256:" + "0" * 64, progress=False, **QUICK)
    right = f"sha256:{hashlib.sha256(zenodo.plain['/lung.zip']).hexdigest()}"
    with pytest.raises(BadFileError, match="no sound zip file"):
        sx.fetch(url, home / "got", checksum=right, progress=False, **QUICK)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "source",
    ["https://doi.org/10.1234/other.5", "https://[bad", "https://jane:pw@zenodo.org/records/1", "http://"],
)
def test_addresses_of_nothing(source: str) -> None:
    with pytest.raises(UsageError) as found:
        parse_source(source)
    assert "pw" not in str(found.value)


def test_a_link_by_http_is_asked_by_https() -> None:
    assert parse_source("http://zenodo.org/record/5").base_url == "https://zenodo.org/api"


def test_a_record_of_a_hundred_files(zenodo: Zenodo, home: Path) -> None:
    zenodo.new({})
    zenodo.files[100] = {f"table {n:03}.csv": b"1" for n in range(98)} | {"x.zip": b"PK", "y.zip": b"PK"}
    with pytest.raises(BadFileError, match="2 archives") as found:
        fetched(zenodo, home)
    assert "its files: x.zip, y.zip, table 000.csv" in str(found.value)
    assert str(found.value).endswith("and 90 more")
    with pytest.raises(BadFileError, match="no sound zip file"):
        fetched(zenodo, home, file="y.zip")


def test_names_of_any_script(zenodo: Zenodo, home: Path) -> None:
    """Quoted where they travel: to a bucket, in a record's link, in an address that a user gives."""
    number = sx.zenodo.create_deposition(TOKEN, "dataset", "A", "B", base_url=zenodo.api)
    name = "größe Ω #1?.zip"
    (home / name).write_bytes(b"PK none")
    link = sx.zenodo.upload_file(home / name, number, TOKEN, base_url=zenodo.api, progress=False)
    assert zenodo.files[100] == {name: b"PK none"}
    copy, _ = sx.zenodo.download_file(link, home / "copy", progress=False)
    assert Path(copy).read_bytes() == b"PK none"
    zenodo.plain["/größe Ω.zip"] = zenodo.plain["/gr%C3%B6%C3%9Fe%20%CE%A9.zip"] = b"PK none"
    sx.zenodo.download_file(f"{zenodo.url}/größe Ω.zip", home / "again", progress=False)
    assert (home / "again").read_bytes() == b"PK none"


def test_a_published_deposition_takes_no_file(zenodo: Zenodo, home: Path) -> None:
    number = sx.zenodo.create_deposition(TOKEN, "dataset", "A", "B", base_url=zenodo.api)
    (home / "a").write_bytes(b"1")
    link = sx.zenodo.upload_file(home / "a", number, TOKEN, base_url=zenodo.api, progress=False)
    sx.zenodo.publish_deposition(number, TOKEN, base_url=zenodo.api)
    assert sx.zenodo.upload_file(home / "a", number, TOKEN, base_url=zenodo.api, progress=False) == link
    (home / "a").write_bytes(b"2")
    with pytest.raises(UsageError, match="is published"):
        sx.zenodo.upload_file(home / "a", number, TOKEN, base_url=zenodo.api, progress=False)
    assert zenodo.count("PUT", "bucket") == 1
