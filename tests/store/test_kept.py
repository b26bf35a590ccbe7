"""One bounded cache for all shards of a collection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_samples import sample

import streamx as sx
from streamx.store.kept import Cache
from streamx.store.matrix import Offsets


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), max_size=60))
def test_bound_and_recency(asked: list[tuple[int, int]]) -> None:
    cache: Cache[bytes] = Cache(100, len)
    for key, size in asked:
        held = set(cache._values)
        made = []
        value = cache.get(key, lambda size=size, made=made: made.append(1) or bytes(size))  # type: ignore[func-returns-value, misc]
        assert bool(made) == (key not in held)
        assert next(reversed(cache._values)) == key
        assert cache._values[key] is value
        assert cache.used == sum(map(len, cache._values.values())) <= 100


def test_the_newest_stays_even_if_it_is_too_large() -> None:
    cache: Cache[bytes] = Cache(10, len)
    cache.get("a", lambda: bytes(5))
    large = cache.get("b", lambda: bytes(50))
    assert cache.get("b", lambda: bytes(1)) is large
    assert list(cache._values) == ["b"]


@given(st.lists(st.integers(0, 70_000), min_size=0, max_size=40), st.data())
def test_offsets_are_kept_as_differences(size_n: list[int], data: st.DataObject) -> None:
    entries = np.concatenate([[0], np.cumsum(np.array(size_n, np.int64))]) + 2**40
    start = data.draw(st.integers(0, len(size_n)))
    stop = data.draw(st.integers(start + 1, len(size_n) + 1))
    found = Offsets.of(entries)[start:stop]
    assert found.dtype == np.int64
    assert found.tolist() == entries[start:stop].tolist()


def test_rows_are_right_when_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look-up is made anew, and files are opened and closed all the time."""
    monkeypatch.setattr("streamx.store.kept.FILES", 1)
    monkeypatch.setattr("streamx.store.collection.NBYTES", 1)
    adata = sample(700, 30, 0, batch=["a"] * 700)
    store = sx.convert(adata, tmp_path / "store", shard_rows=101)
    expected = store.read(0, 700).toarray()
    rng = np.random.default_rng(0)
    for _ in range(10):
        low = int(rng.integers(0, 600))
        assert np.array_equal(store.read(low, low + 100).toarray(), expected[low : low + 100])
    assert len(store._kept.parts._values) == len(store._kept.files._values) == 1
