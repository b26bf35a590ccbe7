"""Statistics merge in any grouping, and no bit of a pass depends on threads, slabs or the scheduler."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_sparse

from streamx.cluster import active_client
from streamx.errors import ResourceError
from streamx.preprocess import passes
from streamx.preprocess.moments import Moments, mean_variance, merge, no_moments, pool, recode, select
from streamx.preprocess.passes import (
    Clipping,
    Counting,
    Magnitudes,
    Normalising,
    Pass,
    Resources,
    plan_resources,
    run_pass,
    runs_of,
)
from streamx.preprocess.rows import MatrixRows

N_GENES = 6


@st.composite
def moments(draw: st.DrawFn) -> Moments:
    codes = sorted(draw(st.sets(st.integers(0, 5), max_size=4)))
    numbers = st.integers(0, 2**20)
    table = np.array(
        draw(st.lists(numbers, min_size=len(codes) * N_GENES * 4, max_size=len(codes) * N_GENES * 4)), float
    )
    n_b = draw(st.lists(st.integers(1, 1000), min_size=len(codes), max_size=len(codes)))
    return Moments(np.array(codes, np.int64), np.array(n_b, np.int64), table.reshape(len(codes), N_GENES, 4))


def same(a: Moments, b: Moments) -> None:
    np.testing.assert_array_equal(a.code_b, b.code_b)
    np.testing.assert_array_equal(a.n_b, b.n_b)
    np.testing.assert_array_equal(a.table_bg4, b.table_bg4)


@given(moments(), moments(), moments())
def test_merging_counts_is_associative_and_commutative(a: Moments, b: Moments, c: Moments) -> None:
    same(merge([merge([a, b]), c]), merge([a, merge([b, c])]))
    same(merge([a, b, c]), merge([c, a, b]))
    same(merge([a, no_moments(N_GENES)]), a)
    same(pool(merge([a, b])), pool(merge([pool(a), pool(b)])))


@given(st.lists(moments(), min_size=1, max_size=4), st.permutations(range(6)))
def test_recoding_commutes_with_merging(parts: list[Moments], order: list[int]) -> None:
    new = np.array(order)
    same(recode(merge(parts), new[merge(parts).code_b]), merge([recode(p, new[p.code_b]) for p in parts]))


@given(st.lists(st.integers(0, 3), max_size=30))
def test_runs(codes: list[int]) -> None:
    runs = runs_of(np.array(codes, np.int64))
    assert [i for a, b in runs for i in range(a, b)] == list(range(len(codes)))
    assert all(len({codes[i] for i in range(a, b)}) == 1 for a, b in runs)
    assert all(codes[b - 1] != codes[b] for _, b in runs[:-1])


def test_variance_of_one_cell_is_zero() -> None:
    mean, variance = mean_variance(1, np.array([3.0, 0.0]), np.array([9.0, 0.0]))
    np.testing.assert_array_equal(mean, [3, 0])
    np.testing.assert_array_equal(variance, [0, 0])


def block(n: int = 1000, n_genes: int = 50, seed: int = 0) -> csr_matrix:
    rng = np.random.default_rng(seed)
    x_ng = random_sparse(n, n_genes, 0.2, format="csr", random_state=rng, dtype=np.float32)
    x_ng.data[:] = rng.integers(1, 60_000, x_ng.nnz)
    return csr_matrix(x_ng)


KEEP = np.arange(50) % 7 != 0
PASSES: dict[str, Pass] = {
    "counting": Counting(KEEP, 8),
    "linear": Normalising(KEEP, 1e4),
    "log": Normalising(KEEP, 1e4, log=True),
    "binary": Normalising(KEEP, 1e4, binarize=True),
    "clipping": Clipping(KEEP, 1e4, {b: np.full(50, 3e4 + b) for b in range(4)}),
    "magnitudes": Magnitudes(),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_nothing_depends_on_threads_or_slabs(
    monkeypatch: pytest.MonkeyPatch, name: str, interleaved: bool
) -> None:
    monkeypatch.setattr(passes, "TASK_ROWS", 127)
    x_ng = block()
    code_n = np.arange(1000) % 4 if interleaved else np.repeat(np.arange(4), 250)
    admitted_n = np.random.default_rng(1).random(1000) < 0.8
    admitted_n[300:500] = False
    pieces = [
        run_pass(MatrixRows(x_ng), code_n, admitted_n, PASSES[name], resources=Resources(threads, slab))[0]
        for threads, slab in [(1, 4096), (1, 1), (2, 13), (5, 64)]
    ]
    for piece in pieces[1:]:
        same(piece.moments, pieces[0].moments)
        np.testing.assert_array_equal(piece.cell_n, pieces[0].cell_n)


def test_statistics_are_right() -> None:
    x_ng, code_n = block(), np.repeat(np.arange(4), 250)
    everyone = np.ones(1000, bool)
    counted, values = run_pass(
        MatrixRows(x_ng), code_n, everyone, PASSES["counting"], PASSES["linear"], resources=Resources()
    )
    dense = x_ng.toarray().astype(float) * KEEP
    n_features = (dense > 0).sum(1)
    kept = n_features >= 8
    np.testing.assert_array_equal(counted.cell_n, n_features)
    np.testing.assert_allclose(values.cell_n, np.where(kept, dense.sum(1), np.nan))
    scaled = dense / np.maximum(dense.sum(1, keepdims=True), 1) * 1e4
    for code in range(4):
        mine = kept & (code_n == code)
        assert counted.moments.n_b[code] == values.moments.n_b[code] == mine.sum()
        np.testing.assert_array_equal(counted.moments.sum_bg[code], dense[mine].sum(0))
        np.testing.assert_array_equal(counted.moments.squares_bg[code], (dense[mine] ** 2).sum(0))
        np.testing.assert_array_equal(counted.moments.detected_bg[code], (dense[mine] > 0).sum(0))
        np.testing.assert_allclose(values.moments.sum_bg[code], scaled[mine].sum(0))
        np.testing.assert_allclose(values.moments.squares_bg[code], (scaled[mine] ** 2).sum(0))
        np.testing.assert_allclose(values.moments.max_bg[code], scaled[mine].max(0))
    same(select(counted.moments, np.arange(50)), counted.moments)


def test_few_tables_wait_to_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 tasks' tables, two at each of the two levels; not the eight of a group."""
    monkeypatch.setattr(passes, "TASK_ROWS", 16)
    n_genes = 50_000
    x_ng = random_sparse(256, n_genes, density=1e-3, format="csr", dtype=np.float32, random_state=0)
    everyone, table = np.ones(256, bool), n_genes * 4 * 8
    counting = Counting(np.ones(n_genes, bool), 0)
    run_pass(MatrixRows(x_ng), everyone.astype(int), everyone, counting, resources=Resources())  # compiled
    tracemalloc.start()
    (piece,) = run_pass(MatrixRows(x_ng), everyone.astype(int), everyone, counting, resources=Resources())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert piece.moments.n_b.tolist() == [256]
    assert peak < 6 * table


