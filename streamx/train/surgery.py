"""Surgery: a reference model learns new batches; its own weights, and so its latents, stay the same bits."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamx.config import FreezeConfig
from streamx.models.freeze import freeze, trainable
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
    generator = torch.Generator().manual_seed(seed_of(seed, 3, key))
    grown = extended(module.cpu(), [generator], _library(run, module, batch, rows))
    freeze(grown, trainable(grown, 1, options))
    of_batch = replace(run, config=replace(run.config, seed=seed_of(seed, 4, key) % 2**31))
    task = counts.task_of(of_batch, grown.to(run.device), rows)
    trained = run_task(of_batch, task, rows[1] - rows[0], progress)
    return grown.requires_grad_(True), trained.state


def _library(run: Run, module: Any, batch: str, rows: tuple[int, int]) -> dict[str, Tensor] | None:
    """Where the library size is a latent variable, its prior in the new batch."""
    tables = [name for name, _ in module.named_buffers() if name.endswith("library_mean_b")]
    if not tables:
        return None
    code = run.view.batches.index(batch)
    mean, var = (float(value_b[code]) for value_b in counts.log_library(run.view, rows))
    stem = tables[0].removesuffix("mean_b")
    return {f"{stem}mean_b": torch.tensor([mean]), f"{stem}var_b": torch.tensor([var])}
