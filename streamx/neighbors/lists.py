"""The loops over inverted lists: which lists are near a point, and which of their points are nearest.

Points of list l are rows ``offset_l[l]`` to ``offset_l[l + 1]``; they lie in one flat array, dimension after
dimension within each list, so that a loop over points runs through neighbouring numbers. Every sum runs in a
fixed order: a distance has the same bits whatever is searched beside it.
"""

from __future__ import annotations

import numpy as np

from streamx.compiled import compiled


@compiled
def to_centres(points_nk, centre_kl, center_of_n, square_n):
    """The nearest of a few centres for every point, and its squared distance."""
    flat = centre_kl.reshape(-1)
    square_l = np.empty(centre_kl.shape[1], centre_kl.dtype)
    for row in range(len(points_nk)):
        squares(points_nk[row], flat, 0, square_l)
        best = np.argmin(square_l)
        center_of_n[row], square_n[row] = best, square_l[best]


@compiled
def squares(q_k, flat, low, out):
    """Squared distances of a point to the points of one list, which begins at row `low`."""
    n, d = out.size, q_k.size
    base = low * d
    out[:] = 0
    j = 0
    while j + 4 <= d:
        at = base + j * n
        a, b, c, e = flat[at:], flat[at + n :], flat[at + 2 * n :], flat[at + 3 * n :]
        qa, qb, qc, qe = q_k[j], q_k[j + 1], q_k[j + 2], q_k[j + 3]
        for i in range(n):
            s, t, u, v = a[i] - qa, b[i] - qb, c[i] - qc, e[i] - qe
            out[i] += (s * s + t * t) + (u * u + v * v)
        j += 4
    while j < d:
        at = base + j * n
        a, qa = flat[at : at + n], q_k[j]
        for i in range(n):
            s = a[i] - qa
            out[i] += s * s
        j += 1


@compiled
def nearest_lists(q_k, group_kg, list_g, flat_centres, n_groups, n_lists, work, found, found_square):
    """Lists whose centres are nearest, nearest first, among those of the nearest groups; how many there are.

    Parameters
    ----------
    group_kg
        Centres of the groups, one per column.
    list_g
        Group g is lists ``list_g[g]`` to ``list_g[g + 1]``.
    flat_centres
        Centres of the lists, laid out as the points of lists are, groups being the lists.
    n_groups, n_lists
        How many to look at, and to find.
    work
        As many entries as there are groups, or lists in the largest group.
    found, found_square
        Filled: numbers of lists, squared distances.
    """
    near = np.empty(n_groups, np.int64)
    near_square = np.empty(n_groups, q_k.dtype)
    squares(q_k, group_kg.reshape(-1), 0, work[: group_kg.shape[1]])
    size = 0
    for g in range(group_kg.shape[1]):
        size = push(near_square, near, size, n_groups, work[g], g)
    filled = 0
    for i in range(size):
        g = near[i]
        low, high = list_g[g], list_g[g + 1]
        squares(q_k, flat_centres, low, work[: high - low])
        for j in range(high - low):
            filled = push(found_square, found, filled, n_lists, work[j], low + j)
    unheap(found_square, found, filled)
    return filled


@compiled
def own_lists(points_nk, group_kg, list_g, flat_centres, n_groups, list_n):
    """The nearest list of every point; -1 of a point that isn't finite."""
    work = np.empty(max(group_kg.shape[1], np.max(list_g[1:] - list_g[:-1])), points_nk.dtype)
    found, square = np.empty(1, np.int64), np.empty(1, points_nk.dtype)
    for row in range(len(points_nk)):
        list_n[row] = -1
        if np.all(np.isfinite(points_nk[row])):
            nearest_lists(points_nk[row], group_kg, list_g, flat_centres, n_groups, 1, work, found, square)
            list_n[row] = found[0]


