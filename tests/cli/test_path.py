"""The whole way by command lines, on the demo's cells: the JSON keys that other programs rely on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamx.demo import DATA, QUERY


def streamx(*argv: str | Path, cwd: Path | None = None, code: int = 0) -> dict[str, Any]:
    """The one JSON object that a command prints, in a process of its own."""
    command = [sys.executable, "-m", "streamx.cli.main", *map(str, argv), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=200)
    assert done.returncode == code, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("path")


@pytest.fixture(scope="module")
def converted(folder: Path) -> dict[str, Any]:
    return streamx("convert", DATA / "sc_celseq2*.h5ad", "-o", "store", cwd=folder)


def test_convert(converted: dict[str, Any]) -> None:
    assert converted["n_cells"] == 1_183
    assert converted["n_genes"] == 5_000
    assert converted["n_batches"] == 4
    assert converted["n_shards"] == 1
    assert converted["nnz"] > 3_000_000
    assert converted["bytes_per_cell"] == pytest.approx(converted["bytes"] / 1_183, abs=0.1)
    assert converted["seconds"] > 0
    assert converted["peak_rss_bytes"] > 10_000_000


def test_info(converted: dict[str, Any], folder: Path) -> None:
    info = streamx("info", "store", cwd=folder)
    assert {key: info[key] for key in ("kind", "generation", "n_cells")} == {
        "kind": "store",
        "generation": 1,
        "n_cells": 1_183,
    }


def test_verify(converted: dict[str, Any], folder: Path) -> None:
    result = streamx("verify", "store", cwd=folder)
    assert result["ok"] is True
    assert result["objects"] > 10
    assert result["errors"] == []


def test_verify_of_a_broken_store(converted: dict[str, Any], folder: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "store", broken)
    victim = max((path for path in broken.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    result = streamx("verify", "broken", cwd=folder, code=6)
    assert result["ok"] is False
    assert len(result["errors"]) == 1


def test_append_is_the_next_generation(converted: dict[str, Any], folder: Path) -> None:
    shutil.copytree(folder / "store", folder / "grown")
    grown = streamx("convert", DATA / f"{QUERY}.h5ad", "-o", "grown", "--append", cwd=folder)
    assert (grown["n_cells"], grown["n_batches"], grown["generation"]) == (1_408, 5, 2)


def test_broken_input_is_left_out_on_request(folder: Path) -> None:
    (folder / "broken.h5ad").write_text("no HDF5")
    argv = ["convert", "broken.h5ad", DATA / "sc_*p[12].h5ad", "-o", "partial"]
    assert streamx(*argv, cwd=folder, code=3)["kind"] == "BadFileError"
    result = streamx(*argv, "--on-error", "skip", cwd=folder, code=4)
    assert result["n_cells"] == 604
    assert "broken.h5ad" in result["skipped"][0]["input"]
