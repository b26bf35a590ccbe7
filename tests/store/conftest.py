"""Many small stores: no waiting for the disk, and a geometry in which small data have many chunks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamx.store import draft, layout


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability against power cuts can't be tested here, and waiting for all of the machine's disks can."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def tiny_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 values in zarr shards of 3 chunks; obs in chunks of 13 rows, obsm in shards of 3 x 4."""
    monkeypatch.setattr(layout, "ROWS_PER_CHUNK", 2)
    monkeypatch.setattr(layout, "VALUES_MULTIPLE", 8)
    monkeypatch.setattr(layout, "CHUNKS_PER_SHARD", 3)
    monkeypatch.setattr(draft, "OBS_ROWS_PER_CHUNK", 13)
    monkeypatch.setattr(draft, "OBSM_ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(draft, "OBSM_ROWS_PER_SHARD", 12)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Stores are many small files: in memory where that is possible, and gone after each test."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="streamx-test-", dir=memory if memory.is_dir() else None))
    yield folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
