"""The inner loops from stored counts to what a model sees, without the GIL."""

from __future__ import annotations

import numpy as np

from streamx.compiled import compiled

REMEMBERED = 16  # small counts, whose value is computed once per cell


@compiled
def transform_rows(indptr, indices, data, factor_n, binarize, log1p, inverse, base_n, out):
    """Transform the stored values of rows into `out`, float32, which begins at the first row's first value.

    Most values of a cell are small counts and occur many times: each is scaled and logged once.

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
    """
    small = np.empty(REMEMBERED, np.float32)
    first = indptr[0]
    for row in range(len(indptr) - 1):
        low, high = indptr[row], indptr[row + 1]
        values, columns, target = data[low:high], indices[low:high], out[low - first : high - first]
        factor = factor_n[row]
        for k in range(REMEMBERED):
            small[k] = _transformed(np.float32(k), factor, binarize, log1p)
        for j in range(high - low):
            x = values[j]
            if x >= 0 and x < REMEMBERED and x == np.int64(x):
                target[j] = small[np.uint64(x)]
            else:
                target[j] = _transformed(np.float32(x), factor, binarize, log1p)
        if inverse.size:
            table = inverse[base_n[row] :]
            for j in range(high - low):
                target[j] *= table[np.uint64(columns[j])]


@compiled
def _transformed(x, factor, binarize, log1p):
    if binarize:
        x = np.float32(x > 0)
    x = x * factor
    return np.log1p(x) if log1p else x


@compiled
def densify(indptr, indices, data, out):
    """Rows as dense ones: `out`, float32 (n, n_genes), is overwritten."""
    n_genes = np.uint64(out.shape[1])
    for row in range(len(indptr) - 1):
        target = out[row]
        target[:] = 0  # a row at a time: it is still in the cache when its values come
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
