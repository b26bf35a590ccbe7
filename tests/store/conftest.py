"""Many small stores: no waiting for the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability against power cuts can't be tested here, and waiting for all of the machine's disks can."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Stores are many small files: in memory where that is possible, and gone after each test."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="streamx-test-", dir=memory if memory.is_dir() else None))
    yield folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
