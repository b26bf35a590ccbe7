"""The same data in every format give the same source."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from streamx.store.ingest import Source, check_counts, open_sources
from streamx.store.ingest.table import numbers_in

N_CELLS, N_GENES = 61, 29
MEMORY = 1 << 20


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    x_ng = rng.poisson(0.4, (N_CELLS, N_GENES)).astype(np.float32)
    x_ng[7] = 0  # a cell and a gene without counts
    x_ng[:, 3] = 0
    x_ng[0, 0] = 70_000
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(["b", "a"], N_CELLS)),
            "depth": rng.random(N_CELLS),
            "note": rng.choice(["x", "yß"], N_CELLS),
            "flag": rng.random(N_CELLS) < 0.5,
        },
        index=[f"cell-{i}é" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=["gene, odd", *(f"G{i}" for i in range(1, N_GENES))])
    made = ad.AnnData(sparse.csr_matrix(x_ng), obs=obs, var=var)
    proteins = rng.integers(0, 50, (N_CELLS, 3)).astype(np.float32)
    made.obsm["protein_expression"] = pd.DataFrame(proteins, columns=["CD3", "CD4", "CD8"], index=obs.index)
    return made


def with_x(adata: ad.AnnData, convert: Callable) -> ad.AnnData:
    other = adata.copy()
    other.X = convert(adata.X)
    return other


def logged(adata: ad.AnnData) -> ad.AnnData:
    """Counts in a layer and in raw; X is normalised; raw has one gene more than X."""
    extra = ad.AnnData(
        sparse.csr_matrix((N_CELLS, 1), dtype=np.float32),
        obs=adata.obs[[]],
        var=pd.DataFrame(index=["extra"]),
    )
    raw = ad.concat([adata, extra], axis=1, merge="first")
    other = with_x(adata, lambda x: x.log1p())
    other.raw = raw
    other.layers["counts"] = adata.X.copy()
    return other


def write_tenx_v3(adata: ad.AnnData, path: Path, proteins: bool = False) -> None:
    x_ng = sparse.hstack([adata.X, adata.obsm["protein_expression"].to_numpy()]) if proteins else adata.X
    x_ng = sparse.csr_matrix(x_ng)
    names = [*adata.var_names, *(adata.obsm["protein_expression"].columns if proteins else ())]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array([n.encode() for n in adata.obs_names])
        group["data"], group["indices"], group["indptr"] = (
            x_ng.data.astype(np.int32),
            x_ng.indices,
            x_ng.indptr,
        )
        group["shape"] = np.array(x_ng.shape[::-1])
        group["features/id"] = np.array([f"ENSG{i}".encode() for i in range(len(names))])
        group["features/name"] = np.array([n.encode() for n in names])
        kinds = [b"Gene Expression"] * adata.n_vars + [b"Antibody Capture"] * (len(names) - adata.n_vars)
        group["features/feature_type"] = np.array(kinds)


def write_tenx_v2(adata: ad.AnnData, path: Path, genomes: tuple[str, ...] = ("hg19",)) -> None:
    with h5py.File(path, "w") as file:
        for genome in genomes:
            group = file.create_group(genome)
            group["barcodes"] = np.array([n.encode() for n in adata.obs_names])
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(adata.X, part)
            group["shape"] = np.array(adata.shape[::-1])
            group["genes"] = np.array([f"ENSG{i}".encode() for i in range(adata.n_vars)])
            group["gene_names"] = np.array([n.encode() for n in adata.var_names])


def write_mtx(adata: ad.AnnData, folder: Path, style: str) -> None:
    folder.mkdir(parents=True)
    names = {
        "10x3": "matrix.mtx",
        "10x2": "matrix.mtx",
        "plain": "count_matrix.mtx",
        "GSM": "GSM1_x_matrix.mtx",
    }
    scipy.io.mmwrite(folder / names[style], adata.X.T.astype(np.int64), field="integer")
    genes = [f"ENSG{i}\t{n}" for i, n in enumerate(adata.var_names)]
    if style in ("10x3", "GSM"):
        genes = [f"{line}\tGene Expression" for line in genes]
    prefix = "GSM1_x_" if style == "GSM" else ""
    file = {"10x3": "features.tsv", "10x2": "genes.tsv", "plain": "peaks.txt", "GSM": "GSM1_x_features.tsv"}[
        style
    ]
    (folder / file).write_text("\n".join(genes) + "\n", encoding="utf-8")
    (folder / f"{prefix}barcodes.tsv").write_text("\n".join(adata.obs_names) + "\n", encoding="utf-8")
    if style in ("10x3", "GSM"):
        for plain in list(folder.iterdir()):
            with gzip.open(f"{plain}.gz", "wb") as packed:
                packed.write(plain.read_bytes())
            plain.unlink()


def write_zarr(adata: ad.AnnData, path: Path, version: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's notices about its own next defaults
        ad.settings.zarr_write_format = version
        adata.write_zarr(path)
        ad.settings.reset("zarr_write_format")


def write_legacy(adata: ad.AnnData, path: Path) -> None:
    """anndata 0.6: compound obs and var, categories in uns, sparse groups with h5sparse attributes."""
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", adata.shape
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(adata.X, part)
        fields = [("index", "S16"), ("batch", "i1"), ("depth", "f8"), ("flag", "?")]
        obs = np.zeros(adata.n_obs, dtype=fields)
        obs["index"] = [n.encode() for n in adata.obs_names]
        obs["batch"] = adata.obs["batch"].cat.codes
        for name in ("depth", "flag"):
            obs[name] = adata.obs[name]
        file["obs"] = obs
        file["var"] = np.array([(n.encode(),) for n in adata.var_names], dtype=[("index", "S16")])
        file["uns/batch_categories"] = np.array([c.encode() for c in adata.obs["batch"].cat.categories])


def write_old_categoricals(adata: ad.AnnData, path: Path) -> None:
    """anndata 0.7: codes with a reference to ``__categories``."""
    adata.write_h5ad(path)
    with h5py.File(path, "a") as file:
        codes, names = file["obs/batch/codes"][:], file["obs/batch/categories"][:]
        del file["obs/batch"]
        file["obs/__categories/batch"] = names
        file["obs/batch"] = codes
        file["obs/batch"].attrs["categories"] = file["obs/__categories/batch"].ref
        file["obs"].attrs["encoding-version"] = "0.1.0"


def write_h5mu(adata: ad.AnnData, path: Path, order: np.ndarray | None = None) -> None:
    proteins = adata.obsm["protein_expression"]
    prot = ad.AnnData(
        sparse.csr_matrix(proteins.to_numpy()), obs=adata.obs[[]], var=proteins.columns.to_frame()[[]]
    )
    rna = adata.copy()
    del rna.obsm["protein_expression"]
    if hasattr(mudata, "set_options"):  # before 0.4 it pulls obs columns up, with a warning
        mudata.set_options(pull_on_update=False)
    mdata = mudata.MuData({"rna": rna, "prot": prot if order is None else prot[order].copy()})
    mdata.write(path)


def make(form: str, adata: ad.AnnData, folder: Path) -> tuple[object, dict]:
    path = folder / "input.h5ad"
    options: dict = {}
    item: object = path
    if form in ("csr", "gzip", "memory", "backed"):
        adata.write_h5ad(path, compression="gzip" if form == "gzip" else None)
        item = {"memory": adata, "backed": None}.get(form, path)
        item = ad.read_h5ad(path, backed="r") if form == "backed" else item
    elif form in ("csc", "csc memory", "csc backed"):
        other = with_x(adata, sparse.csc_matrix)
        other.write_h5ad(path)
        item = (
            other
            if form == "csc memory"
            else ad.read_h5ad(path, backed="r")
            if form == "csc backed"
            else path
        )
    elif form in ("dense", "dense memory"):
        other = with_x(adata, lambda x: x.toarray())
        other.write_h5ad(path, compression="gzip")
        item = other if form == "dense memory" else path
    elif form in ("int32", "uint32", "big endian"):
        small = {"int32": "<i4", "uint32": "<u4", "big endian": ">f4"}[form]
        adata.write_h5ad(path)
        with h5py.File(path, "a") as file:
            values = file["X/data"][:]
            del file["X/data"]
            file["X/data"] = values.astype(small)
    elif form.startswith("layer") or form.startswith("raw"):
        other = logged(adata)
        options["layer"] = "counts" if form.startswith("layer") else "raw"
        other.write_h5ad(path)
        item = other if form.endswith("memory") else path
    elif form.startswith("zarr"):
        item = folder / "input.zarr"
        kinds = {"csc": sparse.csc_matrix, "dense": lambda x: x.toarray()}
        write_zarr(with_x(adata, kinds.get(form[6:], lambda x: x)), item, int(form[4]))
    elif form == "unsorted":
        adata.write_h5ad(path)
        with h5py.File(path, "a") as file:
            indptr = file["X/indptr"][:]
            for part in ("indices", "data"):
                values = file[f"X/{part}"][:]
                for a, b in pairwise(indptr):
                    values[a:b] = values[a:b][::-1]
                file[f"X/{part}"][:] = values
    elif form == "legacy":
        write_legacy(adata, path)
    elif form == "old categoricals":
        write_old_categoricals(adata, path)
    elif form.startswith("10x h5"):
        item = folder / "input.h5"
        write_tenx_v2(adata, item) if form.endswith("2") else write_tenx_v3(
            adata, item, form.endswith("protein")
        )
    elif form.startswith("mtx"):
        item = folder / "input"
        write_mtx(adata, item, form.split()[1])
    elif form.startswith("table"):
        item = folder / f"input{form.split()[1]}"
        sep = "," if ".csv" in item.name else "\t"
        frame = pd.DataFrame(adata.X.toarray().T, index=adata.var_names, columns=adata.obs_names).astype(int)
        frame.to_csv(item, sep=sep, quoting=2 if "quoted" in form else 0)
        if "R" in form.split():  # write.table leaves the corner out
            item.write_text(item.read_text(encoding="utf-8").removeprefix(sep), encoding="utf-8")
    elif form.startswith("h5mu"):
        item = folder / "input.h5mu"
        order = np.random.default_rng(1).permutation(N_CELLS) if "shuffled" in form else None
        write_h5mu(adata, item, order)
        options["modality"] = None if "default" in form else "rna"
        if "memory" in form:
            item = mudata.read_h5mu(item)
    return item, options


FORMS = """
csr, gzip, memory, backed, csc, csc memory, csc backed, dense, dense memory, int32, uint32, big endian,
layer, layer memory, raw, raw memory, zarr2, zarr3, zarr2 csc, zarr3 csc, zarr3 dense, unsorted, legacy,
old categoricals, 10x h5 2, 10x h5 3, 10x h5 3 protein, mtx 10x3, mtx 10x2, mtx plain, mtx GSM, table .csv,
table .csv.gz, table .tsv, table .txt R, table .txt.gz, table .csv quoted, h5mu, h5mu default, h5mu shuffled,
h5mu memory
"""


@pytest.mark.parametrize("form", [" ".join(f.split()) for f in FORMS.split(",")])
def test_every_format_gives_the_same(form: str, adata: ad.AnnData, tmp_path: Path) -> None:
    item, options = make(form, adata, tmp_path)
    (source,) = open_sources([item], scratch=tmp_path / "scratch", memory=MEMORY, **options)
    try:
        compare(source, adata, form)
    finally:
        source.close()


def compare(source: Source, adata: ad.AnnData, form: str) -> None:
    assert source.key == ("adata" if form.endswith(("memory", "backed")) else "input")
    assert list(source.obs_names) == list(adata.obs_names)
    assert list(source.obs.index) == list(adata.obs_names)
    expected = adata.X
    names = list(adata.var_names)
    if form.startswith("raw"):
        names = [*names, "extra"]
        expected = sparse.hstack([expected, sparse.csr_matrix((N_CELLS, 1))]).tocsr()
    assert list(source.var_names) == names
    assert (source.n_obs, source.n_vars) == expected.shape
    for start, stop in ((0, N_CELLS), (5, 9), (7, 8), (N_CELLS - 1, N_CELLS), (3, 3), (50, 500)):
        x_ng = source.read(start, stop)
        assert isinstance(x_ng, sparse.csr_matrix)
        part = expected[start : min(stop, N_CELLS)]
        assert x_ng.shape == part.shape
        np.testing.assert_array_equal(x_ng.toarray(), part.toarray())
        assert x_ng.nnz == part.nnz
        check_counts(x_ng, source=source, first_row=start)
        assert sparse.csr_matrix(
            (x_ng.data, x_ng.indices, x_ng.indptr), shape=x_ng.shape
        ).has_canonical_format
        assert x_ng.data.all()
    whole_numbers = ("10x h5 3", "int32", "uint32", "mtx", "table")
    assert (source.read(0, 5).dtype.kind in "iu") == form.startswith(whole_numbers)
    if not form.startswith(("10x", "mtx", "table")):
        assert list(source.obs["batch"]) == list(adata.obs["batch"])
        assert list(source.obs["batch"].cat.categories) == list(adata.obs["batch"].cat.categories)
        np.testing.assert_array_equal(source.obs["depth"], adata.obs["depth"])
        np.testing.assert_array_equal(source.obs["flag"], adata.obs["flag"])
        if form != "legacy":
            assert list(source.obs["note"].astype(object)) == list(adata.obs["note"])
    if not form.startswith(("10x h5 2", "mtx", "table", "legacy")) and form != "10x h5 3":
        proteins = adata.obsm["protein_expression"]
        assert source.obsm == {"protein_expression": list(proteins.columns)}
        np.testing.assert_array_equal(
            source.read_obsm("protein_expression", 4, 40), proteins.to_numpy()[4:40]
        )
    assert source.checksum() == source.checksum()


def test_threads_read_the_same(adata: ad.AnnData, tmp_path: Path) -> None:
    for form in ("csr", "csc", "zarr3", "table .csv"):
        folder = tmp_path / form.split()[0]
        folder.mkdir()
        item, _ = make(form, adata, folder)
        (source,) = open_sources([item], scratch=folder / "scratch", memory=MEMORY)
        with ThreadPoolExecutor(8) as pool:
            blocks = list(pool.map(lambda at, s=source: s.read(at, at + 4), range(0, N_CELLS, 4)))
        assert (sparse.vstack(blocks) != adata.X).nnz == 0
        source.close()


def test_reading_does_not_touch_an_object(tmp_path: Path) -> None:
    """Unsorted indices and explicit zeros of the user's object stay as they are."""
    x_ng = sparse.csr_matrix(
        (np.array([1.0, 0.0, 2.0]), np.array([2, 0, 1]), np.array([0, 2, 3])), shape=(2, 3)
    )
    (source,) = open_sources([ad.AnnData(x_ng.copy())], scratch=tmp_path, memory=MEMORY)
    assert source.read(0, 2).toarray().tolist() == [[0, 0, 1], [0, 2, 0]]
    assert x_ng.indices.tolist() == [2, 0, 1]
    assert x_ng.data.tolist() == [1, 0, 2]


