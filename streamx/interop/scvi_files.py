"""Folders of saved SCVI, SCANVI and TOTALVI models of scvi-tools, read without running anything.

Layouts: 0.7 to 0.14 wrote ``model_params.pt``, ``attr.pkl`` and ``var_names.csv``; from 0.15 on there is one
``model.pt`` (1.5 by its documentation). Either may have a prefix in front of the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from streamx.errors import BadFileError, UsageError
from streamx.interop.scvi_names import normalised
from streamx.interop.unpickle import Opaque, first_line, read_pickle, read_torch

KINDS = {"SCVI": "scvi", "SCANVI": "scanvi", "TOTALVI": "totalvi"}
MODEL, _LEGACY = "model.pt", "model_params.pt"
# Arguments of scvi-tools that are no settings of the network.
_NO_SETTING = ("use_cuda", "use_gpu", "datamodule", "registry", "unlabeled_category", "pretrained_model")


@dataclass(frozen=True, eq=False)
class Saved:
    """A saved model of scvi-tools: its tensors, and what the data were that it was trained on.

    Attributes
    ----------
    kind
        ``scvi``, ``scanvi`` or ``totalvi``.
    version
        Release of scvi-tools that saved it (``0.0.0``: one before 0.9).
    weights
        Names of scvi-tools 1.4 -> tensors.
    settings
        Arguments of the model and its network under scvi-tools' names, and ``n_cats_per_cov`` (levels of each
        categorical covariate) and ``n_continuous_cov``.
    genes
        Names of the inputs.
    batches, batch_key
        Batches in the order of their codes; the obs column they come from, if there is one.
    labels, label_key, unlabeled
        The same for labels; the label that means none is not among them.
    categories, continuous
        Covariates: obs column -> its levels; obs columns.
    layer, size_factor_key
        The layer with the counts, if it is not X; obs column with size factors, if the model uses them.
    proteins, protein_key
        Names of the proteins; the obsm matrix (or modality) that holds them.
    protein_mask_bp
        bool (n_batches, n_proteins): proteins that a batch measured; None: all of them.
    """

    kind: str
    version: str
    weights: dict[str, Tensor]
    settings: dict[str, Any]
    genes: list[str]
    batches: list[str]
    batch_key: str | None = None
    labels: list[str] = field(default_factory=list)
    label_key: str | None = None
    unlabeled: str | None = None
    categories: dict[str, list[str]] = field(default_factory=dict)
    continuous: list[str] = field(default_factory=list)
    layer: str | None = None
    size_factor_key: str | None = None
    proteins: list[str] = field(default_factory=list)
    protein_key: str | None = None
    protein_mask_bp: np.ndarray | None = None


def find_scvi(folder: str | Path, prefix: str | None = None) -> tuple[Path, bool] | None:
    """The file with the weights in a folder, and whether it is of the older layout; None if there is none.

    Raises
    ------
    UsageError
        If the folder holds several models and no prefix says which.
    """
    folder = Path(folder)
    for name in (MODEL, _LEGACY):
        found = [folder / f"{prefix}{name}"] if prefix is not None else [folder / name]
        if prefix is None and not found[0].is_file():
            found = sorted(folder.glob(f"*{name}"))
        if len(found) > 1:
            names = ", ".join(repr(path.name.removesuffix(name)) for path in found)
            raise UsageError(f"several models, with the prefixes {names}", where=str(folder), fix="name one")
        if found and found[0].is_file():
            return found[0], name == _LEGACY
    return None


def read_scvi(folder: str | Path, prefix: str | None = None) -> Saved:
    """The model in a folder that ``save`` of scvi-tools wrote.

    Parameters
    ----------
    prefix
        In front of the files' names; by default the only one that is there.

    Raises
    ------
    BadFileError
        If there is no model, or it is damaged, holds code, or is none of SCVI, SCANVI and TOTALVI.
    UsageError
        If the folder holds several models and no prefix says which.
    """
    found = find_scvi(folder, prefix)
    if found is None:
        raise BadFileError(f"no {MODEL} and no {_LEGACY}", where=str(folder))
    path, legacy = found
    read = _read_legacy if legacy else _read_model
    try:
        return read(path)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise BadFileError(f"no model of scvi-tools: {first_line(error)}", where=str(path)) from None


def _read_model(path: Path) -> Saved:
    """0.15 and later."""
    content = read_torch(path)
    attributes, weights = content["attr_dict"], normalised(content["model_state_dict"])
    registry = attributes["registry_"]
    kind, arguments = _kind(str(registry["model_name"]), path), registry["setup_args"]
    state = {name: part.get("state_registry") or {} for name, part in registry["field_registries"].items()}
    if arguments.get("panel_key"):
        raise BadFileError("panels of proteins (panel_key) are not supported", where=str(path))
    modalities = arguments.get("modalities") or {}
    batches, batch_key = _column(state["batch"])
    labels, label_key = _column(state["labels"])
    unlabeled = state["labels"].get("unlabeled_category")
    categories = _categories(state.get("extra_categorical_covs", {}), "field_keys")
    continuous = _texts(state.get("extra_continuous_covs", {}).get("columns", ()))
    proteins = _texts(state["proteins"]["column_names"]) if kind == "totalvi" else []
    masks = state["proteins"].get("protein_batch_mask") if proteins else None
    protein_key = arguments.get("protein_expression_obsm_key") or modalities.get("protein_layer")
    saved = Saved(
        kind,
        str(registry["scvi_version"]),
        weights,
        _settings(attributes["init_params_"], categories, continuous),
        _genes(content["var_names"], state["X"], modalities.get("rna_layer")),
        batches,
        batch_key=batch_key,
        labels=_known(labels, unlabeled, kind, weights),
        label_key=label_key,
        unlabeled=None if unlabeled is None else str(unlabeled),
        categories=categories,
        continuous=continuous,
        layer=arguments.get("layer") or arguments.get("rna_layer"),
        size_factor_key=arguments.get("size_factor_key"),
        proteins=proteins,
        protein_key=protein_key if proteins else None,
        protein_mask_bp=_mask(masks, len(batches), len(proteins)),
    )
    return _checked(saved, path)


def _read_legacy(path: Path) -> Saved:
    """0.7 to 0.14: no file names the class; its weights do."""
    prefix = path.name.removesuffix(_LEGACY)
    attributes = read_pickle(path.with_name(f"{prefix}attr.pkl"))
    weights, setup = normalised(read_torch(path)), attributes["scvi_setup_dict_"]
    kind, mapped, data = (
        _kind(_class_of(weights), path),
        setup["categorical_mappings"],
        setup["data_registry"],
    )
    batches, batch_key = _column(mapped["_scvi_batch"])
    labels, label_key = _column(mapped["_scvi_labels"])
    unlabeled = attributes.get("unlabeled_category_", attributes["init_params_"].get("unlabeled_category"))
    categories = _categories(setup.get("extra_categoricals") or {}, "keys")
    continuous = _texts(setup.get("extra_continuous_keys", ()))
    proteins = _texts(setup["protein_names"]) if kind == "totalvi" else []
    masks = setup.get("totalvi_batch_mask") if proteins else None
    saved = Saved(
        kind,
        str(setup["scvi_version"]),
        weights,
        _settings(attributes["init_params_"], categories, continuous),
        lines(path.with_name(f"{prefix}var_names.csv")),
        batches,
        batch_key=batch_key,
        labels=_known(labels, unlabeled, kind, weights),
        label_key=label_key,
        unlabeled=None if unlabeled is None else str(unlabeled),
        categories=categories,
        continuous=continuous,
        layer=data["X"]["attr_key"] if data["X"]["attr_name"] == "layers" else None,
        proteins=proteins,
        protein_key=data["protein_expression"]["attr_key"] if proteins else None,
        protein_mask_bp=_mask(masks, len(batches), len(proteins)),
    )
    return _checked(saved, path)


def lines(path: Path) -> list[str]:
    """A list of names, one a line.

    Raises
    ------
    BadFileError
        If there is none.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"no list of names: {first_line(error)}", where=str(path)) from None


