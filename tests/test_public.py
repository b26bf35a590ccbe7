"""Public functions can be called whatever module of the same name was imported before."""

from __future__ import annotations

from types import ModuleType

import pytest

import streamx as sx
from streamx.errors import BadFileError


def test_a_function_and_a_module_share_a_name() -> None:
    import streamx.preprocess as room
    from streamx.preprocess import run

    assert isinstance(room, ModuleType)
    assert room.run is run
    with pytest.raises(BadFileError, match="does not exist"):
        sx.preprocess("/nowhere/at/all", "/nowhere/view")
