"""The whole way by command lines, on the demo's cells: the JSON keys that other programs rely on."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamx.cli.demo import command_lines
from streamx.cli.main import main, make_parser
from streamx.demo import DATA, QUERY


def streamx(*argv: str | Path, code: int = 0) -> dict[str, Any]:
    """The one JSON object that a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, argv), "--json"]) == code
    assert out.getvalue().count("\n") == 1
    result = json.loads(out.getvalue())
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def demo(needs_torch: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The whole demo, seed 0: where it worked, what it printed."""
    folder = tmp_path_factory.mktemp("path") / "demo"
    return folder, streamx("demo", "-o", folder)


@pytest.fixture(scope="module")
def folder(demo: tuple[Path, dict[str, Any]]) -> Path:
    return demo[0]


def finds_the_genotypes(result: dict[str, Any]) -> bool:
    drawn = [Path(figure).stat().st_size > 1_000 for figure in result["figures"]]
    return result["accuracy"] >= 0.9 and result["metrics"]["batch_entropy_mixing"] > 0.4 and all(drawn)


def test_demo_finds_the_genotypes(demo: tuple[Path, dict[str, Any]]) -> None:
    assert finds_the_genotypes(demo[1])
    assert demo[1]["seed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_demo_with_other_seeds(seed: int, tmp_path: Path) -> None:
    assert finds_the_genotypes(streamx("demo", "-o", tmp_path / "demo", "--seed", str(seed)))


def test_convert_again_changes_nothing(folder: Path) -> None:
    result = streamx("convert", DATA / "sc_celseq2*.h5ad", "-o", folder / "store")
    assert result["n_cells"] == 1_183
    assert result["n_genes"] == 5_000
    assert result["n_batches"] == 4
    assert result["n_shards"] == 1
    assert result["nnz"] > 3_000_000
    assert result["bytes_per_cell"] == pytest.approx(result["bytes"] / 1_183, abs=0.1)
    assert result["generation"] == 1
    assert result["seconds"] > 0
    assert result["peak_rss_bytes"] > 10_000_000


def test_info(folder: Path) -> None:
    store, view, model = (streamx("info", folder / name) for name in ("store", "view", "model-0"))
    assert [part["kind"] for part in (store, view, model)] == ["store", "view", "model"]
    assert store["n_cells"] == view["n_cells"] == model["n_cells"] == 1_183
    assert view["store_generation"] == view["store_generation_now"] == 1
    assert view["n_genes"] == model["n_genes"] == 2_000


def test_verify(folder: Path) -> None:
    for name in ("store", "view"):
        result = streamx("verify", folder / name)
        assert result["ok"] is True
        assert result["objects"] > 10
        assert result["errors"] == []


def test_verify_of_a_model(folder: Path, tmp_path: Path) -> None:
    assert streamx("verify", folder / "model-0") == {"ok": True, "objects": 4, "errors": []}
    model = tmp_path / "model"
    for key in ("model.json", "model.safetensors", "history.csv", "reference.zarr/obsm/X_scalex/c/0/0"):
        shutil.copytree(folder / "model-0", model)
        data = bytearray((model / key).read_bytes())
        data[len(data) // 2] ^= 1
        (model / key).write_bytes(data)
        result = streamx("verify", model, code=6)
        assert [error["object"] for error in result["errors"]] == [key.split("/")[0]]
        shutil.rmtree(model)


def test_verify_of_a_broken_store(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "store", broken)
    victim = max((path for path in broken.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    result = streamx("verify", broken, code=6)
    assert result["ok"] is False
    assert len(result["errors"]) == 1


def test_preprocess(folder: Path) -> None:
    result = streamx("preprocess", folder / "store", "-o", folder / "view")
    assert (result["n_cells"], result["n_genes"], result["n_batches"]) == (1_183, 2_000, 4)


def test_train(folder: Path) -> None:
    lines = command_lines(folder, 0)
    result = streamx(*next(line for line in lines if line.startswith("train")).split())
    assert result["model"] == "scalex"
    assert (result["epochs"], result["steps"]) == (56, 1_008)
    assert result["loss"] > 0
    assert {"cells_per_second", "seconds", "peak_rss_bytes"} <= set(result)


def test_project(folder: Path, tmp_path: Path) -> None:
    queries = [DATA / f"{QUERY}.h5ad", f"plates={DATA}/sc_celseq2_5cl_p1.h5ad"]
    result = streamx(
        "project", folder / "model-0", *queries, f"plates={DATA}/sc_celseq2.h5ad", "-o", tmp_path
    )
    first, second = sorted(result["queries"], key=lambda query: query["name"])
    assert {key: first[key] for key in ("name", "n_cells", "n_passed", "gene_overlap", "status")} == {
        "name": "plates",
        "n_cells": 571,
        "n_passed": 571,
        "gene_overlap": 1.0,
        "status": "done",
    }
    assert (second["name"], second["n_cells"]) == (QUERY, 225)
    again = streamx("project", folder / "model-0", queries[0], "-o", tmp_path)
    assert again["queries"][0]["status"] == "skipped"


def test_project_leaves_a_broken_query_out_on_request(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.h5ad").write_text("no HDF5")
    argv = [
        "project",
        folder / "model-0",
        tmp_path / "broken.h5ad",
        DATA / f"{QUERY}.h5ad",
        "-o",
        tmp_path / "out",
    ]
    assert streamx(*argv, code=3)["kind"] == "BadFileError"
    result = streamx(*argv, "--on-error", "skip", code=4)
    assert sorted(query["status"] for query in result["queries"]) == ["done", "failed"]


def test_transfer(folder: Path) -> None:
    argv = ["transfer", folder / "model-0", folder / "mapped-0", "--label-key", "cell_line"]
    assert {"n_cells", "n_unknown", "knn_recall"} <= set(streamx(*argv))
    scored = streamx(*argv, "--truth-key", "cell_line")
    assert {"accuracy", "balanced_accuracy", "macro_f1"} <= set(scored)
    assert scored["n_cells"] == 225


def test_metrics(folder: Path) -> None:
    result = streamx("metrics", folder / "model-0", folder / "mapped-0", "--label-key", "cell_line")
    for name in (
        "batch_entropy_mixing",
        "ebm",
        "ilisi",
        "clisi",
        "asw_label",
        "asw_batch",
        "knn_purity",
        "nmi",
        "ari",
    ):
        assert 0 <= result[name] <= 1


@pytest.mark.parametrize("format", ["pdf", "svg"])
def test_plot(folder: Path, tmp_path: Path, format: str) -> None:
    argv = ["plot", folder / "model-0", "-o", tmp_path, "--color", "cell_line", "--format", format]
    names = {Path(figure).name for figure in streamx(*argv)["figures"]}
    assert names == {f"history.{format}", f"umap_cell_line.{format}"}
    assert all((tmp_path / name).stat().st_size > 1_000 for name in names)


def test_plot_names_the_columns_that_there_are(folder: Path, tmp_path: Path) -> None:
    error = streamx("plot", folder / "model-0", "-o", tmp_path, "--color", "celltype", code=2)
    assert "cell_line" in error["fix"]


def test_append_update_and_annotate(folder: Path, tmp_path: Path) -> None:
    store, view = tmp_path / "store", tmp_path / "view"
    shutil.copytree(folder / "store", store)
    streamx("preprocess", store, "-o", view)
    grown = streamx("convert", DATA / f"{QUERY}.h5ad", "-o", store, "--append")
    assert (grown["n_cells"], grown["n_batches"], grown["generation"]) == (1_408, 5, 2)
    info = streamx("info", view)
    assert (info["store_generation"], info["store_generation_now"]) == (1, 2)
    assert streamx("preprocess", "--update", view)["n_cells"] == 1_408
    (tmp_path / "labels.csv").write_text("cell,grade\nsc_celseq2_A1,high\n")
    streamx("annotate", store, tmp_path / "labels.csv")
    assert "grade" in streamx("info", store)["obs_columns"]


def test_annotate_what_was_mapped(folder: Path, tmp_path: Path) -> None:
    mapped = tmp_path / "mapped"
    streamx(
        "project",
        folder / "model-0",
        DATA / f"{QUERY}.h5ad",
        f"p1={DATA}/sc_celseq2_5cl_p1.h5ad",
        "-o",
        mapped,
    )
    (tmp_path / "truth.csv").write_text(
        "cell,line\nsc_dropseq_CELL_000302,HCC827\nsc_celseq2_5cl_p1_p1_A1,A549\n"
    )
    assert streamx("annotate", mapped, tmp_path / "truth.csv") == {"n_cells": 2, "columns": ["line"]}
    argv = ["transfer", folder / "model-0", mapped, "--label-key", "cell_line", "--truth-key", "line"]
    assert streamx(*argv)["n_scored"] == 2


def test_broken_input_is_left_out_on_request(tmp_path: Path) -> None:
    (tmp_path / "broken.h5ad").write_text("no HDF5")
    argv = ["convert", tmp_path / "broken.h5ad", DATA / "sc_*p[12].h5ad", "-o", tmp_path / "partial"]
    assert streamx(*argv, code=3)["kind"] == "BadFileError"
    result = streamx(*argv, "--on-error", "skip", code=4)
    assert result["n_cells"] == 604
    assert "broken.h5ad" in result["skipped"][0]["input"]


def test_text_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["info", folder / "view"], ["metrics", folder / "model-0", "--label-key", "cell_line"]):
        assert main([str(word) for word in argv]) == 0
    shown = capsys.readouterr().out
    assert "sc_celseq2_5cl_p1    297" in shown
    assert "asw_label" in shown
    assert "{" not in shown


def test_a_process_of_its_own(folder: Path) -> None:
    command = [sys.executable, "-m", "streamx.cli.main", "info", str(folder / "store"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(done.stdout)["n_cells"] == 1_183


def test_demo_works_in_a_folder_with_a_space() -> None:
    first = shlex.split(command_lines(Path("my demo"), 0)[0])
    assert first == ["convert", "my demo/data/sc_celseq2*.h5ad", "-o", "my demo/store"]
    assert make_parser().parse_args(first).verb


def test_demo_prints_what_it_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(folder)]) == 0  # finished already: nothing is done twice
    shown = capsys.readouterr().out
    for line in command_lines(folder, 0):
        assert f"$ streamx {line}" in shown
        assert make_parser().parse_args(line.split()).verb
    assert "genotype" in shown
