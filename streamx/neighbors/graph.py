"""The graph of all cells: a search of modest recall, then a look around each cell's neighbours.

Recall grows slowly with what a search reads: from .9 to .99 it takes four times as many cells. But a missed
neighbour has mostly been found by others, by the missed cell itself or by common neighbours (Dong 2011,
NN-Descent); looking at these two hundred cells is quicker. All work is done in the order of the index, where
cells that lie together read the same lists and share their candidates: in the order of a file, searching five
million cells takes twice as long.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from streamx.compiled import compiled
from streamx.errors import warn
from streamx.neighbors.blocks import blocks, scratch_array
from streamx.neighbors.index import TARGET_RECALL, Index, reach_recall, recall_sample
from streamx.neighbors.lists import ascend, push

IN_MEMORY = 1 << 28  # bytes of an array; a larger one goes into a file
TASK = 4096  # cells
START_RECALL = 0.9
ROUNDS = 3


def knn_graph(
    index: Index,
    points_nk: np.ndarray,
    n_neighbors: int,
    *,
    target_recall: float,
    seed: int = 0,
    memory: str | int = "4GB",
) -> tuple[np.ndarray, float]:
    """Neighbours of every cell of an index among the others, nearest first.

    The index is asked for a recall of .9, and what it finds is improved in up to three rounds, until the
    recall measured on the sample of :func:`.reach_recall` is `target_recall`. If that fails, all is done
    again from a recall of .95. Where cells spread evenly in some tens of dimensions even this falls short,
    and more would be a comparison of all pairs: then a warning says what was reached.

    Parameters
    ----------
    index
        Of `points_nk`.
    points_nk
        (cells, dimensions), float, finite; may be memory-mapped.

    Returns
    -------
    indices_nj
        int32 (cells, n_neighbors); in a file without a name if it is large. Which of several neighbours at
        the same distance are among them depends on the index, but not on threads.
    recall
        1.0 if the index is exact.
    """
    own_n = np.arange(index.n)
    shape = index.n, min(n_neighbors, index.n - 1)
    truth = recall_sample(index, points_nk, n_neighbors, own_n, seed=seed, memory=memory)
    rows, limit_m = truth
    number_n, lying_nk = _as_they_lie(index)
    place_n = np.empty(index.n, dtype=np.int32)
    place_n[number_n] = own_n
    near_nj, better_nj, back_nj = (_room(shape, np.int32) for _ in range(3))
    index.effort = index.efforts[0]  # a search of more neighbours had to look further
    for target in (min(START_RECALL, target_recall), min(TARGET_RECALL, target_recall)):
        recall, _ = reach_recall(index, points_nk, n_neighbors, own_n, target=target, truth=truth)
        for low, some_nk in blocks(lying_nk):
            part = slice(low, low + len(some_nk))
            near_nj[part] = place_n[index.search(some_nk, n_neighbors, number_n[part])[0]]
        for _ in range(ROUNDS):
            if recall >= target_recall:
                break
            _improve(lying_nk, near_nj, back_nj, better_nj, index.threads)
            near_nj, better_nj = better_nj, near_nj
            sample = place_n[rows]
            offset_mjk = lying_nk[near_nj[sample]].astype(np.float64) - lying_nk[sample, None]
            recall = float(np.mean(np.linalg.norm(offset_mjk, axis=2) <= limit_m[:, None] * (1 + 1e-9)))
        if recall >= target_recall:
            break
    else:
        warn(
            f"the graph of neighbours has a recall of {recall:.3f}, below {target_recall}",
            fix="what rests on it misses some edges: latents of fewer dimensions have nearer neighbours",
        )
    indices_nj = better_nj
    for low, some_nj in blocks(near_nj):
        indices_nj[number_n[low : low + len(some_nj)]] = number_n[some_nj]
    return indices_nj, recall


def _room(shape: tuple[int, int], dtype: np.dtype | type) -> np.ndarray:
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    return scratch_array(shape, dtype, on_disk=size > IN_MEMORY)


def _as_they_lie(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """All cells in the order of the index: their numbers, and themselves."""
    number_n, lying_nk, low = np.empty(index.n, dtype=np.int64), np.empty((0, index.d)), 0
    for rows_nk, numbers in index.pieces():
        if not low:
            lying_nk = _room((index.n, index.d), rows_nk.dtype)
        part = slice(low, low + len(numbers))
        number_n[part], lying_nk[part], low = numbers, rows_nk, part.stop
    return number_n, lying_nk


def _improve(
    points_nk: np.ndarray, indices_nj: np.ndarray, back_nj: np.ndarray, better_nj: np.ndarray, threads: int
) -> None:
    """Fill `better_nj`, from `indices_nj` and these turned round."""
    n = len(points_nk)
    back_n = np.zeros(n, dtype=np.int32)
    turn(indices_nj, back_nj, back_n)

    def one(low: int) -> None:
        rows = np.arange(low, min(low + TASK, n))
        look_around(points_nk, indices_nj, back_nj, back_n, rows, better_nj)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, range(0, n, TASK)):
            pass


@compiled
def turn(indices_nj, back_nj, back_n):
    """The edges turned round: the first cells that have a cell among their neighbours, and how many."""
    for row in range(len(indices_nj)):
        for near in indices_nj[row]:
            if back_n[near] < back_nj.shape[1]:
                back_nj[near, back_n[near]] = row
                back_n[near] += 1


@compiled
def look_around(points_nk, indices_nj, back_nj, back_n, rows, better_nj):
    """The nearest of each row's neighbours, the cells that it is a neighbour of, and their neighbours."""
    k, d = indices_nj.shape[1], points_nk.shape[1]
    most = 2 * k * (k + 1)
    mask = 1
    while mask < 2 * most:
        mask *= 2
    mask -= 1
    met, met_by = np.empty(mask + 1, np.int64), np.full(mask + 1, -1, np.int64)  # a hash table of candidates
    square, found = np.empty(k, np.float64), np.empty(k, np.int64)
    for row in rows:
        size = 0
        for i in range(k + back_n[row]):
            source = indices_nj[row, i] if i < k else back_nj[row, i - k]
            for j in range(-1, k):
                candidate = np.int64(source if j < 0 else indices_nj[source, j])
                at = (candidate * 2654435761) & mask
                while met_by[at] == row and met[at] != candidate:
                    at = (at + 1) & mask
                if met_by[at] == row or candidate == row:
                    continue
                met_by[at], met[at] = row, candidate
                total = 0.0
                for c in range(d):
                    t = np.float64(points_nk[candidate, c]) - np.float64(points_nk[row, c])
                    total += t * t
                if size < k or total < square[0]:
                    size = push(square, found, size, k, total, candidate)
        ascend(square, found, size)
        for j in range(k):
            better_nj[row, j] = found[j]
