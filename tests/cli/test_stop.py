"""SIGTERM while a verb really works: it stops in time, says 143, and the same command goes on (R6)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import streamx as sx
from streamx.demo import DATA


def start(*argv: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "streamx.cli.main", *map(str, argv), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_training(needs_torch: None, tmp_path: Path) -> None:
    store = sx.convert([DATA / "sc_celseq2.h5ad", DATA / "sc_dropseq.h5ad"], tmp_path / "store")
    sx.preprocess(store, tmp_path / "view", n_top_features=200)
    argv = ["train", tmp_path / "view", "-o", tmp_path / "model", "--checkpoint-seconds", "0"]
    child = start(*argv, "--max-iteration", "100000")
    journal = tmp_path / "model.journal"
    while not any(journal.rglob("*.safetensors")):  # the first checkpoint
        assert child.poll() is None, child.stderr and child.stderr.read()
        time.sleep(0.05)
    told = time.monotonic()
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert time.monotonic() - told < 10
    assert child.returncode == 143
    assert "takes it up again" in err
    assert out == ""
    assert not (tmp_path / "model" / "model.json").exists()

    # with other settings it can't go on, and says which
    other = start(*argv, "--max-iteration", "14")
    out, err = other.communicate(timeout=60)
    assert other.returncode == 5
    assert json.loads(out)["kind"] == "SettingsChangedError"
    assert "max_iteration" in err
