"""Cells of two modalities, whose latents have another middle, spread and length, by their direction."""

from __future__ import annotations

import numpy as np
import pytest

from streamx.errors import UsageError
from streamx.transfer import directions, transfer_labels


def test_two_modalities_meet() -> None:
    """The same types, shrunk towards another place, and each cell by how little was seen of it."""
    rng = np.random.default_rng(0)
    type_n = np.repeat(np.arange(5), 60)
    corner_tk = 4 * np.eye(5, 6)
    rna = corner_tk[type_n] + rng.normal(size=(300, 6))
    atac = corner_tk[type_n] + rng.normal(size=(300, 6))
    atac -= atac.mean(axis=0)
    atac = 0.3 * atac * rng.uniform(0.1, 1, size=(300, 1)) * np.array([1, 2, 1, 0.5, 1, 1]) + 3
    both = directions(np.concatenate([rna, atac]), ["RNA"] * 300 + ["ATAC"] * 300)
    assert both.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)
    found = transfer_labels(both[:300], type_n.astype(str), both[300:]).labels_n == type_n.astype(str)
    plain = transfer_labels(rna, type_n.astype(str), atac).labels_n == type_n.astype(str)
    assert found.mean() > 0.95
    assert plain.mean() < 0.5


def test_by_hand() -> None:
    z = np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0]])
    found = directions(z)
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [np.nan, np.nan]], rtol=1e-6)
    z = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 7.0], [10.0, 0.0]])
    found = directions(z, ["a", "a", "a", "b"])  # one dimension of a and all of b do not vary
    np.testing.assert_allclose(found, [[-1, 0], [1, 0], [np.nan, np.nan], [0, 0]], atol=1e-6)
    assert z[0, 0] == 1  # what was given stays


def test_every_cell_has_a_batch() -> None:
    with pytest.raises(UsageError, match="1 batches of 2 cells"):
        directions(np.ones((2, 3)), ["a", None])
    with pytest.raises(UsageError, match="3 batches of 2 cells"):
        directions(np.ones((2, 3)), ["a", "a", "a"])
