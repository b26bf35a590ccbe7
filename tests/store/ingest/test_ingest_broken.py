"""Broken inputs: each a named error that says what, where and what to do; never a parser's traceback."""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import zarr
from scipy import sparse

from streamx.errors import BadFileError, EmptyError, InputError, StreamxError, UsageError
from streamx.store.ingest import open_sources

X = np.array([[0, 2, 0], [1, 0, 5], [0, 0, 3], [4, 0, 0]], dtype=np.float32)


def make_h5ad(folder: Path, x: object = None, **layers: object) -> Path:
    path = folder / "sample.h5ad"
    obs = pd.DataFrame({"batch": pd.Categorical(list("abab"))}, index=[f"cell{i}" for i in range(4)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(3)])
    made = ad.AnnData(sparse.csr_matrix(X) if x is None else x, obs=obs, var=var)
    for name, value in layers.items():
        made.layers[name] = value
    made.write_h5ad(path)
    return path


def edit(part: str, values: object) -> Callable[[Path], Path]:
    """An h5ad with one element replaced (deleted if None)."""

    def make(folder: Path) -> Path:
        path = make_h5ad(folder)
        with h5py.File(path, "a") as file:
            attributes = dict(file[part].attrs)
            del file[part]
            if values is not None:
                file[part] = values
                file[part].attrs.update(attributes)
        return path

    return make


def truncated(folder: Path) -> Path:
    path = make_h5ad(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def flipped_chunk(folder: Path) -> Path:
    """A gzip chunk whose bytes have rotted."""
    path = make_h5ad(folder)
    with h5py.File(path, "a") as file:
        del file["X/data"]
        made = file.create_dataset(
            "X/data", data=np.arange(1, 6, dtype=np.float32), chunks=(5,), compression="gzip"
        )
        where = made.id.get_chunk_info(0)
    with path.open("r+b") as stream:
        stream.seek(where.byte_offset)
        stream.write(b"\xff" * where.size)
    return path


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(content.encode()))
        else:
            path.write_text(content)
        return path

    return make


def rotten_gzip(folder: Path) -> Path:
    path = folder / "table.csv.gz"
    packed = gzip.compress(("," + ",".join(f"c{i}" for i in range(500)) + "\n").encode() * 20)
    path.write_bytes(packed[:40] + b"\xff\xff\xff" + packed[43:-9])
    return path


