"""``scarches.dataset``'s documented helpers: codes of labels, dense copies, cells one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse

from streamx.errors import BatchError, UsageError


def label_encoder(
    adata: AnnData, encoder: Mapping[str, int] | None = None, condition_key: str = "condition"
) -> tuple[np.ndarray, dict[str, int]]:
    """Codes of an obs column, float64 (n_cells, 1), and the code of each label.

    Parameters
    ----------
    encoder
        Codes to use; by default 0, 1, ... of the labels in the order of the alphabet.

    Raises
    ------
    UsageError
        If there is no such column.
    BatchError
        If a cell has a label that the encoder does not know.
    """
    if condition_key not in adata.obs:
        raise UsageError(f"no obs column {condition_key!r}", fix=f"one of {', '.join(adata.obs.columns)}")
    names = adata.obs[condition_key].astype(str).to_numpy(dtype=object)
    known = dict(encoder) if encoder is not None else {n: i for i, n in enumerate(sorted(set(names)))}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise BatchError(f"labels without a code: {', '.join(unknown[:5])}", fix=f"one of {', '.join(known)}")
    return np.array([[known[name]] for name in names], dtype=np.float64).reshape(-1, 1), known


def remove_sparsity(adata: AnnData) -> AnnData:
    """The same cells with X dense, obs and var (nothing else); the object itself if X is dense already.

    For small data: models take sparse counts as they are.
    """
    if not sparse.issparse(adata.X):
        return adata
    return AnnData(adata.X.toarray(), obs=adata.obs.copy(), var=adata.var.copy())


class trVAEDataset:
    """Cells of an AnnData as trVAE takes them: a dict of tensors for each.

    ``x`` float32 (n_genes,); ``sizefactor``, the cell's total or its logarithm; ``batch``, code of the
    condition; ``celltype``, code of the cell type, where that is asked for. Models themselves stream
    (:class:`streamx.Loader`); this is for loops of one's own over small data.

    Parameters
    ----------
    condition_key, condition_encoder, cell_type_key, cell_type_encoder
        obs columns, and codes to use (:func:`label_encoder`).
    size_factor
        ``sum``, as scArches from 2021 on; ``log_sum``, as in the documentation's release.
    """

    def __init__(
        self,
        adata: AnnData,
        condition_key: str | None = None,
        condition_encoder: Mapping[str, int] | None = None,
        cell_type_key: str | None = None,
        cell_type_encoder: Mapping[str, int] | None = None,
        *,
        size_factor: str = "sum",
    ) -> None:
        if size_factor not in ("sum", "log_sum"):
            raise UsageError(f"size_factor = {size_factor!r}", fix="sum or log_sum")
        self.adata, self._x = adata, adata.X
        total_n = np.asarray(adata.X.sum(axis=1), np.float64).ravel()
        self.size_factors = torch.as_tensor(np.log(total_n) if size_factor == "log_sum" else total_n).float()
        self._codes: dict[str, Any] = {}
        self.condition_encoder: dict[str, int] = {}
        self.cell_type_encoder: dict[str, int] = {}
        if condition_key is not None:
            codes, self.condition_encoder = label_encoder(adata, condition_encoder, condition_key)
            self._codes["batch"] = torch.as_tensor(codes.ravel()).long()
        if cell_type_key is not None:
            codes, self.cell_type_encoder = label_encoder(adata, cell_type_encoder, cell_type_key)
            self._codes["celltype"] = torch.as_tensor(codes.ravel()).long()

    def __len__(self) -> int:
        return self.adata.n_obs

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        x_g = self._x[row]
        x_g = x_g.toarray() if sparse.issparse(x_g) else np.asarray(x_g)
        item = {"x": torch.as_tensor(x_g.ravel().astype(np.float32)), "sizefactor": self.size_factors[row]}
        return item | {name: codes[row] for name, codes in self._codes.items()}
