"""Models as scvi-tools 1.4 saves them: a folder with one ``model.pt``, which its ``load`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamx.interop.scvi_files import KINDS, MODEL, Saved

VERSION = "1.4.2"  # the release whose layout it is

# Arguments of the classes themselves; the others are passed on to their network.
_OWN_ARGUMENTS = {
    "scvi": (
        *("n_hidden", "n_latent", "n_layers", "dropout_rate", "dispersion", "gene_likelihood"),
        *("use_observed_lib_size", "latent_distribution"),
    ),
    "scanvi": (
        *("n_hidden", "n_latent", "n_layers", "dropout_rate", "dispersion", "gene_likelihood"),
        *("use_observed_lib_size", "linear_classifier"),
    ),
    "totalvi": (
        *("n_latent", "gene_dispersion", "protein_dispersion", "gene_likelihood", "latent_distribution"),
        *("empirical_protein_background_prior", "override_missing_proteins"),
    ),
}


def write_scvi(folder: str | Path, saved: Saved) -> None:
    """Write a folder that ``load`` of scvi-tools 1.4 reads.

    Parameters
    ----------
    saved
        Complete: with the tensors that scvi-tools 1.4 makes for such a model
        (``state_dict_of`` in :mod:`streamx.interop.scvi_tools` and :mod:`streamx.interop.scvi_totalvi`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = _OWN_ARGUMENTS[saved.kind]
    derived = ("n_cats_per_cov", "n_continuous_cov")
    chosen = {name: value for name, value in saved.settings.items() if name not in derived}
    attributes = {
        "init_params_": {
            "non_kwargs": {name: value for name, value in chosen.items() if name in own},
            "kwargs": {"kwargs": {name: value for name, value in chosen.items() if name not in own}},
        },
        "is_trained_": True,
        "registry_": _registry(saved),
    }
    content = {
        "model_state_dict": {name: value.detach().cpu().clone() for name, value in saved.weights.items()},
        "var_names": _names(saved.genes),
        "attr_dict": attributes,
    }
    torch.save(content, folder / f".{MODEL}.tmp")
    (folder / f".{MODEL}.tmp").replace(folder / MODEL)


def _names(names: list[str]) -> np.ndarray:
    return np.array(names, dtype=object)


def _registry(saved: Saved) -> dict[str, Any]:
    """What scvi-tools notes about the data, as it looks after ``setup_anndata``."""
    label_key = None if saved.kind == "totalvi" else saved.label_key
    state: dict[str, dict[str, Any]] = {
        "X": {"n_obs": 0, "n_vars": len(saved.genes), "column_names": _names(saved.genes)},
        "batch": _state(saved.batches, saved.batch_key, "_scvi_batch"),
        "labels": _state(saved.labels, label_key, "_scvi_labels"),
        "size_factor": {},
        "extra_categorical_covs": {},
        "extra_continuous_covs": {},
    }
    arguments: dict[str, Any] = {
        "layer": saved.layer,
        "batch_key": saved.batch_key,
        "size_factor_key": saved.size_factor_key,
        "categorical_covariate_keys": list(saved.categories) or None,
        "continuous_covariate_keys": list(saved.continuous) or None,
    }
    if saved.categories:
        state["extra_categorical_covs"] = {
            "field_keys": list(saved.categories),
            "mappings": {key: _names(levels) for key, levels in saved.categories.items()},
            "n_cats_per_key": [len(levels) for levels in saved.categories.values()],
        }
    if saved.continuous:
        state["extra_continuous_covs"] = {"columns": _names(saved.continuous)}
    if saved.kind != "totalvi":
        arguments["labels_key"] = saved.label_key
    if saved.kind == "scanvi":
        labels = [*saved.labels, *([saved.unlabeled] if saved.unlabeled is not None else [])]
        state["labels"] = _state(labels, saved.label_key, "_scvi_labels")
        state["labels"]["unlabeled_category"] = saved.unlabeled
        arguments["unlabeled_category"] = saved.unlabeled
    if saved.kind == "totalvi":
        state["proteins"] = {"column_names": list(saved.proteins)}
        if saved.protein_mask_bp is not None and not saved.protein_mask_bp.all():
            masks = {str(code): mask_p for code, mask_p in enumerate(saved.protein_mask_bp)}
            state["proteins"]["protein_batch_mask"] = masks
        arguments["protein_expression_obsm_key"] = saved.protein_key
    return {
        "scvi_version": saved.version,
        "model_name": next(name for name, kind in KINDS.items() if kind == saved.kind),
        "setup_method_name": "setup_anndata",
        "setup_args": arguments,
        "field_registries": {
            name: {"data_registry": {}, "state_registry": part, "summary_stats": {}}
            for name, part in state.items()
        },
    }


def _state(names: list[str], key: str | None, made_up: str) -> dict[str, Any]:
    """A column of categories; without one scvi-tools makes up a column of zeros."""
    if key is None:
        return {"categorical_mapping": np.zeros(1, dtype=np.int64), "original_key": made_up}
    return {"categorical_mapping": _names(names), "original_key": key}
