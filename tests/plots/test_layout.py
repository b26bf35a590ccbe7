"""UMAP of many cells: the sketch that it is fitted on, and how others are placed by it."""

from __future__ import annotations

import numpy as np
import pytest

from streamx import pl
from streamx.plots.layout import sketch_rows


def cells(n=3000, seed=0):
    """Three clusters far apart, one of them rare."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(3, size=n, p=[0.7, 0.29, 0.01])
    return (rng.normal(size=(n, 5)) + 30 * np.eye(3, 5)[codes]).astype(np.float32), codes


def test_sketch_holds_each_stratum_by_its_share_and_rare_ones_anyway():
    latent, codes = cells(20_000)
    latent[5] = np.nan
    rows = sketch_rows(latent, 1000, codes, seed=1)
    assert len(rows) == 1000
    assert (np.diff(rows) > 0).all()
    assert 5 not in rows
    counts = np.bincount(codes[rows])
    assert counts[2] >= 1000 // 30  # a tenth of a third, where its share would be 10
    np.testing.assert_allclose(counts[:2] / 1000, [0.7, 0.29], atol=0.04)
    np.testing.assert_array_equal(rows, sketch_rows(latent, 1000, codes, seed=1))
    assert (rows != sketch_rows(latent, 1000, codes, seed=2)).any()


@pytest.mark.parametrize("size", [1, 7, 100, 2999])
def test_sketch_has_the_size_asked_for(size):
    latent, _ = cells()
    strata = np.arange(3000) % 60
    strata[:2000] = 60
    assert len(sketch_rows(latent, size, strata)) == size
    assert len(sketch_rows(latent, size)) == size


def test_sketch_of_few_cells_is_all_with_a_latent():
    latent, codes = cells(50)
    latent[7] = np.inf
    np.testing.assert_array_equal(sketch_rows(latent, 50, codes), np.delete(np.arange(50), 7))


def test_placed_cells_move_nobody_and_land_in_their_cluster():
    latent, codes = cells(900)
    rest, other = cells(400, seed=1)
    rest[0] = np.nan
    fitted = pl.umap(latent, seed=2)
    before = fitted.copy()
    placed = pl.place(rest, latent, fitted)
    np.testing.assert_array_equal(fitted, before)
    assert np.isnan(placed[0]).all()
    assert np.isfinite(placed[1:]).all()
    nearest = np.linalg.norm(placed[1:, None] - fitted[None], axis=2).argmin(axis=1)
    assert (codes[nearest] == other[1:]).all()
    np.testing.assert_array_equal(placed, pl.place(rest, latent, fitted, threads=1))
    half = pl.place(rest[200:], latent, fitted)  # where a cell goes doesn't depend on who comes with it
    np.testing.assert_array_equal(half, placed[200:])


def test_memory_mapped_latents_give_the_same(tmp_path):
    latent, codes = cells(700)
    np.save(tmp_path / "latent.npy", latent)
    mapped = np.load(tmp_path / "latent.npy", mmap_mode="r")
    settings = {"sketch": 300, "strata": codes, "seed": 4}
    np.testing.assert_array_equal(pl.umap(mapped, **settings), pl.umap(latent, **settings))
