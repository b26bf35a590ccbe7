"""The benchmark runs, and its ways agree on the genes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/preprocess.py"


@pytest.mark.slow
def test_a_small_size(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--cells",
        "600",
        "--genes",
        "4000",
        "--repeats",
        "1",
        "--flavor",
        "seurat",
    ]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    lines = [json.loads(line) for line in done]
    assert [line.get("way") for line in lines] == ["scanpy", "statistics", "streamx", None]
    assert lines[3]["same_genes"]
    assert lines[3]["streamx"]["cpu_seconds"] > 0
