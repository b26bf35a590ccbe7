"""Surgery, its first half: a model of more batches whose weights for the old ones are the same bits.

The second half, what moves while the new batches are learnt, is :mod:`streamx.models.freeze`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from streamx.models.sparse import SparseLinear
from streamx.models.stack import CovariateLinear


def batch_dimension(name: str) -> int | None:
    """The dimension of a table (by the last part of its name) that counts batches, or None.

    ``batch`` (n_out, n_batches) are columns of a layer; otherwise the letters after the last underscore are
    the axes: ``log_theta_gb`` is (n_genes, n_batches), ``library_mean_b`` (n_batches,).
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "batch":
        return 1
    axes = leaf.rsplit("_", 1)[-1] if "_" in leaf else ""
    return axes.index("b") if "b" in axes and len(axes) <= 3 else None


def batch_tables(module: nn.Module) -> dict[str, int]:
    """Names of all parameters and buffers that have an axis of batches -> that axis; sorted."""
    found = {name: batch_dimension(name) for name in sorted(_tensors(module))}
    return {name: dimension for name, dimension in found.items() if dimension is not None}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def extended(
    module: nn.Module, generators: Sequence[torch.Generator], given: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A new module with one batch more for each generator; the given module stays as it is.

    A new batch's values are drawn from its own generator, table by table, as at the beginning: several
    batches in one go give the same bits as one by one. A layer of a single batch has no column for it; when
    it grows, that batch gets a column of zeros, and its cells the results that they had.

    Parameters
    ----------
    module
        A model; every part of it that holds a table of batches has a method ``new_batch(name, generator)``,
        which gives the values of one batch more. Attributes ``n_batches`` follow.
    generators
        CPU generators, one for each new batch.
    given
        Values of the new batches, by the table's name, along its axis of batches, for tables that are not
        drawn.

    Raises
    ------
    ValueError
        If a table that is not drawn is not given, or has another number of batches than there are generators.
    """
    made = copy.deepcopy(module)
    tables, given = batch_tables(made), given or {}
    for name, values in given.items():
        if name not in tables or values.shape[tables[name]] != len(generators):
            raise ValueError(f"{name}: got values {tuple(values.shape)} for {len(generators)} new batches")
    for number, generator in enumerate(generators):
        for name, dimension in tables.items():
            own = given[name].select(dimension, number) if name in given else None
            _append(made, generator, name, dimension, own)
    _add_to_count(made, len(generators))
    for part in made.modules():
        if isinstance(part, SparseLinear):
            part.pending = None  # the old model's optimiser does not know this one
    return made


@torch.no_grad()
def _append(
    module: nn.Module, generator: torch.Generator, name: str, dimension: int, values: Tensor | None
) -> None:
    """One slice more for one table."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    table: Tensor = getattr(owner, leaf)
    if values is None:
        draw = owner.new_batch
        assert callable(draw)
        values = draw(leaf, generator)
    parts = [table, values.to(table).unsqueeze(dimension)]
    if table.shape[dimension] == 0:
        parts.insert(1, torch.zeros_like(parts[1]))
    longer = torch.cat(parts, dimension)
    if isinstance(table, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(longer, requires_grad=table.requires_grad))
    else:
        owner.register_buffer(leaf, longer)


def covariate_layers(module: nn.Module) -> dict[str, CovariateLinear]:
    """The layers that further categorical covariates enter, by name: those that batches do.

    (scANVI's labels are levels of layers without batches.)
    """
    parts = module.named_modules()
    return {n: p for n, p in parts if isinstance(p, CovariateLinear) and p.batch is not None and p.n_levels}


def with_levels(module: nn.Module, generators: Sequence[Sequence[torch.Generator]]) -> nn.Module:
    """A new module with more levels of its categorical covariates; the given module stays as it is.

    ``generators``: for each covariate a CPU generator for every new level, which draws its columns layer by
    layer. In scvi-tools new columns go behind all others, so that a new batch takes those of the first
    covariate's first level; here each goes behind the levels of its own covariate.
    """
    made = copy.deepcopy(module)
    for category, of_levels in enumerate(generators):
        for generator in of_levels:
            for layer in covariate_layers(made).values():
                layer.add_level(category, generator)
    for part in made.modules():
        if "n_levels" in vars(part) and not isinstance(part, CovariateLinear):
            added = zip(vars(part)["n_levels"], generators, strict=True)
            vars(part)["n_levels"] = tuple(n + len(new) for n, new in added)
    return made


def selected(module: nn.Module, codes: Sequence[int]) -> nn.Module:
    """A new module with these of the batches, in this order; the given module stays as it is."""
    made = copy.deepcopy(module)
    for name, dimension in batch_tables(made).items():
        path, _, leaf = name.rpartition(".")
        owner = made.get_submodule(path)
        table: Tensor = getattr(owner, leaf)
        if table.shape[dimension] == 0:  # of a single batch, which has no column
            continue
        chosen = table.detach().index_select(dimension, torch.tensor(list(codes), dtype=torch.int64))
        if isinstance(table, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(chosen, requires_grad=table.requires_grad))
        else:
            owner.register_buffer(leaf, chosen)
    _add_to_count(made, len(codes) - module.n_batches)  # type: ignore[operator, arg-type]
    return made


def _add_to_count(module: nn.Module, n: int) -> None:
    """More (or fewer) batches in every part that counts them."""
    for part in module.modules():
        if "n_batches" in vars(part):
            vars(part)["n_batches"] += n
