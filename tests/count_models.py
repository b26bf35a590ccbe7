"""Small count models with random weights, and cells for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from streamx.config import ScviConfig, TotalviConfig
from streamx.models.cells import Cells
from streamx.models.scanvi import Scanvi
from streamx.models.scvi import Scvi
from streamx.models.totalvi import Totalvi

N_GENES, N_PROTEINS, N_BATCHES = 12, 5, 3
SCVI = ScviConfig(n_latent=3, n_hidden=8)
TOTALVI = TotalviConfig(n_latent=3, n_hidden=8, per_batch_efficiency=True)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def some_cells(n: int = 20, number: int = 0) -> Cells:
    rng = np.random.default_rng(number)
    return Cells(
        torch.as_tensor(rng.poisson(1.0, (n, N_GENES)).astype(np.float32)),
        torch.as_tensor(np.arange(n) % N_BATCHES),
        protein_np=torch.as_tensor(rng.poisson(6.0, (n, N_PROTEINS)).astype(np.float32)),
    )


def repeated(cells: Cells, times: int) -> Cells:
    """All cells, then all of them again, and so on."""
    row_n = torch.arange(len(cells)).repeat(times)
    assert isinstance(cells.x_ng, torch.Tensor)
    assert cells.protein_np is not None
    return Cells(cells.x_ng[row_n], cells.batch_n[row_n], protein_np=cells.protein_np[row_n])


def scvi(**changes: Any) -> Scvi:
    library_b = (np.full(N_BATCHES, 2.5), np.full(N_BATCHES, 0.3))
    return _strengthened(Scvi(N_GENES, N_BATCHES, replace(SCVI, **changes), library_b=library_b))


def scanvi() -> Scanvi:
    return Scanvi(scvi(), 4)


def totalvi(**changes: Any) -> Totalvi:
    library_b = (np.full(N_BATCHES, 2.5), np.full(N_BATCHES, 0.3))
    config = replace(TOTALVI, **changes)
    return _strengthened(Totalvi(N_GENES, N_BATCHES, config, n_proteins=N_PROTEINS, library_b=library_b))


def _strengthened(module: Any) -> Any:
    """Batches that differ clearly, and means of some counts, so that a mistake shows."""
    with torch.no_grad():
        for name, table in module.named_parameters():
            if name.endswith(".batch"):
                table *= 3
            if name.endswith("_pb"):
                table += 0.3 * torch.randn(table.shape, generator=seed(1))
    return module
