"""Inner loops of the sparse path on the CPU: a minibatch's non-zeros instead of its zeros.

Arrays are float32 and C-contiguous, ``first`` (int64) and ``other`` (int32) are pointers and indices of rows
or of genes. Every loop is sequential, so a result depends on its inputs and on the machine's instructions,
never on threads. The vector loops run over rows of the first layer's weights, blocked so that these come
from the processor's second-level cache; the sums stay in registers.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from streamx.compiled import compiled
from streamx.models.vectors import LANES, add_few, add_lanes, rectified_lanes

GENES_AT_ONCE = 256  # 1 MB of weights: half of a second-level cache
TILE = 128  # genes per tile of the cross-entropy: 64 cells take 32 KB
_ROWS_PER_LOG = 64  # a product of that many numbers up to 2 stays far from overflow

_F = np.float32
_LOG2_E = _F(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = _F(0.693145751953125), _F(1.42860682030941723212e-6)

# Sums may be reordered and products contracted, which a compiler does in the same way at every call; NaN and
# infinity keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_vectorised = partial(compiled, fastmath=_FAST, error_model="numpy")  # x / 0 is infinite


@_vectorised
def transpose(first_n, gene_v, value_v, first_g, cell_v, value_out_v):
    """Non-zeros by cell -> by gene, the cells of a gene ascending. ``first_g`` (n_genes + 1) is filled."""
    n_genes = first_g.size - 1
    first_g[:] = 0
    for j in range(gene_v.size):
        first_g[gene_v[j] + 1] += 1
    for g in range(n_genes):
        first_g[g + 1] += first_g[g]
    for i in range(first_n.size - 1):
        for j in range(first_n[i], first_n[i + 1]):
            at = first_g[gene_v[j]]
            cell_v[at], value_out_v[at] = i, value_v[j]
            first_g[gene_v[j]] = at + 1
    for g in range(n_genes, 0, -1):
        first_g[g] = first_g[g - 1]
    first_g[0] = 0


@_vectorised
def add_rows(sum_h, table_rh, row_v, value_v, start, stop):
    """sum_h += value x row of the table, for non-zeros start..stop in their order, 64 sums at a time."""
    whole = sum_h.size // LANES * LANES
    for low in range(0, whole, LANES):
        add_lanes(sum_h, low, table_rh, row_v, value_v, start, stop)
    if whole < sum_h.size:
        for j in range(start, stop):
            x, w_h = value_v[j], table_rh[row_v[j]]
            for c in range(whole, sum_h.size):
                sum_h[c] += x * w_h[c]


@_vectorised
def product(first_n, gene_v, value_v, weight_gh, bias_h, out_nh):
    """out = x W + bias. Genes in blocks, so that a block's weights are read once into the cache."""
    n, n_genes = first_n.size - 1, weight_gh.shape[0]
    for i in range(n):
        out_nh[i] = bias_h
    next_n = first_n[:-1].copy()
    for low in range(0, n_genes, GENES_AT_ONCE):
        high = low + GENES_AT_ONCE
        for i in range(n):
            start, end = next_n[i], first_n[i + 1]
            stop = end
            if high < n_genes:  # the last block takes what is left, whatever the order of a row's genes
                stop = start
                while stop < end and gene_v[stop] < high:
                    stop += 1
            next_n[i] = stop
            add_rows(out_nh[i], weight_gh, gene_v, value_v, start, stop)


@_vectorised
def head_of_units(first_n, gene_v, value_v, code_n, weight_kgt, scale_bh, shift_bh, head_lhf, out_nlf):
    """out = relu(x W * scale + shift) head, for inference: a cell's result depends on that cell alone.

    W lies in tiles of 64 units, the head in tiles of 16 outputs, each contiguous and padded to its size.
    """
    unit_t = np.empty(LANES, np.float32)
    out_nlf[:] = 0
    for k in range(weight_kgt.shape[0]):
        low, weight_gt = k * LANES, weight_kgt[k]
        for i in range(first_n.size - 1):
            start, stop, b = first_n[i], first_n[i + 1], code_n[i]
            rectified_lanes(unit_t, weight_gt, gene_v, value_v, start, stop, scale_bh, shift_bh, b, low)
            for tile in range(head_lhf.shape[0]):
                add_few(out_nlf[i], tile, unit_t, head_lhf[tile, low : low + LANES])


