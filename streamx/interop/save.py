"""Our count models in the files of other tools."""

from __future__ import annotations

import copy
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from streamx.config import ScviConfig
from streamx.errors import UsageError
from streamx.interop import scvi_tools, scvi_totalvi
from streamx.interop.scvi_files import Saved
from streamx.interop.scvi_write import VERSION, write_scvi
from streamx.models.scanvi import Scanvi
from streamx.models.scvi import Scvi
from streamx.models.stack import CovariateLinear, n_columns
from streamx.models.totalvi import Totalvi
from streamx.schema import Schema


def save_for_scvi_tools(
    folder: str | Path, module: nn.Module, schema: Schema, *, layer: str | None = None
) -> None:
    """Write a folder that ``load`` of scvi-tools 1.4 reads, together with the data.

    Parameters
    ----------
    module
        scVI, scANVI or totalVI.
    schema
        What it was trained on. Columns of obs and the obsm matrix must have these names in the data.
    layer
        The layer with the counts, if it is not X.

    Raises
    ------
    UsageError
        If scvi-tools has no such model, or would compute something else with its weights.
    """
    module, schema = _sorted(module, schema)
    if isinstance(module, Totalvi):
        kind, settings, weights = "totalvi", _of_totalvi(module), scvi_totalvi.state_dict_of(module)
    elif isinstance(module, Scanvi):
        kind, settings, weights = "scanvi", _of_scanvi(module), scvi_tools.state_dict_of(module)
    elif isinstance(module, Scvi):
        kind, settings, weights = "scvi", asdict(module.config), scvi_tools.state_dict_of(module)
    else:
        name = {"Scalex": "SCALEX", "Trvae": "trVAE"}.get(type(module).__name__, type(module).__name__)
        raise UsageError(f"scvi-tools has no {name}", fix="train scvi, scanvi or totalvi for it")
    saved = Saved(
        kind,
        VERSION,
        weights,
        settings,
        list(schema.genes),
        list(schema.batches),
        batch_key=schema.batch_key,
        labels=list(schema.labels),
        label_key=schema.label_key,
        unlabeled=schema.unlabeled,
        categories={key: list(levels) for key, levels in schema.categories},
        continuous=list(schema.continuous),
        layer=layer,
        proteins=list(schema.proteins),
        protein_key=schema.protein_key,
        protein_mask_bp=module.measured_bp.cpu().numpy() if isinstance(module, Totalvi) else None,
    )
    write_scvi(folder, saved)


def _sorted(module: nn.Module, schema: Schema) -> tuple[nn.Module, Schema]:
    """The same model with the levels of each covariate in the order of the alphabet.

    scvi-tools 1.4 takes a column of categories as it is, and not in the order that a model's file names (its
    conversion takes categories in another order for the same); batches it does convert.
    """
    orders = [sorted(range(len(levels)), key=levels.__getitem__) for _, levels in schema.categories]
    if all(order == sorted(order) for order in orders):
        return module, schema
    module = copy.deepcopy(module)
    column_c: list[int] = []
    for order in orders:
        column_c += [len(column_c) + level for level in order[: n_columns(len(order))]]
    for layer in (module.vae if isinstance(module, Scanvi) else module).modules():
        if isinstance(layer, CovariateLinear) and layer.category is not None:
            layer.category = nn.Parameter(layer.category.detach()[:, column_c])
    categories = tuple((key, tuple(sorted(levels))) for key, levels in schema.categories)
    return module, replace(schema, categories=categories)


def _of_scanvi(module: Scanvi) -> dict[str, Any]:
    names = [f.name for f in fields(ScviConfig)]  # the inner scVI may have been made with scANVI's settings
    settings = {name: getattr(module.vae.config, name) for name in names}
    del settings["latent_distribution"]  # normal, and no argument of theirs
    settings["linear_classifier"] = module.config.linear_classifier
    if not module.config.logits:
        settings["classifier_parameters"] = {"logits": False}
    return settings


def _of_totalvi(module: Totalvi) -> dict[str, Any]:
    settings = asdict(module.config)
    transform, activation = settings.pop("input_transform"), settings.pop("background_activation")
    if transform != "scaled":
        raise UsageError(
            f"totalVI with input_transform = {transform}: scvi-tools 1.4 scales the input of every totalVI "
            "first, and would give other latents",
            fix="train with input_transform scaled to share a model with it",
        )
    for name in ("per_batch_efficiency", "protein_warmup"):
        del settings[name]
    settings["extra_decoder_kwargs"] = {"activation_function_bg": activation}
    return settings | {"empirical_protein_background_prior": False}
