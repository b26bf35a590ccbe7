"""Where the tests find real data and numeric fixtures, and a small store that many of them share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


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
