"""scvi-tools 1.4.2 itself: its models loaded by us, ours by it, with equal latents."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scvi_cells import cells_of

from streamx.config import ScanviConfig, ScviConfig, TotalviConfig
from streamx.interop.load import load_foreign
from streamx.interop.save import save_for_scvi_tools
from streamx.models.scanvi import Scanvi
from streamx.models.scvi import Scvi
from streamx.models.totalvi import Totalvi
from streamx.schema import Schema

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

ARCHES = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}


def peer() -> Any:
    """scvi-tools' models; imported where a test runs, not where tests are collected."""
    return pytest.importorskip("scvi").model


def cells(seed: int = 0, studies: str = "xyz", n: int = 90) -> anndata.AnnData:
    """Counts of 25 genes and 4 proteins, of which study z lacks one."""
    rng = np.random.default_rng(seed)
    data = anndata.AnnData(rng.poisson(1.5, (n, 25)).astype(np.float32))
    data.var_names = [f"g{i}" for i in range(25)]
    data.obs["study"] = pd.Categorical(np.resize(list(studies), n))
    data.obs["type"] = pd.Categorical(rng.choice(["T", "B", "?"], n))
    data.obs["donor"] = pd.Categorical(rng.choice(["1", "2", "3"], n))
    data.obs["one"] = pd.Categorical(["1"] * n)
    data.obs["age"] = rng.normal(size=n).astype(np.float32)
    proteins = rng.poisson(5, (n, 4)).astype(np.float32)
    proteins[data.obs["study"] == "z", 2] = 0
    data.obsm["adt"] = pd.DataFrame(proteins, index=data.obs_names, columns=["CD3", "CD4", "CD8", "CD19"])
    data.layers["counts"] = data.X.copy()
    return data


def scvi_model(data: anndata.AnnData, **settings: Any) -> Any:
    peer().SCVI.setup_anndata(data, batch_key="study")
    return peer().SCVI(data, n_hidden=16, n_latent=4, **settings)


