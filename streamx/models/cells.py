"""What a count model is given: a minibatch of cells."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamx.models.sparse import Rows


@dataclass(frozen=True, eq=False)
class Cells:
    """A minibatch.

    Attributes
    ----------
    x_ng
        Raw counts, float32 (n, n_genes): a tensor, or (on the CPU, where the model says so) sparse rows.
    batch_n
        Batch codes, int64 (trVAE's conditions).
    label_n
        Label codes, int64; -1 means unlabelled.
    category_nc
        Codes of further categorical covariates, int64, one column each.
    continuous_nc
        Continuous covariates, float32.
    protein_np
        Raw protein counts, float32 (totalVI).
    """

    x_ng: Tensor | Rows
    batch_n: Tensor
    label_n: Tensor | None = None
    category_nc: Tensor | None = None
    continuous_nc: Tensor | None = None
    protein_np: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_ng)
