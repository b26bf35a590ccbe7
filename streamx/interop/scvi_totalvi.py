"""scvi-tools' totalVI weights as ours, and back: functions on a state dict; files are read elsewhere.

What scvi-tools' releases differ in follows from the release that saved the weights: before 1.2 the
background's standard deviation is an exponential; from 1.3.1 on the encoder's input is scaled, the warm-up
also weights proteins, and a protein has an efficiency per batch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamx.config import TotalviConfig
from streamx.interop.scvi_names import Names, fill, gathered, normalised, of_columns, of_linear, of_stack
from streamx.models.stack import Stack
from streamx.models.totalvi import Totalvi

_LINEAR = {
    "encoder.z_mean_encoder": "encoder.mean",
    "encoder.z_var_encoder": "encoder.log_var",
    "encoder.l_gene_mean_encoder": "encoder.library_mean",
    "encoder.l_gene_var_encoder": "encoder.library_log_var",
}
_STACKS = {
    "encoder.encoder": "encoder.stack",
    "encoder.l_gene_encoder": "encoder.library",
    "decoder.px_decoder": "decoder.gene",
    "decoder.px_scale_decoder": "decoder.scale",
    "decoder.py_back_decoder": "decoder.back",
    "decoder.py_back_mean_log_alpha": "decoder.back_mean",
    "decoder.py_back_mean_log_beta": "decoder.back_sd",
    "decoder.py_fore_decoder": "decoder.fore",
    "decoder.py_fore_scale_decoder": "decoder.fore_scale",
    "decoder.sigmoid_decoder": "decoder.mix",
    "decoder.px_dropout_decoder_gene": "decoder.dropout",
    "decoder.py_background_decoder": "decoder.mixing",
}
_EFFICIENCY = "log_per_batch_efficiency"
_FIRST_SOFTPLUS, _FIRST_SCALED = (1, 2), (1, 3, 1)


def config_of(state_dict: Mapping[str, Any], settings: Mapping[str, Any], version: str) -> TotalviConfig:
    """The settings of a model that scvi-tools saved.

    Parameters
    ----------
    state_dict
        Names -> tensors.
    settings
        What the shapes do not tell, under scvi-tools' own names: arguments of the model and its module;
        defaults where absent.
    version
        Release of scvi-tools that saved it, such as ``"1.3.2"`` (``"0.0.0"``: one before 0.9).
    """
    state, release = normalised(state_dict), _release(version)
    known = {field.name for field in dataclasses.fields(TotalviConfig)}
    given = {name: value for name, value in settings.items() if name in known}
    activation = (settings.get("extra_decoder_kwargs") or {}).get("activation_function_bg")
    n_latent, n_hidden = state["encoder.z_mean_encoder.weight"].shape
    given |= {
        "n_latent": n_latent,
        "n_hidden": n_hidden,
        "n_layers_encoder": _n_layers(state, "encoder.encoder"),
        "n_layers_decoder": _n_layers(state, "decoder.px_decoder"),
        "use_observed_lib_size": "library_log_means" not in state,
        "use_batch_norm": _where_normed(state),
        "input_transform": "scaled" if release >= _FIRST_SCALED else "log1p",
        "background_activation": activation or ("softplus" if release >= _FIRST_SOFTPLUS else "exp"),
        "per_batch_efficiency": release >= _FIRST_SCALED and _EFFICIENCY in state,
        "protein_warmup": release >= _FIRST_SCALED,
    }
    return TotalviConfig(**given)


def module_from(
    state_dict: Mapping[str, Any],
    settings: Mapping[str, Any],
    version: str,
    measured_bp: np.ndarray | None = None,
) -> Totalvi:
    """Our module, in evaluation mode, with the weights of a model of scvi-tools.

    Parameters
    ----------
    state_dict, settings, version
        As :func:`config_of`; ``n_cats_per_cov`` and ``n_continuous_cov`` among the settings where the model
        has such covariates.
    measured_bp
        bool (n_batches, n_proteins): which proteins a batch measured.

    Raises
    ------
    ValueError
        If a tensor is missing or has another shape than the settings say.
    """
    state, config = normalised(state_dict), config_of(state_dict, settings, version)
    n_proteins, n_batches = state["background_pro_alpha"].shape
    means, vars_ = state.get("library_log_means"), state.get("library_log_vars")
    by_label = [
        state[theirs].shape[1]
        for theirs, kind in (("px_r", config.gene_dispersion), ("py_r", config.protein_dispersion))
        if kind.endswith("-label")
    ]
    module = Totalvi(
        len(state["px_r"]),
        n_batches,
        config,
        n_proteins=n_proteins,
        n_labels=by_label[0] if by_label else 0,
        n_levels=tuple(settings.get("n_cats_per_cov") or ()),
        n_continuous=settings.get("n_continuous_cov") or 0,
        measured_bp=measured_bp,
        library_b=None if means is None or vars_ is None else (means[0].numpy(), vars_[0].numpy()),
    )
    fill(module, _names(module), state)
    return module.eval()


def state_dict_of(module: Totalvi) -> dict[str, Tensor]:
    """Our module's tensors under the names and in the shapes of scvi-tools 1.4.

    A model without efficiencies gets zeros for them, which 1.4 wants and which change no prediction.
    """
    found = gathered(module, _names(module))
    if _EFFICIENCY not in found:
        found[_EFFICIENCY] = torch.zeros_like(found["background_pro_alpha"])
    return found


def _names(module: Totalvi) -> Names:
    names: Names = {
        "background_pro_alpha": ["background_mean_pb"],
        "background_pro_log_beta": ["background_log_sd_pb"],
    }
    if module.log_efficiency_pb is not None:
        names[_EFFICIENCY] = ["log_efficiency_pb"]
    if module.library_mean_b is not None:
        names |= {"library_log_means": ["library_mean_b"], "library_log_vars": ["library_var_b"]}
    for theirs, start in (("px_r", "log_theta_g"), ("py_r", "log_theta_p")):
        names[theirs] = [name for name, _ in module.named_parameters() if name.startswith(start)]
    for theirs, ours in _LINEAR.items():
        names |= of_linear(theirs, ours)
    for theirs, ours in _STACKS.items():
        part = module.get_submodule(ours)
        if isinstance(part, Stack):
            names |= of_stack(part, theirs, ours)
        else:
            names |= of_columns(part, f"{theirs}.fc_layers.Layer 0.0", ours)  # type: ignore[arg-type]
    return names


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _n_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return sum(name.startswith(f"{prefix}.fc_layers.Layer ") and name.endswith(".0.bias") for name in state)


def _where_normed(state: Mapping[str, Tensor]) -> str:
    encoder = "encoder.encoder.fc_layers.Layer 0.1.weight" in state
    decoder = "decoder.px_decoder.fc_layers.Layer 0.1.weight" in state
    if encoder and decoder:
        return "both"
    return "encoder" if encoder else "decoder" if decoder else "none"
