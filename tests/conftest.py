"""Where the tests find real data and numeric fixtures, and a small store that many of them share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A first example may compile a loop, on a machine that others use.
settings.register_profile("streamx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("streamx")

NO_TORCH = "torch is not installed"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    """Without torch, test files that import it are skipped: the other half runs on any Python (README)."""
    report = yield
    if report.failed and "No module named 'torch'" in str(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {NO_TORCH}")
    return report


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="session")
def needs_torch() -> None:
    """For a test that runs a model in a file whose other tests do not."""
    pytest.importorskip("torch", reason=NO_TORCH)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data sets (see README, section Tests)."""
    return _folder("STREAMX_DATA")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Big numeric fixtures; the small ones lie in tests/data."""
    return _folder("STREAMX_FIXTURES")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small numeric fixtures that travel with the tests."""
    return Path(__file__).parent / "data"


@pytest.fixture
def tiny_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in small data: of 8 values, 3 in a zarr shard; 7 row offsets, 13 rows of obs, 4 of obsm."""
    from streamx.store import draft, layout

    monkeypatch.setattr(layout, "ROWS_PER_CHUNK", 2)
    monkeypatch.setattr(layout, "VALUES_MULTIPLE", 8)
    monkeypatch.setattr(layout, "CHUNKS_PER_SHARD", 3)
    monkeypatch.setattr(layout, "OFFSETS_PER_CHUNK", 7)
    monkeypatch.setattr(draft, "OBS_ROWS_PER_CHUNK", 13)
    monkeypatch.setattr(draft, "OBSM_ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(draft, "OBSM_ROWS_PER_SHARD", 12)
