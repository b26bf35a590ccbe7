"""From raw counts to what a model sees: the transform that a view declares, and sparse to dense.

The one file below `models` that may touch a device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from streamx.errors import UsageError

if TYPE_CHECKING:
    import torch

_VALUES_AT_ONCE = 1 << 17  # temporaries of this length stay in the processor's cache


@dataclass(frozen=True)
class Transform:
    """What is done to the counts of a cell, in this order.

    Attributes
    ----------
    binarize
        x -> 1 where x > 0.
    target_sum
        x -> x * target_sum / total of the cell (None: not).
    total
        Which total: ``view_total``, the one that the view keeps per cell.
    log1p
        x -> ln(1 + x).
    scale
        x -> x / table[gene]: ``batch`` (a table per batch), ``global``, or None.
    """

    binarize: bool = False
    target_sum: float | None = None
    total: str | None = None
    log1p: bool = False
    scale: str | None = None

    @classmethod
    def of(cls, declared: dict[str, Any] | None) -> Transform:
        """From a view's manifest; None changes nothing.

        Raises
        ------
        UsageError
            If it declares a step that this version does not know.
        """
        unknown = set(declared or {}) - {f.name for f in fields(cls)}
        if unknown:
            raise UsageError(
                f"the transform has unknown steps: {', '.join(sorted(unknown))}", fix="update streamx"
            )
        return cls(**(declared or {}))


def apply_transform(
    x_ng: sparse.csr_matrix,
    transform: Transform,
    *,
    total_n: np.ndarray | None = None,
    batch_n: np.ndarray | None = None,
    scale_bg: np.ndarray | None = None,
) -> None:
    """Apply a transform to the stored values of a float32 CSR matrix, in place.

    Zeros stay zeros under every step, so only stored values are touched, in one pass.

    Parameters
    ----------
    total_n
        Total of each cell, (n,); needed for ``target_sum``. A cell whose total is 0 stays as it is.
    batch_n
        Row of ``scale_bg`` of each cell, (n,); default: row 0.
    scale_bg
        What values are divided by, float32; 0 counts as 1. Needed for ``scale``.
    """
    factor_n = None
    if transform.target_sum is not None:
        assert total_n is not None
        with np.errstate(divide="ignore"):
            factor_n = np.where(total_n > 0, transform.target_sum / total_n, 1).astype(np.float32)
    inverse = base_n = None
    if transform.scale is not None:
        assert scale_bg is not None
        inverse = (1 / np.where(scale_bg == 0, 1, scale_bg)).astype(np.float32).ravel()
        base_n = np.zeros(x_ng.shape[0], np.int64) if batch_n is None else batch_n * np.int64(x_ng.shape[1])
    indptr, n = x_ng.indptr, x_ng.shape[0]
    step = max(1, int(_VALUES_AT_ONCE * n / max(x_ng.nnz, 1)))
    for low in range(0, n, step):
        high = min(low + step, n)
        values = x_ng.data[indptr[low] : indptr[high]]
        count_n = np.diff(indptr[low : high + 1])
        if transform.binarize:
            values[...] = values > 0
        if factor_n is not None:
            values *= np.repeat(factor_n[low:high], count_n)
        if transform.log1p:
            np.log1p(values, out=values)
        if inverse is not None and base_n is not None:
            values *= inverse.take(
                np.repeat(base_n[low:high], count_n) + x_ng.indices[indptr[low] : indptr[high]]
            )


def dense(x_ng: sparse.csr_matrix, start: int, stop: int) -> np.ndarray:
    """Rows start..stop as a dense float32 array."""
    flat, values = _flat(x_ng, start, stop)
    out = np.zeros((stop - start) * x_ng.shape[1], np.float32)
    out[flat] = values
    return out.reshape(stop - start, x_ng.shape[1])


def dense_tensor(x_ng: sparse.csr_matrix, start: int, stop: int, device: Any) -> torch.Tensor:
    """Rows start..stop as a dense float32 tensor; the sparse values travel to the device, not the zeros."""
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return torch.from_numpy(dense(x_ng, start, stop))
    flat, values = _flat(x_ng, start, stop)
    out = torch.zeros((stop - start) * x_ng.shape[1], dtype=torch.float32, device=device)
    out[torch.from_numpy(flat).to(device)] = torch.from_numpy(values.astype(np.float32)).to(device)
    return out.view(stop - start, x_ng.shape[1])


def tensor(values: np.ndarray, device: Any) -> torch.Tensor:
    """A numpy array on a device."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _flat(x_ng: sparse.csr_matrix, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the flattened dense rows, and their values."""
    indptr, n_genes = x_ng.indptr, x_ng.shape[1]
    low, high = indptr[start], indptr[stop]
    row_n = np.arange(stop - start, dtype=np.int64) * n_genes
    flat = np.repeat(row_n, np.diff(indptr[start : stop + 1]))
    flat += x_ng.indices[low:high]
    return flat, x_ng.data[low:high]
