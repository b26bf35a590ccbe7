"""Surgery: a reference model learns new batches; its own weights, and so its latents, stay the same bits."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamx.config import FreezeConfig, TrvaeFreezeConfig
from streamx.models.freeze import freeze, trainable
from streamx.models.freeze_trvae import trainable_trvae
from streamx.models.grow import extended
from streamx.train import counts
from streamx.train.engine import run_task
from streamx.train.fit import State, seed_of
from streamx.train.task import Run


def learn_batch(
    run: Run, module: Any, batch: str, rows: tuple[int, int], options: FreezeConfig, *, progress: bool
) -> tuple[Any, State]:
    """The model with one batch more, learnt from its cells alone, and what the training was.

    Initial values, the order of minibatches and all noise follow from (seed, name of the batch).

    Parameters
    ----------
    run
        View, settings and schema, which has the new batch as its last one. With weight decay 0 nothing but
        what `options` frees moves.
    module
        The model so far; it stays as it is.
    rows
        Where the batch's cells lie in the view.
    """
    key, seed = zlib.crc32(batch.encode()), run.config.seed
    grown = with_batch(run, module.cpu(), batch, rows)
    plan = trainable_trvae(grown, 1) if run.config.model == "trvae" else trainable(grown, 1, options)
    freeze(grown, plan)
    of_batch = replace(run, config=replace(run.config, seed=seed_of(seed, 4, key) % 2**31))
    task = counts.task_of(of_batch, grown.to(run.device), rows)
    trained = run_task(of_batch, task, rows[1] - rows[0], progress)
    return grown.requires_grad_(True), trained.state


def with_batch(run: Run, module: Any, batch: str, rows: tuple[int, int] | None = None) -> Any:
    """A new model on the CPU with one batch more, its values as they are before it is learnt.

    ``rows``: where the batch's cells lie in the view; by default they are looked for in all of it.
    """
    generator = torch.Generator().manual_seed(seed_of(run.config.seed, 3, zlib.crc32(batch.encode())))
    return extended(module, [generator], _given(run, module, batch, rows))


def learn_batches(
    run: Run, module: Any, n_new: int, options: FreezeConfig | TrvaeFreezeConfig, *, progress: bool
) -> State:
    """Train what may move of a model, in place, on all cells of the view; its last batches are the new ones.

    Cells of several batches share minibatches, as in scArches: what is learnt of one batch depends on which
    others are learnt with it (unlike :func:`learn_batch`).
    """
    if isinstance(options, TrvaeFreezeConfig):
        plan = trainable_trvae(module, n_new, options)
    else:
        plan = trainable(module, n_new, options)
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
