"""SCALEX on the engine: its minibatches and losses, and what its reference keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamx.models.scalex import Scalex
from streamx.train.feed import make_loader, training_inputs
from streamx.train.fit import seed_of
from streamx.train.latent import latents, match_reference, view_stats
from streamx.train.task import Finished, Run, Task


def prepare(run: Run, progress: bool) -> Task:
    """A new network, and its minibatches from the view."""
    view, config, ranks = run.view, run.config, run.ranks
    loader = make_loader(
        view,
        config.minibatch_size,
        device=run.device,
        drop_last=True,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
        **run.reading,
    )
    generator = torch.Generator().manual_seed(seed_of(config.seed, 0))
    module = Scalex(view.n_vars, max(1, len(view.batches)), run.network, generator).to(run.device)
    return Task(
        module,
        partial(training_inputs, loader, run.network.n_latent, config.seed),
        named_losses(module),
        n_minibatches=len(loader),
        recordable=True,
    )


def named_losses(module: Scalex) -> Callable[..., dict[str, Tensor]]:
    """The model's loss and its parts, as the loop takes them."""

    def loss(x_ng: Any, batch_n: Tensor, noise_nk: Tensor) -> dict[str, Tensor]:
        found = module.loss(x_ng, batch_n, noise_nk)
        return {"loss": found.total, "reconstruction": found.reconstruction, "kl": found.kl}

    return loss


def finish(run: Run, module: Scalex) -> Finished:
    """Latents of the reference, and statistics that queries are judged by."""
    view, config, options = run.view, run.config, run.reading
    stats = view_stats(module, view, **options)
    clusters, moves = match_reference(module, view, seed=config.seed, **options)
    assert config.norm is not None
    z_nk = latents(module, view, config.norm, stats, moves, seed=config.seed, **options)
    mean_h, var_h = stats.pooled()
    tables = {
        "n_b": stats.n_b,
        "mean_bh": stats.mean_bh,
        "var_bh": stats.var_bh,
        "mean_h": mean_h,
        "var_h": var_h,
        **asdict(clusters),
    }
    if view.scale_bg is not None:
        tables["scale_bg"] = view.scale_bg
    return Finished(z_nk, tables)
