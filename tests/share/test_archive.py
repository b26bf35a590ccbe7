"""Archives from strangers: nothing outside the folder, no link, no bomb, no code; ours byte for byte."""

from __future__ import annotations

import hashlib
import io
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamx.errors import BadFileError, IntegrityError, ResourceError
from streamx.share.archive import MANIFEST, _extract, pack, plan_extraction, safe_name, unpack
from streamx.store.folder import Folder

LIMIT = 10_000_000


def archive_of(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members:
            archive.writestr(member, data)
    return path


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o777) << 16
    return info


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "reference.zarr" / "obsm").mkdir(parents=True)
    (path / "model.json").write_bytes(b"{}")
    (path / "reference.zarr" / "obsm" / "c0").write_bytes(bytes(range(256)) * 9000)
    (path / "größe Ω").write_bytes(b"")
    return path


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    digest = pack(Folder(folder), tmp_path / "a.zip", {"README.md": b"card"}, skip=("origin.json",))
    target = tmp_path / "back"
    target.mkdir()
    unpack(tmp_path / "a.zip", target, LIMIT)
    assert everything(target) == everything(folder) | {"README.md": b"card"}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o111 == 0 for path in target.rglob("*") if path.is_file())
    (folder / "origin.json").write_bytes(b"left out")
    for path in folder.rglob("*"):
        path.touch()  # times are not in it
    assert pack(Folder(folder), tmp_path / "b.zip", {"README.md": b"card"}, skip=("origin.json",)) == digest
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    (folder / "model.json").write_bytes(b"[]")
    assert pack(Folder(folder), tmp_path / "c.zip", {"README.md": b"card"}, skip=("origin.json",)) != digest


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/../../evil",
        "/etc/evil",
        "..",
        "C:/evil",
        "c:evil",
        "a\\..\\evil",
        "\\\\host\\share",
        "a\x00b",
        "a\nb",
        "",
        "x" * 5000,
        "a/" + "ü" * 200,
    ],
)
def test_names_that_lead_out(name: str) -> None:
    with pytest.raises(BadFileError, match="leads out of the folder"):
        safe_name(name)


