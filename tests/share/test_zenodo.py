"""``sx.zenodo`` (SA21) against a service on this machine: every function, refusal and broken wire."""

from __future__ import annotations

import hashlib
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fake_zenodo import TOKEN, Fault, Zenodo, serving

import streamx as sx
from streamx.errors import BadFileError, IntegrityError, StorageError, StreamxError, UsageError
from streamx.share import transfer
from streamx.share import zenodo as functions
from streamx.share.http import Service, ask, read_token

QUICK = {"retry_seconds": 0.1, "timeout": 2.0}


def draft(zenodo: Zenodo, **more: Any) -> str:
    return sx.zenodo.create_deposition(TOKEN, "dataset", "A title", "Words", base_url=zenodo.api, **more)


def service(zenodo: Zenodo, **more: Any) -> Service:
    return Service(zenodo.api, TOKEN, **QUICK | more)


def test_sa21_depositions(zenodo: Zenodo) -> None:
    api = {"base_url": zenodo.api}
    numbers = [draft(zenodo, creators=[{"name": f"Doe {i}"}]) for i in range(5)]
    assert numbers == ["100", "101", "102", "103", "104"]
    assert zenodo.depositions[102]["metadata"]["title"] == "A title"
    assert zenodo.depositions[102]["metadata"]["creators"] == [{"name": "Doe 2"}]
    assert sx.zenodo.get_all_deposition_ids(TOKEN, **api) == numbers  # three pages
    sx.zenodo.update_deposition("101", TOKEN, {"title": "as such"}, **api)
    sx.zenodo.update_deposition("102", TOKEN, {"metadata": {"title": "nested"}}, **api)
    titles = [zenodo.depositions[number]["metadata"]["title"] for number in (101, 102)]
    assert titles == ["as such", "nested"]
    assert sx.zenodo.delete_deposition("103", TOKEN, **api) is None  # 204 without a body
    assert sx.zenodo.get_all_deposition_ids(TOKEN, **api) == ["100", "101", "102", "104"]
    assert sx.zenodo.publish_deposition("100", None, **api) == f"{zenodo.url}/records/100"
    assert zenodo.depositions[100]["submitted"]


def test_sa21_files(zenodo: Zenodo, tmp_path: Path) -> None:
    content = bytes(range(256)) * 9_000
    path = tmp_path / "a model.bin"
    path.write_bytes(content)
    number = draft(zenodo)
    link = sx.zenodo.upload_file(path, number, TOKEN, base_url=zenodo.api)
    assert link == f"{zenodo.url}/record/{number}/files/a%20model.bin?download=1"
    assert zenodo.files[100] == {"a model.bin": content}
    assert sx.zenodo.upload_file(path, number, TOKEN, base_url=zenodo.api) == link
    assert zenodo.count("PUT", "bucket") == 1  # the same bytes are not sent again
    target = tmp_path / "new" / "folder" / "copy.bin"
    with pytest.raises(UsageError, match="no such folder"):
        sx.zenodo.download_file(link, target)
    found, headers = sx.zenodo.download_file(link, target, make_dir=True)
    assert Path(found).read_bytes() == content
    assert headers is not None
    assert headers["Content-Length"] == str(len(content))
    target.write_bytes(b"mine")
    assert sx.zenodo.download_file(link, target) == (str(target), None)
    assert target.read_bytes() == b"mine"  # an existing file is kept
    assert not list(target.parent.glob("*.part"))


def test_sa21_models(zenodo: Zenodo, tmp_path: Path) -> None:
    class Saved:
        def save(self, folder: Path) -> None:
            (folder / "inner").mkdir(parents=True)
            (folder / "attr.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")  # runs if it is unpickled
            (folder / "inner" / "weights.pt").write_bytes(b"w" * 1000)

    number = draft(zenodo)
    link = sx.zenodo.upload_model(Saved(), number, TOKEN, "lung", base_url=zenodo.api)
    assert link.endswith("/files/scarches-lung.zip?download=1")
    folder = sx.zenodo.download_model(link, tmp_path / "got", make_dir=True)
    assert folder == str(tmp_path / "got")
    assert (tmp_path / "got" / "inner" / "weights.pt").read_bytes() == b"w" * 1000
    assert not list(tmp_path.rglob("pwned"))
    with pytest.raises(UsageError, match=r"holds 'attr\.pkl' already"):
        sx.zenodo.download_model(link, tmp_path / "got")
    with pytest.raises(UsageError, match="no such folder"):
        sx.zenodo.download_model(link, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFileError, match="holds no model"):
        sx.zenodo.upload_model(tmp_path / "empty", number, TOKEN, base_url=zenodo.api)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, UsageError), (401, UsageError), (403, UsageError), (404, BadFileError), (500, StorageError)],
)
def test_errors_are_named_and_hold_no_token(status: int, error: type, zenodo: Zenodo) -> None:
    said = {"message": f"sorry, {TOKEN}", "errors": [{"field": "title", "messages": ["too short"]}]}
    zenodo.faults.append(Fault("PUT", "depositions", status, body=said, times=100))
    with pytest.raises(error) as found:
        ask(service(zenodo), "PUT", f"/deposit/depositions/1?access_token={TOKEN}", {})
    text = str(found.value)
    assert f"answered {status}: sorry, ***; title: too short" in text
    assert TOKEN not in text
    attempts = zenodo.count("PUT", "depositions")
    assert attempts == 1 if status < 500 else attempts > 1


