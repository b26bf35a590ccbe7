"""SCALEX's one call: its signature, its output files, its spellings, and what each argument does."""

from __future__ import annotations

import gc
import inspect
import shlex
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from scipy import sparse

import streamx.integrate
from streamx.cli.main import main, make_parser
from streamx.cli.verb import given
from streamx.config import IntegrateConfig
from streamx.demo import DATA
from streamx.errors import BatchError, UsageError
from streamx.integrate import SCALEX, result
from streamx.interop.scalex import read_checkpoint

DOCUMENTED = {
    "data_list": None,
    "batch_categories": None,
    "profile": "RNA",
    "batch_name": "batch",
    "min_features": 600,
    "min_cells": 3,
    "target_sum": None,
    "n_top_features": None,
    "join": "inner",
    "batch_key": "batch",
    "processed": False,
    "fraction": None,
    "n_obs": None,
    "use_layer": "X",
    "backed": False,
    "batch_size": 64,
    "lr": 2e-4,
    "max_iteration": 30_000,
    "seed": 124,
    "gpu": 0,
    "outdir": None,
    "projection": None,
    "repeat": False,
    "impute": None,
    "chunk_size": 20_000,
    "ignore_umap": False,
    "verbose": False,
    "assess": False,
    "show": True,
    "eval": False,
    "num_workers": 4,
}
FAST: dict[str, Any] = {"max_iteration": 8, "n_top_features": 200, "show": False, "ignore_umap": True}
PLATES = ["sc_celseq2_5cl_p2", "sc_celseq2_5cl_p1"]  # not sorted, on purpose


def small(name: str, step: int = 3) -> anndata.AnnData:
    """Every third cell of a batch, its counts in X."""
    adata = anndata.read_h5ad(DATA / f"{name}.h5ad")[::step].copy()
    adata.X = sparse.csr_matrix(adata.X.astype(np.float32))
    return adata


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plates")
    for name in [*PLATES, "sc_dropseq"]:
        small(name, 1 if name == "sc_dropseq" else 3).write_h5ad(folder / f"{name}.h5ad")
    return [str(folder / f"{name}.h5ad") for name in [*PLATES, "sc_dropseq"]]


