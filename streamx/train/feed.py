"""Minibatches as a model takes them: sparse rows where that is faster, else dense tensors on its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from scipy import sparse
from torch import Tensor

from streamx.loader.loader import Loader, Minibatch
from streamx.loader.transform import dense
from streamx.models.sparse import DENSITY_LIMIT, Rows
from streamx.store.collection import Collection
from streamx.train.fit import seed_of


def make_loader(
    view: Collection, minibatch_size: int, *, device: torch.device, sparse: bool = True, **options: Any
) -> Loader:
    """A loader of what :func:`inputs` gives to a model on ``device``.

    On the CPU sparse, unless the model takes no sparse rows or the view is dense. That depends on these
    alone: the two ways round differently.
    """
    dense = not sparse or view.nnz > DENSITY_LIMIT * view.n_obs * view.n_vars
    if device.type == "cpu" and not dense:
        return Loader(view, minibatch_size, output="csr", **options)
    return Loader(view, minibatch_size, device=device, **options)


def inputs(minibatch: Minibatch) -> tuple[Tensor | Rows, Tensor]:
    """What the model sees, and batch codes int64."""
    x_ng, batch_n = minibatch.x_ng, torch.as_tensor(minibatch.batch_n)
    return (x_ng if isinstance(x_ng, Tensor) else Rows.of(x_ng)), batch_n


def training_inputs(
    loader: Loader, n_latent: int, seed: int, epoch: int, done: int
) -> Iterator[tuple[Tensor | Rows, Tensor, Tensor]]:
    """This process's minibatches of an epoch without the first ``done``: input, batch codes, noise.

    Noise (n, n_latent) depends on (seed, epoch, number of the minibatch among those of all processes), not on
    the device.
    """
    generator, number = torch.Generator(), done * loader.world + loader.rank
    for minibatch in loader.at(epoch, done * loader.world):
        x_ng, batch_n = inputs(minibatch)
        generator.manual_seed(seed_of(seed, 1, epoch, number))
        noise_nk = torch.randn(len(minibatch), n_latent, generator=generator)
        yield x_ng, batch_n, noise_nk.to(batch_n.device, non_blocking=True)
        number += loader.world


def query_input(x_ng: sparse.csr_matrix, device: torch.device) -> Tensor | Rows:
    """Transformed cells of a query for a model on ``device``; on the CPU always sparse."""
    if device.type == "cpu":
        return Rows.of(x_ng)
    return torch.from_numpy(dense(x_ng, 0, x_ng.shape[0])).to(device)


def all_inputs(loader: Loader) -> Iterator[tuple[Tensor | Rows, Tensor]]:
    """Those of an epoch, the same at every call."""
    return map(inputs, loader.at(0))
