"""The inner loops from stored counts to what a model sees, without the GIL."""

from __future__ import annotations

import numpy as np

from streamx.store.decode import compiled

REMEMBERED = 64  # small counts of a cell whose transformed value is computed once


@compiled
def transform_rows(indptr, indices, data, factor_n, binarize, log1p, inverse, base_n, out):
    """Transform the stored values of rows into `out`, float32, which begins at the first row's first value.

    Parameters
    ----------
    indptr
        Of the rows, anywhere in `indices` and `data`.
    factor_n
        What each row's values are multiplied by.
    inverse, base_n
        Values are multiplied by ``inverse[base_n[row] + gene]``; no entries: not.
    out
        May be `data` itself.

    Most values of a cell are small counts and occur many times: each is scaled and logged once.
    """
    memo = np.empty(REMEMBERED, np.float32)
    first = indptr[0]
    for row in range(len(indptr) - 1):
        low, high = indptr[row], indptr[row + 1]
        values, columns, target = data[low:high], indices[low:high], out[low - first : high - first]
        factor = factor_n[row]
        memo[:] = -1.0
        for j in range(high - low):
            x = np.float32(values[j])
            if binarize:
                x = np.float32(x > 0)
            small = 0 <= x < REMEMBERED and x == np.float32(int(x))
            if small and memo[int(x)] >= 0:
                target[j] = memo[int(x)]
                continue
            y = x * factor
            if log1p:
                y = np.log1p(y)
            if small and y >= 0:
                memo[int(x)] = y
            target[j] = y
        if inverse.size:
            table = inverse[base_n[row] :]
            for j in range(high - low):
                target[j] *= table[np.uint64(columns[j])]


@compiled
def densify(indptr, indices, data, out):
    """Rows as dense ones: `out`, float32 (n, n_genes), is overwritten."""
    out[:] = 0
    n_genes = np.uint64(out.shape[1])
    for row in range(len(indptr) - 1):
        target = out[row]
        for j in range(indptr[row], indptr[row + 1]):
            gene = np.uint64(indices[j])
            if gene < n_genes:
                target[gene] = data[j]


@compiled
def take_rows(indptr, indices, data, row_n, ends, out_indices, out_data):
    """Rows, any number of times each, one after the other; `ends` is the indptr of the result."""
    for k in range(len(row_n)):
        low, high = indptr[row_n[k]], indptr[row_n[k] + 1]
        out_indices[ends[k] : ends[k + 1]] = indices[low:high]
        out_data[ends[k] : ends[k + 1]] = data[low:high]