@pytest.fixture(scope="module")
def reference(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[anndata.AnnData, Path]:
    folder = tmp_path_factory.mktemp("reference")
    settings = FAST | {"ignore_umap": False, "assess": True, "impute": "two"}
    return SCALEX(files[:2], batch_categories=["two", "one"], outdir=str(folder), **settings), folder


def test_sx01_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(SCALEX).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == DOCUMENTED
    assert list(parameters) == list(DOCUMENTED)


def test_reference(reference: tuple[anndata.AnnData, Path]) -> None:
    adata, _ = reference
    names = [name for plate in PLATES for name in small(plate).obs_names]
    assert list(adata.obs_names) == names  # the order of the input, file after file
    assert list(adata.obs["batch"].unique()) == ["two", "one"]
    assert adata.obsm["latent"].shape == (len(names), 10)
    assert np.isfinite(adata.obsm["latent"]).all()
    assert adata.X.max() == pytest.approx(1)
    assert adata.X.min() == 0
    assert adata.n_vars == 200
    assert np.array_equal(adata.obsm["X_umap"], adata.obsm["X_scalex_umap"])
    assert adata.obs["leiden"].cat.categories[0] == "0"
    assert adata.obs["leiden"].value_counts().idxmax() == "0"
    assert adata.layers["impute"].shape == adata.shape
    assert 0 <= adata.layers["impute"].min() <= adata.layers["impute"].max() <= 1
    assert 0 <= adata.uns["scalex"]["batch_entropy_mixing_score"] <= np.log(2) + 1e-6
    assert set(adata.obs) == {"cell_line", "batch", "leiden"}


def test_output_files(reference: tuple[anndata.AnnData, Path]) -> None:
    adata, folder = reference
    assert (folder / "umap.png").stat().st_size > 5_000
    assert "batch_entropy_mixing_score" in (folder / "log.txt").read_text()
    module, genes = read_checkpoint(folder)
    assert genes == list(adata.var_names)
    assert module.n_batches == 2
    written = anndata.read_h5ad(folder / "adata.h5ad")
    assert np.array_equal(written.obsm["latent"], adata.obsm["latent"])
    assert list(written.obs_names) == list(adata.obs_names)


def test_sx18_projection(reference: tuple[anndata.AnnData, Path], files: list[str], tmp_path: Path) -> None:
    before, home = reference
    call: dict[str, Any] = {"projection": str(home), "show": False, "ignore_umap": True}
    both = SCALEX(files[2], batch_categories=["one"], outdir=str(tmp_path), **call)
    assert list(both.obs["projection"].value_counts().items()) == [("query", 225), ("reference", 202)]
    assert list(both.var_names) == list(before.var_names)
    assert np.array_equal(both.obsm["latent"][:202], before.obsm["latent"])
    # a query batch called like a reference batch is not that batch
    assert set(both.obs["batch"].unique()) == {"two", "one", "one (query)"}
    alone = SCALEX(files[2], repeat=True, **call)
    assert alone.n_obs == 225
    assert np.array_equal(alone.obsm["latent"], both.obsm["latent"][202:])


def test_running_statistics(
    reference: tuple[anndata.AnnData, Path], files: list[str], tmp_path: Path
) -> None:
    home = str(reference[1])
    call: dict[str, Any] = {"projection": home, "repeat": True, "show": False, "ignore_umap": True}
    own, running = SCALEX(files[2], **call), SCALEX(files[2], eval=True, **call)
    assert not np.allclose(own.obsm["latent"], running.obsm["latent"])


def test_few_cells_take_the_reference_statistics(reference: tuple[anndata.AnnData, Path]) -> None:
    home = str(reference[1])
    call: dict[str, Any] = {"projection": home, "repeat": True, "show": False, "ignore_umap": True}
    few = small("sc_dropseq", 20)
    with pytest.warns(UserWarning, match="fewer than 200 cells"):
        own = SCALEX(few, **call)
    assert np.array_equal(own.obsm["latent"], SCALEX(few, eval=True, **call).obsm["latent"])


def test_batches_from_obs(files: list[str]) -> None:
    adata = anndata.concat([small(name, 6) for name in PLATES], label="plate", keys=["x", "y"])
    assert list(SCALEX(adata, batch_name="plate", **FAST).obs["batch"].unique()) == ["x", "y"]
    with pytest.raises(BatchError, match="cell_line"):
        SCALEX(files[:2], batch_name="mistyped", **FAST)
    assert list(SCALEX(adata, **FAST).obs["batch"].unique()) == ["0"]  # no column: all cells one batch


def test_a_share_of_the_cells(files: list[str]) -> None:
    everything = small(PLATES[0]).n_obs + small(PLATES[1]).n_obs
    assert SCALEX(files[:2], fraction=0.5, **FAST).n_obs == round(everything / 2)
    some = SCALEX(files[:2], n_obs=100, **FAST)
    assert some.n_obs == 100
    assert "sampled" not in some.obs
    with pytest.raises(UsageError, match="100,000"):
        SCALEX(files[:2], n_obs=100_000, **FAST)


def test_listed_features(files: list[str], tmp_path: Path) -> None:
    names = [*small(PLATES[0]).var_names[[5, 3, 8]], "not_measured"]
    settings = FAST | {"n_top_features": names}
    with pytest.warns(UserWarning, match="not_measured"):
        adata = SCALEX(files[:2], **settings)
    assert list(adata.var_names) == names
    (tmp_path / "genes.txt").write_text("\n".join(names[:3]))
    assert (
        list(SCALEX(files[:2], **FAST | {"n_top_features": str(tmp_path / "genes.txt")}).var_names)
        == names[:3]
    )
    with pytest.raises(UsageError, match="n_top_features"):
        SCALEX(files[:2], **FAST | {"n_top_features": "absent.txt"})


def test_a_layer_or_obsm_is_only_scaled() -> None:
    adata = small(PLATES[0])
    adata.layers["half"] = sparse.csr_matrix(adata.X / 2)
    adata.obsm["few"] = adata.X[:, :40].toarray() / 3
    layer = SCALEX(adata, use_layer="half", **FAST | {"n_top_features": None})
    expected = adata.X.toarray() / np.maximum(adata.X.toarray().max(axis=0), 1e-9)
    assert np.allclose(
        layer.X.toarray(), expected[:, adata.var_names.get_indexer(layer.var_names)], atol=1e-6
    )
    obsm = SCALEX(adata, use_layer="few", **FAST | {"n_top_features": None})
    assert obsm.n_vars == 40
    assert np.allclose(obsm.X.toarray(), expected[:, :40], atol=1e-6)


def test_what_does_not_fit_stays_on_disk(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_enough = SCALEX(files[:2], impute="0", **FAST)
    monkeypatch.setattr(result, "IN_MEMORY", 0)
    lazy = SCALEX(files[:2], impute="0", outdir=str(tmp_path), **FAST)
    assert type(lazy.X).__module__.startswith("dask")
    order = lazy.obs_names.get_indexer(small_enough.obs_names)
    x, imputed = lazy.X.compute(), lazy.layers["impute"].compute()
    assert np.array_equal(x[order].toarray(), small_enough.X.toarray())
    assert np.allclose(imputed[order], small_enough.layers["impute"], atol=1e-6)
    written = anndata.read_h5ad(tmp_path / "adata.h5ad")
    assert np.array_equal(written.X.toarray(), x.toarray())


def test_without_a_folder_what_is_on_disk_lasts_as_long_as_the_cells(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    in_memory = SCALEX(files[:2], **FAST)
    assert not list(tmp_path.glob("streamx-*"))
    monkeypatch.setattr(result, "IN_MEMORY", 0)
    lazy = SCALEX(files[:2], **FAST)
    order = lazy.obs_names.get_indexer(in_memory.obs_names)
    assert np.array_equal(lazy.X.compute()[order].toarray(), in_memory.X.toarray())
    del lazy
    gc.collect()
    assert not list(tmp_path.glob("streamx-*"))


def test_as_many_names_as_files(files: list[str]) -> None:
    with pytest.raises(UsageError, match="2 files"):
        SCALEX(files[:2], batch_categories=["one"])


def test_what_can_not_be_is_refused_at_once(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="fix: batch_name with one of: "):
        SCALEX(files, batch_name="nope", outdir=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="max_iteration = 0"):
        SCALEX(files, max_iteration=0, outdir=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "model.json").touch()
    with pytest.raises(UsageError, match="holds a store, view or model"):
        SCALEX(files, outdir=str(tmp_path))


SPELLINGS = [
    ("-d a b -b x y -o out -p ref -g 1", {"batch_categories": ("x", "y"), "outdir": "out", "gpu": 1}),
    ("a b --batch_categories x y --batch_name donor", {"batch_name": "donor"}),
    ("--data_list a --min_cell 2 --min_gene 5 --n_top_genes 7", {"min_cells": 2, "min_features": 5}),
    ("a --min_cells 2 --min_features 5 --n_top_features 7", {"min_cells": 2, "n_top_features": "7"}),
    ("a --min-cells 2 --target-sum 1e3 --eval", {"min_cells": 2, "target_sum": 1_000.0, "eval": True}),
    ("a -c old --repeat --ignore_umap --assess", {"projection": "old", "repeat": True, "assess": True}),
    ("a --checkpoint old --impute x --chunk_size 9", {"projection": "old", "impute": "x", "chunk_size": 9}),
    ("a --batch_key study --join outer --processed", {"batch_key": "study", "join": "outer"}),
    ("a --lr 1e-3 --batch_size 32 --seed 1 --max_iteration 10", {"lr": 1e-3, "batch_size": 32, "seed": 1}),
]


@pytest.mark.parametrize(("line", "expected"), SPELLINGS)
@pytest.mark.parametrize("verb", ["integrate", "scalex"])
def test_spellings(verb: str, line: str, expected: dict[str, Any]) -> None:
    settings = given(make_parser().parse_args([verb, *shlex.split(line)]), IntegrateConfig)
    assert expected.items() <= settings.items()


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []

    def fake(data: list[str], **settings: Any) -> anndata.AnnData:
        calls.append((data, settings))
        return anndata.AnnData(np.zeros((3, 2)), obs={"batch": ["a", "a", "b"]})

    monkeypatch.setattr(streamx.integrate, "SCALEX", fake)
    assert main(["scalex", "one.h5ad", "-d", "two.h5ad", "--batch_name", "donor", "--json"]) == 0
    data, settings = calls[0]
    assert data == ["one.h5ad", "two.h5ad"]
    assert settings == {"outdir": "output/", "show": False, "min_features": None, "batch_name": "donor"}
    assert '"n_batches": 2' in capsys.readouterr().out
    assert main(["integrate"]) == 2
