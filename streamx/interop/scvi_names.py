"""How the layers of scvi-tools' models are called there and here.

scvi-tools appends one-hot covariates to a layer's input: the columns of its weights are, in this order, the
input, continuous covariates, batches, and the levels of each further category. Ours are parameters of their
own (:class:`streamx.models.stack.CovariateLinear`). Everything else differs by name alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamx.models.stack import CovariateLinear, Layer, Stack

Names = dict[str, list[str]]  # theirs -> ours, whose tensors lie side by side in theirs

ROWS = {"library_log_means", "library_log_vars", "y_prior"}  # of shape (1, n), ours (n,)
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def normalised(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict in the names of scvi-tools 1.4, whatever release wrote it.

    0.8.0 beta wrote ``Layer_0`` and ``px_scale_decoder.weight``; 1.3 added a store of pyro's, which these
    models do not use.
    """
    renamed = {}
    for name, value in state.items():
        if name == "pyro_param_store":
            continue
        name = re.sub(r"\bLayer_(\d+)", r"Layer \1", name)
        renamed[re.sub(r"\bpx_scale_decoder\.(weight|bias)$", r"px_scale_decoder.0.\1", name)] = value
    return renamed


def of_linear(theirs: str, ours: str) -> Names:
    return {f"{theirs}.{part}": [f"{ours}.{part}"] for part in ("weight", "bias")}


def of_columns(columns: CovariateLinear, theirs: str, ours: str) -> Names:
    """A layer with covariates."""
    tables = [name for name in ("continuous", "batch", "category") if getattr(columns, name) is not None]
    names = of_linear(theirs, f"{ours}.linear")
    names[f"{theirs}.weight"] += [f"{ours}.{name}" for name in tables]
    return names


def of_stack(stack: Stack, theirs: str, ours: str) -> Names:
    names: Names = {}
    for i, layer in enumerate(stack.layers):
        assert isinstance(layer, Layer)
        prefix = f"{theirs}.fc_layers.Layer {i}"
        names |= of_columns(layer.columns, f"{prefix}.0", f"{ours}.layers.{i}.columns")
        if layer.norm is not None:
            names |= {f"{prefix}.1.{part}": [f"{ours}.layers.{i}.norm.{part}"] for part in _NORM}
    return names


def size(module: nn.Module, ours: list[str]) -> tuple[int, ...]:
    """Shape of what lies side by side in scvi-tools' tensor."""
    state = module.state_dict()
    first = tuple(state[ours[0]].shape)
    return first if len(ours) == 1 else (first[0], sum(state[name].shape[1] for name in ours))


def fill(module: nn.Module, names: Names, state: Mapping[str, Tensor]) -> None:
    """Copy their tensors into ours.

    Raises
    ------
    ValueError
        If a tensor is missing or has another shape than ours.
    """
    own = module.state_dict()
    with torch.no_grad():
        for theirs, ours in names.items():
            want, got = size(module, ours), state.get(theirs)
            if got is not None and theirs in ROWS:
                got = got[0]
            if got is None or tuple(got.shape) != want:
                found = "nothing" if got is None else tuple(got.shape)
                raise ValueError(f"{theirs}: got {found}, want {want}: do the settings fit the model?")
            parts = [got] if len(ours) == 1 else got.split([own[name].shape[1] for name in ours], 1)
            for name, part in zip(ours, parts, strict=True):
                own[name].copy_(part)


def gathered(module: nn.Module, names: Names) -> dict[str, Tensor]:
    """Our tensors under their names and in their shapes, as copies."""
    state = module.state_dict()
    found = {}
    for theirs, ours in names.items():
        tensor = torch.cat([state[name] for name in ours], 1) if len(ours) > 1 else state[ours[0]].clone()
        found[theirs] = (tensor[None] if theirs in ROWS else tensor).contiguous()
    return found