def test_empty_cells_and_no_cells() -> None:
    x_ng = csr_matrix((3, 50), dtype=np.float32)
    (piece,) = run_pass(
        MatrixRows(x_ng), np.zeros(3, int), np.ones(3, bool), PASSES["linear"], resources=Resources()
    )
    np.testing.assert_array_equal(piece.cell_n, [0, 0, 0])
    assert not piece.moments.table_bg4.any()
    (piece,) = run_pass(
        MatrixRows(x_ng[:0]), np.zeros(0, int), np.ones(0, bool), PASSES["linear"], resources=Resources()
    )
    assert len(piece.cell_n) == len(piece.moments.code_b) == 0


def test_large_counts_stay_exact() -> None:
    """Beyond 2**24, where float32 would round: such values come as integers or float64."""
    x_ng = csr_matrix(np.array([[2**24 + 1, 3]], dtype=np.uint32))
    (piece,) = run_pass(
        MatrixRows(x_ng),
        np.zeros(1, int),
        np.ones(1, bool),
        Counting(np.ones(2, bool), 0),
        resources=Resources(),
    )
    assert piece.moments.sum_bg[0, 0] == 2**24 + 1


@settings(max_examples=30)
@given(
    st.integers(20, 5000), st.integers(1, 40_000), st.integers(1, 50), st.integers(0, 8), st.integers(26, 36)
)
def test_resources_fit_into_the_memory(
    nnz: int, n_genes: int, n_batches: int, threads: int, memory_bits: int
) -> None:
    memory = 1 << memory_bits
    try:
        plan = plan_resources(nnz, n_genes, n_batches, memory=memory, threads=threads)
    except ResourceError as error:
        needed = int(str(error.fix).split()[1].removesuffix("MB")) * 1_000_000
        assert needed > memory
        plan_resources(nnz, n_genes, n_batches, memory=needed, threads=threads)
        return
    assert 1 <= plan.threads <= (threads or 1024)
    assert 256 <= plan.slab_rows <= 4096


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_client_is_used() -> None:
    distributed = pytest.importorskip("distributed")
    x_ng, code_n, everyone = block(), np.repeat(np.arange(4), 250), np.ones(1000, bool)
    (here,) = run_pass(MatrixRows(x_ng), code_n, everyone, PASSES["linear"], resources=Resources())
    assert active_client() is None
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None):
        assert active_client() is not None
        (there,) = run_pass(MatrixRows(x_ng), code_n, everyone, PASSES["linear"], resources=Resources())
    same(here.moments, there.moments)
