"""Cells of an AnnData as a loaded model of scvi-tools takes them."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import torch

from streamx.models.cells import Cells
from streamx.schema import Schema


def codes(values: Any, names: tuple[str, ...]) -> torch.Tensor:
    """Position of each value among the names; -1 where it is none."""
    position = {name: code for code, name in enumerate(names)}
    return torch.tensor([position.get(str(value), -1) for value in values])


def cells_of(data: anndata.AnnData, schema: Schema) -> Cells:
    dense = data.X.toarray() if hasattr(data.X, "toarray") else data.X
    batch_n = torch.zeros(len(data), dtype=torch.int64)
    if schema.batch_key:
        batch_n = codes(data.obs[schema.batch_key], schema.batches)
    categories = [codes(data.obs[key], names) for key, names in schema.categories]
    continuous = [torch.as_tensor(np.array(data.obs[key], np.float32)) for key in schema.continuous]
    proteins = np.array(data.obsm[schema.protein_key], np.float32) if schema.protein_key else None
    return Cells(
        torch.as_tensor(np.asarray(dense, np.float32)),
        batch_n,
        label_n=codes(data.obs[schema.label_key], schema.labels) if schema.label_key else None,
        category_nc=torch.stack(categories, 1) if categories else None,
        continuous_nc=torch.stack(continuous, 1) if continuous else None,
        protein_np=None if proteins is None else torch.as_tensor(proteins),
    )
