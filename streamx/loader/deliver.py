"""From a fetch to minibatches: a few at a time are made by one kernel call, then each is a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import sparse

from streamx.loader.transform import ToDevice, Transform, inverse_of, ready, tensor, transformed
from streamx.store.matrix import Allocate

OUTPUTS = ("dense", "scipy", "csr", "compact")


@dataclass(frozen=True, slots=True)
class Csr:
    """Rows of counts as plain arrays: row i holds ``indices[indptr[i]:indptr[i + 1]]``, and so its data.

    Attributes
    ----------
    indptr
        int64 (n + 1,), from 0 on.
    indices, data
        Genes, ascending in each row, and their values; see the loader's ``output``.
    n_genes
        Width.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    n_genes: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indptr) - 1, self.n_genes

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def scipy(self) -> sparse.csr_matrix:
        """The same as a scipy matrix, over the same memory where dtypes allow."""
        return sparse.csr_matrix((self.data, self.indices, self.indptr), shape=self.shape)

    def dense(self) -> np.ndarray:
        """float32 (n, n_genes)."""
        from streamx.loader.kernels import densify

        out = np.empty(self.shape, np.float32)
        densify(self.indptr, self.indices, self.data, out)
        return out


@dataclass(slots=True)
class Minibatch:
    """Cells for one step; numpy arrays, or tensors on the loader's device.

    Attributes
    ----------
    x_ng
        What the model sees, (n, n_genes): float32, dense or as the loader's ``output`` says.
    batch_n
        Batch code of each cell, int64.
    row_n
        Row of the collection of each cell, int64.
    total_n
        The cell's total before features were selected, float32 (views; else None).
    obsm
        Further modalities: name -> (n, n_features) float32.
    """

    x_ng: Any
    batch_n: Any
    row_n: Any
    total_n: Any
    obsm: dict[str, Any]

    def __len__(self) -> int:
        return len(self.row_n)


