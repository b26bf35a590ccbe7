"""Points that memory may not hold: the same rows, however they are reached."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import zarr

from streamx.errors import ResourceError
from streamx.neighbors.blocks import Rows, Stacked, blocks, finite_rows, scratch_array, settle, take_rows

POINTS = np.arange(60, dtype=np.float32).reshape(20, 3)


def stored(parts):
    store = zarr.storage.MemoryStore()
    return [
        zarr.create_array(store, name=str(number), data=part, chunks=(3, 3))
        for number, part in enumerate(parts)
    ]


@pytest.mark.parametrize("cuts", [[20], [0, 20], [7, 7, 13, 20], [1, 2, 3, 20]])
def test_stacked_is_the_concatenation(cuts):
    parts = np.split(POINTS, cuts[:-1])
    for stacked in (Stacked(parts), Stacked(stored([part for part in parts if len(part)]))):
        assert stacked.shape == (20, 3)
        for low in range(20):
            for high in (low, low + 1, low + 5, 99):
                np.testing.assert_array_equal(stacked[low:high], POINTS[low:high])
        np.testing.assert_array_equal(np.asarray(stacked), POINTS)
        np.testing.assert_array_equal(take_rows(stacked, np.array([0, 6, 7, 19])), POINTS[[0, 6, 7, 19]])


def test_no_rows_of_no_points():
    nobody = Stacked([POINTS[:0], POINTS[:0]])
    assert take_rows(nobody, np.empty(0, np.int64)).shape == (0, 3)


def test_rows_are_those_rows():
    rows = np.array([1, 4, 5, 17])
    for points in (POINTS, Stacked([POINTS[:5], POINTS[5:]]), *stored([POINTS])):
        some = Rows(points, rows)
        assert some.shape == (4, 3)
        np.testing.assert_array_equal(some[1:3], POINTS[[4, 5]])
        np.testing.assert_array_equal(np.asarray(some), POINTS[rows])
        assert some[4:].shape == (0, 3)


def test_blocks_cover_all_rows_once():
    for rows in (1, 7, 20, 100):
        parts = list(blocks(POINTS, rows))
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), POINTS)
        assert [low for low, _ in parts] == list(range(0, 20, rows))


def test_settled_in_memory_or_in_a_file():
    (points,) = stored([POINTS])
    small, large = settle(points, POINTS.nbytes), settle(points, POINTS.nbytes - 1)
    assert isinstance(large, np.memmap)
    assert not isinstance(small, np.memmap)
    np.testing.assert_array_equal(small, POINTS)
    np.testing.assert_array_equal(large, POINTS)


def test_a_full_disk_is_said_before_it_is_met(monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="No space left"):
        scratch_array((5, 3), np.float32, on_disk=True)


def test_finite_rows():
    points = POINTS.copy()
    points[3, 1], points[11, 2] = np.nan, np.inf
    np.testing.assert_array_equal(np.flatnonzero(~finite_rows(points)), [3, 11])
    assert finite_rows(points[:0]).shape == (0,)
