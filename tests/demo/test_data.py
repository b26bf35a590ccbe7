"""The embedded data: small, licensed, and what their source file gives."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np

from streamx.demo import DATA, QUERY, REFERENCE
from streamx.demo.cut import cut


def test_small_and_licensed() -> None:
    files = sorted(path.name for path in DATA.glob("*.h5ad"))
    assert files == sorted([*(f"{name}.h5ad" for name in REFERENCE), f"{QUERY}.h5ad"])
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 4_000_000
    assert "MIT License" in (DATA / "LICENSE.txt").read_text()
    assert "GSE118767" in (DATA / "SOURCE.md").read_text()


def test_raw_counts_with_true_lines() -> None:
    n_cells = 0
    for path in sorted(DATA.glob("*.h5ad")):
        adata = anndata.read_h5ad(path)
        n_cells += adata.n_obs
        assert adata.n_vars == 5_000
        assert adata.X.dtype == np.uint16
        assert (adata.X > 0).sum(axis=1).min() >= 600  # SCALEX's documented min_features removes no cell
        assert set(adata.obs["cell_line"]) <= {"A549", "H1975", "H2228", "H838", "HCC827"}
    assert n_cells == 1_408


def test_cut_again_gives_the_same(data_dir: Path, tmp_path: Path) -> None:
    for path in cut(data_dir / "cellbench_5batch.h5ad", tmp_path):
        ours, again = anndata.read_h5ad(DATA / path.name), anndata.read_h5ad(path)
        assert np.array_equal(ours.X, again.X)
        assert ours.obs.equals(again.obs)
        assert list(ours.var_names) == list(again.var_names)
