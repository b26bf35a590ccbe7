"""Which weights of a trVAE model move while it learns new batches (scArches' surgery)."""

from __future__ import annotations

from torch import nn

from streamx.config import TrvaeFreezeConfig
from streamx.models.freeze import Trainable, last
from streamx.models.grow import batch_tables
from streamx.models.trvae import Block, Trvae


def trainable_trvae(module: Trvae, n_new: int, options: TrvaeFreezeConfig | None = None) -> Trainable:
    """What moves while a model learns its last ``n_new`` batches; for :func:`streamx.models.freeze.freeze`.

    By default the new batches' columns in both first layers, and their dispersions; without
    ``freeze_expression`` the first layers whole. Two deviations from scArches: the old batches' columns stay
    even where the query has cells of them, and statistics of frozen batch norms stay, so that the reference's
    latents do.
    """
    options = options or TrvaeFreezeConfig()
    parameters, tables = dict(module.named_parameters()), batch_tables(module)
    blocks = [name for name, part in module.named_modules() if isinstance(part, Block)]
    norms = [name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm1d)]
    no_dropout = tuple(blocks) if options.remove_dropout else ()
    if not options.freeze:
        return Trainable(dict.fromkeys(parameters), no_dropout)

    def moves_whole(name: str) -> bool:
        return not options.freeze_expression and ".blocks.0." in name

    moves = {name: last(parameters[name], tables[name], n_new) for name in parameters if name in tables}
    whole = {name: None for name in parameters if moves_whole(name) and name not in tables}
    return Trainable(moves | whole, no_dropout, tuple(name for name in norms if not moves_whole(name)))