def test_what_may_pass_is_repeated(zenodo: Zenodo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "streamx")
    zenodo.faults += [Fault("GET", "depositions", 503, times=2), Fault("POST", "depositions", 429)]
    zenodo.faults.append(Fault("PUT", "bucket", 502, body={"message": "later"}))
    number = draft(zenodo)  # a POST goes again where it was not taken: 429
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    sx.zenodo.upload_file(path, number, TOKEN, base_url=zenodo.api)
    assert zenodo.files[100]["file"] == path.read_bytes()
    assert zenodo.count("PUT", "bucket") == 2
    assert len(re.findall(r"answered 50[23].*; tried again in", caplog.text)) == 3  # no silence


def test_a_post_that_may_have_been_done_is_not_repeated(zenodo: Zenodo) -> None:
    zenodo.faults.append(Fault("POST", "depositions", 500, times=100))
    with pytest.raises(StorageError, match="answered 500"):
        draft(zenodo)
    assert zenodo.count("POST", "depositions") == 1


def test_the_token_is_in_a_header_and_nowhere_else(
    zenodo: Zenodo, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    link = sx.zenodo.upload_file(path, draft(zenodo), TOKEN, base_url=zenodo.api)
    assert TOKEN not in link
    assert {headers.get("Authorization") for _, _, headers in zenodo.asked} == {f"Bearer {TOKEN}"}
    assert all(TOKEN not in url for _, url, _ in zenodo.asked)
    assert TOKEN not in repr(service(zenodo))
    out = capfd.readouterr()
    assert TOKEN not in caplog.text + out.out + out.err


def test_the_token_stays_with_its_host(zenodo: Zenodo, tmp_path: Path) -> None:
    content = b"elsewhere"
    with serving() as other:
        other.plain["/blob"] = content
        zenodo.plain["/here"] = content
        zenodo.faults += [
            Fault("GET", "^/away$", 302, {"Location": f"{other.url}/blob"}),
            Fault("GET", "^/near$", 302, {"Location": "/here"}),
        ]
        for name in ("away", "near"):
            transfer.get_file(service(zenodo), f"{zenodo.url}/{name}", tmp_path / name)
            assert (tmp_path / name).read_bytes() == content
        [(_, _, foreign)] = other.asked
        assert "Authorization" not in foreign
        assert [h.get("Authorization") for _, path, h in zenodo.asked if path == "/here"] == [
            f"Bearer {TOKEN}"
        ]
        transfer.get_file(service(zenodo), f"{other.url}/blob", tmp_path / "direct")
        assert "Authorization" not in other.asked[-1][2]
        zenodo.faults.append(Fault("PUT", "bucket", 307, {"Location": f"{other.url}/take"}))
        with pytest.raises(StorageError, match="answered 307"):  # what is sent goes nowhere else
            transfer.put_file(service(zenodo), tmp_path / "near", f"{zenodo.api}/files/bucket-1/near")
        assert len(other.asked) == 2


def test_no_token_in_the_clear() -> None:
    with pytest.raises(UsageError, match="only sent by https"):
        ask(Service("http://zenodo.example/api", TOKEN), "GET", "/deposit/depositions")


def test_where_the_token_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ZENODO_TOKEN", "ZENODO_SANDBOX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="export ZENODO_TOKEN"):
        functions.service_of(None)
    with pytest.raises(UsageError, match="export ZENODO_SANDBOX_TOKEN"):
        functions.service_of(None, sx.zenodo.SANDBOX)
    monkeypatch.setenv("ZENODO_TOKEN", "real")
    monkeypatch.setenv("ZENODO_SANDBOX_TOKEN", "trial")
    assert functions.service_of(None).token == "real"
    assert functions.service_of(None, sx.zenodo.SANDBOX).token == "trial"
    (tmp_path / "token").write_text(" filed \n")
    assert functions.service_of(None, token_file=tmp_path / "token").token == "filed"
    assert functions.service_of("given", token_file=tmp_path / "token").token == "given"
    with pytest.raises(UsageError, match="no token can be read"):
        functions.service_of(None, token_file=tmp_path / "none")
    with pytest.raises(UsageError, match="characters that no token has"):
        read_token("two\nlines", ())


