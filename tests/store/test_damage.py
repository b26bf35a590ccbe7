"""Flipped bits; cut, lost, exchanged and foreign objects: verify finds them, and nobody reads them."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from store_samples import sample, tree, with_names

import streamx as sx
from streamx.errors import BadFileError, IncompleteError, IntegrityError, StreamxError
from streamx.store import Collection, draft, layout
from streamx.store.latents import write_latents
from streamx.store.pack import Content, write_part
from streamx.store.spill import Slab

# Copies for plain anndata, and what only verify looks at: a lost one does not change what is read.
NOT_READ = re.compile(
    r"shards/\d+.zarr/(obs|uns|layers|obsp|varm|varp)/|shards/0*[1-9]\d*.zarr/var/|shards/.*/zarr.json"
    r"|obs/000003.zarr/_index/|generations/00000[12].json"
)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of every kind of object: two parts, an annotation, an obsm matrix, a table."""
    place = tmp_path_factory.mktemp("intact") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "ROWS_PER_CHUNK", 2)
        patch.setattr(layout, "VALUES_MULTIPLE", 8)
        patch.setattr(layout, "CHUNKS_PER_SHARD", 3)
        patch.setattr(draft, "OBSM_ROWS_PER_CHUNK", 4)
        patch.setattr(draft, "OBSM_ROWS_PER_SHARD", 8)
        adata = sample(19, 9, 0, note=pd.array([1, None] * 9 + [2], dtype="Int64"), batch=["x"] * 19)
        adata.obsm["protein_expression"] = np.arange(38, dtype=np.float32).reshape(19, 2)
        sx.convert({"a": adata}, place)
        more = sample(7, 9, 1, note=[3] * 7, batch=["y"] * 7)
        sx.convert({"b": with_names(more, "b")}, place, append=True)
        sx.annotate(place, pd.DataFrame({"label": ["T", "B"]}, index=["c1", "b3"]))
    assert sx.verify(place)["ok"]
    return place


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "store")
    return tmp_path / "store"


def everything(place: Path) -> list[Any]:
    """All that can be read of a store, as plain values."""
    store = Collection(place)
    obs = store.obs.astype(object)
    return [
        store.read(0, store.n_obs).toarray().tolist(),
        obs.where(obs.notna(), None).to_numpy().tolist(),
        list(store.obs_names),
        list(store.obs.columns),
        list(store.var_names),
        store.read_obsm("protein_expression").tolist(),
        store.batches,
        store.measured_bg.tolist(),
        store.modalities,
        store.sources["checksum"].tolist(),
    ]


def flips(files: list[Path], n: int, rng: random.Random) -> Iterator[tuple[Path, bytes]]:
    """At least one bit of each file, then bits of files at random."""
    for path in itertools.islice(itertools.chain(files, iter(lambda: rng.choice(files), None)), n):
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        yield path, whole
        path.write_bytes(whole)


def silently_wrong(place: Path, expected: list[Any]) -> bool:
    """Reading gives something else, and no error of ours."""
    try:
        return everything(place) != expected
    except (IntegrityError, BadFileError):
        return False


def check_flips(place: Path, n: int, seed: int) -> None:
    files = sorted(path for path in place.rglob("*") if path.is_file())
    expected = everything(place)
    undetected, wrong = [], []
    for i, (path, _) in enumerate(flips(files, n, random.Random(seed))):
        if sx.verify(place, threads=1)["ok"]:
            undetected.append(path)
        opened = not NOT_READ.match(path.relative_to(place).as_posix())
        if (opened or i % 8 == 0) and silently_wrong(place, expected):
            wrong.append(path)
    assert (undetected, wrong) == ([], [])
    assert everything(place) == expected


def test_flipped_bits(copy: Path) -> None:
    check_flips(copy, 300, seed=0)


@pytest.mark.slow
def test_a_thousand_flipped_bits(copy: Path) -> None:
    check_flips(copy, 1000, seed=1)


