"""Models that other tools saved give the latents that those tools give; or the right ones."""

import tarfile
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scvi_cells import cells_of

from streamx.config import ScalexConfig, TrvaeConfig
from streamx.errors import BadFileError, UsageError
from streamx.interop.load import load_foreign
from streamx.interop.save import save_for_scvi_tools
from streamx.interop.scalex import write_checkpoint
from streamx.interop.scarches_trvae import write_trvae
from streamx.models.scalex import Scalex
from streamx.models.trvae import Trvae
from streamx.schema import Schema


@pytest.fixture(scope="module")
def checkpoints(fixtures_dir: Path) -> Path:
    return fixtures_dir / "checkpoints"


@pytest.fixture(scope="module")
def old_models(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that scvi-tools 0.8.0 saved."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(checkpoints / "scvidata_testing_models_080.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "testing_models"


def latents(folder: Path, data: anndata.AnnData) -> np.ndarray:
    loaded = load_foreign(folder)
    with torch.no_grad():
        return loaded.module.encode(cells_of(data, loaded.schema))[0].numpy()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("scvidata_0150_scvi", "SCVI_0150_input.h5ad", "SCVI_0150_latent.npy"),
        ("scvidata_0150_totalvi", "TOTALVI_0150_input.h5ad", "TOTALVI_0150_latent.npy"),
    ],
)
def test_latents_of_real_models(checkpoints: Path, name: str, data: str, expected: str) -> None:
    found = latents(checkpoints / name, anndata.read_h5ad(checkpoints / data))
    np.testing.assert_allclose(found, np.load(checkpoints / expected), atol=1e-5)


def test_latents_of_an_old_scvi(checkpoints: Path, old_models: Path) -> None:
    found = latents(old_models / "080_scvi", anndata.read_h5ad(checkpoints / "TOTALVI_0150_input.h5ad"))
    np.testing.assert_allclose(found, np.load(checkpoints / "080_scvi_latent.npy"), atol=1e-5)


def test_an_old_totalvi_gets_the_transform_it_was_trained_with(
    golden: Path, checkpoints: Path, old_models: Path
) -> None:
    """ln(1 + x). scvi-tools 1.4.2 loads the model and applies its own, later one: other latents.

    The file was made with the encoder of scvi-tools 1.4.2 on ln(1 + counts) and ln(1 + proteins).
    """
    found = latents(old_models / "080_totalvi", anndata.read_h5ad(checkpoints / "TOTALVI_0150_input.h5ad"))
    np.testing.assert_allclose(found, np.load(golden / "totalvi_080_latent.npy"), atol=1e-5)
    theirs = np.load(checkpoints / "080_totalvi_latent.npy")
    assert np.abs(found - theirs).max() > 0.5


def test_what_a_card_needs(checkpoints: Path) -> None:
    loaded = load_foreign(checkpoints / "scvitools_pre_logits_fix_scanvi")
    assert (loaded.kind, loaded.origin) == ("scanvi", "scvi-tools 1.0.3")
    assert loaded.schema.labels == ("label_2", "label_1")
    assert (loaded.schema.label_key, loaded.schema.unlabeled) == ("labels", "label_0")
    assert (loaded.schema.batches, loaded.schema.batch_key) == (("0",), None)
    assert not loaded.module.training
    assert not loaded.module.config.logits
    totalvi = load_foreign(checkpoints / "scvitools_exp_activation_totalvi")
    assert totalvi.schema.labels == ()
    assert len(totalvi.schema.proteins) == 100
    config = totalvi.module.config
    assert (config.input_transform, config.background_activation) == ("log1p", "exp")


def test_models_of_other_tools(tmp_path: Path) -> None:
    seed = torch.Generator().manual_seed(4)
    trvae = Trvae(5, 2, TrvaeConfig(hidden_layer_sizes=(4,), latent_dim=2), generator=seed)
    write_trvae(tmp_path / "trvae", trvae, list("abcde"), ["x", "y"], "study")
    scalex = Scalex(5, 2, ScalexConfig(n_hidden=4))
    write_checkpoint(tmp_path / "scalex" / "checkpoint", scalex, list("abcde"))
    found = load_foreign(tmp_path / "trvae")
    assert (found.kind, found.origin) == ("trvae", "scArches")
    assert found.schema == Schema(tuple("abcde"), batches=("x", "y"), batch_key="study")
    assert found.module.config.size_factor == "sum"
    assert load_foreign(tmp_path / "trvae", december_2020=True).module.config.size_factor == "log_sum"
    for name, value in trvae.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value), name
    other = load_foreign(tmp_path / "scalex")
    assert (other.kind, other.schema) == ("scalex", Schema(tuple("abcde")))
    with pytest.raises(UsageError, match="scvi-tools has no trVAE"):
        save_for_scvi_tools(tmp_path / "out", trvae, found.schema)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFileError, match="no model of scvi-tools, scArches or SCALEX"):
        load_foreign(tmp_path / "empty")


def test_what_scvi_tools_would_encode_otherwise_is_not_written(
    tmp_path: Path, checkpoints: Path, old_models: Path
) -> None:
    old = load_foreign(old_models / "080_totalvi")
    with pytest.raises(UsageError, match="input_transform = log1p"):
        save_for_scvi_tools(tmp_path / "out", old.module, old.schema)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("scvidata_0150_scvi", "SCVI_0150_input.h5ad"),
        ("scvidata_0150_totalvi", "TOTALVI_0150_input.h5ad"),
        ("scvitools_pre_logits_fix_scanvi", "scvitools_pre_logits_fix_scanvi/adata.h5ad"),
    ],
)
def test_written_for_scvi_tools_and_loaded_again(
    tmp_path: Path, checkpoints: Path, name: str, data: str
) -> None:
    first = load_foreign(checkpoints / name)
    save_for_scvi_tools(tmp_path, first.module, first.schema)
    again = load_foreign(tmp_path)
    assert again.schema == first.schema
    assert again.module.config == first.module.config
    cells = cells_of(anndata.read_h5ad(checkpoints / data), first.schema)
    for a, b in zip(first.module.encode(cells), again.module.encode(cells), strict=True):
        assert torch.equal(a, b)
