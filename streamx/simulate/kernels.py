"""Draws of cells, compiled, without the GIL. Every cell has a generator of its own, seeded by its place.

The generator is splitmix64 (Steele 2014); transcripts are drawn by Walker's alias method (Vose 1991): one
64-bit draw each, half of it chooses the column, the other half between the column and its alias.
"""

from __future__ import annotations

import numpy as np

from streamx.compiled import compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@compiled
def mix(x):
    """The finaliser of splitmix64: every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def unit(x):
    """64 random bits -> a float in (0, 1)."""
    return (np.float64(x >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0)


@compiled
def normal(x, y):
    """Two times 64 random bits -> a standard normal number (Box and Muller 1958)."""
    return np.sqrt(-2.0 * np.log(unit(x))) * np.cos(2.0 * np.pi * unit(y))


@compiled
def alias_table(weight_g, threshold_g, alias_g):
    """Weights -> for each column, how many of 2^32 draws stay in it, and where the others go."""
    n = weight_g.size
    scaled = weight_g * (n / weight_g.sum())
    small, large = np.empty(n, np.int64), np.empty(n, np.int64)
    n_small = n_large = 0
    for g in range(n):
        if scaled[g] < 1.0:
            small[n_small] = g
            n_small += 1
        else:
            large[n_large] = g
            n_large += 1
    while n_small and n_large:
        n_small -= 1
        s, t = small[n_small], large[n_large - 1]
        threshold_g[s] = np.uint64(scaled[s] * 4294967296.0)
        alias_g[s] = t
        scaled[t] -= 1.0 - scaled[s]
        if scaled[t] < 1.0:
            n_large -= 1
            small[n_small] = t
            n_small += 1
    for i in range(n_large):
        threshold_g[large[i]], alias_g[large[i]] = np.uint64(4294967296), large[i]
    for i in range(n_small):  # one, but for rounding
        threshold_g[small[i]], alias_g[small[i]] = np.uint64(4294967296), small[i]


@compiled
def draw_cells(salt, first, cumulative_t, median, spread, most, type_n, depth_n):
    """Type and number of transcripts of the cells first, first + 1, ... of a batch."""
    for i in range(type_n.size):
        state = mix(salt + GOLDEN * np.uint64(first + i + 1))
        share = unit(mix(state + GOLDEN))
        t = 0
        while t < cumulative_t.size - 1 and share > cumulative_t[t]:
            t += 1
        type_n[i] = t
        z = normal(mix(state + GOLDEN * np.uint64(2)), mix(state + GOLDEN * np.uint64(3)))
        depth_n[i] = min(most, max(1, np.int64(np.exp(np.log(median) + spread * z))))


@compiled
def draw_counts(salt, first, type_n, depth_n, threshold_tg, alias_tg, indptr, indices, data):
    """Counts of these cells, row after row with sorted columns; returns the number of values."""
    n_genes = np.uint64(threshold_tg.shape[1])
    count_g = np.zeros(threshold_tg.shape[1], np.int32)
    n = 0
    for i in range(type_n.size):
        state = mix(salt + GOLDEN * np.uint64(first + i + 1)) + GOLDEN * np.uint64(16)
        threshold_g, alias_g = threshold_tg[type_n[i]], alias_tg[type_n[i]]
        for _ in range(depth_n[i]):
            state += GOLDEN
            draw = mix(state)
            g = ((draw >> np.uint64(32)) * n_genes) >> np.uint64(32)
            if (draw & np.uint64(0xFFFFFFFF)) >= threshold_g[g]:
                g = np.uint64(alias_g[g])
            count_g[g] += 1
        for g in range(count_g.size):
            # written always, counted when wanted: a branch that is taken at random costs more
            indices[n] = g
            data[n] = count_g[g]
            n += count_g[g] > 0
            count_g[g] = 0
        indptr[i + 1] = n
    return n


@compiled
def draw_proteins(salt, first, type_n, mean_tp, spread, x_np):
    """Protein counts: log-normal around the mean of the cell's type, rounded."""
    n_proteins = np.uint64(mean_tp.shape[1])
    for i in range(type_n.size):
        state = mix(salt + GOLDEN * np.uint64(first + i + 1)) ^ np.uint64(0xA5A5A5A5A5A5A5A5)
        for p in range(mean_tp.shape[1]):
            at = np.uint64(2) * np.uint64(p) + np.uint64(1)
            z = normal(mix(state + GOLDEN * at), mix(state + GOLDEN * (at + np.uint64(1))))
            x_np[i, p] = np.rint(mean_tp[type_n[i], p] * np.exp(spread * z))
    return n_proteins
