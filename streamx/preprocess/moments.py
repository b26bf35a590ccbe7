"""Statistics per batch and gene that merge: what a pass over rows leaves behind, all that later steps see.

Sums of counts are integers held in float64, hence exact in any order (below 2**53). Sums of normalised values
depend on the order of addition in their last bits, so rows are cut into tasks by row number alone and the
tasks' tables are added in a fixed tree (see passes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamx.preprocess.kernels import DETECTED, MAX, SQUARES, SUM


@dataclass(frozen=True)
class Moments:
    """Tables of the batches that occurred.

    Parameters
    ----------
    code_b
        Batch codes, int64 (n_batches,), ascending.
    n_b
        Cells that were counted, int64 (n_batches,).
    table_bg4
        float64 (n_batches, n_genes, 4): cells with the gene, sum, sum of squares, maximum (at least 0).
    """

    code_b: np.ndarray
    n_b: np.ndarray
    table_bg4: np.ndarray

    @property
    def n_genes(self) -> int:
        return int(self.table_bg4.shape[1])

    @property
    def detected_bg(self) -> np.ndarray:
        return self.table_bg4[:, :, DETECTED]

    @property
    def sum_bg(self) -> np.ndarray:
        return self.table_bg4[:, :, SUM]

    @property
    def squares_bg(self) -> np.ndarray:
        return self.table_bg4[:, :, SQUARES]

    @property
    def max_bg(self) -> np.ndarray:
        return self.table_bg4[:, :, MAX]


def no_moments(n_genes: int) -> Moments:
    """The neutral element of :func:`merge`."""
    nothing = np.zeros(0, np.int64)
    return Moments(nothing, nothing, np.zeros((0, n_genes, 4)))


def merge(parts: Sequence[Moments]) -> Moments:
    """Tables of the union of the cells: sums add, maxima compete. Added in the order given.

    Parameters
    ----------
    parts
        Moments over disjoint sets of cells and the same genes; at least one.
    """
    codes = np.unique(np.concatenate([part.code_b for part in parts]))
    n_b = np.zeros(len(codes), np.int64)
    table = np.zeros((len(codes), parts[0].n_genes, 4))
    for part in parts:
        at = np.searchsorted(codes, part.code_b)
        n_b[at] += part.n_b
        for row, k in enumerate(at):  # one batch at a time: no copy of the whole table
            table[k, :, :MAX] += part.table_bg4[row, :, :MAX]
            np.maximum(table[k, :, MAX], part.table_bg4[row, :, MAX], out=table[k, :, MAX])
    return Moments(codes, n_b, table)


def pool(moments: Moments) -> Moments:
    """All batches as one (code 0), added in the order of the codes."""
    table = np.zeros((1, moments.n_genes, 4))
    for row in moments.table_bg4:
        table[0, :, :MAX] += row[:, :MAX]
        np.maximum(table[0, :, MAX], row[:, MAX], out=table[0, :, MAX])
    return Moments(np.zeros(1, np.int64), np.array([moments.n_b.sum()], np.int64), table)


def select(moments: Moments, genes: np.ndarray) -> Moments:
    """The same moments for some genes only (boolean mask or indices)."""
    return Moments(moments.code_b, moments.n_b, moments.table_bg4[:, genes])


def recode(moments: Moments, code_b: np.ndarray) -> Moments:
    """The same moments under other batch codes (`code_b[i]` for ``moments.code_b[i]``), in their order."""
    order = np.argsort(code_b, kind="stable")
    return Moments(code_b[order].astype(np.int64), moments.n_b[order], moments.table_bg4[order])


def mean_variance(n: int, sum_g: np.ndarray, squares_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance per gene, in the arithmetic of scanpy 1.11 so that ties stay ties.

    One cell has variance 0.
    """
    mean = sum_g / n
    variance = squares_g / n - mean**2
    return mean, variance * (n / (n - 1)) if n > 1 else variance
