"""The loss of a count decoder on the CPU, and its gradients, in one pass: NB and ZINB of softmax x library.

A cell's genes (2,000 floats: 8 KB) and its intermediate results stay in the processor's caches; what takes
some forty passes over (n, n_genes) as single operations reads each logit and writes each gradient once. Every
value is taken for a zero first, without any logarithm of the gamma function; then non-zeros are put right.

With q = mu / (theta + eps) and u = 1 + q: -ln NB(0) = theta ln u; its derivative by ln mu is theta q / u, by
ln theta theta (ln u - q / u). For the rest see :mod:`streamx.models.likelihoods`.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from streamx.compiled import compiled
from streamx.models.kernels import exp_minus_abs

EPS = 1e-8
COUNTED = 16  # up to it, a coefficient is a product of x factors; above, or for no whole number, by ln gamma
_CELLS_PER_LOG = 64  # a product of that many numbers between 1/2 and 2 stays far from overflow
_HUGE, _SMALL = 1e100, 1e-100  # between them a running product can take one factor more

_F = np.float32
_LN_FACTORIAL = np.array([math.lgamma(k + 1) for k in range(COUNTED + 1)])

_vectorised = partial(compiled, fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy")
_exact = partial(compiled, fastmath={"contract", "nsz"}, error_model="numpy")  # sums in the order written
_comparing = partial(compiled, fastmath={"nnan", "nsz", "reassoc"})


@_vectorised
def count_loss(
    y_ng,
    dropout_ng,
    zero_inflated,
    library_n,
    theta_rg,
    row_n,
    first_n,
    gene_v,
    value_v,
    share,
    dy_ng,
    ddropout_ng,
    dlog_theta_rg,
    dlibrary_n,
):
    """Sum of -ln p over all values (float64); and its gradients by logits, ln theta and library, x ``share``.

    Means are exp(library_n) x softmax(y_ng); ``theta_rg`` is a table, ``row_n`` each cell's row of it.
    ``dropout_ng`` and its gradient are looked at if ``zero_inflated``.
    """
    n, n_genes = y_ng.shape
    dlog_theta_rg[:] = 0
    inv_rg = _F(1) / (theta_rg + _F(EPS))
    power_g, e_g, mu_g = np.empty(n_genes, _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    q_g, w_g, log_u_g = np.empty(n_genes, _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    lost_g, e_lost_g, e_zero_g = np.empty(n_genes, _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    loss_g, dlog_theta_g = np.empty(n_genes, _F), np.empty(n_genes, _F)
    ratio_g, product_g = np.empty(n_genes, _F), np.ones(n_genes, _F)
    total, running = 0.0, 1.0
    for i in range(n):
        theta_g, inv_g, dy_g, sum_g = theta_rg[row_n[i]], inv_rg[row_n[i]], dy_ng[i], dlog_theta_rg[row_n[i]]
        sum_e = _exponentials(y_ng[i], mu_g, power_g, e_g)
        _scaled(e_g, _F(math.exp(library_n[i]) / sum_e), inv_g, mu_g, q_g)
        _log1p(q_g, power_g, w_g, log_u_g)
        _as_zeros(theta_g, inv_g, q_g, w_g, log_u_g, loss_g, dy_g, dlog_theta_g)
        if zero_inflated:
            _plus(dropout_ng[i], loss_g, ratio_g)  # the logit of being lost against being kept and zero
            exp_minus_abs(dropout_ng[i], power_g, e_lost_g)
            exp_minus_abs(ratio_g, power_g, e_zero_g)
            lost = (dropout_ng[i], e_lost_g, e_zero_g, ratio_g, lost_g)
            _as_zeros_inflated(*lost, loss_g, dy_g, dlog_theta_g, ddropout_ng[i], share)
        for j in range(first_n[i], first_n[i + 1]):
            g, x = gene_v[j], np.float64(value_v[j])
            if x == 0:
                continue
            theta, mu, qw = np.float64(theta_g[g]), np.float64(mu_g[g]), np.float64(q_g[g] * w_g[g])
            inv_sum = np.float64(w_g[g] * inv_g[g])  # 1 / (theta + mu + eps)
            odds = (mu + EPS) * inv_sum
            log_c, digamma, k = 0.0, 0.0, int(x)
            if k <= COUNTED and k == x and 0 < theta < 1e15:
                above, below = 0.0, 1.0  # sum of 1 / (theta + c) as a fraction
                for c in range(k):
                    factor = theta + c
                    above, below = above * factor + below, below * factor
                    running *= factor * odds
                    if not _SMALL < running < _HUGE:
                        total -= math.log(running)
                        running = 1.0
                digamma = above / below
                log_c = -_LN_FACTORIAL[k]
            else:
                log_c = x * math.log(odds) + math.lgamma(x + theta) - math.lgamma(theta) - math.lgamma(x + 1)
                digamma = _digamma(x + theta) - _digamma(theta)
            at_zero = theta * np.float64(log_u_g[g])
            loss_g[g] = at_zero
            total -= log_c
            dy_g[g] = theta * qw + x * (qw - mu / (mu + EPS))
            by_theta = np.float64(log_u_g[g]) - qw * theta * np.float64(inv_g[g]) + x * inv_sum - digamma
            dlog_theta_g[g] = theta * by_theta
            if zero_inflated:
                logit = dropout_ng[i, g]
                loss_g[g] += _F(0) if logit < 0 else logit
                ratio_g[g] = _F(1) + e_lost_g[g]
                ddropout_ng[i, g] = share * (_F(1) - lost_g[g])
        total += _row_sum(loss_g)
        if zero_inflated:
            _times(product_g, ratio_g)
            if i % _CELLS_PER_LOG == _CELLS_PER_LOG - 1 or i == n - 1:
                for g in range(n_genes):
                    total += math.log(np.float64(product_g[g]))
                product_g[:] = 1
        _add_scaled(sum_g, dlog_theta_g, share)
        by_library = _row_sum(dy_g)
        dlibrary_n[i] = by_library * share
        _through_softmax(dy_g, e_g, _F(by_library / sum_e), share)
    return total - math.log(running)


@_comparing
def _largest(x_g):
    largest = x_g[0]
    for g in range(x_g.size):
        largest = max(largest, x_g[g])
    return largest


@_vectorised
def _exponentials(y_g, below_g, power_g, e_g):
    """exp(y - max y), and their sum."""
    largest = _largest(y_g)
    for g in range(y_g.size):
        below_g[g] = y_g[g] - largest
    exp_minus_abs(below_g, power_g, e_g)
    return _row_sum(e_g)


@_vectorised
def _row_sum(x_g):
    total = _F(0)
    for g in range(x_g.size):
        total += x_g[g]
    return np.float64(total)


@_vectorised
def _scaled(e_g, scale, inv_g, mu_g, q_g):
    for g in range(e_g.size):
        mu = e_g[g] * scale
        mu_g[g] = mu
        q_g[g] = mu * inv_g[g]


@_exact
def _log1p(q_g, m_g, w_g, log_g):
    """ln(1 + q) for q >= 0, to one or two units in the last place, and w = 1 / (1 + q).

    The polynomial is that of Cephes' logf; what 1 + q loses of a small q comes back as a correction, which a
    compiler that reorders sums would drop. NaN stays NaN.
    """
    bits_g = m_g.view(np.int32)
    u_bits_g = w_g.view(np.int32)
    for g in range(q_g.size):
        u = _F(1) + q_g[g]
        w_g[g] = u
        log_g[g] = q_g[g] - (u - _F(1))
    for g in range(q_g.size):
        exponent = (u_bits_g[g] - np.int32(0x3F3504F3)) >> np.int32(23)  # mantissas from sqrt(1/2)
        bits_g[g] = u_bits_g[g] - (exponent << np.int32(23))
    for g in range(q_g.size):
        exponent = _F((u_bits_g[g] - np.int32(0x3F3504F3)) >> np.int32(23))
        x = m_g[g] - _F(1)
        w = _F(1) / w_g[g]
        p = _F(7.0376836292e-2) * x - _F(1.1514610310e-1)
        p = (p * x + _F(1.1676998740e-1)) * x - _F(1.2420140846e-1)
        p = (p * x + _F(1.4249322787e-1)) * x - _F(1.6668057665e-1)
        p = (p * x + _F(2.0000714765e-1)) * x - _F(2.4999993993e-1)
        p = (p * x + _F(3.3333331174e-1)) * x
        z = x * x
        low = p * z - exponent * _F(2.12194440e-4) - _F(0.5) * z + log_g[g] * w
        log_g[g] = x + low + exponent * _F(0.693359375)
        w_g[g] = w


@_vectorised
def _as_zeros(theta_g, inv_g, q_g, w_g, log_u_g, loss_g, dy_g, dlog_theta_g):
    """-ln NB(0), and its derivatives by ln mu and by ln theta."""
    for g in range(q_g.size):
        theta, qw = theta_g[g], q_g[g] * w_g[g]
        loss_g[g] = theta * log_u_g[g]
        dy_g[g] = theta * qw
        dlog_theta_g[g] = theta * (log_u_g[g] - qw * (theta * inv_g[g]))


@_vectorised
def _as_zeros_inflated(
    logit_g, e_lost_g, e_zero_g, ratio_g, lost_g, loss_g, dy_g, dlog_theta_g, ddropout_g, share
):
    """The same for -ln ZINB(0) = softplus(-logit) - softplus(-logit - loss); its logarithm stays a ratio."""
    for g in range(logit_g.size):
        logit, both = logit_g[g], ratio_g[g]
        q_lost, q_zero = _F(1) / (_F(1) + e_lost_g[g]), _F(1) / (_F(1) + e_zero_g[g])
        kept = q_lost if logit < 0 else e_lost_g[g] * q_lost  # probability of not being lost
        through = q_zero if both < 0 else e_zero_g[g] * q_zero  # share of a zero that is the NB's
        linear = _F(0) if logit > 0 else -logit
        loss_g[g] = linear - (_F(0) if both > 0 else -both)
        ratio_g[g] = (_F(1) + e_lost_g[g]) * q_zero
        lost_g[g] = kept
        dy_g[g] *= through
        dlog_theta_g[g] *= through
        ddropout_g[g] = share * (through - kept)


@_vectorised
def _plus(x_g, y_g, out_g):
    for g in range(x_g.size):
        out_g[g] = x_g[g] + y_g[g]


@_vectorised
def _times(x_g, factor_g):
    for g in range(x_g.size):
        x_g[g] *= factor_g[g]


@_vectorised
def _add_scaled(sum_g, x_g, share):
    for g in range(sum_g.size):
        sum_g[g] += x_g[g] * share


@_vectorised
def _through_softmax(dy_g, e_g, part, share):
    for g in range(dy_g.size):
        dy_g[g] = (dy_g[g] - e_g[g] * part) * share


@_vectorised
def _digamma(z):
    """Derivative of ln gamma at z > 0: up by the recurrence, then the asymptotic series."""
    before = 0.0
    while z < 10:
        before -= 1 / z
        z += 1
    r = 1 / (z * z)
    tail = r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r / 132))))
    return before + math.log(z) - 0.5 / z - tail
