"""Surgery: a reference model learns new batches; its own weights, and so its latents, stay the same bits."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch

from streamx.config import FreezeConfig
from streamx.models.freeze import freeze, trainable
from streamx.models.grow import extended
from streamx.train import counts
from streamx.train.engine import run_task
from streamx.train.fit import State, seed_of
from streamx.train.task import Run


def with_batch(module: Any, batch: str, seed: int, given: dict[str, torch.Tensor] | None = None) -> Any:
    """A new model with one batch more, whose values follow from (seed, name) alone; the given one stays."""
    generator = torch.Generator().manual_seed(seed_of(seed, 3, zlib.crc32(batch.encode())))
    return extended(module.cpu(), [generator], given)


def learn_batch(
    run: Run, module: Any, batch: str, rows: tuple[int, int], options: FreezeConfig, *, progress: bool
) -> tuple[Any, State]:
    """The model with one batch more, learnt from its cells alone, and what the training was.

    Parameters
    ----------
    run
        View, settings and schema, which knows the new batch as its last one. With weight decay 0 nothing but
        what `options` frees moves.
    module
        The model so far; it stays as it is.
    rows
        Where the batch's cells lie in the view.
    """
    given = None
    if getattr(module, "library_mean_b", None) is not None:
        mean_b, var_b = counts.log_library(run.view, rows=rows)
        code = run.view.batches.index(batch) if run.view.batches else 0
        given = {
            "library_mean_b": torch.tensor([mean_b[code]], dtype=torch.float32),
            "library_var_b": torch.tensor([var_b[code]], dtype=torch.float32),
        }
    grown = with_batch(module, batch, run.config.seed, given)
    freeze(grown, trainable(grown, 1, options))
    grown = grown.to(run.device)
    seed = seed_of(run.config.seed, 4, zlib.crc32(batch.encode())) % 2**31
    named = replace(run, config=replace(run.config, seed=seed))
    trained = run_task(named, counts.task_of(named, grown, rows=rows), rows[1] - rows[0], progress)
    return grown.requires_grad_(True), trained.state
