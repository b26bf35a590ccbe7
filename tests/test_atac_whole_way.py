"""ATAC by SCALEX from peaks to latents: a query's cells get what the same cells got in the reference."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch  # noqa: F401  (the file is skipped where it is not installed)

import streamx as sx


@pytest.mark.parametrize("variant", ["0.2.0", "1.0.2", "1.0.4"])
def test_the_reference_mapped_onto_itself(tmp_path: Path, variant: str) -> None:
    shape = {"n_cells": 300, "n_genes": 400, "n_batches": 2, "n_types": 3, "depth": 150, "seed": 5}
    files = sx.simulate(tmp_path / "files", features="peaks", format="h5ad", threads=1, **shape)
    store = sx.convert(files, tmp_path / "store", batch_key="batch", threads=1)
    settings = {"min_features": 55, "n_top_features": 200, "threads": 1}
    view = sx.preprocess(store, tmp_path / "view", profile="ATAC", atac=variant, **settings)
    assert 0 < view.n_obs < 300
    assert 200 <= view.n_vars < 400
    sx.train(view, tmp_path / "model", max_iteration=30, norm="running", progress=False)
    reference = anndata.read_zarr(tmp_path / "model" / "reference.zarr")
    # one query of both files; its own maxima are those of the reference
    queries = {"all": [str(path) for path in files]}
    own = {"batch_key": "batch", "norm": "running", "scale": "query", "min_query_cells": 1}
    sx.project(tmp_path / "model", queries, tmp_path / "out", drop_filtered=True, progress=False, **own)
    mapped = anndata.read_zarr(tmp_path / "out" / "all.zarr")
    assert set(mapped.obs_names) == set(reference.obs_names)
    latent = mapped[reference.obs_names].obsm["X_scalex"]
    np.testing.assert_allclose(latent, reference.obsm["X_scalex"], atol=1e-5)
