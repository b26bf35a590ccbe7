"""Which inputs are found, and what they are called."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from streamx.errors import BadFileError, UsageError
from streamx.store.ingest import open_sources

MATRIX = "%%MatrixMarket matrix coordinate integer general\n%\n2 2 1\n1 1 3\n"


def adata() -> ad.AnnData:
    names = {"obs": pd.DataFrame(index=["c0", "c1"]), "var": pd.DataFrame(index=["g0", "g1"])}
    return ad.AnnData(sparse.csr_matrix(np.array([[3.0, 0], [0, 0]])), **names)


def keys(*inputs: object, tmp_path: Path, **options: object) -> list[str]:
    sources = open_sources(inputs, scratch=tmp_path / "scratch", memory=1 << 20, **options)
    found = [s.key for s in sources]
    for source in sources:
        assert source.read(0, 2).toarray().tolist() == [[3, 0], [0, 0]]
        source.close()
    return found


def run_folder(folder: Path, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}matrix.mtx").write_text(MATRIX)
    (folder / f"{prefix}barcodes.tsv").write_text("c0\nc1\n")
    (folder / f"{prefix}features.tsv").write_text("i0\tg0\tGene Expression\ni1\tg1\tGene Expression\n")
    return folder


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.h5ad", "a.h5ad"):
        adata().write_h5ad(folder / name)
    (folder / "c.csv").write_text(",c0,c1\ng0,3,0\ng1,0,0\n")
    run_folder(folder / "run1")
    (folder / ".hidden.h5ad").write_text("no")
    (folder / "README.md").write_text("no")
    return folder


def test_folder_glob_and_file(many: Path, tmp_path: Path) -> None:
    assert keys(many, tmp_path=tmp_path) == ["a", "b", "c", "run1"]
    assert keys(str(many / "*.h5ad"), tmp_path=tmp_path) == ["a", "b"]
    assert keys(many / "b.h5ad", many / "run1", tmp_path=tmp_path) == ["b", "run1"]
    assert keys(str(many / "**" / "*.mtx"), tmp_path=tmp_path) == ["run1"]


def test_an_input_named_twice_is_read_once(many: Path, tmp_path: Path) -> None:
    assert keys(many / "a.h5ad", str(many / "*.h5ad"), many, tmp_path=tmp_path) == ["a", "b", "c", "run1"]


def test_order_changes_nothing(many: Path, tmp_path: Path) -> None:
    assert keys(many / "run1", many / "b.h5ad", many / "a.h5ad", tmp_path=tmp_path) == ["a", "b", "run1"]


def test_clash_takes_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_folder(tmp_path / name / "filtered_feature_bc_matrix")
    found = keys(str(tmp_path / "*" / "filtered_feature_bc_matrix"), tmp_path=tmp_path)
    assert found == ["one_filtered_feature_bc_matrix", "two_filtered_feature_bc_matrix"]


def test_clash_takes_as_many_folders_as_it_needs(tmp_path: Path) -> None:
    for name in ("x/one", "y/one"):
        (tmp_path / name).mkdir(parents=True)
        adata().write_h5ad(tmp_path / name / "a.h5ad")
    found = keys(str(tmp_path / "*" / "one" / "*.h5ad"), tmp_path=tmp_path)
    assert found == ["x_one_a", "y_one_a"]


def test_several_matrices_in_one_folder(tmp_path: Path) -> None:
    """As GEO gives them: each matrix takes the names with its own prefix."""
    for prefix in ("GSM2_b_", "GSM1_a_"):
        run_folder(tmp_path / "geo", prefix)
    assert keys(tmp_path / "geo", tmp_path=tmp_path) == ["GSM1_a", "GSM2_b"]


def test_objects_and_names(many: Path, tmp_path: Path) -> None:
    one, two = adata(), adata()
    assert keys(one, tmp_path=tmp_path) == ["adata"]
    assert keys(one, two, many / "a.h5ad", tmp_path=tmp_path) == ["a", "adata1", "adata2"]
    sources = open_sources({"q2": one, "q1": many / "a.h5ad"}, scratch=tmp_path, memory=1 << 20)
    assert [s.key for s in sources] == ["q1", "q2"]
    sources[0].close()


@pytest.mark.parametrize("item", [3, None, np.zeros((2, 2))])
def test_what_is_no_input(item: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no input"):
        keys(item, tmp_path=tmp_path)


def test_an_object_without_a_matrix_says_what_it_has(tmp_path: Path) -> None:
    bare = ad.AnnData(obs=adata().obs, var=adata().var)
    with pytest.raises(BadFileError, match="no X; it has no matrix at all"):
        keys(bare, tmp_path=tmp_path)
    bare.layers["counts"] = adata().X
    with pytest.raises(BadFileError, match="no X; it has counts\n"):
        keys(bare, tmp_path=tmp_path)
    assert keys(bare, tmp_path=tmp_path, layer="counts")


def test_a_store_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "streamx.json").write_text("{}")
    with pytest.raises(UsageError, match="streamx store"):
        keys(tmp_path / "store", tmp_path=tmp_path)


def test_checksum_sees_a_changed_byte(many: Path, tmp_path: Path) -> None:
    for item in (many / "a.h5ad", many / "c.csv", many / "run1"):
        (before,) = open_sources([item], scratch=tmp_path, memory=1 << 20)
        first = before.checksum()
        before.close()
        (again,) = open_sources([item], scratch=tmp_path, memory=1 << 20)
        assert again.checksum() == first
        file = item if item.is_file() else item / "matrix.mtx"
        raw = file.read_bytes()
        file.write_bytes(raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])
        assert again.checksum() != first
        again.close()


def test_checksum_of_an_object_is_its_content(tmp_path: Path) -> None:
    def checksum(a: ad.AnnData) -> str:
        return open_sources([a], scratch=tmp_path, memory=1 << 20)[0].checksum()

    plain, other = adata(), adata()
    assert checksum(plain) == checksum(other)
    other.X[0, 0] = 4
    assert checksum(plain) != checksum(other)
    renamed = adata()
    renamed.obs_names = ["c0", "cX"]
    assert checksum(plain) != checksum(renamed)


def test_scratch_is_only_made_when_needed(many: Path, tmp_path: Path) -> None:
    keys(many / "a.h5ad", tmp_path=tmp_path)
    assert not (tmp_path / "scratch").exists()


def test_feature_types(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "multi")
    (folder / "features.tsv").write_text("i0\tg0\tGene Expression\ni1\tCD3\tAntibody Capture\n")
    (rna,) = open_sources([folder], scratch=tmp_path, memory=1 << 20)
    assert list(rna.var_names) == ["g0"]
    assert rna.obsm == {"protein_expression": ["CD3"]}
    assert rna.read(0, 2).toarray().tolist() == [[3], [0]]
    assert rna.read_obsm("protein_expression", 0, 2).tolist() == [[0], [0]]
    (adt,) = open_sources([folder], modality="adt", scratch=tmp_path, memory=1 << 20)
    assert list(adt.var_names) == ["CD3"]
    with pytest.raises(UsageError, match="no feature type 'Peaks'; the file has Gene Expression, Antibody"):
        open_sources([folder], modality="atac", scratch=tmp_path, memory=1 << 20)