@dataclass(frozen=True)
class Block:
    """A fetch.

    Attributes
    ----------
    indptr, indices, data
        Of the rows as they are stored; without an `order`, in that of delivery.
    order
        int64: which of these rows each one delivered is; all that follows is in the order of delivery.
    cuts
        Minibatch i holds the rows ``cuts[i]:cuts[i + 1]``.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    order: np.ndarray | None
    batch_n: np.ndarray
    row_n: np.ndarray
    total_n: np.ndarray | None
    obsm: dict[str, np.ndarray]
    cuts: np.ndarray

    def groups(self, rows: int) -> Iterator[tuple[int, int]]:
        """Minibatches first..last that are made together: as many as have so many rows, at least one."""
        n, low = len(self.cuts) - 1, 0
        while low < n:
            high = int(np.searchsorted(self.cuts, self.cuts[low] + rows, side="right")) - 1
            high = min(max(high, low + 1), n)
            yield low, high
            low = high


def makes_there(output: str, device: Any) -> bool:
    """Whether rows travel as they are stored, to become dense ones on the device."""
    return device is not None and output == "dense" and str(device).split(":")[0] != "cpu"


def made_dtypes(output: str, device: Any, stored: tuple[Any, Any]) -> tuple[Any, Any]:
    """Of indices and data of the rows that minibatches are made of."""
    if output == "compact" or makes_there(output, device):
        return stored
    return (stored[0] if output == "dense" else np.int32), np.float32


class Delivery:
    """How minibatches are given: settings of a loader that concern a fetch once it is read.

    Parameters
    ----------
    output
        ``dense``: float32 array, or tensor on `device`; ``scipy``: a float32 CSR matrix; ``csr``:
        :class:`Csr` with int32 genes and float32 values; ``compact``: :class:`Csr` in the dtypes that are
        stored, without transform.
    scale_bg
        What the transform divides by.
    allocate_values, allocate_dense
        (values, dtype) -> an array for what is made: transformed values, and dense minibatches.
    """

    def __init__(
        self,
        output: str,
        n_genes: int,
        transform: Transform,
        scale_bg: np.ndarray | None,
        device: Any,
        allocate_values: Allocate,
        allocate_dense: Allocate,
    ) -> None:
        self.output, self.n_genes, self.transform, self.device = output, n_genes, transform, device
        self.allocate_values, self.allocate_dense = allocate_values, allocate_dense
        self.inverse_bg = None if scale_bg is None or transform.scale is None else inverse_of(scale_bg)
        self._to_device = None
        if makes_there(output, device):
            self._to_device = ToDevice(device, n_genes, transform, self.inverse_bg)
        self._templates: dict[int, sparse.csr_matrix] = {}

    def make(self, block: Block, low: int, high: int) -> tuple[list[Minibatch], Callable[[], None] | None]:
        """Minibatches low..high of a block, and what to call before they are used."""
        cuts = block.cuts[low : high + 1]
        start, stop = int(cuts[0]), int(cuts[-1])
        columns: dict[str, Any] = {"batch": block.batch_n[start:stop], "row": block.row_n[start:stop]}
        if block.total_n is not None:
            columns["total"] = block.total_n[start:stop]
        columns |= {f"obsm/{name}": values[start:stop] for name, values in block.obsm.items()}
        rows = self._taken(block, start, stop)
        arrive = None
        slice_of: Callable[[int, int], Any]
        if self._to_device is not None:
            x_ng, columns, event = self._to_device(*rows, columns)
            slice_of = lambda a, b: x_ng[a:b]  # noqa: E731
            arrive = partial(ready, event, [x_ng, *columns.values()])
        else:
            slice_of = self._made(*rows, columns)
        if self.device is not None and self._to_device is None:
            columns = {name: tensor(values, self.device) for name, values in columns.items()}
        return list(_sliced(slice_of, columns, (cuts - start).tolist())), arrive

    def _taken(self, block: Block, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows start..stop in the order of delivery."""
        from streamx.loader.kernels import take_rows

        if block.order is None:
            low, high = block.indptr[[start, stop]]
            return block.indptr[start : stop + 1] - low, block.indices[low:high], block.data[low:high]
        row_n = block.order[start:stop]
        indptr = np.zeros(len(row_n) + 1, np.int64)
        np.cumsum(block.indptr[row_n + 1] - block.indptr[row_n], out=indptr[1:])
        dtypes = made_dtypes(self.output, self.device, (block.indices.dtype, block.data.dtype))
        indices, data = (self.allocate_values(int(indptr[-1]), dtype) for dtype in dtypes)
        take_rows(block.indptr, block.indices, block.data, row_n, indptr, indices, data)
        return indptr, indices, data

    def _made(
        self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, columns: dict[str, Any]
    ) -> Callable[[int, int], Any]:
        """(first row, last row) -> x_ng of a minibatch."""
        if self.output != "compact":
            made = data if data.dtype == np.float32 else self.allocate_values(len(data), np.float32)
            transformed(
                indptr, indices, data, self.transform, columns.get("total"), columns["batch"],
                self.inverse_bg, made,
            )  # fmt: skip
            data = made
        if self.output != "dense":
            rows = self._scipy if self.output == "scipy" else self._rows
            return lambda a, b: rows(indptr[a : b + 1], indices, data)
        from streamx.loader.kernels import densify

        n = len(indptr) - 1
        x_ng = self.allocate_dense(n * self.n_genes, np.float32).reshape(n, self.n_genes)
        densify(indptr, indices, data, x_ng)
        dense = x_ng if self.device is None else tensor(x_ng, self.device)
        return lambda a, b: dense[a:b]

    def _rows(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> Csr:
        values = slice(int(indptr[0]), int(indptr[-1]))
        return Csr(indptr - indptr[0], indices[values], data[values], self.n_genes)

    def _scipy(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> sparse.csr_matrix:
        n, rows = len(indptr) - 1, self._rows(indptr, indices, data)
        if n not in self._templates:  # scipy's constructor would scan all indices
            template = sparse.csr_matrix((n, self.n_genes), dtype=np.float32)
            template.has_sorted_indices = template.has_canonical_format = True
            self._templates[n] = template
        x_ng = copy(self._templates[n])
        x_ng.indptr, x_ng.indices, x_ng.data = rows.indptr.astype(np.int32), rows.indices, rows.data
        return x_ng


def _sliced(
    slice_of: Callable[[int, int], Any], columns: dict[str, Any], cuts: list[int]
) -> Iterator[Minibatch]:
    obsm = {name[5:]: values for name, values in columns.items() if name.startswith("obsm/")}
    batch_n, row_n, total_n = columns["batch"], columns["row"], columns.get("total")
    for a, b in pairwise(cuts):
        yield Minibatch(
            slice_of(a, b),
            batch_n[a:b],
            row_n[a:b],
            None if total_n is None else total_n[a:b],
            {name: values[a:b] for name, values in obsm.items()} if obsm else {},
        )