def with_covariates(data: anndata.AnnData, **settings: Any) -> Any:
    peer().SCVI.setup_anndata(
        data,
        layer="counts",
        batch_key="study",
        labels_key="type",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    return peer().SCVI(data, n_hidden=16, n_latent=4, **settings)


def without_batches(data: anndata.AnnData) -> Any:
    peer().SCVI.setup_anndata(data)
    return peer().SCVI(data, n_hidden=16, n_latent=4, dispersion="gene-cell", gene_likelihood="nb")


def scanvi_model(data: anndata.AnnData, **settings: Any) -> Any:
    peer().SCANVI.setup_anndata(data, labels_key="type", unlabeled_category="?", batch_key="study")
    return peer().SCANVI(data, n_hidden=16, n_latent=4, **settings)


def totalvi_model(data: anndata.AnnData, **settings: Any) -> Any:
    peer().TOTALVI.setup_anndata(data, protein_expression_obsm_key="adt", batch_key="study")
    return peer().TOTALVI(data, n_latent=4, **settings)


MODELS: dict[str, Callable[[anndata.AnnData], Any]] = {
    "scvi": scvi_model,
    "scvi arches": lambda data: scvi_model(data, **ARCHES),
    "scvi gene-batch, latent library": lambda data: scvi_model(
        data, dispersion="gene-batch", use_observed_lib_size=False
    ),
    "scvi without batches": without_batches,
    "scvi covariates": with_covariates,
    "scvi covariates in the encoder": lambda data: with_covariates(data, encode_covariates=True, n_layers=2),
    "scanvi": scanvi_model,
    "scanvi arches": lambda data: scanvi_model(data, **ARCHES),
    "scanvi linear": lambda data: scanvi_model(data, linear_classifier=True),
    "totalvi": totalvi_model,
    "totalvi zinb": lambda data: totalvi_model(
        data, gene_likelihood="zinb", protein_dispersion="protein-batch"
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_scvi_tools_encodes_to_its_latents(tmp_path: Path, name: str) -> None:
    data = cells()
    torch.manual_seed(1)
    model = MODELS[name](data)
    model.train(2, **QUIET)
    model.save(str(tmp_path), prefix="p_", overwrite=True)
    loaded = load_foreign(tmp_path)
    assert loaded.kind == name.split(" ", 1)[0]
    assert loaded.schema.genes == tuple(data.var_names)
    given = cells_of(data, loaded.schema)
    with torch.no_grad():
        mean, _ = loaded.module.encode(given)
        np.testing.assert_allclose(mean, model.get_latent_representation(), atol=1e-5)
        if loaded.kind == "scanvi":
            soft = model.predict(soft=True)
            assert loaded.schema.labels == tuple(soft.columns)
            np.testing.assert_allclose(loaded.module.predict(given), soft, atol=1e-5)
    if loaded.kind == "totalvi":
        assert loaded.module.measured_bp.tolist()[2] == [True, True, False, True]


@pytest.mark.parametrize("name", ["scvi arches", "scanvi arches", "totalvi"])
def test_a_query_model_of_scvi_tools(tmp_path: Path, name: str) -> None:
    """After surgery: the new batches are the last ones."""
    data, query = cells(), cells(1, "wv")
    torch.manual_seed(1)
    reference = MODELS[name](data)
    reference.train(1, **QUIET)
    model = type(reference).load_query_data(query, reference)
    model.train(2, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    model.save(str(tmp_path), overwrite=True)
    loaded = load_foreign(tmp_path)
    assert loaded.schema.batches == ("x", "y", "z", "v", "w")
    with torch.no_grad():
        mean, _ = loaded.module.encode(cells_of(query, loaded.schema))
    np.testing.assert_allclose(mean, model.get_latent_representation(), atol=1e-5)


def test_data_in_modalities(tmp_path: Path) -> None:
    mudata = pytest.importorskip("mudata")
    data = cells()
    both = mudata.MuData({"rna": data.copy(), "adt": anndata.AnnData(data.obsm["adt"])})
    both.obs["study"] = data.obs["study"]
    peer().TOTALVI.setup_mudata(
        both, batch_key="study", modalities={"rna_layer": "rna", "protein_layer": "adt"}
    )
    model = peer().TOTALVI(both, n_latent=4)
    model.train(1, **QUIET)
    for legacy in (False, True):
        model.save(str(tmp_path), overwrite=True, legacy_mudata_format=legacy)
        loaded = load_foreign(tmp_path)
        assert loaded.schema.genes == tuple(data.var_names)
        assert loaded.schema.proteins == ("CD3", "CD4", "CD8", "CD19")
        with torch.no_grad():
            mean, _ = loaded.module.encode(cells_of(data, loaded.schema))
        np.testing.assert_allclose(mean, model.get_latent_representation(), atol=1e-5)


SCHEMA = Schema(
    genes=tuple(f"g{i}" for i in range(25)), batches=("z", "x", "y"), batch_key="study"
)  # not in the order of the alphabet
CATEGORIES = (("one", ("1",)), ("donor", ("3", "1", "2")), ("type", ("T", "?", "B")))
COVARIATES = {"categories": CATEGORIES, "continuous": ("age",)}
LABELS = {"labels": ("T", "B"), "label_key": "type", "unlabeled": "?"}
PROTEINS = {"proteins": ("CD3", "CD4", "CD8", "CD19"), "protein_key": "adt"}
SMALL: dict[str, Any] = {"n_hidden": 16, "n_latent": 4}
Ours = tuple[torch.nn.Module, Schema]


def ours_scvi(**settings: Any) -> Ours:
    return Scvi(25, 3, ScviConfig(**SMALL | settings)), SCHEMA


def ours_with_covariates(**settings: Any) -> Ours:
    module = Scvi(25, 3, ScviConfig(**SMALL | settings), n_levels=(1, 3, 3), n_continuous=1)
    return module, Schema(**vars(SCHEMA) | COVARIATES)


def ours_scanvi(config: ScanviConfig | None = None, **settings: Any) -> Ours:
    vae = Scvi(25, 3, ScviConfig(**SMALL | settings))
    return Scanvi(vae, 2, config), Schema(**vars(SCHEMA) | LABELS)


def ours_totalvi(**settings: Any) -> Ours:
    measured = np.ones((3, 4), dtype=bool)
    measured[0, 2] = False
    config = TotalviConfig(**SMALL | {"input_transform": "scaled"} | settings)
    module = Totalvi(25, 3, config, n_proteins=4, measured_bp=measured)
    return module, Schema(**vars(SCHEMA) | PROTEINS)


WRITTEN: dict[str, Callable[[], Ours]] = {
    "scvi": ours_scvi,
    "scvi arches": lambda: ours_scvi(**ARCHES),
    "scvi nb, gene-batch": lambda: ours_scvi(gene_likelihood="nb", dispersion="gene-batch"),
    "scvi ln": lambda: ours_scvi(latent_distribution="ln", log_variational=False),
    "scvi covariates": lambda: ours_with_covariates(encode_covariates=True, n_layers=2),
    "scanvi": ours_scanvi,
    "scanvi arches": lambda: ours_scanvi(**ARCHES),
    "scanvi linear": lambda: ours_scanvi(ScanviConfig(linear_classifier=True)),
    "scanvi without logits": lambda: ours_scanvi(ScanviConfig(logits=False)),
    "totalvi": ours_totalvi,
    "totalvi exp": lambda: ours_totalvi(background_activation="exp", per_batch_efficiency=True),
    "totalvi layers": lambda: ours_totalvi(n_layers_encoder=1, n_layers_decoder=2, encode_covariates=False),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_scvi_tools_reads_a_folder_of_ours(tmp_path: Path, name: str) -> None:
    data = cells()
    module, schema = WRITTEN[name]()
    kind = name.split(" ", 1)[0]
    save_for_scvi_tools(tmp_path, module.eval(), schema)
    model = getattr(peer(), kind.upper()).load(str(tmp_path), data, accelerator="cpu")
    given = cells_of(data, schema)
    with torch.no_grad():
        mean, _ = module.encode(given)  # type: ignore[operator]
        if name == "scvi ln":  # there the mean is one of samples of the softmax
            inputs = {"x": given.x_ng, "batch_index": given.batch_n[:, None]}
            want = model.module.inference(**inputs)["qz"].loc
        else:
            want = model.get_latent_representation()
        np.testing.assert_allclose(mean, want, atol=1e-5)
        if kind == "scanvi":
            soft = model.predict(soft=True)
            assert tuple(soft.columns) == schema.labels
            np.testing.assert_allclose(module.predict(given), soft, atol=1e-5)  # type: ignore[operator]
    if not schema.categories:  # whose levels are written in another order
        again = load_foreign(tmp_path).module.state_dict()
        assert all(torch.equal(again[key], value) for key, value in module.state_dict().items())
    model.train(1, **QUIET)  # complete enough to go on with


def test_a_real_scanvi_from_before_its_classifier_gave_logits(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "checkpoints" / "scvitools_pre_logits_fix_scanvi"
    model = peer().SCANVI.load(str(folder), accelerator="cpu")
    loaded = load_foreign(folder)
    given = cells_of(model.adata, loaded.schema)
    soft = model.predict(soft=True)
    assert loaded.schema.labels == tuple(soft.columns)
    with torch.no_grad():
        np.testing.assert_allclose(
            loaded.module.encode(given)[0], model.get_latent_representation(), atol=1e-5
        )
        np.testing.assert_allclose(loaded.module.predict(given), soft, atol=1e-5)


@pytest.mark.parametrize("folder", ["scvitools_exp_activation_totalvi", "testing_models/080_totalvi"])
def test_real_totalvis_with_the_older_transform(fixtures_dir: Path, tmp_path: Path, folder: str) -> None:
    """scvi-tools' own network on ln(1 + x), which is what these were trained on; its methods scale first."""
    checkpoints = fixtures_dir / "checkpoints"
    data = anndata.read_h5ad(checkpoints / "TOTALVI_0150_input.h5ad")
    path, converted = checkpoints / folder, checkpoints / folder
    if "080" in folder:
        with tarfile.open(checkpoints / "scvidata_testing_models_080.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
        path, converted = tmp_path / folder, tmp_path / "converted"
        peer().TOTALVI.convert_legacy_save(str(path), str(converted))
        data.var_names = [str(i) for i in range(100)]
    else:  # scvi-tools 1.4.2 can't load it: it has no efficiencies
        data, converted = anndata.read_h5ad(path / "adata.h5ad"), tmp_path
        content = torch.load(path / "model.pt", map_location="cpu", weights_only=False)
        weights = content["model_state_dict"]
        weights["log_per_batch_efficiency"] = torch.zeros_like(weights["background_pro_alpha"])
        torch.save(content, tmp_path / "model.pt")
    model = peer().TOTALVI.load(str(converted), data, accelerator="cpu")
    loaded = load_foreign(path)
    given = cells_of(data, loaded.schema)
    assert isinstance(given.x_ng, torch.Tensor)
    assert given.protein_np is not None
    inputs = torch.cat([given.x_ng.log1p(), given.protein_np.log1p()], 1)
    with torch.no_grad():
        encoder = model.module.encoder
        want = encoder.z_mean_encoder(encoder.encoder(inputs, given.batch_n[:, None]))
        np.testing.assert_allclose(loaded.module.encode(given)[0], want, atol=1e-5)