@_vectorised
def gradient(first_g, cell_v, value_v, d_nh, out_gh):
    """out = x' d: the gradient of the weights, gene by gene."""
    for g in range(out_gh.shape[0]):
        out_gh[g] = 0
        add_rows(out_gh[g], d_nh, cell_v, value_v, first_g[g], first_g[g + 1])


@_vectorised
def gradient_and_adam(first_g, cell_v, value_v, d_nh, weight_gh, mean_gh, square_gh, rates):
    """The same gradient used at once: a gene's weights and their two moments are read and written once.

    ``rates`` float32: lr / (1 - beta1^t), beta1, beta2, eps, weight decay, 1 / sqrt(1 - beta2^t).
    """
    d_h = np.empty(weight_gh.shape[1], np.float32)
    for g in range(weight_gh.shape[0]):
        d_h[:] = 0
        add_rows(d_h, d_nh, cell_v, value_v, first_g[g], first_g[g + 1])
        _adam(weight_gh[g], mean_gh[g], square_gh[g], d_h, rates)


@_vectorised
def adam(d_gh, weight_gh, mean_gh, square_gh, rates):
    """The same update by a dense gradient."""
    for g in range(weight_gh.shape[0]):
        _adam(weight_gh[g], mean_gh[g], square_gh[g], d_gh[g], rates)


@_vectorised
def _adam(weight_h, mean_h, square_h, d_h, rates):
    """Adam (Kingma 2015) with L2 weight decay added to the gradient, as in torch."""
    lr, beta1, beta2, eps, decay, correction = rates[0], rates[1], rates[2], rates[3], rates[4], rates[5]
    for c in range(weight_h.size):
        d = d_h[c] + decay * weight_h[c]
        mean = mean_h[c] + (_F(1) - beta1) * (d - mean_h[c])
        square = beta2 * square_h[c] + (_F(1) - beta2) * d * d
        mean_h[c], square_h[c] = mean, square
        weight_h[c] -= lr * mean / (np.sqrt(square) * correction + eps)


# -- cross-entropy of normalised logits ------------------------------------------------------------------


@_vectorised
def normed_cross_entropy(
    y_ng,
    code_n,
    n_b,
    weight_bg,
    bias_bg,
    eps,
    first_g,
    cell_v,
    value_v,
    d_ng,
    dweight_bg,
    dbias_bg,
    mean_bg,
    var_bg,
):
    """Domain batch norm, then the sum of binary cross-entropies against the non-zeros; and all gradients.

    Genes in tiles that stay in the first-level cache: what takes about forty passes over (n, n_genes) as
    single operations reads ``y_ng`` and writes ``d_ng`` (gradient of the sum by y) once. Batches with one
    row pass through; their gradients are 0, their statistics mean nothing.
    """
    n, n_genes, n_batches = y_ng.shape[0], y_ng.shape[1], n_b.size
    t_nc = np.empty((n, TILE), np.float32)
    inv_bc = np.empty((n_batches, TILE), np.float32)
    scale_bc, shift_bc = np.empty_like(inv_bc), np.empty_like(inv_bc)
    for table_bg in (dweight_bg, dbias_bg, mean_bg, var_bg):
        table_bg[:] = 0
    total = 0.0
    for low in range(0, n_genes, TILE):
        high = min(low + TILE, n_genes)
        _centre(low, high, y_ng, code_n, n_b, mean_bg, var_bg, t_nc)
        _affine(low, high, n_b, weight_bg, bias_bg, var_bg, eps, inv_bc, scale_bc, shift_bc)
        total += _entropy(low, high, t_nc, code_n, scale_bc, shift_bc, d_ng)
        for g in range(low, high):
            for j in range(first_g[g], first_g[g + 1]):
                i, c = cell_v[j], g - low
                logit = t_nc[i, c] * scale_bc[code_n[i], c] + shift_bc[code_n[i], c]
                total -= np.float64(value_v[j]) * logit
                d_ng[i, g] -= value_v[j]
        _through_norm(low, high, d_ng, t_nc, code_n, n_b, inv_bc, scale_bc, dweight_bg, dbias_bg, shift_bc)
    return total


