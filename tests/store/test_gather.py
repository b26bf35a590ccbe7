"""Rows from any layout, in any order: the kernel and zarr give the same, value by value."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from streamx.errors import IntegrityError
from streamx.store import Collection, decode, layout
from streamx.store.pack import Content, write_part
from streamx.store.spill import Slab

N = 1_009


def matrix(n_genes: int, high: int, kind: str) -> sparse.csr_matrix:
    """Rows of 0 to 60 values; some stretches of rows are empty."""
    rng = np.random.default_rng(n_genes + high)
    size_n = rng.integers(0, 61, N)
    size_n[[0, 1, 500, 501, 502, N - 1]] = 0
    size_n[700:730] = 0
    genes = [np.sort(rng.choice(n_genes, size, replace=False)) for size in size_n]
    values = rng.integers(1, high, size_n.sum()).astype(np.float64)
    values[7] = high
    if kind == "float":
        values += 0.25
    return sparse.csr_matrix(
        (values, np.concatenate(genes), np.concatenate([[0], np.cumsum(size_n)])), shape=(N, n_genes)
    )


def store(path: Path, x_ng: sparse.csr_matrix, preset: str, kind: str) -> Collection:
    names = pd.Index([f"g{i}" for i in range(x_ng.shape[1])], dtype=object)
    obs = pd.DataFrame({"batch": pd.Categorical(["a"] * 400 + ["b"] * (N - 400))})
    obs.index = pd.Index([f"c{i}" for i in range(N)], dtype=object)
    content = Content(
        "store", obs, pd.DataFrame(index=names), "batch", {"made": preset},
        value_dtype="float32" if kind == "float" else None,
    )  # fmt: skip
    slabs = [Slab("all", np.arange(N), lambda: (x_ng, {}))]
    return write_part(path, slabs, content, preset=preset, shard_rows=401)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr")
@pytest.mark.usefixtures("tiny_geometry")
@pytest.mark.parametrize("preset", list(layout.PRESETS))
@pytest.mark.parametrize(
    ("n_genes", "high", "kind"),
    [(90, 200, "count"), (300, 60_000, "count"), (70_000, 200_000, "count"), (90, 9, "float")],
)
def test_every_row_of_every_layout(
    tmp_path: Path, preset: str, n_genes: int, high: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_ng = matrix(n_genes, high, kind)
    found = store(tmp_path / "store", x_ng, preset, kind)
    by_zarr = Collection(tmp_path / "store")
    monkeypatch.setattr(decode, "available", lambda: False)
    assert all(by_zarr._matrix(shard).values is None for shard in range(3))
    by_zarr.read(0, N)
    monkeypatch.undo()
    assert decode.available()
    assert all(found._matrix(shard).values is not None for shard in range(3))

    @settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.integers(0, N), max_size=9), st.integers(0, 9))
    def rows_in_any_order(cuts: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        edges = sorted(cuts)[: len(cuts) // 2 * 2]
        ranges = list(zip(edges[::2], edges[1::2], strict=True))
        rows = np.concatenate([np.arange(a, b) for a, b in ranges] or [np.zeros(0, int)])
        order = rng.permutation(len(rows))[: rng.integers(len(rows) + 1)]
        if seed == 0:
            ranges, rows, order = (
                ranges[::-1],
                np.concatenate([np.arange(a, b) for a, b in ranges[::-1]] or [rows]),
                None,
            )
        expected = x_ng[rows if order is None else rows[order]]
        for collection in (found, by_zarr):
            got = collection.fetch(ranges, dtype=np.float64, order=order)
            assert np.array_equal(got.indptr, expected.indptr)
            assert np.array_equal(got.indices, expected.indices)
            assert np.array_equal(got.data, expected.data)

    rows_in_any_order()
    assert np.array_equal(found.fetch([(0, N)], dtype="stored").data, x_ng.data.astype(found.value_dtype))
    assert found.batch_runs[0].tolist() == [0, 400, N]


@pytest.mark.usefixtures("tiny_geometry")
def test_checksums_are_off_only_when_asked(tmp_path: Path) -> None:
    """Uncompressed, so that a changed byte can be read at all."""
    x_ng = matrix(90, 200, "count")
    found = store(tmp_path / "store", x_ng, "speed", "count")
    path = tmp_path / "store" / "shards/000000.zarr/X/data/c/0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="not those that were written"):
        found.read(0, 100)
    changed = Collection(tmp_path / "store", verify=False).read(0, 100)
    assert (changed.data != x_ng[:100].data).sum() == 1
