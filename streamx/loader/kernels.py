"""The inner loops from stored counts to what a model sees, without the GIL."""

from __future__ import annotations

from functools import partial

import numpy as np

from streamx.compiled import compiled

_F, _I = np.float32, np.int32
_SQRT_HALF = _I(0x3F3504F3)  # its bits
_LN2_HIGH, _LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)
_vectorised = partial(
    compiled, fastmath={"contract"}, error_model="numpy"
)  # nothing is reordered; x / 0 is inf


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
    """
    first, most = indptr[0], 0
    for row in range(len(indptr) - 1):
        most = max(most, indptr[row + 1] - indptr[row])
    scaled, ratio = np.empty(most, np.float32), np.empty(most, np.float32)
    for row in range(len(indptr) - 1):
        low, high = indptr[row], indptr[row + 1]
        target, x = out[low - first : high - first], scaled[: high - low]
        _scale(data[low:high], factor_n[row], binarize, x)
        if log1p:
            _log1p(x, ratio[: high - low], target)
        else:
            target[:] = x
        if inverse.size:
            _multiply(indices[low:high], inverse[base_n[row] :], target)


@_vectorised
def _scale(values, factor, binarize, out):
    if binarize:
        for j in range(out.size):
            out[j] = factor if values[j] > 0 else _F(0)
    else:
        for j in range(out.size):
            out[j] = _F(values[j]) * factor


@_vectorised
def _multiply(columns, table, out):
    for j in range(out.size):
        out[j] *= table[np.uint64(columns[j])]


@_vectorised
def _log1p(x_v, ratio_v, out_v):
    """ln(1 + x) to 0.7 units in the last place (polynomial of Cephes' logf); `ratio_v` is working memory.

    1 + x = ratio * 2^k with ratio around 1; what rounding 1 + x loses is added again.
    """
    bits_v = ratio_v.view(np.int32)
    for j in range(x_v.size):
        ratio_v[j] = _F(1) + x_v[j]
    for j in range(x_v.size):
        k = (bits_v[j] - _SQRT_HALF) >> _I(23)
        bits_v[j] -= k << _I(23)
        out_v[j] = _F(k)
    for j in range(x_v.size):
        x, k, f = x_v[j], out_v[j], ratio_v[j] - _F(1)
        one = _F(1) + x
        p = (_F(7.0376836292e-2) * f - _F(1.1514610310e-1)) * f + _F(1.1676998740e-1)
        p = ((p * f - _F(1.2420140846e-1)) * f + _F(1.4249322787e-1)) * f - _F(1.6668057665e-1)
        p = ((p * f + _F(2.0000714765e-1)) * f - _F(2.4999993993e-1)) * f + _F(3.3333331174e-1)
        square, lost = f * f, (x - (one - _F(1))) / one
        y = p * f * square + (lost + k * _LN2_LOW) - _F(0.5) * square
        y = (f + y) + k * _LN2_HIGH
        far = _F(np.nan) if one < 0 else (_F(-np.inf) if one == 0 else x)  # x: infinite, or no number
        out_v[j] = y if (one > 0) & (one < _F(np.inf)) else far


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
        _copy(indices[low:high], out_indices[ends[k] : ends[k + 1]])
        _copy(data[low:high], out_data[ends[k] : ends[k + 1]])


@compiled
def _copy(values, out):
    for j in range(out.size):
        out[j] = values[j]
