"""A batch of one kind of cells is warned of; others are not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from streamx.errors import StreamxWarning
from streamx.store.latents import write_latents
from streamx.store.location import open_location
from streamx.surgery import narrow
from streamx.surgery.narrow import spread_of, warn_narrow
from streamx.surgery.run import _look as warn_of_narrow


def test_spread_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z_nk = np.random.default_rng(0).normal(3, [1, 2, 0.5], (1000, 3)).astype(np.float32)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(1000)])
    write_latents(tmp_path / "z.zarr", obs, {"X_scvi": z_nk}, {})
    monkeypatch.setattr(narrow, "ROWS", 300)
    found = spread_of(open_location(tmp_path / "z.zarr"), "X_scvi")
    assert found == pytest.approx(np.sqrt(z_nk.astype(float).var(0).sum()))
    write_latents(tmp_path / "none.zarr", obs[:0], {"X_scvi": z_nk[:0]}, {})
    assert spread_of(open_location(tmp_path / "none.zarr"), "X_scvi") == 0


def test_one_kind_is_warned_of() -> None:
    z_nk = np.random.default_rng(0).normal(0, 0.3, (300, 4))
    with pytest.warns(StreamxWarning, match="new: its 300 cells lie within 29% of the reference's spread"):
        warn_narrow("new", z_nk, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_narrow("few", z_nk[:199], 2.0)
        warn_narrow("wide", 2 * z_nk, 2.0)
        warn_narrow("of a model without cells", z_nk, 0.0)


def test_batches_of_numbers_are_found(tmp_path: Path) -> None:
    """A column of 7.0 names the batch 7."""
    z_nk = np.random.default_rng(0).normal(0, 0.3, (300, 4)).astype(np.float32)
    obs = pd.DataFrame({"run": np.full(300, 7.0)}, index=[f"c{i}" for i in range(300)])
    write_latents(tmp_path / "q.zarr", obs, {"X_scvi": z_nk}, {})
    with pytest.warns(StreamxWarning, match="7: its 300 cells lie within 29%"):
        warn_of_narrow(open_location(tmp_path / "q.zarr"), ["7"], "run", 2.0)