def mtx(
    entries: str = "2 1 2\n1 2 1\n3 2 5\n3 3 3\n1 4 4\n",
    header: str = "%%MatrixMarket matrix coordinate integer general\n3 4 5\n",
    barcodes: str | None = "c0\nc1\nc2\nc3\n",
    genes: str = "id0\tg0\nid1\tg1\nid2\tg2\n",
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        here = folder / "run1"
        here.mkdir()
        (here / "matrix.mtx").write_text(header + entries)
        (here / "genes.tsv").write_text(genes)
        if barcodes is not None:
            (here / "barcodes.tsv").write_text(barcodes)
        return here

    return make


def zarr_without_x(folder: Path) -> Path:
    return make_zarr(folder, drop="X")


def make_zarr(folder: Path, drop: str | None = None, lose_chunk: bool = False) -> Path:
    source, path = ad.read_h5ad(make_h5ad(folder)), folder / "sample.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's notices about its own next defaults
        source.write_zarr(path)
    (folder / "sample.h5ad").unlink()
    group = zarr.open_group(path, mode="a", use_consolidated=False)
    if drop:
        del group[drop]
    if lose_chunk:
        chunk = next(
            p for p in (path / "X" / "data").rglob("*") if p.is_file() and not p.name.startswith((".", "z"))
        )
        chunk.unlink()
    for name in (".zmetadata",):
        (path / name).unlink(missing_ok=True)
    return path


def tenx(
    several: bool = False, drop: str | None = None, shape: tuple[int, int] = (3, 4)
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path, x_ng = folder / "run.h5", sparse.csr_matrix(X)
        with h5py.File(path, "w") as file:
            for name in ("hg19", "mm10") if several else ("matrix",):
                group = file.create_group(name)
                group["barcodes"] = np.array([b"c0", b"c1", b"c2", b"c3"])
                group["data"], group["indices"], group["indptr"] = x_ng.data, x_ng.indices, x_ng.indptr
                group["shape"] = np.array(shape)
                group["genes"], group["gene_names"] = (
                    np.array([b"i0", b"i1", b"i2"]),
                    np.array([b"a", b"b", b"c"]),
                )
                if drop:
                    del group[drop]
        return path

    return make


def odd_frame(folder: Path) -> Path:
    path = make_h5ad(folder)
    with h5py.File(path, "a") as file:
        del file["obs/batch"]
        file["obs/batch"] = np.arange(3)
        file["obs/batch"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return path


def complex_x(folder: Path) -> Path:
    return edit("X", np.ones((4, 3), dtype=complex))(folder)


def renamed(folder: Path) -> Path:
    path = folder / "sample.h5ad"
    path.write_text("<html>404 not found</html>" * 50)
    return path


def compressed_h5ad(folder: Path) -> Path:
    path = folder / "sample.h5ad.gz"
    path.write_bytes(gzip.compress(make_h5ad(folder).read_bytes()))
    return path


HEADER = "%%MatrixMarket matrix coordinate integer general\n"
# what it is: how it is made, options, error, words of the message
BROKEN: dict[str, tuple[Callable[[Path], Path], dict, type[StreamxError], str]] = {
    "truncated h5ad": (truncated, {}, BadFileError, "truncated"),
    "not HDF5": (renamed, {}, BadFileError, "not an HDF5 file"),
    "rotten chunk": (flipped_chunk, {}, BadFileError, "rows 0 to 4"),
    "compressed h5ad": (compressed_h5ad, {}, BadFileError, "gunzip"),
    "no X": (edit("X", None), {}, BadFileError, "no X"),
    "no obs": (edit("obs", None), {}, BadFileError, "no obs"),
    "no var": (edit("var", None), {}, BadFileError, "no var"),
    "no such layer": (
        lambda f: make_h5ad(f, counts=sparse.csr_matrix(X)),
        {"layer": "spliced"},
        BadFileError,
        "no layer 'spliced'; the file has X, counts",
    ),
    "no raw": (make_h5ad, {"layer": "raw"}, BadFileError, "no layer 'raw'; the file has X"),
    "obs column too short": (odd_frame, {}, BadFileError, r"obs\['batch'\] has 3 values for 4 rows"),
    "obs longer than X": (edit("obs/_index", [b"a"] * 5), {}, BadFileError, "4|5"),
    "X has another shape": (edit("X", np.ones((4, 7))), {}, BadFileError, r"\(4, 7\).*4 cells.*3 genes"),
    "X holds no numbers": (complex_x, {}, BadFileError, "no numbers"),
    "indptr falls": (
        edit("X/indptr", np.array([0, 3, 1, 4, 5])),
        {},
        BadFileError,
        "falls from 3 to 1 at row 1",
    ),
    "indptr starts late": (edit("X/indptr", np.array([1, 1, 3, 4, 5])), {}, BadFileError, "starts at 1"),
    "indptr ends early": (
        edit("X/indptr", np.array([0, 1, 3, 4, 4])),
        {},
        BadFileError,
        "5 values.*ends at 4",
    ),
    "indptr too short": (edit("X/indptr", np.array([0, 1, 5])), {}, BadFileError, "3 entries for 4"),
    "indices beyond the genes": (
        edit("X/indices", np.array([1, 0, 2, 9, 0])),
        {},
        BadFileError,
        "gene index 9 of cell 'cell2' .row 2.",
    ),
    "negative index": (
        edit("X/indices", np.array([1, 0, -2, 2, 0])),
        {},
        BadFileError,
        "index -2 of cell 'cell1'",
    ),
    "duplicate entry": (
        edit("X/indices", np.array([1, 2, 2, 2, 0])),
        {},
        BadFileError,
        "'gene2' occurs twice in cell 'cell1' .row 1.",
    ),
    "fewer indices than values": (
        edit("X/indices", np.array([1, 0])),
        {},
        BadFileError,
        "5 values and 2 indices",
    ),
    "no data": (edit("X/data", None), {}, BadFileError, "X has no data"),
    "no cells": (lambda f: _sliced(f, slice(0), slice(None)), {}, EmptyError, "no cells"),
    "no genes": (lambda f: _sliced(f, slice(None), slice(0)), {}, EmptyError, "no genes"),
    "empty file": (text("sample.h5ad", ""), {}, EmptyError, "empty"),
    "unknown extension": (text("notes.docx", "hello"), {}, BadFileError, "unknown kind of file '.docx'"),
    "no such file": (lambda f: f / "nothing.h5ad", {}, UsageError, "no such file"),
    "glob without match": (lambda f: f / "*.h5ad", {}, UsageError, "nothing matches"),
    "empty folder": (lambda f: f, {}, UsageError, "holds no input"),
    "a model": (lambda f: text("model.json", "{}")(f).parent, {}, UsageError, "is a model, not an input"),
    "zarr without X": (zarr_without_x, {}, BadFileError, "no X|chunks of X/data are missing"),
    "zarr lost a chunk": (
        lambda f: make_zarr(f, lose_chunk=True),
        {},
        BadFileError,
        "1 of 1 chunks of X/data",
    ),
    "empty zarr folder": (lambda f: _mkdir(f / "x.zarr"), {}, BadFileError, "zarr group"),
    "mtx header": (mtx(header="1 2 3\n"), {}, BadFileError, "header is '1 2 3'"),
    "mtx dense": (mtx(header="%%MatrixMarket matrix array real general\n3 4\n"), {}, BadFileError, "array"),
    "mtx complex": (
        mtx(header=HEADER.replace("integer", "complex") + "3 4 5\n"),
        {},
        BadFileError,
        "complex",
    ),
    "mtx without size": (mtx(header=HEADER, entries=""), {}, BadFileError, "line 2"),
    "mtx cut short": (mtx("2 1 2\n1 2 1\n"), {}, BadFileError, "2 entries, the header says 5"),
    "mtx without entries": (mtx(""), {}, BadFileError, "0 entries, the header says 5"),
    "mtx too long": (mtx("2 1 2\n1 2 1\n3 2 5\n3 3 3\n1 4 4\n2 2 9\n"), {}, BadFileError, "6 entries"),
    "mtx index out of bounds": (
        mtx("2 1 2\n1 2 1\n3 9 5\n3 3 3\n1 4 4\n"),
        {},
        BadFileError,
        r"entry 3 \(line 5\) is feature 3, cell 9",
    ),
    "mtx index zero": (
        mtx("2 1 2\n0 2 1\n3 2 5\n3 3 3\n1 4 4\n"),
        {},
        BadFileError,
        "entry 2 .*feature 0, cell 2",
    ),
    "mtx text in a value": (mtx("2 1 2\n1 2 x\n3 2 5\n3 3 3\n1 4 4\n"), {}, BadFileError, "x"),
    "mtx line of four": (mtx("2 1 2\n1 2 1 7\n3 2 5\n3 3 3\n1 4 4\n"), {}, BadFileError, "fields"),
    "mtx line of two": (mtx("2 1 2\n1 2\n3 2 5\n3 3 3\n1 4 4\n"), {}, BadFileError, "matrix"),
    "mtx duplicate": (
        mtx("2 1 2\n2 1 1\n3 2 5\n3 3 3\n1 4 4\n"),
        {},
        BadFileError,
        "'g1' occurs twice in cell 'c0'",
    ),
    "mtx barcodes short": (mtx(barcodes="c0\nc1\n"), {}, BadFileError, "2 names for a matrix of 4 cells"),
    "mtx barcodes header": (mtx(barcodes="bc\nc0\nc1\nc2\nc3\n"), {}, BadFileError, "looks like a header"),
    "mtx no barcodes": (mtx(barcodes=None), {}, BadFileError, "no barcodes"),
    "mtx genes short": (mtx(genes="i\tg0\n"), {}, BadFileError, "1 names for a matrix of 3 features"),
    "mtx genes ragged": (mtx(genes="i\tg0\ng1\ni\tg2\n"), {}, BadFileError, "line 2 has 1 fields"),
    "mtx no cells": (mtx("", HEADER + "3 0 0\n", barcodes=""), {}, EmptyError, "3 features x 0 cells"),
    "csv only a header": (text("t.csv", ",c0,c1\n"), {}, EmptyError, "0 genes"),
    "csv blank": (text("t.csv", "\n"), {}, EmptyError, "0 genes and 0 cells"),
    "csv ragged": (
        text("t.csv", ",c0,c1\ng0,1,2\ng1,3\n"),
        {},
        BadFileError,
        r"line 3 \(gene 'g1'\) has 1 values",
    ),
    "csv too long": (
        text("t.csv", ",c0,c1\ng0,1,2\ng1,3,4,5\n"),
        {},
        BadFileError,
        "has 3 values for 2 cells",
    ),
    "csv text in a cell": (
        text("t.csv", ",c0,c1\ng0,1,2\ng1,3,high\n"),
        {},
        BadFileError,
        r"'high' is no number: gene 'g1', cell 'c1' \(line 3, column 3\)",
    ),
    "csv blank cell": (
        text("t.csv", ",c0,c1\ng0,,2\ng1,3,4\n"),
        {},
        BadFileError,
        "'' is no number: gene 'g0', cell 'c0'",
    ),
    "csv last cell blank": (
        text("t.csv", ",c0,c1\ng0,1,2\ng1,3,\n"),
        {},
        BadFileError,
        "gene 'g1', cell 'c1'",
    ),
    "csv one cell of blanks": (text("t.csv", ",c0\ng0, \n"), {}, BadFileError, "no number"),
    "tsv with blanks": (text("t.tsv", "\tc0\tc1\ng0\t\t2 3\n"), {}, BadFileError, "no number"),
    "tsv with decimal commas": (
        text("t.tsv", "\tc0\tc1\ng0\t1,5\t2\n"),
        {},
        BadFileError,
        "'1,5' is no number",
    ),
    "csv that has tabs": (
        text("t.csv", "\tc0\tc1\ng0\t1\t2\n"),
        {},
        BadFileError,
        "separated by something else",
    ),
    "csv.gz rotten": (rotten_gzip, {}, BadFileError, "can't read table"),
    "csv.gz that is none": (text("t.csv", ""), {}, EmptyError, "empty"),
    "10x several genomes": (tenx(several=True), {}, UsageError, "several genomes: hg19, mm10"),
    "10x no data": (tenx(drop="data"), {}, BadFileError, "matrix has no data"),
    "10x shape": (tenx(shape=(9, 4)), {}, BadFileError, r"\(9, 4\), but there are 3 features and 4 barcodes"),
}


def _sliced(folder: Path, rows: slice, columns: slice) -> Path:
    path = make_h5ad(folder)
    ad.read_h5ad(path)[rows, columns].copy().write_h5ad(path)
    return path


def _mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def read_all(item: object, scratch: Path, **options: object) -> np.ndarray:
    sources = open_sources([item], scratch=scratch, memory=1 << 20, **options)
    try:
        return np.concatenate([s.read(0, s.n_obs).toarray() for s in sources])
    finally:
        for source in sources:
            source.close()


@pytest.mark.parametrize("name", BROKEN)
def test_named_error(name: str, tmp_path: Path) -> None:
    make, options, kind, words = BROKEN[name]
    (tmp_path / "in").mkdir()
    item = make(tmp_path / "in")
    with pytest.raises(StreamxError, match=words) as caught:
        read_all(item, tmp_path / "scratch", **options)
    assert type(caught.value) is kind
    assert caught.value.where is not None
    assert str(tmp_path) in caught.value.where
    assert caught.value.fix


def test_the_sound_versions_are_read(tmp_path: Path) -> None:
    for number, make in enumerate((make_h5ad, mtx(), make_zarr, tenx())):
        folder = _mkdir(tmp_path / str(number))
        np.testing.assert_array_equal(read_all(make(folder), tmp_path / "scratch"), X)


def test_a_failed_spill_can_be_repeated(tmp_path: Path) -> None:
    """The error comes at every read, not only at the first; nothing half-made is used."""
    (source,) = open_sources([mtx("2 1 2\n1 2 1\n")(tmp_path)], scratch=tmp_path / "s", memory=1 << 20)
    for _ in range(2):
        with pytest.raises(BadFileError, match="2 entries"):
            source.read(0, 2)


def test_broken_files_can_be_collected(tmp_path: Path) -> None:
    bad, good = _mkdir(tmp_path / "bad"), _mkdir(tmp_path / "good")
    failed: list[InputError] = []
    inputs = [truncated(bad), make_h5ad(good)]
    (source,) = open_sources(inputs, scratch=tmp_path, memory=1 << 20, failed=failed)
    assert source.location.startswith(str(good))
    assert [type(e) for e in failed] == [BadFileError]
    source.close()


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("part", ["obs/_index", "obs/batch/codes", "X/data", "X/indptr"])
@pytest.mark.parametrize("dtype", ["|O", "<i8"])
def test_pickled_zarr_is_never_decoded(
    part: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zarr v2 array with numcodecs' pickle filter would run code when decoded."""
    monkeypatch.chdir(tmp_path)
    ad.settings.zarr_write_format = 2
    path = make_zarr(tmp_path)
    ad.settings.reset("zarr_write_format")
    array = path / part
    array = array / "values" if (array / "values").is_dir() else array  # pandas 3: text is nullable
    described = json.loads((array / ".zarray").read_text())
    described |= {"filters": [{"id": "pickle", "protocol": 4}], "dtype": dtype, "compressor": None}
    (array / ".zarray").write_text(json.dumps(described))
    (array / "0").write_bytes(pickle.dumps(np.array([Bomb()] * 4, dtype=object)))
    with pytest.raises(BadFileError, match=r"could run code|No Zarr data type"):
        read_all(path, tmp_path / "scratch")
    assert not Path("exploded").exists()


def test_disk_full_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from streamx.errors import StorageError
    from streamx.store.ingest.spill import Spill

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (source,) = open_sources([mtx()(tmp_path)], scratch=tmp_path / "s", memory=1 << 20)
    monkeypatch.setattr(Spill, "_scatter", full)
    with pytest.raises(StorageError, match="No space left"):
        source.read(0, 2)
    monkeypatch.undo()
    np.testing.assert_array_equal(source.read(0, 4).toarray(), X)


def test_scipy_agrees_on_mtx(tmp_path: Path) -> None:
    folder = mtx()(tmp_path)
    np.testing.assert_array_equal(scipy.io.mmread(folder / "matrix.mtx").toarray().T, X)


@pytest.mark.parametrize("kind", ["h5ad", "mtx.gz", "csv.gz", "10x"])
def test_any_truncation_is_a_named_error(kind: str, tmp_path: Path) -> None:
    """Cut at any place, a file is refused, never read as something shorter."""
    if kind == "h5ad":
        item = file = make_h5ad(tmp_path)
    elif kind == "10x":
        item = file = tenx()(tmp_path)
    elif kind == "csv.gz":
        item = file = text("t.csv.gz", ",c0,c1\n" + "".join(f"g{i},{i},0\n" for i in range(40)))(tmp_path)
    else:
        item = mtx()(tmp_path)
        file = item / "matrix.mtx.gz"
        file.write_bytes(gzip.compress((item / "matrix.mtx").read_bytes()))
        (item / "matrix.mtx").unlink()
    whole, raw = read_all(item, tmp_path / "s"), file.read_bytes()
    for size in np.linspace(0, len(raw) - 1, 40).astype(int):
        file.write_bytes(raw[:size])
        with pytest.raises(InputError):
            read_all(item, tmp_path / "s")
    file.write_bytes(raw)
    np.testing.assert_array_equal(read_all(item, tmp_path / "s"), whole)


def test_flipped_bytes_never_leave_a_traceback(tmp_path: Path) -> None:
    path = make_h5ad(tmp_path)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(0, len(raw), 150):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ int(rng.integers(1, 256))]) + raw[at + 1 :])
        with contextlib.suppress(StreamxError):
            read_all(path, tmp_path / "s")
