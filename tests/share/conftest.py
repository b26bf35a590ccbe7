"""A service on this machine, its token in the environment, and no pauses between attempts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_zenodo import TOKEN, Zenodo, serving

from streamx.share import http, transfer


@pytest.fixture
def zenodo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zenodo]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("ZENODO_TOKEN", TOKEN)
    for module in (http, transfer):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(module, "LONGEST_PAUSE", 0.02)
    with serving() as service:
        yield service
