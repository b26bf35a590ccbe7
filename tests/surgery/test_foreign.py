"""Models of other tools as references: projection gives their latents, surgery extends them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import streamx as sx
from streamx.errors import UsageError
from streamx.mapping import read_reference
from streamx.train.model import load_model


def test_scvi_tools_model_maps_and_learns(fixtures_dir: Path, tmp_path: Path) -> None:
    """A model that scvi-tools 0.15 saved, and the latents that its own package gives."""
    saved = fixtures_dir / "checkpoints" / "scvidata_0150_scvi"
    cells = ad.read_h5ad(fixtures_dir / "checkpoints" / "SCVI_0150_input.h5ad")
    model = load_model(saved)
    cells.var_names = list(model.genes)
    options = {"batch_key": "batch", "min_features": 0}
    sx.project(model, {"q": cells}, tmp_path / "out", **options)
    wanted = np.load(fixtures_dir / "checkpoints" / "SCVI_0150_latent.npy")
    np.testing.assert_allclose(ad.read_zarr(tmp_path / "out/q.zarr").obsm["X_scvi"], wanted, atol=1e-5)

    new = cells.copy()
    new.obs["batch"] = "new"
    with pytest.warns(match="sees no batches"):
        reports = sx.surgery(saved, {"known": cells, "new": new}, tmp_path / "u", max_epochs=2, **options)
    assert [list(report["learnt"]) for report in reports] == [[], ["new"]]
    reference = read_reference(tmp_path / "u")
    assert reference.n_cells == 800
    np.testing.assert_allclose(reference.latent_nk[:400], wanted, atol=1e-5)
    assert load_model(tmp_path / "u").batches == ("batch_0", "batch_1", "new")
    assert sx.verify(tmp_path / "u")["ok"]


def test_refit_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamx.surgery import run

    monkeypatch.setattr(run, "load_model", lambda place: None)
    monkeypatch.setattr(run, "_check", lambda model, options: None)
    monkeypatch.setattr("streamx.store.folder.Folder.shared", True)
    with pytest.raises(UsageError, match="does not do in a bucket"):
        run.surgery(tmp_path, ad.AnnData(np.ones((1, 1))), tmp_path / "u", refit=True)
