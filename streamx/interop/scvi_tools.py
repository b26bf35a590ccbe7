"""Weights of scvi-tools' SCVI and SCANVI as ours, and back: functions on a state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from streamx.config import ScanviConfig, ScviConfig
from streamx.interop.scvi_names import Names, fill, gathered, normalised, of_linear, of_stack, size
from streamx.models.scanvi import Scanvi
from streamx.models.scvi import Scvi
from streamx.models.stack import Stack, n_columns


def _of_encoder(stack: Stack, theirs: str, ours: str, kind: str = "encoder") -> Names:
    heads = of_linear(f"{theirs}.mean_{kind}", f"{ours}.mean") | of_linear(
        f"{theirs}.var_{kind}", f"{ours}.log_var"
    )
    return of_stack(stack, f"{theirs}.{kind}", f"{ours}.stack") | heads


def _of_scvi(module: Scvi) -> Names:
    dispersion = [name for name, _ in module.named_parameters() if name.startswith("log_theta_")]
    names: Names = {"px_r": dispersion} if dispersion else {}  # none for gene-cell
    names |= _of_encoder(module.encoder.stack, "z_encoder", "encoder")
    if module.library_encoder is not None:
        names |= _of_encoder(module.library_encoder.stack, "l_encoder", "library_encoder")
        names |= {"library_log_means": ["library_mean_b"], "library_log_vars": ["library_var_b"]}
    names |= of_stack(module.decoder.stack, "decoder.px_decoder", "decoder.stack")
    names |= of_linear("decoder.px_scale_decoder.0", "decoder.scale")
    if module.decoder.log_theta is not None:
        names |= of_linear("decoder.px_r_decoder", "decoder.log_theta")
    if module.decoder.dropout is not None:
        names |= of_linear("decoder.px_dropout_decoder", "decoder.dropout")
    return names


def _of_scanvi(module: Scanvi) -> Names:
    names = {theirs: [f"vae.{name}" for name in ours] for theirs, ours in _of_scvi(module.vae).items()}
    names |= {"y_prior": ["label_prior_l"]}
    names |= _of_encoder(module.z2_encoder.stack, "encoder_z2_z1", "z2_encoder")
    names |= _of_encoder(module.z1_decoder.stack, "decoder_z1_z2", "z1_decoder", "decoder")
    if module.classifier.stack is None:
        return names | of_linear("classifier.classifier.0", "classifier.out")
    names |= of_stack(module.classifier.stack, "classifier.classifier.0", "classifier.stack")
    return names | of_linear("classifier.classifier.1", "classifier.out")


def _names(module: Scvi | Scanvi) -> Names:
    return _of_scanvi(module) if isinstance(module, Scanvi) else _of_scvi(module)


def _unused(module: Scvi | Scanvi, names: Names) -> dict[str, tuple[int, ...]]:
    """Tensors that scvi-tools makes whether or not the model uses them, and expects in a file."""
    vae = module.vae if isinstance(module, Scanvi) else module
    n_genes, n_hidden = vae.n_genes, vae.config.n_hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for head in ("px_r_decoder", "px_dropout_decoder"):
        shapes |= {f"decoder.{head}.weight": (n_genes, n_hidden), f"decoder.{head}.bias": (n_genes,)}
    for name in names:
        if name.startswith("z_encoder.encoder.fc_layers.Layer 0."):
            own = size(module, names[name])
            shapes[name.replace("z_encoder", "l_encoder", 1)] = own
    for head in ("mean_encoder", "var_encoder"):
        shapes |= {f"l_encoder.{head}.weight": (1, n_hidden), f"l_encoder.{head}.bias": (1,)}
    return {name: shape for name, shape in shapes.items() if name not in names}


def state_dict_of(module: Scvi | Scanvi) -> dict[str, Tensor]:
    """Our module's tensors under the names and in the shapes of scvi-tools 1.4.

    Parts that scvi-tools makes and such a model never uses (the library encoder where the library size is
    observed) are there too, as zeros; norms among them as they begin.
    """
    names = _names(module)
    found = gathered(module, names)
    for name, shape in _unused(module, names).items():
        ones = name.endswith(("0.1.weight", "running_var"))
        dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        found[name] = torch.ones(shape) if ones else torch.zeros(shape, dtype=dtype)
    return found


def module_from(kind: str, state_dict: Mapping[str, Any], settings: Mapping[str, Any]) -> Scvi | Scanvi:
    """Our module with the weights of a model of scvi-tools.

    Parameters
    ----------
    kind
        ``scvi`` or ``scanvi``.
    state_dict
        Names -> tensors, as any release since 0.7 wrote them.
    settings
        What the shapes do not tell, under scvi-tools' own names: arguments of the model (``gene_likelihood``,
        ``use_layer_norm``, ``encode_covariates``, ...; defaults where absent), and ``n_cats_per_cov`` and
        ``n_continuous_cov`` where the model has such covariates; for scANVI also ``scvi_version``, which
        says whether the classifier was trained on logits (from 1.1 on; default). Others are not looked at.

    Raises
    ------
    ValueError
        If a tensor is missing or has another shape than the settings say.
    """
    if kind not in ("scvi", "scanvi"):
        raise ValueError(f"got {kind!r}; known: scvi, scanvi")
    state = normalised(state_dict)
    vae = _empty_scvi(state, settings)
    scanvi = kind == "scanvi"
    module = Scanvi(vae, state["y_prior"].shape[1], _scanvi_config(settings)) if scanvi else vae
    fill(module, _names(module), state)
    return module


def _scanvi_config(settings: Mapping[str, Any]) -> ScanviConfig:
    version = re.match(r"(\d+)\.(\d+)", str(settings.get("scvi_version", "")))
    since_logits = version is None or (int(version[1]), int(version[2])) >= (1, 1)
    parameters = settings.get("classifier_parameters") or {}
    return ScanviConfig(
        linear_classifier=bool(settings.get("linear_classifier", False)),
        logits=bool(parameters.get("logits", since_logits)),
    )


def _empty_scvi(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Scvi:
    n_genes = len(state["decoder.px_scale_decoder.0.bias"])
    n_latent, n_hidden = state["z_encoder.mean_encoder.weight"].shape
    n_layers = sum(
        bool(re.fullmatch(r"z_encoder.encoder.fc_layers.Layer \d+\.0\.bias", name)) for name in state
    )
    n_levels = tuple(settings.get("n_cats_per_cov") or ())
    n_continuous = settings.get("n_continuous_cov") or 0
    width = state["decoder.px_decoder.fc_layers.Layer 0.0.weight"].shape[1]
    n_batches = width - n_latent - n_continuous - sum(n_columns(n) for n in n_levels)
    means, vars_ = state.get("library_log_means"), state.get("library_log_vars")
    sizes = {"n_latent": n_latent, "n_hidden": n_hidden, "n_layers": n_layers}
    known = {field.name for field in fields(ScviConfig)}
    config = ScviConfig(**{name: value for name, value in settings.items() if name in known} | sizes)
    return Scvi(
        n_genes,
        max(n_batches, 1),
        config,
        n_labels=state["px_r"].shape[1] if config.dispersion == "gene-label" else 0,
        n_levels=n_levels,
        n_continuous=n_continuous,
        library_b=None if means is None or vars_ is None else (means[0].numpy(), vars_[0].numpy()),
    )
