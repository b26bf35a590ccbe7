"""Any number of input files, few of them open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import sample, written

import streamx as sx
from streamx.store.ingest import open_sources, pool


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [written(sample(5 + i, 9, i), tmp_path / f"f{i}.h5ad") for i in range(pool.MOST_OPEN + 4)]


def test_few_are_open(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import h5py

    opened: list[Any] = []
    original = h5py.File

    def file(*args: Any, **kwargs: Any) -> Any:
        opened.append(original(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(h5py, "File", file)
    sources = open_sources(files, scratch=tmp_path / "scratch", memory=10**8)
    assert sum(map(bool, opened)) <= pool.MOST_OPEN
    for i, source in enumerate(sources):
        number = int(source.key[1:])
        expected = sample(5 + number, 9, number)
        assert (source.n_obs, list(source.obs_names)) == (5 + number, list(expected.obs_names))
        np.testing.assert_array_equal(source.read(1, 4).toarray(), expected.X[1:4].toarray())
        assert list(source.obs["kind"]) == list(expected.obs["kind"])
        assert source.var is sources[0].var, i  # the same genes are kept once
        assert sum(map(bool, opened)) <= pool.MOST_OPEN
    for source in sources:
        source.close()
    assert not any(map(bool, opened))


def test_many_files_convert(files: list[Path], tmp_path: Path) -> None:
    store = sx.convert(files, tmp_path / "store", threads=3)
    assert store.n_obs == sum(5 + i for i in range(len(files)))
    assert len(store.batches) == len(files)
