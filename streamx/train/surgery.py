"""Surgery: a reference model learns new batches; its own weights, and so its latents, stay the same bits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamx.config import FreezeConfig, TrvaeFreezeConfig
from streamx.models.freeze import freeze, trainable
from streamx.models.freeze_trvae import trainable_trvae
from streamx.models.grow import batch_tables, covariate_layers, extended, selected, with_levels
from streamx.schema import Schema
from streamx.store.collection import Collection
from streamx.train import counts
from streamx.train.build import build_module
from streamx.train.engine import run_task
from streamx.train.fit import State, seed_of
from streamx.train.task import Run


def learn_batch(
    run: Run, module: Any, batch: str, rows: tuple[int, int], options: FreezeConfig, *, progress: bool
) -> tuple[Any, State]:
    """The model with one batch more, learnt from its cells alone, and what the training was.

    Initial values, the order of minibatches and all noise follow from (seed, name of the batch). What is
    trained has the columns of this batch alone: steps and checkpoints cost the same however many batches came
    before.

    No classifier of batches is fooled meanwhile, as totalVI's training does where batches lack proteins:
    there is one batch, and nothing to tell it from. (A deviation: scvi-tools fools a new classifier of all
    batches, shown the query's cells alone, where a batch of the query lacks proteins.)

    Parameters
    ----------
    run
        View, settings and schema, which has the new batch as its last one, and behind each covariate's levels
        those that are new. With weight decay 0 nothing but
        what `options` frees moves. A view of some of the model's genes: the others are left out of the
        likelihood.
    module
        The model so far; it stays as it is.
    rows
        Where the batch's cells lie in the view.
    """
    key, seed = zlib.crc32(batch.encode()), run.config.seed
    grown, n_new_levels = with_covariates(run, with_batch(run, module.cpu(), batch, rows))
    measured = measured_in(run.view, run.schema)
    narrow = narrowed(run.config.model, run.schema, grown, measured)
    alone: Any = selected(narrow, [len(run.schema.batches) - 1])
    if run.config.model == "trvae":
        plan = trainable_trvae(alone, 1)
    else:
        plan = trainable(alone, 1, options, n_new_levels)
    freeze(alone, plan)
    of_batch = replace(
        run,
        config=replace(run.config, seed=seed_of(seed, 4, key) % 2**31),
        schema=replace(run.schema, batches=(batch,)),
    )
    task = counts.task_of(of_batch, alone.to(run.device), rows)
    trained = run_task(of_batch, task, rows[1] - rows[0], progress)
    join_last(narrow, alone)
    if measured is not None:
        widen(grown, narrow, measured)
    return grown, trained.state


def measured_in(view: Collection, schema: Schema) -> Tensor | None:
    """Positions of a view's genes among the model's; None where it has all."""
    genes = [str(name) for name in view.var_names]
    if len(genes) == len(schema.genes):
        return None
    position = {name: g for g, name in enumerate(schema.genes)}
    return torch.tensor([position[name] for name in genes])


def narrowed(kind: str, schema: Schema, module: Any, measured: Tensor | None) -> Any:
    """The model on some of its genes (None: all): what it would say of a cell if the others did not exist.

    Its encoder is the same function, since a gene without counts adds nothing to the first layer; the
    decoder's shares are those among these genes.
    """
    if measured is None:
        return module
    genes = tuple(schema.genes[g] for g in measured.tolist())
    made = build_module(kind, replace(schema, genes=genes), module.config)
    state = {}
    for name, value in made.state_dict().items():
        full = module.state_dict()[name]
        axis = _other_axis(full, value)
        state[name] = full if axis is None else full.index_select(axis, measured)
    made.load_state_dict(state)
    return made.train(module.training)


@torch.no_grad()
def widen(module: Any, narrow: Any, measured: Tensor) -> None:
    """Bring back what a narrowed model has learnt; of other genes everything stays."""
    learnt = narrow.cpu().state_dict()
    for name, value in module.state_dict().items():
        axis = _other_axis(value, learnt[name])
        if axis is None:
            value.copy_(learnt[name])
        else:
            value.index_copy_(axis, measured, learnt[name])


@torch.no_grad()
def join_last(module: Any, alone: Any) -> None:
    """Bring back what a model of its last batch alone has learnt; the other batches' values stay."""
    tables, learnt = batch_tables(module), alone.cpu().state_dict()
    for name, value in module.state_dict().items():
        own = value if name not in tables else value.narrow(tables[name], value.shape[tables[name]] - 1, 1)
        own.copy_(learnt[name])


def _other_axis(a: Tensor, b: Tensor) -> int | None:
    """The axis in which two tensors differ in length."""
    return next((d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)


def with_batch(run: Run, module: Any, batch: str, rows: tuple[int, int] | None = None) -> Any:
    """A new model on the CPU with one batch more, its values as they are before it is learnt.

    ``rows``: where the batch's cells lie in the view; by default they are looked for in all of it.
    """
    return extended(module, [_drawing(run, 3, batch)], _given(run, module, batch, rows))


def with_covariates(run: Run, module: Any) -> tuple[Any, list[int]]:
    """The model with the levels that the schema has and it lacks, and how many of each covariate these are.

    A level's initial values follow from (seed, covariate, level).
    """
    layer = next(iter(covariate_layers(module).values()), None)
    n_old = (0,) * len(run.schema.categories) if layer is None else layer.n_levels
    new = [
        [f"{key}={level}" for level in levels[n:]]
        for n, (key, levels) in zip(n_old, run.schema.categories, strict=True)
    ]
    n_new = [len(levels) for levels in new]
    if not any(n_new):
        return module, n_new
    return with_levels(module, [[_drawing(run, 6, level) for level in levels] for levels in new]), n_new


def _drawing(run: Run, purpose: int, name: str) -> torch.Generator:
    """The generator of the initial values of a batch, or of a level."""
    return torch.Generator().manual_seed(seed_of(run.config.seed, purpose, zlib.crc32(name.encode())))


def learn_batches(
    run: Run,
    module: Any,
    n_new: int,
    options: FreezeConfig | TrvaeFreezeConfig,
    n_new_levels: Sequence[int] = (),
    *,
    progress: bool,
) -> State:
    """Train what may move of a model, in place, on all cells of the view; its last batches are the new ones,
    and the last so many levels of each covariate.

    Cells of several batches share minibatches, as in scArches: what is learnt of one batch depends on which
    others are learnt with it (unlike :func:`learn_batch`). No classifier is fooled here either.
    """
    if isinstance(options, TrvaeFreezeConfig):
        plan = trainable_trvae(module, n_new, options)
    else:
        plan = trainable(module, n_new, options, n_new_levels)
    freeze(module, plan)
    task = counts.task_of(run, module.to(run.device), (0, run.view.n_obs))
    trained = run_task(run, task, run.view.n_obs, progress)
    module.requires_grad_(True)
    return trained.state


def _given(run: Run, module: Any, batch: str, rows: tuple[int, int] | None) -> dict[str, Tensor]:
    """What of the new batch is not drawn but follows from its cells, by the tables' names."""
    code, given = run.view.batches.index(batch), dict[str, Tensor]()
    for name, _ in module.named_buffers():
        if name.endswith("library_mean_b"):
            mean, var = (float(value_b[code]) for value_b in counts.log_library(run.view, rows))
            given |= {name: torch.tensor([mean]), name.replace("mean_b", "var_b"): torch.tensor([var])}
    if run.config.model == "totalvi":
        tables = counts.protein_tables(run.view, run.schema, run.config)
        given["measured_bp"] = torch.as_tensor(tables["measured_bp"][[code]])
        if "background" in tables and tables["measured_bp"][code].any():
            mean_pb, sd_pb = (torch.as_tensor(table[:, [code]]) for table in tables["background"])
            given |= {"background_mean_pb": mean_pb, "background_log_sd_pb": sd_pb.log()}
    return given