@_vectorised
def track(running_mean_bg, running_var_bg, n_tracked_b, mean_bg, var_bg, n_b, momentum):
    """Move the running statistics of batches with several rows (unbiased variance, as torch does)."""
    for b in range(n_b.size):
        if n_b[b] > 1:
            unbiased = _F(n_b[b]) / _F(n_b[b] - 1)
            _approach(running_mean_bg[b], mean_bg[b], momentum, _F(1))
            _approach(running_var_bg[b], var_bg[b], momentum, unbiased)
            n_tracked_b[b] += 1


@_vectorised
def _approach(x_g, target_g, share, factor):
    for g in range(x_g.size):
        x_g[g] += share * (target_g[g] * factor - x_g[g])


# A row of a tile is taken as table[i, low:high]: of a slice of columns numba does not know that its rows are
# contiguous, and makes no vector instructions.


@_vectorised
def _centre(low, high, y_ng, code_n, n_b, mean_bg, var_bg, t_nc):
    """Means and (biased) variances per batch, and deviations from the means."""
    for i in range(y_ng.shape[0]):
        b = code_n[i]
        if n_b[b] > 1:
            _add_scaled(mean_bg[b, low:high], y_ng[i, low:high], _F(1) / _F(n_b[b]))
    for i in range(y_ng.shape[0]):
        b = code_n[i]
        _deviate(y_ng[i, low:high], mean_bg[b, low:high], _F(1) / _F(n_b[b]), t_nc[i], var_bg[b, low:high])


@_vectorised
def _add_scaled(sum_c, x_c, factor):
    for c in range(sum_c.size):
        sum_c[c] += x_c[c] * factor


@_vectorised
def _deviate(y_c, mean_c, share, t_c, var_c):
    for c in range(y_c.size):
        t = y_c[c] - mean_c[c]
        t_c[c] = t
        var_c[c] += t * t * share


@_vectorised
def _affine(low, high, n_b, weight_bg, bias_bg, var_bg, eps, inv_bc, scale_bc, shift_bc):
    """1 / sd, and what a deviation is multiplied with and shifted by."""
    for b in range(n_b.size):
        inv_c, scale_c, shift_c = inv_bc[b], scale_bc[b], shift_bc[b]
        weight_c, bias_c, var_c = weight_bg[b, low:high], bias_bg[b, low:high], var_bg[b, low:high]
        if n_b[b] > 1:
            for c in range(weight_c.size):
                inv_c[c] = _F(1) / np.sqrt(var_c[c] + eps)
            for c in range(weight_c.size):
                scale_c[c], shift_c[c] = weight_c[c] * inv_c[c], bias_c[c]
        else:
            inv_c[:], scale_c[:], shift_c[:] = 0, 1, 0


