"""The pure parts: plans of reads and shards, spilled rows, tables in and out, over any geometry."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from store_samples import read_values

from streamx.errors import UsageError
from streamx.store import layout
from streamx.store.chunks import open_chunks
from streamx.store.draft import Draft, draft_anndata_shell, draft_frame
from streamx.store.folder import Folder
from streamx.store.frame import read_frame
from streamx.store.journal import Journal, first_difference
from streamx.store.kept import Kept
from streamx.store.location import describe
from streamx.store.manifest import MARKER, read_generation
from streamx.store.pack import Content, write_part
from streamx.store.plan import plan_shards
from streamx.store.read import plan_reads
from streamx.store.spill import Slab, Spill, spill

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.lists(st.integers(1, 7), max_size=6), st.data())
def test_plan_reads(sizes: list[int], data: st.DataObject) -> None:
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    n = int(starts[-1])
    pairs = data.draw(st.lists(st.tuples(st.integers(0, n), st.integers(0, n)), max_size=5))
    ranges = [(min(pair), max(pair)) for pair in pairs]
    reads = plan_reads(ranges, starts)
    assert [row for a, b in ranges for row in range(a, b)] == [
        int(starts[read.shard]) + row for read in reads for row in range(read.start, read.stop)
    ]
    assert all(0 <= read.start < read.stop <= sizes[read.shard] for read in reads)
    assert len(reads) <= sum(len(sizes) for a, b in ranges if b > a)
    for bad in ((-1, 0), (0, n + 1), (1, 0)):
        with pytest.raises(UsageError):
            plan_reads([bad], starts)


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 17), st.integers(0, 5))
def test_plan_shards(row_nnz: list[int], shard_rows: int, first: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "ROWS_PER_CHUNK", 2)
        patch.setattr(layout, "VALUES_MULTIPLE", 4)
        patch.setattr(layout, "CHUNKS_PER_SHARD", 2)
        plans = plan_shards(np.cumsum([0, *row_nnz]), first_number=first, shard_rows=shard_rows)
    assert [plan.path for plan in plans] == [f"shards/{first + i:06d}.zarr" for i in range(len(plans))]
    assert sum(plan.n_obs for plan in plans) == len(row_nnz)
    assert all(plan.n_obs == shard_rows for plan in plans[:-1])
    for plan in plans:
        mine = row_nnz[plan.first : plan.first + plan.n_obs]
        assert np.diff(plan.indptr).tolist() == mine
        assert plan.indptr.dtype == np.int64
        assert plan.chunk % 4 == 0
        assert plan.shard % plan.chunk == 0
        ends = [0, *(high for _, high in plan.cuts)]
        assert [low for low, _ in plan.cuts] == ends[:-1]
        assert ends[-1] == plan.nnz
        for low, high in plan.cuts:
            assert low % plan.shard == 0
            start, stop = plan.rows(low, high)
            assert plan.indptr[start] <= low < plan.indptr[start + 1]
            assert plan.indptr[stop - 1] < high <= plan.indptr[stop]


@pytest.mark.parametrize(("n", "nnz"), [(0, 0), (1, 0), (1_000_000, 1_016_000_000), (50, 173), (10, 10**7)])
def test_geometry_at_full_size(n: int, nnz: int) -> None:
    chunk = layout.chunk_values(n, nnz)
    shard = layout.shard_values(chunk, nnz)
    assert chunk % 1024 == 0
    assert shard % chunk == 0
    assert shard <= max(chunk, layout.MAX_SHARD_VALUES)
    assert shard - chunk < max(nnz, 1)


def test_dtypes_at_their_limits() -> None:
    for bits in (8, 16, 32, 64):
        assert layout.smallest_unsigned(2**bits - 1) == f"uint{bits}"
    assert layout.smallest_unsigned(2**8) == np.uint16
    assert layout.smallest_unsigned(0) == np.uint8
    with pytest.raises(OverflowError):
        layout.smallest_unsigned(2**64)
    assert layout.index_dtype(1 << 16) == np.uint16
    assert layout.index_dtype((1 << 16) + 1) == np.uint32


def matrix(rng: np.random.Generator, n: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((rng.integers(0, 99, (n, 5)) * (rng.random((n, 5)) < 0.4)).astype(np.int32))


@quick
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**32 - 1), st.data())
def test_spilled_rows(tmp_path: Path, n: int, n_slabs: int, seed: int, data: st.DataObject) -> None:
    """Slabs of rows in any order, read back in the order of their destinations."""
    rng = np.random.default_rng(seed)
    x_ng, dense = matrix(rng, n), rng.random((n, 2))
    order = rng.permutation(n)
    owner = rng.integers(0, n_slabs, n)

    def slab(k: int) -> Slab:
        mine = order[owner == k]
        return Slab(f"s{k}", mine, lambda: (x_ng[mine], {"p": dense[mine]} if k else {}))

    place = tmp_path / str(seed)
    with Journal(Folder(place), {"seed": seed}) as journal:
        for _ in range(2):  # made, then found
            rows = Spill(
                spill([slab(k) for k in range(n_slabs)], journal, threads=2, progress=""), n, journal.rows
            )
            assert rows.ends.tolist() == x_ng.indptr.tolist()
            assert rows.maximum == (x_ng.data.max() if x_ng.nnz else 0)
            assert rows.counts
            low = data.draw(st.integers(0, n))
            high = data.draw(st.integers(low, n))
            indices = rows.values("indices", low, high, np.uint16)
            values = rows.values("data", low, high, np.uint8)
            piece = sparse.csr_matrix(
                (values, indices, x_ng.indptr[low : high + 1] - x_ng.indptr[low]), shape=(high - low, 5)
            )
            np.testing.assert_array_equal(piece.toarray(), x_ng[low:high].toarray())
            found = rows.dense("p", low, high, 2, np.float64)
            destination = np.empty(n, dtype=np.int64)
            destination[order] = owner[np.arange(n)]
            expected = np.where((destination != 0)[:, None], dense, 0)
            np.testing.assert_array_equal(found, expected[low:high])
        journal.remove()


def test_spilled_rows_are_those_of_the_slab(tmp_path: Path) -> None:
    """A record under the same key, of other rows (other limits of memory): read again."""
    with Journal(Folder(tmp_path / "store"), {}) as journal:
        for rows in (np.array([0, 1]), np.array([0, 2])):
            made = spill(
                [Slab("k", rows, lambda: (matrix(np.random.default_rng(0), 2), {}))],
                journal,
                threads=1,
                progress="",
            )
            assert made[0].array("rows").tolist() == rows.tolist()


def frames() -> st.SearchStrategy[pd.DataFrame]:
    n = st.shared(st.integers(1, 6), key="rows")

    def column(values: st.SearchStrategy, dtype: object = None) -> st.SearchStrategy[pd.Series]:
        return n.flatmap(lambda k: st.lists(values, min_size=k, max_size=k)).map(
            lambda v: pd.Series(v, dtype=dtype)
        )

    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
    columns = st.one_of(
        column(st.integers(-(2**62), 2**62)),
        column(st.floats(width=64)),
        column(st.floats(width=32), "float32"),
        column(st.booleans()),
        column(st.one_of(st.none(), st.integers(0, 9)), "Int64"),
        column(st.one_of(st.none(), st.booleans()), "boolean"),
        column(text, object),
        column(st.one_of(st.none(), text), object),
        column(st.one_of(st.none(), text), "category"),
    )
    names = st.lists(
        text.filter(lambda t: t.strip("./\\") and "/" not in t and "\\" not in t), max_size=4, unique=True
    )
    index = n.flatmap(lambda k: st.lists(text, min_size=k, max_size=k))

    def build(parts: tuple[list[str], list[pd.Series], list[str]]) -> pd.DataFrame:
        names, columns, index = parts
        data = {name: c.array for name, c in zip(names, columns, strict=False) if name not in ("_index",)}
        return pd.DataFrame(data, index=pd.Index(index, dtype=object))

    return st.tuples(names, st.lists(columns, max_size=4), index).map(build)


@quick
@given(frames())
def test_tables_come_back(frame: pd.DataFrame) -> None:
    draft = Draft()
    draft_anndata_shell(
        draft, (len(frame), 0), {"a": {"b": [1, 2], "c": "text", "d": None, "e": 1.5, "f": True}}
    )
    draft_frame(draft, "obs", frame)
    draft_frame(draft, "var", pd.DataFrame(index=pd.Index([], dtype=object)))
    group = _opened(draft)
    found = read_frame(group["obs"])
    assert list(found.columns) == list(frame.columns)
    assert list(found.index) == list(frame.index)
    for name in frame.columns:
        expected = frame[name]
        if isinstance(expected.dtype, pd.CategoricalDtype):
            assert (
                found[name].astype(object).fillna("<NA>").tolist()
                == expected.astype(object).fillna("<NA>").tolist()
            )
            assert found[name].cat.codes.tolist() == expected.cat.codes.tolist()
        else:
            pd.testing.assert_series_equal(found[name], expected, check_names=False)
    low = len(frame) // 2
    pd.testing.assert_frame_equal(read_frame(group["obs"], low), found.iloc[low:])
    if frame.index.is_unique:
        plain = ad.io.read_elem(group["obs"])
        assert list(plain.columns) == list(frame.columns)


def _opened(draft: Draft) -> zarr.Group:
    from zarr.core.buffer import cpu
    from zarr.storage import MemoryStore

    objects = {key: cpu.Buffer.from_bytes(data) for key, data in draft.consolidated().items()}
    return zarr.open_group(MemoryStore(objects), mode="r", zarr_format=3)


def test_beyond_2_31_values(tmp_path: Path) -> None:
    """R11: positions above 2^31 are exact, by our reader and by zarr."""
    n, shard, chunk = 2_200_000_123, 1 << 24, 1 << 16
    array = zarr.create_array(
        tmp_path / "store" / "data", shape=(n,), dtype="uint8", chunks=(chunk,), shards=(shard,),
        fill_value=0, zarr_format=3, **layout.matrix_codecs("default", "data", np.dtype(np.uint8)),
    )  # fmt: skip
    values = np.random.default_rng(0).integers(1, 255, 5000).astype(np.uint8)
    array[n - 5000 : n] = values
    reader = open_chunks(Folder(tmp_path / "store"), "data", {}, Kept())
    assert reader is not None
    np.testing.assert_array_equal(read_values(reader, n - 5000, n), values)
    np.testing.assert_array_equal(read_values(reader, n - 7, n - 2), values[-7:-2])
    np.testing.assert_array_equal(array[n - 5000 : n], values)
    plan = plan_shards(np.arange(2_200_002) * 1000, first_number=0, shard_rows=1 << 22)[0]
    assert plan.nnz == 2_200_001_000
    low, high = plan.cuts[-1]
    assert plan.rows(low, high) == (low // 1000, 2_200_001)


@given(st.binary(max_size=50), st.integers(0, 50))
def test_describe_in_pieces(data: bytes, cut: int) -> None:
    assert describe(data) == describe(data[:cut], memoryview(data[cut:]))
    assert describe(data)[0] == len(data)


def test_first_difference_names_the_field() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b: 1 -> 2"
    assert first_difference({"a": 1}, {"a": 1}) is None
    assert first_difference({}, {"a": [1]}) == "a: null -> [1]"
    assert len(first_difference({"a": "x" * 999}, {"a": "y"}) or "") < 100


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "\\x", "..", "a\0"])
def test_keys_stay_inside(tmp_path: Path, key: str) -> None:
    from streamx.errors import StorageError

    location = Folder(tmp_path / "store")
    for work in (
        location.read,
        location.exists,
        location.size,
        location.delete,
        location.delete_tree,
        location.list,
    ):
        with pytest.raises(StorageError, match="leaves the store"):
            work(key)
    with pytest.raises(StorageError, match="leaves the store"):
        location.write(key, b"x")
    assert not list(tmp_path.iterdir())


def test_unknown_schemes_are_named() -> None:
    import streamx as sx

    with pytest.raises(UsageError, match=r"ftp:// .*\n.*s3://"):
        sx.open("ftp://bucket/store")
    with pytest.raises(UsageError, match="https://"):
        sx.convert([], "https://bucket/store")


def test_a_part_of_one_cell_and_no_obs_but_the_batch(tmp_path: Path) -> None:
    content = Content(
        kind="store",
        obs=pd.DataFrame({"batch": pd.Categorical(["b"])}, index=["cell"]),
        var=pd.DataFrame(index=["g"]),
        batch_key="batch",
        fingerprint={"x": (1, 2)},  # a tuple is a list once written
    )
    slab = Slab("s", np.array([0]), lambda: (sparse.csr_matrix([[3]]), {}))
    for _ in range(2):
        made = write_part(tmp_path / "store", [slab], content)
        assert made.read(0, 1).toarray().tolist() == [[3]]
    assert read_generation(Folder(tmp_path / "store")).fingerprint == {"x": [1, 2]}
    assert (tmp_path / "store" / MARKER).exists()
