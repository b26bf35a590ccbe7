"""Surgery, its second half: which weights move while a reference model learns new batches (scArches).

The plan is data: :func:`trainable` says what moves, :func:`freeze` makes it so. The optimiser must have no
weight decay, which would move weights that have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamx.config import FreezeConfig
from streamx.models.grow import batch_tables, covariate_layers
from streamx.models.stack import Layer
from streamx.models.trvae import Block

# Whose first layers an option frees. totalVI's encoder has a stack for the library, its decoder four: the
# genes' is what scvi-tools means.
_STACKS = {"encoder": ("stack", "library"), "decoder": ("stack", "gene")}


@dataclass(frozen=True, eq=False)
class Trainable:
    """What moves.

    Attributes
    ----------
    moves
        Names of parameters -> where they move (bool, of the parameter's shape), or None: everywhere.
        A parameter that is not there stays.
    no_dropout
        Names of layers whose dropout is off.
    still_norms
        Names of batch norms whose running statistics stay. (While training they normalise by the minibatch's
        own, as in the reference implementation.)
    """

    moves: dict[str, Tensor | None]
    no_dropout: tuple[str, ...] = ()
    still_norms: tuple[str, ...] = ()


def trainable(
    module: nn.Module, n_new: int, options: FreezeConfig | None = None, n_new_levels: Sequence[int] = ()
) -> Trainable:
    """What moves while a model learns its last ``n_new`` batches, and so many levels of each covariate.

    Always: the new batches' values in every table, the new levels' columns, and the whole encoder of the
    library size. By option: the first layers of encoder and decoder, batch norms, the classifier (Lotfollahi
    2022; the options are scvi-tools'). Two deviations: the old batches' and levels' values stay even where
    the query has cells of them; and a frozen classifier's batch norm keeps its statistics too.
    """
    options = options or FreezeConfig()
    parameters = dict(module.named_parameters())
    if options.unfrozen:
        return Trainable({name: None for name, p in parameters.items() if p.requires_grad})
    whole = {"library_encoder"} | (set() if options.freeze_classifier else {"classifier"})
    tables = batch_tables(module)
    moves: dict[str, Tensor | None] = {}
    for name, parameter in parameters.items():
        if _part(name) in whole or _moves_by_option(name, options):
            moves[name] = None
        elif name in tables and not (_part(name).startswith("log_theta_") and options.freeze_dispersion):
            moves[name] = last(parameter, tables[name], n_new)
    if any(n_new_levels):
        for name, layer in covariate_layers(module).items():
            moves.setdefault(f"{name}.category", layer.last_levels(n_new_levels))
    names = dict(module.named_modules())
    layers = [n for n, m in names.items() if isinstance(m, Layer) and _part(n) not in whole]
    norms = [n for n, m in names.items() if isinstance(m, nn.BatchNorm1d) and _part(n) not in whole]
    return Trainable(
        moves,
        no_dropout=tuple(layers) if options.freeze_dropout else (),
        still_norms=tuple(name for name in norms if _frozen_norm(name, options)),
    )


def _part(name: str) -> str:
    """encoder, decoder, classifier, ...: also of a model inside another."""
    return name.removeprefix("vae.").split(".", 1)[0]


def _is_norm(name: str) -> bool:
    return ".norm" in name


def _frozen_norm(name: str, options: FreezeConfig) -> bool:
    part = _part(name)
    if "decoder" in part:
        return options.freeze_batchnorm_decoder
    return options.freeze_batchnorm_encoder if "encoder" in part else options.freeze_classifier


def _moves_by_option(name: str, options: FreezeConfig) -> bool:
    """Norms that are not frozen; first layers, all their weights."""
    if _is_norm(name):
        return "classifier" not in name and not _frozen_norm(name, options)
    frozen = {"encoder": options.freeze_expression, "decoder": options.freeze_decoder_first_layer}
    part, _, within = name.removeprefix("vae.").partition(".")
    stack, _, rest = within.partition(".")
    in_first = stack in _STACKS.get(part, ()) and rest.startswith("layers.0.columns.")
    return in_first and not frozen[part]


def last(table: Tensor, dimension: int, n_new: int) -> Tensor:
    """Where a table's last ``n_new`` batches are: bool, of its shape."""
    mask = torch.zeros_like(table, dtype=torch.bool)
    mask.narrow(dimension, table.shape[dimension] - n_new, n_new).fill_(True)
    return mask


def freeze(module: nn.Module, plan: Trainable) -> None:
    """Make it so, in place: on a model that :func:`~streamx.models.grow.extended` has just made."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in plan.moves)
        mask = plan.moves.get(name)
        if mask is not None:
            parameter.register_hook(_within(mask))
    for name in plan.no_dropout:
        layer = module.get_submodule(name)
        assert isinstance(layer, (Layer, Block))
        layer.dropout = 0.0
    for name in plan.still_norms:
        norm = module.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm1d)
        norm.momentum = 0.0


class _within:
    """Gradients where the mask says, zeros elsewhere."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        self.mask = self.mask.to(gradient.device)  # once: a recorded step may not copy from the host
        return gradient * self.mask