def test_wrong_checksum_of_an_upload(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.wrong_checksum = True
    (tmp_path / "file").write_bytes(b"abc")
    with pytest.raises(IntegrityError, match="the service got md5:"):
        sx.zenodo.upload_file(tmp_path / "file", draft(zenodo), TOKEN, base_url=zenodo.api)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_the_wire_broke(ranges: bool, zenodo: Zenodo, tmp_path: Path) -> None:
    content = hashlib.sha256(b"seed").digest() * 100_000
    zenodo.plain["/file"], zenodo.ranges = content, ranges
    zenodo.faults += [Fault("GET", "/file", cut=1_000_000), Fault("GET", "/file", cut=1_500_000)]
    transfer.get_file(service(zenodo), f"{zenodo.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    asked = [headers.get("Range") for _, _, headers in zenodo.asked]
    second = "bytes=2500000-" if ranges else "bytes=1500000-"
    assert asked == [None, "bytes=1000000-", second]


def test_a_download_that_keeps_breaking_is_kept(zenodo: Zenodo, tmp_path: Path) -> None:
    content = bytes(1000)
    described = {"size": 1000, "checksum": f"md5:{hashlib.md5(content).hexdigest()}"}
    zenodo.plain["/file"] = content
    zenodo.faults += [Fault("GET", "/file", cut=400), Fault("GET", "/file", cut=0, times=100)]
    with pytest.raises(StorageError, match="broke off"):
        transfer.get_file(service(zenodo), f"{zenodo.url}/file", tmp_path / "file", **described)
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").stat().st_size == 400
    zenodo.faults.clear()
    transfer.get_file(service(zenodo), f"{zenodo.url}/file", tmp_path / "file", **described)
    assert zenodo.asked[-1][2]["Range"] == "bytes=400-"
    assert (tmp_path / "file").read_bytes() == content


def test_a_part_of_another_file_is_dropped(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.plain["/file"] = b"right" * 100
    checksum = f"md5:{hashlib.md5(zenodo.plain['/file']).hexdigest()}"
    (tmp_path / "file.part").write_bytes(b"wrong" * 10)
    transfer.get_file(service(zenodo), f"{zenodo.url}/file", tmp_path / "file", checksum=checksum)
    assert (tmp_path / "file").read_bytes() == b"right" * 100
    (tmp_path / "next.part").write_bytes(b"wrong" * 10)
    transfer.get_file(service(zenodo), f"{zenodo.url}/file", tmp_path / "next")  # no checksum: from the start
    assert (tmp_path / "next").read_bytes() == b"right" * 100


@pytest.mark.parametrize("described", [{"size": 7}, {"checksum": "md5:" + "0" * 32}, {"checksum": "crc:1"}])
def test_a_wrong_download_is_no_file(described: dict[str, Any], zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.plain["/file"] = b"123456"
    with pytest.raises(IntegrityError):
        transfer.get_file(service(zenodo), f"{zenodo.url}/file", tmp_path / "file", **described)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_service(zenodo: Zenodo) -> None:
    zenodo.plain["/api/page"] = b"<html>"
    with pytest.raises(StreamxError, match="no JSON"):
        ask(service(zenodo), "GET", "/page")
    with serving() as gone:
        url = gone.url
    with pytest.raises(StorageError, match="can't be reached"):
        ask(Service(url, None, **QUICK), "GET", "/api")
    with pytest.raises(UsageError, match="is no address"):
        sx.zenodo.download_file("file:///etc/passwd", "copy")


def test_a_zip_of_scarches_itself(zenodo: Zenodo, tmp_path: Path) -> None:
    """Its archives hold one folder and no list of files."""
    with zipfile.ZipFile(tmp_path / "theirs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trVAE/var_names.csv", "A\nB\n")
    zenodo.plain["/theirs.zip"] = (tmp_path / "theirs.zip").read_bytes()
    folder = sx.zenodo.download_model(f"{zenodo.url}/theirs.zip", tmp_path / "model", make_dir=True)
    assert folder == str(tmp_path / "model" / "trVAE")
