"""Folders of scvi-tools: real ones of five releases, and small ones of every layout."""

import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from streamx.errors import BadFileError, UsageError
from streamx.interop.scvi_files import Saved, read_scvi
from streamx.interop.scvi_write import write_scvi


@pytest.fixture(scope="module")
def checkpoints(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real folders side by side, those of 0.8 under ``testing_models``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for path in (fixtures_dir / "checkpoints").iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
    with tarfile.open(fixtures_dir / "checkpoints" / "scvidata_testing_models_080.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


REAL = {
    "testing_models/080_scvi": ("scvi", "0.0.0", 2, 3, 0),
    "testing_models/080_totalvi": ("totalvi", "0.0.0", 2, 3, 100),
    "scvidata_0150_scvi": ("scvi", "0.15.5", 2, 3, 0),
    "scvitools_pre_logits_fix_scanvi": ("scanvi", "1.0.3", 1, 2, 0),
    "scvitools_exp_activation_totalvi": ("totalvi", "1.1.5", 2, 1, 100),
    "scvidata_0150_totalvi": ("totalvi", "1.3.2", 2, 1, 100),
}


@pytest.mark.parametrize("name", REAL)
def test_real_folders(checkpoints: Path, name: str) -> None:
    saved = read_scvi(checkpoints / name)
    n_batches = 2 if REAL[name][2] == 2 else 1
    assert (saved.kind, saved.version) == REAL[name][:2]
    assert len(saved.batches) == n_batches
    assert len(saved.labels) == REAL[name][3]
    assert len(saved.proteins) == REAL[name][4]
    assert len(saved.genes) == 100
    assert all(isinstance(value, torch.Tensor) for value in saved.weights.values())
    assert saved.settings["n_latent"] == (
        10 if name != "testing_models/080_totalvi" and "exp" not in name else 20
    )
    assert "use_cuda" not in saved.settings
    assert (saved.settings["n_cats_per_cov"], saved.settings["n_continuous_cov"]) == ([], 0)


def test_details_of_real_folders(checkpoints: Path) -> None:
    old = read_scvi(checkpoints / "testing_models/080_totalvi")
    assert old.batches == ["batch_0", "batch_1"]
    assert (old.batch_key, old.label_key) == ("batch", "labels")
    assert (old.proteins[:2], old.protein_key) == (["0", "1"], "protein_expression")
    assert old.settings["empirical_protein_background_prior"] is True
    assert old.protein_mask_bp is None
    scanvi = read_scvi(checkpoints / "scvitools_pre_logits_fix_scanvi")
    assert scanvi.labels == ["label_2", "label_1"]
    assert (scanvi.label_key, scanvi.unlabeled) == ("labels", "label_0")
    assert (scanvi.batches, scanvi.batch_key) == (["0"], None)
    later = read_scvi(checkpoints / "scvidata_0150_totalvi")
    assert "log_per_batch_efficiency" in later.weights
    assert "pyro_param_store" not in later.weights
    assert later.genes[:2] == ["gene_0", "gene_1"]


@pytest.mark.parametrize(
    ("name", "kind"), [("scvitools_mrvi_model", "TorchMRVI"), ("scvitools_condscvi_pre_batch", "CondSCVI")]
)
def test_other_classes_are_refused_by_name(checkpoints: Path, name: str, kind: str) -> None:
    with pytest.raises(BadFileError, match=f"a {kind} model") as caught:
        read_scvi(checkpoints / name)
    assert caught.value.fix == "give one of SCVI, SCANVI, TOTALVI"


def saved_scvi(**parts: Any) -> Saved:
    """A model of five genes; of its weights those that reading looks at."""
    weights = {
        "px_r": torch.zeros(5),
        "z_encoder.mean_encoder.weight": torch.zeros(2, 3),
        "decoder.px_scale_decoder.0.weight": torch.zeros(5, 3),
        "decoder.px_scale_decoder.0.bias": torch.zeros(5),
    }
    given: dict[str, Any] = {
        "kind": "scvi",
        "version": "1.4.2",
        "weights": weights,
        "settings": {"n_latent": 2, "n_hidden": 3, "use_layer_norm": "both"},
        "genes": list("abcde"),
        "batches": ["x", "y"],
        "batch_key": "study",
    }
    return Saved(**given | parts)


def saved_totalvi(**parts: Any) -> Saved:
    weights = {
        "px_r": torch.zeros(5),
        "background_pro_alpha": torch.zeros(3, 2),
        "decoder.px_scale_decoder.fc_layers.Layer 0.0.bias": torch.zeros(5),
    }
    given: dict[str, Any] = {"kind": "totalvi", "weights": weights, "proteins": ["CD3", "CD4", "CD8"]}
    return saved_scvi(**given | {"protein_key": "adt"} | parts)


WRITTEN = {
    "plain": saved_scvi(),
    "no batch": saved_scvi(batches=["0"], batch_key=None),
    "covariates": saved_scvi(
        categories={"donor": ["1", "2", "3"], "sex": ["f", "m"]}, continuous=["age"], layer="counts"
    ),
    "labels": saved_scvi(labels=["T", "B"], label_key="type"),
    "scanvi": saved_scvi(
        kind="scanvi",
        weights=saved_scvi().weights | {"y_prior": torch.zeros(1, 2)},
        labels=["T", "B"],
        label_key="type",
        unlabeled="?",
    ),
    "totalvi": saved_totalvi(),
    "missing proteins": saved_totalvi(protein_mask_bp=np.array([[True, True, True], [True, False, True]])),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_and_read_back(tmp_path: Path, name: str) -> None:
    saved = WRITTEN[name]
    write_scvi(tmp_path / "model", saved)
    again = read_scvi(tmp_path / "model")
    for part in ("kind", "version", "genes", "batches", "batch_key", "label_key", "unlabeled", "categories"):
        assert getattr(again, part) == getattr(saved, part), part
    for part in ("continuous", "layer", "size_factor_key", "proteins", "protein_key"):
        assert getattr(again, part) == getattr(saved, part), part
    assert again.labels == (saved.labels or ["0"])
    n_levels = [len(levels) for levels in saved.categories.values()]
    sizes = {"n_cats_per_cov": n_levels, "n_continuous_cov": len(saved.continuous)}
    assert again.settings == saved.settings | sizes
    assert list(again.weights) == list(saved.weights)
    assert all(torch.equal(again.weights[key], value) for key, value in saved.weights.items())
    if saved.protein_mask_bp is None:
        assert again.protein_mask_bp is None
    else:
        np.testing.assert_array_equal(again.protein_mask_bp, saved.protein_mask_bp)


def content(saved: Saved, folder: Path) -> dict[str, Any]:
    """What a folder written for scvi-tools holds, to change it."""
    write_scvi(folder, saved)
    loaded: dict[str, Any] = torch.load(folder / "model.pt", weights_only=False)
    return loaded


def test_prefixes(tmp_path: Path) -> None:
    write_scvi(tmp_path, saved_scvi())
    (tmp_path / "model.pt").rename(tmp_path / "a_model.pt")
    assert read_scvi(tmp_path).genes == read_scvi(tmp_path, "a_").genes == list("abcde")
    write_scvi(tmp_path, saved_scvi(genes=list("fghij")))
    assert read_scvi(tmp_path).genes == list("fghij")  # without one, where there is one without
    (tmp_path / "model.pt").rename(tmp_path / "b_model.pt")
    with pytest.raises(UsageError, match="prefixes 'a_', 'b_'"):
        read_scvi(tmp_path)
    assert read_scvi(tmp_path, "b_").genes == list("fghij")
    with pytest.raises(BadFileError, match=r"no model\.pt"):
        read_scvi(tmp_path, "c_")


def test_data_in_modalities(tmp_path: Path) -> None:
    """From 1.2 names by modality; before, those of all in one list."""
    for names in (
        {"rna": np.array(list("abcde"), object), "adt": np.array(["CD3", "CD4", "CD8"], object)},
        np.array([*"abcde", "CD3", "CD4", "CD8"], dtype=object),
    ):
        changed = content(saved_totalvi(), tmp_path)
        changed["var_names"] = names
        changed["attr_dict"]["registry_"]["setup_args"] = {
            "modalities": {"rna_layer": "rna", "protein_layer": "adt"},
            "rna_layer": "counts",
        }
        torch.save(changed, tmp_path / "model.pt")
        saved = read_scvi(tmp_path)
        assert saved.genes == list("abcde")
        assert (saved.protein_key, saved.layer) == ("adt", "counts")


def legacy(folder: Path, *, prefix: str = "", weights: Any = None, **attributes: Any) -> None:
    """A folder in the layout of 0.7 to 0.14."""
    setup = {
        "scvi_version": "0.9.1",
        "categorical_mappings": {
            "_scvi_batch": {"original_key": "study", "mapping": np.array(["x", "y"], object)},
            "_scvi_labels": {"original_key": "type", "mapping": np.array(["B", "T", "?"], object)},
        },
        "extra_categoricals": {
            "mappings": {"donor": np.array([1, 2, 3])},
            "keys": ["donor"],
            "n_cats_per_key": [3],
        },
        "extra_continuous_keys": pd.Index(["age"]),
        "data_registry": {"X": {"attr_name": "layers", "attr_key": "counts"}},
        "summary_stats": {"n_vars": 5},
    }
    arguments = {"n_hidden": 3, "n_latent": 2, "use_cuda": True, "model_kwargs": {"use_layer_norm": "both"}}
    given = {"init_params_": arguments, "is_trained_": True, "scvi_setup_dict_": setup} | attributes
    (folder / f"{prefix}attr.pkl").write_bytes(pickle.dumps(given))
    torch.save(weights or saved_scvi().weights, folder / f"{prefix}model_params.pt")
    (folder / f"{prefix}var_names.csv").write_text("a\nb\nc\nd\ne\n")


def test_the_older_layout(tmp_path: Path) -> None:
    legacy(tmp_path, prefix="old_")
    saved = read_scvi(tmp_path)
    assert (saved.kind, saved.version, saved.layer) == ("scvi", "0.9.1", "counts")
    assert saved.genes == list("abcde")
    assert (saved.batches, saved.labels) == (["x", "y"], ["B", "T", "?"])
    assert saved.categories == {"donor": ["1", "2", "3"]}
    assert saved.continuous == ["age"]
    sizes = {"n_cats_per_cov": [3], "n_continuous_cov": 1}
    assert saved.settings == {"n_hidden": 3, "n_latent": 2, "use_layer_norm": "both"} | sizes


@pytest.mark.parametrize(("n_known", "labels"), [(2, ["B", "T"]), (3, ["B", "T", "?"])])
def test_the_older_layout_of_scanvi(tmp_path: Path, n_known: int, labels: list[str]) -> None:
    weights = saved_scvi().weights | {"y_prior": torch.zeros(1, n_known)}
    legacy(tmp_path, weights=weights, unlabeled_category_="?")
    saved = read_scvi(tmp_path)
    assert (saved.kind, saved.labels, saved.unlabeled) == ("scanvi", labels, "?")


def test_names_of_the_beta(tmp_path: Path) -> None:
    """0.8.0 beta, which scArches of December 2020 used."""
    weights = {
        "px_r": torch.zeros(5),
        "z_encoder.encoder.fc_layers.Layer_0.0.weight": torch.zeros(3, 5),
        "z_encoder.mean_encoder.weight": torch.zeros(2, 3),
        "decoder.px_scale_decoder.weight": torch.zeros(5, 3),
        "decoder.px_scale_decoder.bias": torch.zeros(5),
    }
    legacy(tmp_path, weights=weights)
    found = read_scvi(tmp_path).weights
    assert "z_encoder.encoder.fc_layers.Layer 0.0.weight" in found
    assert "decoder.px_scale_decoder.0.bias" in found


def test_proteins_that_a_batch_lacks_in_the_older_layout(tmp_path: Path) -> None:
    legacy(tmp_path, weights=saved_totalvi().weights)
    attributes = pickle.loads((tmp_path / "attr.pkl").read_bytes())
    setup = attributes["scvi_setup_dict_"]
    setup["protein_names"] = np.array(["CD3", "CD4", "CD8"])
    setup["totalvi_batch_mask"] = {"0": np.array([True] * 3), "1": np.array([True, False, True])}
    setup["data_registry"]["protein_expression"] = {"attr_name": "obsm", "attr_key": "adt"}
    (tmp_path / "attr.pkl").write_bytes(pickle.dumps(attributes))
    saved = read_scvi(tmp_path)
    assert saved.kind == "totalvi"
    assert saved.protein_mask_bp is not None
    assert saved.protein_mask_bp.tolist() == [[True] * 3, [True, False, True]]


def test_what_does_not_fit(tmp_path: Path) -> None:
    cases = {
        "6 genes, but the weights have 5": saved_scvi(genes=list("abcdef")),
        "1 labels, but the weights have 2": saved_scvi(
            kind="scanvi",
            weights=saved_scvi().weights | {"y_prior": torch.zeros(1, 2)},
            labels=["T"],
            label_key="type",
        ),
        "2 proteins, but the weights have 3": saved_totalvi(proteins=["CD3", "CD4"]),
        "3 batches, but the weights have 2": saved_totalvi(batches=["x", "y", "z"]),
        "batch_representation = 'embedding' is not": saved_scvi(
            settings={"batch_representation": "embedding"}
        ),
        "gene_likelihood = 'normal' is not": saved_scvi(settings={"gene_likelihood": "normal"}),
    }
    for message, saved in cases.items():
        write_scvi(tmp_path, saved)
        with pytest.raises(BadFileError, match=message):
            read_scvi(tmp_path)
    with pytest.raises(BadFileError, match="no model"):
        read_scvi(tmp_path / "absent")
    torch.save({"model_state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(BadFileError, match="no model of scvi-tools"):
        read_scvi(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "where", ["model_state_dict", "var_names", "attr_dict", "attr.pkl", "model_params.pt"]
)
def test_code_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    if "." in where:
        legacy(tmp_path)
        (tmp_path / "attr.pkl").write_bytes(pickle.dumps({"history_": Bomb()}))
        if where == "model_params.pt":
            legacy(tmp_path, weights=saved_scvi().weights | {"px_r": Bomb()})
    else:
        changed = content(saved_scvi(), tmp_path)
        changed[where] = Bomb()
        torch.save(changed, tmp_path / "model.pt")
    with pytest.raises(BadFileError, match="holds code, which is never run"):
        read_scvi(tmp_path)
    assert not (tmp_path / "exploded").exists()
