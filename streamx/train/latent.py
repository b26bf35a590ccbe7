"""Latents of whole collections, in row order, under each way to normalise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from streamx.errors import BatchError
from streamx.loader.column import large_array
from streamx.models.matched import (
    REFERENCE_BATCH_SAMPLE,
    REFERENCE_SAMPLE,
    Clusters,
    Move,
    as_statistics,
    fit_reference,
    normalised,
)
from streamx.models.scalex import (
    NormStats,
    Scalex,
    encode,
    encode_by_minibatch,
    norm_stats,
    running_stats,
)
from streamx.store.collection import Collection
from streamx.train.feed import all_inputs, inputs, make_loader
from streamx.train.model import Model

ROWS = 4096  # per minibatch where its size does not matter
ORIGINAL = 64  # where it does
MIN_CELLS = 200  # of a batch, for statistics of its own


def view_stats(module: Scalex, view: Collection, **options: Any) -> NormStats:
    """Statistics of the pre-activations of each batch, over all cells of a view."""
    loader = make_loader(view, ROWS, device=_device(module), order="sequential", **options)
    return norm_stats(module, lambda: all_inputs(loader))


def match_reference(
    module: Scalex, view: Collection, *, seed: int, **options: Any
) -> tuple[Clusters, list[Move]]:
    """Clusters of the reference and the move of each batch, from a sample of its cells.

    Rows of a view are shuffled inside each batch, so the first ones of every run of a batch are a sample.
    """
    sampled = np.zeros(view.n_obs, dtype=bool)
    code_n, n_batches = view.batch_codes, max(1, len(view.batches))
    quota = max(MIN_CELLS, min(REFERENCE_BATCH_SAMPLE, REFERENCE_SAMPLE // n_batches))
    starts = np.flatnonzero(np.diff(code_n, prepend=-2))
    sizes = np.diff(np.append(starts, len(code_n)))
    of_batch = np.bincount(code_n, minlength=n_batches)
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        share = -(-size * quota // int(of_batch[code_n[start]]))
        sampled[start : start + min(size, share)] = True
    loader = make_loader(view, ROWS, device=_device(module), order="sequential", rows=sampled, **options)
    u_nh = np.concatenate([normalised(module, x_ng) for x_ng, _ in all_inputs(loader)])
    return fit_reference(module, u_nh, code_n[sampled], n_batches, min_cells=MIN_CELLS, seed=seed)


def latents(
    module: Scalex,
    view: Collection,
    norm: str,
    stats: NormStats | None = None,
    moves: list[Move] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Latents of all cells of a view.

    Parameters
    ----------
    norm
        Statistics of the encoder's batch norm: ``matched``, each batch's move to what the reference has at
        its composition; ``running`` ones of the training; ``domain``, each batch's own, exact;
        ``minibatch``, those of 64 cells of one batch, drawn by ``seed`` (the original).
    stats, moves
        For ``domain`` and ``matched``, where they are known already; else they cost one more pass.
    options
        Of the :class:`~streamx.loader.loader.Loader`: memory, prefetch, threads.

    Returns
    -------
    float32 (n_cells, n_latent), in row order.
    """
    out = large_array((view.n_obs, module.config.n_latent), np.float32)
    if norm == "minibatch":
        loader = make_loader(view, ORIGINAL, device=_device(module), order="by_batch", seed=seed, **options)
        rows: list[np.ndarray] = []
        found = encode_by_minibatch(module, lambda: _noting(loader, rows))
        for z_nk in found:
            out[rows.pop()] = z_nk
        return out
    if norm == "domain":
        stats = stats or view_stats(module, view, **options)
        mean_bh, var_bh = stats.mean_bh, stats.var_bh
    elif norm == "matched":
        moves = moves or match_reference(module, view, seed=seed, **options)[1]
        mean_bh, var_bh = map(np.stack, zip(*(as_statistics(module, move) for move in moves), strict=True))
    else:
        mean_h, var_h = running_stats(module)
        mean_bh, var_bh = mean_h[None], var_h[None]
    loader = make_loader(view, ROWS, device=_device(module), order="sequential", **options)
    start = 0
    for z_nk in encode(module, lambda: all_inputs(loader), mean_bh, var_bh):
        out[start : start + len(z_nk)] = z_nk
        start += len(z_nk)
    return out


def impute(model: Model, z_nk: np.ndarray, batch: str, *, rows: int = ROWS) -> Iterator[np.ndarray]:
    """Expression as it would be in a reference batch, block by block: float32 (<= rows, n_genes) in [0, 1].

    On the scale of the model's input (a gene's largest value in the batch is 1), from running statistics.
    The original falls back on the first batch when the name is unknown; here that is an error.

    Raises
    ------
    BatchError
        If the reference has no such batch.
    """
    if batch not in model.batches:
        known = ", ".join(model.batches) or "their names are not in the checkpoint"
        raise BatchError(
            f"the reference has no batch {batch!r}", where=str(model.path), fix=f"one of: {known}"
        )
    device = _device(model.module)
    with torch.no_grad():
        for start in range(0, len(z_nk), rows):
            mu_nk = torch.as_tensor(z_nk[start : start + rows], device=device)
            yield model.module.impute(mu_nk, model.batches.index(batch)).cpu().numpy()


def _device(module: Scalex) -> torch.device:
    return module.encoder.hidden.weight.device


def _noting(loader: Any, rows: list[np.ndarray]) -> Iterator[tuple[Any, Any]]:
    """Minibatches; the rows of the one given last lie in ``rows``."""
    for mb in loader.at(0):
        rows.append(np.asarray(mb.row_n.cpu() if isinstance(mb.row_n, torch.Tensor) else mb.row_n))
        yield inputs(mb)