def test_each_lost_or_cut_object(copy: Path) -> None:
    """R9: reading gives a typed error wherever it needs the object; verify always names it."""
    expected = everything(copy)
    unnoticed = set()
    for i, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        key, whole = path.relative_to(copy).as_posix(), path.read_bytes()
        for cut in (None, (len(whole) // 2, len(whole) - 1, 0)[i % 3]):
            path.unlink() if cut is None else path.write_bytes(whole[:cut])
            report = sx.verify(copy, threads=1)
            assert not report["ok"]
            assert any(key in str(error["object"]) or key == "streamx.json" for error in report["errors"]), (
                key
            )
            if i % 8 == 0 or not NOT_READ.match(key):
                try:
                    assert everything(copy) == expected
                    unnoticed.add(key)
                except (IntegrityError, BadFileError, IncompleteError):
                    pass
            path.write_bytes(whole)
    assert [key for key in unnoticed if not NOT_READ.match(key)] == []
    assert unnoticed


def test_objects_of_other_content(copy: Path) -> None:
    """Exchanged, or from a former state: every one is whole, with its own checksums inside."""
    codes = sorted(copy.glob("shards/*/obs/*/codes/c/0"))
    same_size = [
        (a, b)
        for a, b in itertools.combinations(sorted(copy.rglob("c/*")), 2)
        if a.is_file() and a.stat().st_size == b.stat().st_size and a.read_bytes() != b.read_bytes()
    ]
    assert codes
    assert len(same_size) > 20
    for a, b in random.Random(0).sample(same_size, 20):
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second), b.write_bytes(first)
        found = {error["object"] for error in sx.verify(copy, threads=1)["errors"]}
        assert found == {path.relative_to(copy).as_posix() for path in (a, b)}
        a.write_bytes(first), b.write_bytes(second)


def test_checksums_depend_on_content(copy: Path, tmp_path: Path) -> None:
    """The CRC-32C of bytes that end in their own is a constant; the manifest's is another."""
    parts = Collection(copy).parts
    table = {key: tuple(entry) for part in parts for key, entry in part.objects.items()}
    content = {key: (copy / key).read_bytes() for key in table}
    for a, b in itertools.combinations(table, 2):
        assert (table[a] == table[b]) == (content[a] == content[b])


def test_foreign_objects(copy: Path) -> None:
    (copy / "shards" / "000000.zarr" / "extra").write_bytes(b"x")
    (copy / "note.txt").write_text("x")
    errors = sx.verify(copy)["errors"]
    assert errors == [
        {"object": "note.txt", "error": "not in the manifest"},
        {"object": "shards/000000.zarr/extra", "error": "not in the manifest"},
    ]


def test_verify_of_what_is_no_store(tmp_path: Path) -> None:
    for place, what in ((tmp_path, "is no streamx store"), (tmp_path / "nothing", "does not exist")):
        with pytest.raises(BadFileError, match=what):
            sx.verify(place)
    write_latents(tmp_path / "a.zarr", pd.DataFrame(index=["c"]), {}, {})
    with pytest.raises(BadFileError, match="is an AnnData-Zarr"):
        sx.verify(tmp_path / "a.zarr")
    with pytest.raises(BadFileError, match="is a folder of mapped queries"):
        sx.open(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    with pytest.raises(BadFileError, match="is a model, no streamx store"):
        sx.open(tmp_path / "model")


@pytest.mark.parametrize("damage", ["[]", "{}", "{", '"x"', "\xff", '{"format": 2}', "null"])
def test_a_marker_of_nonsense(copy: Path, damage: str) -> None:
    (copy / "streamx.json").write_text(damage, encoding="latin-1")
    with pytest.raises(IntegrityError):
        sx.open(copy)


def test_another_format(copy: Path) -> None:
    marker = json.loads((copy / "streamx.json").read_text())
    (copy / "streamx.json").write_text(json.dumps(marker | {"format": 1}))
    with pytest.raises(BadFileError, match="make it again"):
        sx.open(copy)
    (copy / "streamx.json").write_text(json.dumps(marker | {"format": 99}))
    with pytest.raises(BadFileError, match="upgrade streamx"):
        sx.open(copy)


def test_a_marker_that_points_elsewhere(copy: Path) -> None:
    """An older generation under the newest's name, and paths out of the store."""
    marker = json.loads((copy / "streamx.json").read_text())
    for path in ("generations/000001.json", "../../etc/passwd", "/etc/passwd"):
        (copy / "streamx.json").write_text(json.dumps(marker | {"path": path}))
        with pytest.raises(StreamxError):
            sx.open(copy)


def test_an_unreadable_folder_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be read is a storage error (5), not an integrity error (6)."""
    original = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "000003.json":
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StreamxError, match="Permission denied") as caught:
        sx.open(copy)
    assert caught.value.exit_code == 5


def test_damaged_tables(tmp_path: Path) -> None:
    """The arrays that a view keeps beside its rows."""
    x_ng = sparse.csr_matrix(np.eye(5, dtype=np.float32))
    content = Content(
        kind="view",
        obs=pd.DataFrame({"batch": pd.Categorical(["a"] * 5)}, index=[f"c{i}" for i in range(5)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(5)]),
        batch_key="batch",
        fingerprint={"a": 1},
        tables={"scale_bg": np.arange(5, dtype=np.float32)[None]},
        view={"store": "../x"},
    )
    view = write_part(tmp_path / "view", [Slab("a", np.arange(5), lambda: (x_ng, {}))], content)
    np.testing.assert_array_equal(view.scale_bg, np.arange(5, dtype=np.float32)[None])
    for path, _ in flips(sorted((tmp_path / "view" / "tables").rglob("*.npy")) * 20, 20, random.Random(0)):
        assert not sx.verify(tmp_path / "view")["ok"]
        with pytest.raises(IntegrityError, match=r"scale_bg\.npy"):
            _ = Collection(tmp_path / "view").scale_bg
        assert path.exists()
    assert tree(tmp_path / "view")


def test_plain_anndata_notices_flipped_counts_too(copy: Path) -> None:
    """The checksums lie inside the zarr format: any reader that follows it is protected."""
    files = sorted(copy.glob("shards/000000.zarr/X/*/c/*"))
    expected = ad.read_zarr(copy / "shards/000000.zarr").X.toarray()
    for _ in flips(files, 40, random.Random(3)):
        try:
            found = ad.read_zarr(copy / "shards/000000.zarr").X.toarray()
        except Exception:
            continue
        np.testing.assert_array_equal(found, expected)