@_vectorised
def _entropy(low, high, t_nc, code_n, scale_bc, shift_bc, d_ng):
    """Sum of softplus(logit), and its derivative sigmoid(logit), as if all targets were 0.

    softplus(l) = max(l, 0) + log(1 + exp(-|l|)); the logarithms of 64 rows are taken of one product.
    """
    n, width = t_nc.shape[0], high - low
    logit_c, e_c, power_c = (
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
    )
    above_c, product_c = np.zeros(width, np.float32), np.ones(width, np.float32)
    total = 0.0
    for i in range(n):
        _multiply_add(t_nc[i], scale_bc[code_n[i]], shift_bc[code_n[i]], logit_c)
        exp_minus_abs(logit_c, power_c, e_c)
        _softplus(logit_c, e_c, above_c, product_c, d_ng[i, low:high])
        if i % _ROWS_PER_LOG == _ROWS_PER_LOG - 1 or i == n - 1:
            for c in range(width):
                total += math.log(np.float64(product_c[c])) + np.float64(above_c[c])
            above_c[:], product_c[:] = 0, 1
    return total


@_vectorised
def _multiply_add(x_c, scale_c, shift_c, out_c):
    for c in range(out_c.size):
        out_c[c] = x_c[c] * scale_c[c] + shift_c[c]


@_vectorised
def exp_minus_abs(x_c, power_c, e_c):
    """exp(-|x|) to one or two units in the last place (polynomial of Cephes' expf); NaN stays NaN."""
    bits_c = power_c.view(np.int32)
    for c in range(x_c.size):
        a = -abs(x_c[c])
        a = _F(-87) if a < _F(-87) else a
        k = np.rint(a * _LOG2_E)
        bits_c[c] = (np.int32(k) + np.int32(127)) << np.int32(23)  # 2^k
        r = a - k * _LN2_HIGH - k * _LN2_LOW
        p = _F(1.9875691500e-4) * r + _F(1.3981999507e-3)
        p = (p * r + _F(8.3334519073e-3)) * r + _F(4.1665795894e-2)
        p = (p * r + _F(1.6666665459e-1)) * r + _F(5.0000001201e-1)
        e_c[c] = p * r * r + r + _F(1)
    for c in range(x_c.size):
        e_c[c] *= power_c[c]


@_vectorised
def _softplus(logit_c, e_c, above_c, product_c, sigmoid_c):
    for c in range(logit_c.size):
        q = _F(1) / (_F(1) + e_c[c])
        sigmoid_c[c] = e_c[c] * q if logit_c[c] < 0 else q
    for c in range(logit_c.size):
        product_c[c] *= _F(1) + e_c[c]
        above_c[c] += _F(0) if logit_c[c] < 0 else logit_c[c]


@_vectorised
def _through_norm(low, high, d_ng, t_nc, code_n, n_b, inv_bc, scale_bc, dweight_bg, dbias_bg, mean_part_bc):
    """Gradients by logits -> gradients by weight, bias and input of the norm (in place)."""
    for i in range(d_ng.shape[0]):
        b = code_n[i]
        if n_b[b] > 1:
            _add_gradients(d_ng[i, low:high], t_nc[i], dbias_bg[b, low:high], dweight_bg[b, low:high])
    for b in range(n_b.size):
        if n_b[b] > 1:
            dweight_c, dbias_c = dweight_bg[b, low:high], dbias_bg[b, low:high]
            for c in range(high - low):
                per_row = scale_bc[b, c] / _F(n_b[b])
                dweight_c[c] *= inv_bc[b, c]
                mean_part_bc[b, c] = per_row * dbias_c[c]
                inv_bc[b, c] *= per_row * dweight_c[c]  # from here on the part along the deviation
    for i in range(d_ng.shape[0]):
        b = code_n[i]
        if n_b[b] > 1:
            _subtract_parts(d_ng[i, low:high], t_nc[i], scale_bc[b], mean_part_bc[b], inv_bc[b])


@_vectorised
def _add_gradients(d_c, t_c, sum_c, along_c):
    for c in range(d_c.size):
        sum_c[c] += d_c[c]
        along_c[c] += d_c[c] * t_c[c]


@_vectorised
def _subtract_parts(d_c, t_c, scale_c, mean_part_c, along_c):
    for c in range(d_c.size):
        d_c[c] = d_c[c] * scale_c[c] - mean_part_c[c] - t_c[c] * along_c[c]
