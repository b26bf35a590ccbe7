"""A kept index when several searchers miss it at once, as the workers of a mapping job do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamx.neighbors import build_index, kept, kept_index, open_index

AT_ONCE = 4


def test_several_make_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each finds none and makes its own, and all write it at the same time: one whole index is left."""
    rng = np.random.default_rng(0)
    points_nk, query_mk = (rng.normal(size=(n, 8)).astype(np.float32) for n in (3000, 50))
    expected = build_index(points_nk, 50, method="ivf", threads=1).search(query_mk, 10)
    all_made = threading.Barrier(AT_ONCE)

    def made_together(*args: Any, **options: Any) -> Any:
        index = build_index(*args, **options)
        all_made.wait(timeout=60)
        return index

    monkeypatch.setattr(kept, "build_index", made_together)

    def search() -> Any:
        return kept_index(tmp_path, points_nk, 50, method="ivf", threads=1).search(query_mk, 10)

    with caplog.at_level("INFO", logger="streamx"), ThreadPoolExecutor(AT_ONCE) as pool:
        found = [task.result() for task in [pool.submit(search) for _ in range(AT_ONCE)]]
    assert "not kept" not in caplog.text
    (folder,) = tmp_path.iterdir()
    found.append(open_index(folder, threads=1).search(query_mk, 10))
    for indices, distances in found:
        np.testing.assert_array_equal(indices, expected[0])
        np.testing.assert_array_equal(distances, expected[1])
    assert not list(folder.glob("*.tmp"))
