"""Exact search against a full sort in float64: also with ties, duplicates, offsets, and any block size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamx.errors import BadValuesError, ResourceError
from streamx.neighbors import exact, nearest
from streamx.neighbors.exact import ExactIndex


def full_sort(reference, query, k, own=None):
    squares = np.zeros((len(query), len(reference)))
    for j in range(reference.shape[1]):
        squares += (reference[None, :, j].astype(float) - query[:, None, j].astype(float)) ** 2
    if own is not None:
        squares[np.arange(len(query)), own] = np.inf
    order = np.argsort(squares, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(squares, order, axis=1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3000),
    d=st.integers(1, 12),
    k=st.integers(1, 60),
    grid=st.booleans(),
    offset=st.sampled_from([0.0, 3.0, 1e4]),
    block=st.sampled_from([16, 64, 512]),
)
def test_equals_full_sort(seed, n, d, k, grid, offset, block):
    rng = np.random.default_rng(seed)
    reference, query = rng.normal(size=(n, d)) + offset, rng.normal(size=(23, d)) + offset
    if grid:  # many equal distances and duplicates
        reference, query = np.round(reference), np.round(query)
    reference, query = reference.astype(np.float32), query.astype(np.float32)
    k = min(k, n)
    index = ExactIndex(reference, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK", block)
        indices, distances = index.search(query, k)
    expected, expected_distances = full_sort(reference, query, k)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(distances, expected_distances)


def test_many_tiles_and_sorted_clusters():
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(30, 8)) * 5
    reference = (np.repeat(centers, 700, axis=0) + rng.normal(size=(21_000, 8))).astype(np.float32)
    query = reference[rng.integers(len(reference), size=150)] + np.float32(0.01)
    for threads in (1, 2):
        indices, distances = ExactIndex(reference, threads=threads).search(query, 40)
        expected, expected_distances = full_sort(reference, query, 40)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_array_equal(distances, expected_distances)


def test_memory_changes_nothing_and_is_refused_when_too_small():
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(9000, 10)).astype(np.float32)
    large = ExactIndex(reference, threads=2, memory="2GB").search(reference[:777], 15)
    small = ExactIndex(reference, threads=2, memory="5MB").search(reference[:777], 15)
    np.testing.assert_array_equal(large[0], small[0])
    np.testing.assert_array_equal(large[1], small[1])
    with pytest.raises(ResourceError, match="fix:"):
        ExactIndex(reference, memory="100kB")


def test_a_reference_larger_than_memory_is_searched_in_pieces():
    rng = np.random.default_rng(2)
    reference = np.round(rng.normal(size=(9000, 4)) * 3).astype(np.float32)  # many equal distances
    index = ExactIndex(reference, threads=1, memory="2MB")
    assert len(list(index.pieces())) == 2
    own = np.arange(0, 9000, 60)
    query = reference[own].copy()
    query[3] = np.nan
    for mine in (None, own):
        whole = ExactIndex(reference, threads=1).search(query, 15, mine)
        np.testing.assert_array_equal(index.search(query, 15, mine)[0], whole[0])
        np.testing.assert_array_equal(index.search(query, 15, mine)[1], whole[1])


def test_self_is_left_out_also_among_duplicates():
    rng = np.random.default_rng(3)
    points = np.repeat(rng.normal(size=(40, 4)), 20, axis=0).astype(np.float32)
    found = nearest(points, n_neighbors=7)
    expected, distances = full_sort(points, points, 7, own=np.arange(len(points)))
    np.testing.assert_array_equal(found.indices_nm, expected)
    np.testing.assert_array_equal(found.distances_nm, distances)


def test_queries_without_a_latent_have_no_neighbours():
    rng = np.random.default_rng(4)
    reference, query = rng.normal(size=(50, 3)), rng.normal(size=(9, 3))
    query[[0, 4]] = np.nan
    query[7, 1] = np.inf
    found = nearest(reference, query, 5)
    assert (found.indices_nm[[0, 4, 7]] == -1).all()
    assert np.isnan(found.distances_nm[[0, 4, 7]]).all()
    keep = [1, 2, 3, 5, 6, 8]
    np.testing.assert_array_equal(found.indices_nm[keep], full_sort(reference, query[keep], 5)[0])
    with_own = nearest(reference, query, 5, own_m=np.full(9, -1))
    np.testing.assert_array_equal(with_own.indices_nm, found.indices_nm)


def test_fewer_cells_than_neighbours():
    points = np.eye(4)
    assert nearest(points, n_neighbors=15).indices_nm.shape == (4, 3)
    assert nearest(points[:1], n_neighbors=15).indices_nm.shape == (1, 0)
    assert nearest(points, points[:2], 15).indices_nm.shape == (2, 4)
    assert nearest(points, np.empty((0, 4)), 3).indices_nm.shape == (0, 3)


def test_bad_reference():
    with pytest.raises(BadValuesError, match="row 2"):
        nearest(np.array([[0.0], [1.0], [np.nan]]))
    with pytest.raises(BadValuesError, match="shape"):
        nearest(np.zeros((0, 3)))
    with pytest.raises(BadValuesError, match="dimensions"):
        nearest(np.zeros((5, 3)), np.zeros((5, 2)))


@pytest.mark.parametrize("scale", [1e16, 1e30, 1e-22, 1e-30])
def test_values_beyond_float32_products(scale):
    rng = np.random.default_rng(5)
    reference, query = rng.normal(size=(2000, 3)) * scale, rng.normal(size=(40, 3)) * scale
    reference[:50] = rng.normal(size=(50, 3))
    query[:5] = rng.normal(size=(5, 3))
    indices, distances = ExactIndex(reference).search(query, 30)
    expected, expected_distances = full_sort(reference, query, 30)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(distances, expected_distances)
