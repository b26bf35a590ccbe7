"""Columns that are read when they are asked for, and kept in a file without a name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from streamx.errors import StorageError
from streamx.loader import column
from streamx.loader.column import Column, codes_of

N = 1000


@pytest.fixture(params=["memory", "file"])
def small_units(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(column, "UNIT", 64)
    monkeypatch.setattr(column, "IN_MEMORY", 10**6 if request.param == "memory" else 0)
    monkeypatch.setenv("STREAMX_SCRATCH", str(tmp_path / "scratch"))
    return request.param


def test_only_what_is_asked_for_is_read_and_once(small_units: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(N).astype(np.float32)
    read: list[tuple[int, int]] = []

    def rows(low: int, high: int) -> np.ndarray:
        read.append((low, high))
        return values[low:high]

    found = Column(N, np.float32, rows)
    wanted = np.array([999, 3, 70, 3])
    assert np.array_equal(found[wanted], values[wanted])
    assert read == [(0, 64), (64, 128), (960, 1000)]
    assert np.array_equal(found[100:300], values[100:300])
    assert np.array_equal(found[0:N], values)
    assert len(read) == len(set(read)) == 16
    assert found[5:5].size == 0
    assert (found.nbytes < 20) == (small_units == "file")
    assert not list(tmp_path.rglob("scratch/*"))


class _Obs:
    """obs of a collection."""

    def __init__(self, values: pd.Series) -> None:
        self.values, self.n_obs = values, len(values)

    def obs_column(self, name: str, start: int = 0, stop: int | None = None) -> pd.Series:
        return self.values.iloc[start:stop].reset_index(drop=True)

    def iter_rows(self, block: int) -> list[tuple[int, int]]:
        return [(low, min(low + block, self.n_obs)) for low in range(0, self.n_obs, block)]


@pytest.mark.parametrize("kind", ["category", "object", "Int64", "float64", "boolean"])
def test_codes_are_those_of_the_whole_column(small_units: str, kind: str) -> None:
    """Also where a unit lacks some of the values."""
    codes = np.repeat(np.random.default_rng(1).permutation(20), 50)
    values: pd.Series = pd.Series(codes)
    if kind in ("category", "object"):
        values = values.map("v{}".format).astype(object)
    elif kind == "boolean":
        values = values > 9
    values = values.astype(kind).mask(codes == 7)
    found = codes_of(_Obs(values), "x")  # type: ignore[arg-type]
    assert np.array_equal(found[0:N], values.astype("category").cat.codes)
    assert found.dtype == np.int8


@pytest.mark.parametrize("small_units", ["file"], indirect=True)
def test_no_scratch_folder(small_units: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STREAMX_SCRATCH", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="no scratch folder can be written"):
        Column(N, np.float32, lambda low, high: np.zeros(high - low))


@pytest.mark.parametrize("small_units", ["file"], indirect=True)
def test_a_full_disk_is_an_error(small_units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    found = Column(N, np.float32, lambda low, high: np.zeros(high - low))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Exception, match="the disk is full"):
        found[0:10]


def test_large_array_lies_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMX_SCRATCH", str(tmp_path))
    monkeypatch.setattr(column, "IN_MEMORY", 64)
    z_nk = column.large_array((50, 3), np.float32)
    assert isinstance(z_nk, np.memmap)
    assert not z_nk.any()
    z_nk[7] = 1, 2, 3
    assert z_nk.sum() == 6
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(column.large_array((2, 2), np.float32), np.memmap)
