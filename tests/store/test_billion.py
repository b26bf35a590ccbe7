"""A billion cells as files: opened, planned, split and resumed in seconds, from what is needed of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from billion import write_billion

MEASURE = """
import json, sys, threading, time
import numpy as np
import streamx.loader.loader as loading
from streamx.store.collection import open_collection
from streamx.memory import resident_bytes

peak = before = resident_bytes()
def watch():
    global peak
    while True:
        peak = max(peak, resident_bytes())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
options = json.loads(sys.argv[2])
begun = time.process_time()
view = open_collection(sys.argv[1])
loader = loading.Loader(view, 256, seed=3, rank=17, world=64, **options)
n_minibatches, n_own = loader.plan().n_minibatches, len(loader)
state = loader.at(2, n_minibatches // 2).state_dict()
loader.load_state_dict(json.loads(json.dumps(state)))
plan = loader.plan()
number = plan.fetch_of(plan.start) + 1
fetch = plan.fetch(number)
rows = np.concatenate([np.arange(a, b) for a, b in fetch.ranges])[fetch.order]
total = loader._total_n[rows]  # zeros: obs has no chunk
seconds = time.process_time() - begun
bounds, code_r = view.batch_runs
codes = code_r[np.searchsorted(bounds, rows, side="right") - 1]
print(json.dumps({
    "seconds": seconds, "bytes": peak, "n_obs": view.n_obs, "n_minibatches": n_minibatches, "n_own": n_own,
    "start": plan.start, "epoch": plan.epoch, "first": fetch.first, "sizes": np.diff(fetch.cuts).tolist(),
    "batches": [len(set(codes[a:b])) for a, b in zip(fetch.cuts[:-1].tolist(), fetch.cuts[1:].tolist())],
    "distinct": len(set(rows.tolist())) == len(rows), "last": int(rows.max()), "total": float(total.sum()),
}))
"""


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("billion") / "view"
    return folder, write_billion(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [
        {"order": "shuffled"},
        {"order": "by_batch"},
        {"order": "stratified"},
        {"order": "stratified", "stratify": "cell_type"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_billion_cells(
    billion: tuple[Path, int], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, n_obs = billion
    monkeypatch.setenv("STREAMX_SCRATCH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["n_obs"] == n_obs > 999_000_000
    assert found["seconds"] < 5
    assert found["bytes"] < 1_000_000_000
    assert found["epoch"] == 2
    assert found["start"] == found["n_minibatches"] // 2
    assert abs(found["n_minibatches"] / 64 - found["n_own"]) <= 1
    assert found["distinct"]
    assert found["last"] < n_obs
    assert len(found["sizes"]) in (1, 2) or options["order"] == "by_batch"
    assert set(found["sizes"]) == {256} or options["order"] == "by_batch"
    if options["order"] == "by_batch":
        assert set(found["batches"]) <= {1}
    else:
        assert min(found["batches"]) > 30
    assert found["total"] == 0
    assert list(tmp_path.iterdir()) == []  # files of columns have no name
