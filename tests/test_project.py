import json
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from views import make_counts, write_view

from streamx.errors import (
    BadFileError,
    BadValuesError,
    BatchError,
    EmptyError,
    GeneError,
    ResourceError,
    SettingsChangedError,
    StorageError,
    StreamxWarning,
    UsageError,
)
from streamx.interop.scalex import write_checkpoint
from streamx.project import project
from streamx.train.model import Model, load_model
from streamx.train.run import train

N_GENES = 40
EXTRA = ["MT-CO1", "OTHER1", "OTHER2"]
QUIET: dict[str, Any] = {"progress": False, "min_query_cells": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("project")
    view = write_view(folder / "view", [200, 120])
    train(view, folder / "model", max_iteration=30, n_hidden=16, progress=False, threads=1)
    return load_model(folder / "model")


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """A query: the model's genes and three more, two batches; every tenth cell has two genes only."""
    x, batch, types = make_counts([150, 90], N_GENES, seed=5)
    rng = np.random.default_rng(6)
    x = x.toarray()
    x[::10] = 0
    x[::10, :2] = 3
    x = np.concatenate([x, rng.poisson(2, (240, 3))], axis=1)
    x[::10, 40:] = 0
    obs = pd.DataFrame(
        {"batch": [f"batch{b}" for b in batch], "type": types.astype(str), "n": np.arange(240)},
        index=[f"q{i}" for i in range(240)],
    )
    var = pd.DataFrame(index=[f"GENE{g}" for g in range(N_GENES)] + EXTRA)
    return anndata.AnnData(sparse.csr_matrix(x.astype(np.float32)), obs=obs, var=var)


def read(folder: Path, name: str = "q") -> anndata.AnnData:
    return anndata.read_zarr(folder / f"{name}.zarr")


def mapped(model: Model, cells: Any, folder: Path, **settings: Any) -> np.ndarray:
    project(model, {"q": cells}, folder, **QUIET | settings)
    return np.asarray(read(folder).obsm["X_scalex"])


def expected(
    model: Model,
    cells: anndata.AnnData,
    norm: str,
    scale: str,
    batch: np.ndarray,
    small: tuple[int, ...] = (),
) -> np.ndarray:
    """The same by plain dense arithmetic over all cells at once; every tenth cell does not pass."""
    x = cells.X.toarray().astype(np.float64)
    passed = (x[:, [*range(40), 41, 42]] > 0).sum(1) >= 5
    total = x[:, [*range(40), 41, 42]].sum(1)
    y = np.log1p(x[:, :40] * (1e4 / np.maximum(total, 1))[:, None])[passed]
    batch = batch[passed]
    pooled = model.pooled_scale_g
    table = np.stack(
        [y[batch == b].max(0) if scale == "query" and b not in small else pooled for b in np.unique(batch)]
    )
    y = y / np.where(table == 0, 1, table)[batch]
    encoder = model.module.encoder
    with torch.no_grad():
        pre = encoder.hidden(torch.as_tensor(y, dtype=torch.float32))
        h = encoder.norm(pre)
        for b in np.unique(batch):
            if norm == "domain" and b not in small:
                rows = torch.as_tensor(batch == b)
                h[rows] = torch.nn.functional.batch_norm(
                    pre[rows], None, None, encoder.norm.weight, encoder.norm.bias, True
                )
        z = np.full((len(x), 10), np.nan, np.float32)
        z[passed] = encoder.mean(torch.relu(h)).numpy()
    return z


@pytest.mark.parametrize("norm", ["running", "domain"])
@pytest.mark.parametrize("scale", ["reference", "query"])
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_equals_plain_arithmetic(
    model: Model, cells: anndata.AnnData, tmp_path: Path, norm: str, scale: str, batch_key: str | None
) -> None:
    batch = np.repeat([0, 1], [150, 90]) if batch_key else np.zeros(240, int)
    want = expected(model, cells, norm, scale, batch)
    got = mapped(model, cells, tmp_path, norm=norm, scale=scale, batch_key=batch_key)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert got.dtype == np.float32
    small_blocks = mapped(
        model, cells, tmp_path / "2", norm=norm, scale=scale, batch_key=batch_key, memory="100kB"
    )
    np.testing.assert_allclose(small_blocks, got, atol=1e-6)


def test_the_original_norm(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    z = mapped(model, cells, tmp_path, norm="minibatch")
    want = expected(model, cells, "domain", "reference", np.zeros(240, int))
    passed = ~np.isnan(want[:, 0])
    assert np.array_equal(~np.isnan(z[:, 0]), passed)
    assert np.corrcoef(z[passed].ravel(), want[passed].ravel())[0, 1] > 0.9
    assert np.array_equal(z, mapped(model, cells, tmp_path / "2", norm="minibatch"), equal_nan=True)
    with pytest.raises(ResourceError, match="--norm domain"):
        mapped(model, cells, tmp_path / "3", norm="minibatch", memory="20kB")


@pytest.mark.parametrize("name", ["view", "model"])
def test_a_folder_of_another_kind_is_left_alone(model: Model, cells: anndata.AnnData, name: str) -> None:
    with pytest.raises(UsageError, match="holds a store, view or model"):
        project(model, cells, model.path.parent / name, **QUIET)


def test_small_batches_take_the_reference_statistics(
    model: Model, cells: anndata.AnnData, tmp_path: Path
) -> None:
    batch = np.repeat([0, 1], [150, 90])
    settings: dict[str, Any] = {
        "norm": "domain",
        "scale": "query",
        "batch_key": "batch",
        "min_query_cells": 100,
    }
    with pytest.warns(StreamxWarning, match=r"1 of 2 batches have fewer than 100 cells: batch1 \(81\)"):
        got = mapped(model, cells, tmp_path, **settings)
    np.testing.assert_allclose(got, expected(model, cells, "domain", "query", batch, small=(1,)), atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StreamxWarning)
        mapped(model, cells, tmp_path / "running", norm="running", min_query_cells=100)


def test_what_is_written(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    [report] = project(model, {"q": cells}, tmp_path, **QUIET)
    assert report == {
        "name": "q",
        "path": str(tmp_path / "q.zarr"),
        "n_cells": 240,
        "gene_overlap": 1.0,
        "n_genes_found": 40,
        "status": "done",
        "n_passed": 216,
        "reference_statistics": [],
    }
    adata = read(tmp_path)
    assert adata.obs_names.tolist() == cells.obs_names.tolist()
    assert adata.obs["n"].tolist() == list(range(240))
    assert adata.obs["type"].tolist() == cells.obs["type"].tolist()
    failed = np.arange(240) % 10 == 0
    assert np.array_equal(adata.obs["passed_qc"], ~failed)
    assert np.isnan(adata.obsm["X_scalex"][failed]).all()
    assert np.isfinite(adata.obsm["X_scalex"][~failed]).all()
    assert adata.uns["streamx"]["model"] == model.id
    assert adata.uns["streamx"]["norm"] == "matched"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.zarr"]


def test_filtered_cells_can_be_left_out(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    z = mapped(model, cells, tmp_path / "all")
    kept = mapped(model, cells, tmp_path / "kept", drop_filtered=True)
    assert np.array_equal(kept, z[~np.isnan(z[:, 0])])
    assert read(tmp_path / "kept").obs["passed_qc"].all()


def test_cells_that_fail_affect_nothing(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    good = np.arange(240) % 10 != 0
    for norm in ("running", "domain", "matched"):
        everything = mapped(model, cells, tmp_path / f"{norm}1", norm=norm, scale="query")
        alone = mapped(model, cells[good].copy(), tmp_path / f"{norm}2", norm=norm, scale="query")
        np.testing.assert_allclose(everything[good], alone, atol=1e-6)


def test_gene_order_and_foreign_genes_change_nothing(
    model: Model, cells: anndata.AnnData, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    z = mapped(model, cells, tmp_path / "1")
    assert np.array_equal(
        z, mapped(model, cells[:, rng.permutation(43)].copy(), tmp_path / "2"), equal_nan=True
    )


def test_sa24_missing_genes_are_zero_and_reported(
    model: Model, cells: anndata.AnnData, tmp_path: Path
) -> None:
    without = cells.copy()
    x = without.X.toarray()
    x[:, 30:40] = 0
    without.X = sparse.csr_matrix(x)
    lacking = without[:, [*range(30), 40, 41, 42]].copy()
    with pytest.warns(StreamxWarning, match=r"30 of 40 genes found \(75%\)"):
        [report] = project(model, {"q": lacking}, tmp_path / "1", **QUIET)
    assert (report["gene_overlap"], report["n_genes_found"]) == (0.75, 30)
    assert read(tmp_path / "1").uns["streamx"]["missing_genes"].tolist() == [
        f"GENE{g}" for g in range(30, 40)
    ]
    z = np.asarray(read(tmp_path / "1").obsm["X_scalex"])
    assert np.array_equal(z, mapped(model, without, tmp_path / "2"), equal_nan=True)
    with pytest.raises(GeneError, match="at least 50% are needed"):
        project(model, {"q": cells[:, :19].copy()}, tmp_path / "3", **QUIET)
    mouse = cells.copy()
    mouse.var_names = [name.capitalize() for name in mouse.var_names]
    with pytest.raises(GeneError, match="wrong organism"):
        project(model, {"q": mouse}, tmp_path / "4", **QUIET)


@pytest.mark.parametrize("norm", ["running", "domain", "matched"])
def test_several_files_as_one_query(model: Model, cells: anndata.AnnData, tmp_path: Path, norm: str) -> None:
    for name, rows in (("a", slice(0, 100)), ("b", slice(100, 101)), ("c", slice(101, 240))):
        cells[rows].copy().write_h5ad(tmp_path / f"{name}.h5ad")
    whole = mapped(model, cells, tmp_path / "whole", norm=norm, scale="query")
    orders = (["a", "b", "c"], ["c", "a", "b"])
    for number, order in enumerate(orders):
        files = [f"q={tmp_path / name}.h5ad" for name in order]
        [report] = project(model, files, tmp_path / str(number), norm=norm, scale="query", **QUIET)
        adata = read(tmp_path / str(number))
        assert report["n_cells"] == 240
        assert adata.obs_names.tolist() == cells.obs_names.tolist()
        assert adata.obs["_streamx_file"].value_counts().to_dict() == {"c": 139, "a": 100, "b": 1}
        np.testing.assert_allclose(adata.obsm["X_scalex"], whole, atol=1e-6)


def test_names_of_queries(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "one.h5ad")
    cells[:50].copy().write_h5ad(tmp_path / "two.h5ad")
    reports = project(
        model, [str(tmp_path / "*.h5ad"), f"three={tmp_path}/two.h5ad"], tmp_path / "o", **QUIET
    )
    assert [r["name"] for r in reports] == ["one", "two", "three"]
    [report] = project(model, cells, tmp_path / "p", **QUIET)
    assert report["name"] == "adata"
    for wrong, message in (
        ({"../evil": cells}, "can't be called"),
        ({".hidden": cells}, "can't be called"),
        ([str(tmp_path / "one.h5ad"), f"one={tmp_path}/two.h5ad"], "two queries are called 'one'"),
        ([str(tmp_path / "none.h5ad")], "no such file"),
        ([], "no query"),
    ):
        with pytest.raises(UsageError, match=message):
            project(model, wrong, tmp_path / "o", **QUIET)


def test_the_name_of_a_batch_never_stands_for_one_of_the_reference(
    model: Model, cells: anndata.AnnData, tmp_path: Path
) -> None:
    other = cells.copy()
    other.obs["batch"] = [f"new_{name}" for name in other.obs["batch"]]
    for norm in ("running", "domain", "matched"):
        for scale in ("reference", "query"):
            settings: dict[str, Any] = {"norm": norm, "scale": scale, "batch_key": "batch"}
            a = mapped(model, cells, tmp_path / f"{norm}{scale}1", **settings)
            b = mapped(model, other, tmp_path / f"{norm}{scale}2", **settings)
            assert np.array_equal(a, b, equal_nan=True)


def test_run_again(
    model: Model, cells: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells.write_h5ad(tmp_path / "one.h5ad")
    cells[:99].copy().write_h5ad(tmp_path / "two.h5ad")
    files = [str(tmp_path / "one.h5ad"), str(tmp_path / "two.h5ad")]
    out = tmp_path / "out"
    first = project(model, files[:1], out, **QUIET)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    again = project(model, files, out, **QUIET)
    assert [r["status"] for r in again] == ["skipped", "done"]
    assert again[0] | {"status": "done"} == first[0]
    assert all(p.read_bytes() == data for p, data in before.items())
    assert project(model, files, out, memory="1GB", **QUIET)[1]["status"] == "skipped"
    with pytest.raises(SettingsChangedError, match=r"another settings\.norm: \"matched\" -> \"domain\""):
        project(model, files, out, norm="domain", **QUIET)
    cells[:98].copy().write_h5ad(tmp_path / "two.h5ad")
    with pytest.raises(SettingsChangedError, match=r"another inputs\.two"):
        project(model, files, out, **QUIET)
    (out / "two.zarr" / "uns" / "streamx" / "fingerprint" / "zarr.json").unlink()
    with pytest.raises(SettingsChangedError, match="not what this would write"):
        project(model, files, out, **QUIET)


def test_killed_at_every_write(
    model: Model, cells: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamx.store.folder import Folder

    class Killed(BaseException):
        pass

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    project(model, {"q": cells}, tmp_path / "whole", **QUIET)
    write, left = Folder.write, 0

    def mortal(self: Folder, key: str, data: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        write(self, key, data)

    for at in range(0, 30, 4):
        left = at
        monkeypatch.setattr(Folder, "write", mortal)
        out = tmp_path / f"out{at}"
        with pytest.raises(Killed):
            project(model, {"q": cells}, out, **QUIET)
        assert not (out / "q.zarr").exists()
        monkeypatch.undo()
        assert project(model, {"q": cells}, out, **QUIET)[0]["status"] == "done"
        assert contents(out) == contents(tmp_path / "whole")


def test_broken_queries(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "good.h5ad")
    (tmp_path / "bad.h5ad").write_bytes(b"\x89HDF broken")
    logged = cells.copy()
    logged.X = logged.X.log1p()
    logged.write_h5ad(tmp_path / "logged.h5ad")
    files = [str(tmp_path / f"{name}.h5ad") for name in ("bad", "good", "logged")]
    with pytest.raises(BadFileError):
        project(model, files, tmp_path / "out", **QUIET)
    with pytest.raises(BadValuesError, match="not an integer"):
        project(model, files[2:], tmp_path / "out", **QUIET)
    reports = project(model, files, tmp_path / "out", on_error="skip", **QUIET)
    assert [r["status"] for r in reports] == ["failed", "done", "failed"]
    assert "logged.h5ad" in reports[2]["error"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project(model, files[2:], tmp_path / "out", allow_float=True, **QUIET)


def test_a_file_where_the_folder_is_to_be(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match=r"out: can't be written: .*\n  fix: choose another place"):
        project(model, {"a": cells}, tmp_path / "out", **QUIET)
    assert (tmp_path / "out").read_text() == "mine"


def test_filters(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    with pytest.raises(
        EmptyError, match=r"none of 240 cells has 600 detected features.*\n  fix: --min-features \d+"
    ):
        mapped(model, cells, tmp_path / "1", min_features=600)
    assert np.isfinite(mapped(model, cells, tmp_path / "2", min_features=0)).all()
    with pytest.warns(StreamxWarning, match="without a latent"):
        mapped(model, cells, tmp_path / "3", min_features=12)


def test_batch_column(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    with pytest.raises(
        BatchError, match=r"no obs column 'donor'\n  fix: --batch-key with one of: batch, type, n"
    ):
        mapped(model, cells, tmp_path, batch_key="donor")
    some = cells.copy()
    some.obs.loc["q7", "batch"] = None
    with pytest.raises(BatchError, match="1 cells have no batch in 'batch', the first is 'q7'"):
        mapped(model, some, tmp_path, batch_key="batch")


def test_duplicates(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    twice = cells.copy()
    twice.var_names = [*twice.var_names[:-1], "OTHER1"]
    with pytest.raises(GeneError, match="duplicate-genes"):
        mapped(model, twice, tmp_path / "1")
    summed = mapped(model, twice, tmp_path / "2", duplicate_genes="sum")
    assert np.isfinite(summed).any()
    named = cells.copy()
    named.obs_names = ["cell"] * 240
    mapped(model, named, tmp_path / "3")
    adata = read(tmp_path / "3")
    assert adata.obs_names.is_unique
    assert set(adata.obs["_streamx_name"]) == {"cell"}


def test_a_checkpoint_of_scalex(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "scalex" / "checkpoint", model.module, list(model.genes))
    with pytest.raises(UsageError, match="--scale query"):
        project(tmp_path / "scalex", {"q": cells}, tmp_path / "out", min_features=5, **QUIET)
    with pytest.raises(UsageError, match="--norm minibatch"):
        project(tmp_path / "scalex", {"q": cells}, tmp_path / "out", scale="query", norm="matched", **QUIET)
    for norm, ours in (("running", "running"), ("domain", "domain"), (None, "minibatch")):
        out = tmp_path / str(norm)
        project(tmp_path / "scalex", {"q": cells}, out, min_features=5, scale="query", norm=norm, **QUIET)
        same = mapped(model, cells, tmp_path / f"ours-{ours}", scale="query", norm=ours)
        assert np.array_equal(read(out).obsm["X_scalex"], same, equal_nan=True)


def test_the_report_is_json(model: Model, cells: anndata.AnnData, tmp_path: Path) -> None:
    json.dumps(project(model, {"q": cells}, tmp_path, **QUIET))
