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
    """Apply a transform to the stored values of a float32 CSR matrix, in place; see :func:`transformed`."""
    table = None if scale_bg is None or transform.scale is None else inverse_of(scale_bg)
    transformed(x_ng.indptr, x_ng.indices, x_ng.data, transform, total_n, batch_n, table, x_ng.data)


def inverse_of(scale_bg: np.ndarray) -> np.ndarray:
    """What values are multiplied by, float32 (n_batches, n_genes): 1 / scale, and 1 where the scale is 0."""
    return (1 / np.where(scale_bg == 0, 1, scale_bg)).astype(np.float32)


def transformed(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    transform: Transform,
    total_n: np.ndarray | None,
    batch_n: np.ndarray | None,
    inverse_bg: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """The stored values of rows, transformed: zeros stay zeros under every step, so only these are touched.

    Parameters
    ----------
    indptr, indices, data
        CSR arrays in any integer or float dtype; `indptr` may begin anywhere in the others.
    total_n
        Total of each cell, (n,); needed for ``target_sum``. A cell whose total is 0 stays as it is.
    batch_n
        Row of ``inverse_bg`` of each cell, (n,); default: row 0.
    inverse_bg
        See :func:`inverse_of`; needed for ``scale``.
    out
        float32, one value for each of the rows' stored ones; may be `data` itself.
    """
    if transform == Transform():
        if out is not data:
            out[:] = data[indptr[0] : indptr[-1]]
        return
    from streamx.loader.kernels import transform_rows

    n = len(indptr) - 1
    factor_n = np.ones(n, np.float32)
    if transform.target_sum is not None:
        assert total_n is not None
        with np.errstate(divide="ignore"):
            factor_n = np.where(total_n > 0, transform.target_sum / total_n, 1).astype(np.float32)
    inverse, base_n = np.empty(0, np.float32), np.zeros(n, np.int64)
    if transform.scale is not None:
        assert inverse_bg is not None
        inverse = inverse_bg.ravel()
        base_n = base_n if batch_n is None else batch_n * np.int64(inverse_bg.shape[-1])
    transform_rows(indptr, indices, data, factor_n, transform.binarize, transform.log1p, inverse, base_n, out)


def dense(x_ng: sparse.csr_matrix, start: int, stop: int) -> np.ndarray:
    """Rows start..stop as a dense float32 array."""
    from streamx.loader.kernels import densify

    out = np.empty((stop - start, x_ng.shape[1]), np.float32)
    densify(x_ng.indptr[start : stop + 1], x_ng.indices, x_ng.data, out)
    return out


def tensor(values: np.ndarray, device: Any) -> torch.Tensor:
    """A numpy array on a device."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


class ToDevice:
    """Stored counts -> transformed dense tensors on a device; they travel as they are stored, without zeros.

    All work is queued on a stream of its own, so that it runs beside the training step; nothing waits for it
    on the host.

    Parameters
    ----------
    inverse_bg
        See :func:`inverse_of`.
    """

    def __init__(
        self, device: Any, n_genes: int, transform: Transform, inverse_bg: np.ndarray | None
    ) -> None:
        import torch

        self.device, self.n_genes, self.transform = torch.device(device), n_genes, transform
        self.inverse_bg = None if inverse_bg is None else torch.from_numpy(inverse_bg).to(self.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        columns: dict[str, np.ndarray],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
        """Rows as a dense float32 tensor, per-row columns (``batch`` and ``total`` among them), and an event.

        Who uses the tensors calls :func:`ready` with the event first.
        """
        import torch

        with torch.cuda.stream(self._stream):  # of None: does nothing
            moved = {name: self._move(values) for name, values in columns.items()}
            count_n = self._move(np.diff(indptr))
            gene_v, x_v = self._move(indices).long(), self._move(data).float()
            row_v = torch.repeat_interleave(
                torch.arange(len(count_n), device=self.device), count_n, output_size=len(gene_v)
            )
            x_v = self._transformed(x_v, row_v, gene_v, moved)
            x_ng = torch.zeros((len(count_n), self.n_genes), dtype=torch.float32, device=self.device)
            x_ng.view(-1)[row_v * self.n_genes + gene_v] = x_v
            event = self._stream.record_event() if self._stream is not None else None
        return x_ng, moved, event

    def _transformed(self, x_v: Any, row_v: Any, gene_v: Any, columns: dict[str, Any]) -> Any:
        import torch

        if self.transform.binarize:
            x_v = (x_v > 0).float()
        if self.transform.target_sum is not None:
            total_n = columns["total"]
            factor_n = torch.where(total_n > 0, self.transform.target_sum / total_n, 1.0)
            x_v = x_v * factor_n[row_v]
        if self.transform.log1p:
            x_v = torch.log1p(x_v)
        if self.transform.scale is not None:
            assert self.inverse_bg is not None
            table = self.inverse_bg.view(-1)
            base_v = columns["batch"][row_v] * self.n_genes if self.inverse_bg.shape[0] > 1 else 0
            x_v = x_v * table[base_v + gene_v]
        return x_v

    def _move(self, values: np.ndarray) -> torch.Tensor:
        """An array on the device; unsigned integers, which torch hardly knows, become wider signed ones."""
        import torch

        values = np.ascontiguousarray(values)
        wider: dict[str, Any] = {
            "uint16": (np.int16, torch.int32, 0xFFFF),
            "uint32": (np.int32, torch.int64, 0xFFFFFFFF),
        }
        signed, dtype, mask = wider.get(values.dtype.name, (values.dtype, None, 0))
        tensor = torch.from_numpy(values.view(signed))
        if self._stream is not None:
            tensor = tensor.pin_memory()
        tensor = tensor.to(self.device, non_blocking=True)
        return tensor if dtype is None else tensor.to(dtype) & mask


def ready(event: Any, tensors: list[torch.Tensor]) -> None:
    """Let the current stream wait for what :class:`ToDevice` queued, and keep the tensors' memory for it."""
    import torch

    if event is not None:
        stream = torch.cuda.current_stream(tensors[0].device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)