@compiled
def search_lists(
    q_mk,
    rows,
    group_kg,
    list_g,
    flat_centres,
    n_groups,
    n_lists,
    offset_l,
    number_n,
    flat,
    spare,
    indices,
    distances,
):
    """The nearest points of the nearest lists, for some rows of the queries.

    Proposed by distances in the precision of the points, `spare` more than are asked for; then ranked by
    their distances in float64, equal ones by id.

    Parameters
    ----------
    q_mk
        float64.
    rows
        Of the queries, whose rows in `indices` and `distances` are filled; -1 and NaN where the lists hold
        too few points.
    """
    d, k = q_mk.shape[1], indices.shape[1]
    most = k + spare
    longest = np.max(offset_l[1:] - offset_l[:-1])
    work = np.empty(max(longest, group_kg.shape[1], np.max(list_g[1:] - list_g[:-1])), flat.dtype)
    near, near_square = np.empty(n_lists, np.int64), np.empty(n_lists, flat.dtype)
    place, square = np.empty(most, np.int64), np.empty(most, flat.dtype)
    exact, ids = np.empty(most, np.float64), np.empty(most, np.int64)
    q_k = np.empty(d, flat.dtype)
    for row in rows:
        for j in range(d):
            q_k[j] = q_mk[row, j]
        n_near = nearest_lists(
            q_k, group_kg, list_g, flat_centres, n_groups, n_lists, work, near, near_square
        )
        size = 0
        for i in range(n_near):
            low, high = offset_l[near[i]], offset_l[near[i] + 1]
            if low == high:
                continue
            squares(q_k, flat, low, work[: high - low])
            for p in range(high - low):
                if size < most or work[p] < square[0]:
                    size = push(square, place, size, most, work[p], (i << 40) | p)
        for c in range(size):
            which, p = place[c] >> 40, place[c] & ((1 << 40) - 1)
            low, high = offset_l[near[which]], offset_l[near[which] + 1]
            total = 0.0
            for j in range(d):
                t = np.float64(flat[low * d + j * (high - low) + p]) - q_mk[row, j]
                total += t * t
            exact[c], ids[c] = total, number_n[low + p]
        ascend(exact, ids, size)
        for c in range(k):
            indices[row, c] = ids[c] if c < size else -1
            distances[row, c] = np.sqrt(exact[c]) if c < size else np.nan


@compiled
def push(values, items, size, most, value, item):
    """Keep the `most` smallest values, the largest of them first (a heap); returns how many are kept."""
    if size < most:
        at = size
        while at > 0 and values[(at - 1) // 2] < value:
            values[at], items[at] = values[(at - 1) // 2], items[(at - 1) // 2]
            at = (at - 1) // 2
        values[at], items[at] = value, item
        return size + 1
    if not value < values[0]:
        return size
    at = 0
    while 2 * at + 1 < most:
        child = 2 * at + 1
        if child + 1 < most and values[child + 1] > values[child]:
            child += 1
        if values[child] <= value:
            break
        values[at], items[at] = values[child], items[child]
        at = child
    values[at], items[at] = value, item
    return size


@compiled
def unheap(values, items, size):
    """Sort what :func:`push` kept, smallest first.

    The loop that sinks an entry stands in both: as a function of its own, it made searches take up to three
    times as long, for `push` was no longer compiled into its callers.
    """
    for last in range(size - 1, 0, -1):
        value, item = values[last], items[last]
        values[last], items[last] = values[0], items[0]
        at = 0
        while 2 * at + 1 < last:
            child = 2 * at + 1
            if child + 1 < last and values[child + 1] > values[child]:
                child += 1
            if values[child] <= value:
                break
            values[at], items[at] = values[child], items[child]
            at = child
        values[at], items[at] = value, item


@compiled
def ascend(values, items, size):
    """Sort a few entries by (value, item)."""
    for i in range(1, size):
        value, item = values[i], items[i]
        j = i
        while j > 0 and (values[j - 1] > value or (values[j - 1] == value and items[j - 1] > item)):
            values[j], items[j] = values[j - 1], items[j - 1]
            j -= 1
        values[j], items[j] = value, item


@compiled
def place_points(points_nk, list_n, first, first_list, last_list, offset_l, next_l, number_n, flat):
    """Put points into their lists, as far as these are among `first_list` to `last_list`.

    `flat` and `number_n` begin with the first point of `first_list`; ``next_l`` counts what each list has.
    """
    d = points_nk.shape[1]
    base = offset_l[first_list]
    for row in range(len(points_nk)):
        which = list_n[row]
        if which < first_list or which >= last_list:
            continue
        low, n = offset_l[which] - base, offset_l[which + 1] - offset_l[which]
        at = next_l[which]
        next_l[which] += 1
        number_n[low + at] = first + row
        for j in range(d):
            flat[low * d + j * n + at] = points_nk[row, j]


@compiled
def take_points(flat, offset_l, points_nk):
    """The reverse of :func:`place_points`: rows in the order of the lists."""
    d = points_nk.shape[1]
    for which in range(len(offset_l) - 1):
        low, n = offset_l[which], offset_l[which + 1] - offset_l[which]
        for j in range(d):
            for p in range(n):
                points_nk[low + p, j] = flat[low * d + j * n + p]


@compiled
def add_up(points_nk, center_of_n, sum_lk, count_l):
    """Sums and numbers of the points of each centre, in float64 and in the order of rows."""
    for row in range(len(points_nk)):
        which = center_of_n[row]
        count_l[which] += 1
        for j in range(points_nk.shape[1]):
            sum_lk[which, j] += points_nk[row, j]