def _kind(name: str, path: Path) -> str:
    if name not in KINDS:
        raise BadFileError(f"a {name} model", where=str(path), fix=f"give one of {', '.join(KINDS)}")
    return KINDS[name]


def _class_of(weights: Mapping[str, Tensor]) -> str:
    """Which class of scvi-tools has such weights."""
    if "background_pro_alpha" in weights:
        return "TOTALVI"
    if "decoder.px_scale_decoder.0.weight" not in weights or "z_encoder.mean_encoder.weight" not in weights:
        raise ValueError("weights of none of " + ", ".join(KINDS))
    return "SCANVI" if "y_prior" in weights else "SCVI"


def _texts(values: Any) -> list[str]:
    """Names, from an array, a list, or an index of pandas."""
    if isinstance(values, Opaque):
        values = next(part["data"] for part in values.parts if isinstance(part, dict) and "data" in part)
    return [str(value) for value in values]


def _column(state: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Categories by code, and the obs column: none if scvi-tools made one up."""
    key = str(state["original_key"])
    mapping = state["categorical_mapping"] if "categorical_mapping" in state else state["mapping"]
    return _texts(mapping), None if key.startswith("_scvi") else key


def _categories(state: Mapping[str, Any], keys: str) -> dict[str, list[str]]:
    return {str(key): _texts(state["mappings"][key]) for key in state.get(keys, ())}


def _settings(
    given: Mapping[str, Any], categories: dict[str, list[str]], continuous: list[str]
) -> dict[str, Any]:
    """The arguments in one dict: they lie in two, or (to 0.14) in one with those for the network inside."""
    own, passed_on = given.get("non_kwargs"), given.get("kwargs")
    if own is None or passed_on is None:
        own = {name: value for name, value in given.items() if not isinstance(value, dict)}
        passed_on = {name: value for name, value in given.items() if isinstance(value, dict)}
    settings = {name: value for name, value in own.items() if name not in _NO_SETTING}
    for arguments in passed_on.values():
        settings |= arguments
    sizes = {"n_cats_per_cov": [len(levels) for levels in categories.values()]}
    return settings | sizes | {"n_continuous_cov": len(continuous)}


def _genes(names: Any, state: Mapping[str, Any], modality: str | None) -> list[str]:
    """Of data in modalities the older releases list the names of all of them, the later ones each apart."""
    if isinstance(names, dict):
        return _texts(names[modality])
    if len(names) != state.get("n_vars", len(names)) and "column_names" in state:
        return _texts(state["column_names"])
    return _texts(names)


def _known(labels: list[str], unlabeled: Any, kind: str, weights: Mapping[str, Tensor]) -> list[str]:
    """Labels that the classifier knows: without the one that means none, except in the oldest releases."""
    if kind != "scanvi" or len(labels) == weights["y_prior"].shape[1]:
        return labels
    return [label for label in labels if label != str(unlabeled)]


def _mask(masks: Mapping[Any, Any] | None, n_batches: int, n_proteins: int) -> np.ndarray | None:
    if not masks:
        return None
    measured_bp = np.ones((n_batches, n_proteins), dtype=bool)
    for code, measured_p in masks.items():
        measured_bp[int(code)] = np.asarray(measured_p, dtype=bool)
    return measured_bp


def _checked(saved: Saved, path: Path) -> Saved:
    """The same, if its names fit its weights and we know what it does."""
    weights, settings = saved.weights, saved.settings
    scale = "decoder.px_scale_decoder.fc_layers.Layer 0.0" if saved.proteins else "decoder.px_scale_decoder.0"
    found = {"genes": (len(saved.genes), len(weights[f"{scale}.bias"]))}
    if saved.kind == "scanvi":
        found["labels"] = (len(saved.labels), weights["y_prior"].shape[1])
    if saved.kind == "totalvi":
        found["proteins"] = (len(saved.proteins), len(weights["background_pro_alpha"]))
        found["batches"] = (len(saved.batches), weights["background_pro_alpha"].shape[1])
    for what, (n_names, n_weights) in found.items():
        if n_names != n_weights:
            raise BadFileError(f"{n_names} {what}, but the weights have {n_weights}", where=str(path))
    for name, known in (
        ("batch_representation", ("one-hot",)),
        ("gene_likelihood", ("zinb", "nb", "poisson")),
    ):
        if settings.get(name, known[0]) not in known:
            raise BadFileError(f"{name} = {settings[name]!r} is not supported", where=str(path))
    return saved