def test_cells_without_proteins_are_nan(adata: ad.AnnData, tmp_path: Path) -> None:
    write_h5mu(adata, tmp_path / "some.h5mu", order=np.arange(5, 30))
    (source,) = open_sources([tmp_path / "some.h5mu"], modality="rna", scratch=tmp_path, memory=MEMORY)
    values = source.read_obsm("protein_expression", 0, N_CELLS)
    assert np.isnan(values[:5]).all()
    assert np.isnan(values[30:]).all()
    np.testing.assert_array_equal(values[5:30], adata.obsm["protein_expression"].to_numpy()[5:30])
    (prot,) = open_sources([tmp_path / "some.h5mu" / "prot"], scratch=tmp_path, memory=MEMORY)
    assert (prot.n_obs, prot.n_vars) == (25, 3)
    assert prot.obsm == {}


def test_real_files(data_dir: Path, tmp_path: Path) -> None:
    sources = open_sources([data_dir / "pbmc"], scratch=tmp_path, memory=1 << 28)
    assert [s.key for s in sources] == sorted(p.stem for p in (data_dir / "pbmc").glob("*.h5ad"))
    for source in sources:
        x_ng = source.read(100, 300)
        check_counts(x_ng, source=source, first_row=100)
        assert (x_ng != ad.read_h5ad(source.location)[100:300].X).nnz == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["0", "7", "12", "3.5", "-1", "1e3", "0.0", "", " ", "x", "1 2", "nan", "inf", "+4", "1,5"]
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([",", "\t"]),
)
def test_numbers_of_a_text(fields: list[str], sep: str) -> None:
    """The quick parser reads what Python's float reads, and nothing else."""
    if sep == ",":
        fields = [f for f in fields if "," not in f] or ["1"]
    try:
        expected = [float(f) for f in fields]
    except ValueError:
        expected = None
    got = numbers_in(sep.join(fields).encode(), sep.encode())
    if expected is None:
        assert len(got) != len(fields)
    else:
        np.testing.assert_array_equal(got, expected)
