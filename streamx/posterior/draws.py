"""Draws from a model's posterior, one minibatch at a time: what every other file of this room stands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from streamx.models import gaussian
from streamx.models.cells import Cells
from streamx.models.counts import Counts
from streamx.models.scanvi import Scanvi
from streamx.models.scvi import Scvi, observed_library
from streamx.models.totalvi import Totalvi
from streamx.models.totalvi_decoder import Proteins

CountModel = Scvi | Scanvi | Totalvi


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module in evaluation mode and without gradients; afterwards in the mode that it was in."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def latents(
    module: CountModel,
    cells: Cells,
    n_samples: int,
    generator: torch.Generator | None,
    measured_p: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``n_samples`` draws of the latent (n, n_latent) and of ln(library size) (n,), encoding once.

    With 0 samples: once, at the means of both posteriors, and without randomness.

    Parameters
    ----------
    measured_p
        For totalVI: False hides a protein from the encoder.
    """
    core = module.vae if isinstance(module, Scanvi) else module
    seen = {"measured_p": measured_p} if isinstance(core, Totalvi) else {}
    of_z = core.encode(cells, **seen)  # type: ignore[arg-type]
    observed = core.config.use_observed_lib_size
    of_library = None if observed else core.encode_library(cells, **seen)  # type: ignore[arg-type]
    total_n = observed_library(cells)
    for _ in range(max(n_samples, 1)):
        z_nk = gaussian.draw(*of_z, generator) if n_samples else of_z[0]
        library_n = total_n
        if of_library is not None:
            library_n = gaussian.draw(*of_library, generator) if n_samples else of_library[0]
        yield core.latent(z_nk), library_n


def decoded(
    module: CountModel,
    z_nk: Tensor,
    library_n: Tensor,
    cells: Cells,
    batch: int | None,
    generator: torch.Generator | None,
) -> tuple[Counts, Proteins | None]:
    """Distributions of gene counts and, for totalVI, of protein counts (whose background is a draw).

    Raises
    ------
    IndexError
        If there is no batch of that code.
    """
    if batch is not None and not 0 <= batch < module.n_batches:
        raise IndexError(f"batch code {batch} of {module.n_batches} batches")
    if isinstance(module, Totalvi):
        both = module.decode(z_nk, library_n, cells, batch, generator)
        return both.genes, both.proteins
    return module.decode(z_nk, library_n, cells, batch), None