@given(st.text(max_size=40))
@settings(deadline=None)
def test_no_name_leads_out(name: str) -> None:
    try:
        found = safe_name(name)
    except BadFileError:
        return
    if found is not None:
        home = Path("/home/of/model")
        assert (home / found).is_relative_to(home)
        assert ".." not in Path(found).parts


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_nothing_is_written_outside(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = archive_of(tmp_path / "a.zip", ("model.json", b"{}"), (name, b"evil"))
    with pytest.raises(BadFileError, match="leads out"):
        unpack(path, home, LIMIT)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "home"]  # not even the good file


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices(mode: int, tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.zip", (special("weights", mode), b"/etc/passwd"))
    with pytest.raises(BadFileError, match="link or device"):
        unpack(path, tmp_path, LIMIT)


def test_names_twice_and_files_as_folders(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archive_of(tmp_path / "a.zip", ("x", b"1"), ("x", b"2"))
    with pytest.raises(BadFileError, match="twice"):
        unpack(twice, tmp_path, LIMIT)
    both = archive_of(tmp_path / "b.zip", ("x", b"1"), ("x/y", b"2"))
    with pytest.raises(BadFileError, match="folder that is a file"):
        unpack(both, tmp_path, LIMIT)


def test_names_that_are_one_on_this_disk(tmp_path: Path) -> None:
    """As `A` and `a` are on some: what came first is not written over."""
    path = archive_of(tmp_path / "a.zip", ("obs/A", b"1"), ("obs/A/x", b"2"))
    for name in ("obs/A", "obs"):
        home = tmp_path / name.replace("/", "-")
        (home / name).parent.mkdir(parents=True)
        (home / name).write_bytes(b"first")
        with zipfile.ZipFile(path) as archive, pytest.raises(BadFileError, match="one name on this disk"):
            _extract(archive, archive.infolist()[1], home / "obs" / "A" / "x", LIMIT)
        assert everything(home) == {name: b"first"}


def test_a_list_of_files_that_is_a_bomb(tmp_path: Path) -> None:
    for listed, match in ((b" " * 1_000_000, "1,000,000 bytes"), (b"[" * 4000, "can't be read")):
        path = archive_of(tmp_path / "a.zip", ("x", b"1"), (MANIFEST, listed))
        with pytest.raises(BadFileError, match=match):
            unpack(path, tmp_path, LIMIT)
    assert not (tmp_path / "x").exists()


def test_a_bomb(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.zip", ("zeros", bytes(LIMIT + 1)))
    assert path.stat().st_size < LIMIT / 500
    with pytest.raises(ResourceError, match="are allowed"):
        unpack(path, tmp_path, LIMIT)
    data = bytearray(path.read_bytes())  # the same, its directory says 10 bytes
    said = (LIMIT + 1).to_bytes(4, "little")
    assert data.count(said) == 2
    path.write_bytes(data.replace(said, (10).to_bytes(4, "little")))
    with pytest.raises((BadFileError, ResourceError)):
        unpack(path, tmp_path, LIMIT)
    assert not (tmp_path / "zeros").exists() or (tmp_path / "zeros").stat().st_size <= 10


def test_too_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamx.share.archive.MOST_FILES", 3)
    with pytest.raises(ResourceError, match="4 files"):
        plan_extraction([zipfile.ZipInfo(str(i)) for i in range(4)], LIMIT)


def test_a_directory_that_would_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive_of(tmp_path / "a.zip", *((str(i), b"") for i in range(100)))
    monkeypatch.setattr("streamx.share.archive.DIRECTORY", 4_000)
    with pytest.raises(ResourceError, match="its directory has 4,790 bytes"):
        unpack(path, tmp_path, LIMIT)
    assert list(tmp_path.iterdir()) == [path]


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive_of(tmp_path / "a.zip", ("file", bytes(1000)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 1, 9))
    with pytest.raises(ResourceError, match="1,000 bytes, 9 are free"):
        unpack(path, tmp_path, LIMIT)


def test_files_against_the_list(folder: Path, tmp_path: Path) -> None:
    pack(Folder(folder), tmp_path / "a.zip", {})
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    changed = {**members, "model.json": b"{ }"}
    missing = {name: data for name, data in members.items() if name != "model.json"}
    strange = {**members, "extra.py": b"import os"}
    unread = {**members, MANIFEST: b'{"files": 3}'}
    for number, found in enumerate((changed, missing, strange, unread)):
        path = archive_of(tmp_path / f"{number}.zip", *found.items())
        home = tmp_path / str(number)
        home.mkdir()
        with pytest.raises((IntegrityError, BadFileError), match=r"model\.json|extra|can't be read"):
            unpack(path, home, LIMIT)


def test_damage(folder: Path, tmp_path: Path) -> None:
    """Cut short, or a byte changed anywhere: an error with a name, or the same files."""
    pack(Folder(folder), tmp_path / "a.zip", {})
    data = (tmp_path / "a.zip").read_bytes()
    for number, at in enumerate([0, 10, 29, 100_000, len(data) - 300, len(data) - 30, len(data) - 5]):
        for what in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]):
            home = tmp_path / f"out-{number}-{len(what) == len(data)}"
            home.mkdir()
            (tmp_path / "bad.zip").write_bytes(what)
            try:
                unpack(tmp_path / "bad.zip", home, LIMIT)
            except (BadFileError, IntegrityError, ResourceError):
                continue
            assert everything(home) == everything(folder)


def test_an_encrypted_file() -> None:
    info = zipfile.ZipInfo("weights")
    info.flag_bits |= 1
    with pytest.raises(BadFileError, match="encrypted"):
        plan_extraction([info], LIMIT)


def test_no_zip(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(io.BytesIO(b"<html>not found</html>").read())
    with pytest.raises(BadFileError, match="no sound zip file"):
        unpack(tmp_path / "a.zip", tmp_path, LIMIT)


def test_memory_stays_flat(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "big").open("wb") as out:
        for part in range(48):
            out.write(hashlib.sha256(bytes([part])).digest() * (1 << 15))
    (tmp_path / "home").mkdir()
    tracemalloc.start()
    pack(Folder(tmp_path / "model"), tmp_path / "a.zip", {})
    unpack(tmp_path / "a.zip", tmp_path / "home", 100_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "home" / "big").stat().st_size == 48 << 20
    assert peak < 16 << 20
