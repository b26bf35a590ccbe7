"""benchmarks/scale.py runs, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scale.py"
STAGES = ["simulate", "convert", "preprocess", "epoch", "columns", "opens"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_small(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--sizes=1500",
            "--no-record",
            f"--folder={tmp_path}",
            "--stages",
            *STAGES,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {line["stage"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == STAGES
    assert not [line for line in lines.values() if "failed" in line]
    assert all(line["peak_anonymous_bytes"] > 10**7 for line in lines.values())
    assert lines["convert"]["nnz"] >= lines["preprocess"]["nnz"] > 0
    assert lines["convert"]["predicted"]["disk_bytes"] > 0
    assert 0 < lines["epoch"]["n_read"] <= 1500
    assert lines["opens"]["n_columns"] == 200
    assert lines["opens"]["open_seconds"] < 1
