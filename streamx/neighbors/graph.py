"""The graph of all cells: a search of modest recall, then a look around each cell's neighbours.

Recall grows slowly with what a search reads: .95 to .99 takes three times as many cells. But a neighbour
that was missed has mostly been found by others, by the missed cell itself or by common neighbours (Dong 2011,
NN-Descent); looking at these two hundred cells is quicker.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from streamx.compiled import compiled
from streamx.neighbors.blocks import blocks, scratch_array
from streamx.neighbors.index import TARGET_RECALL, Index, reach_recall, recall_sample
from streamx.neighbors.lists import ascend, push

IN_MEMORY = 1 << 28  # bytes of a graph; a larger one goes into a file
TASK = 4096  # cells
ROUNDS = 2


def knn_graph(
    index: Index,
    points_nk: np.ndarray,
    n_neighbors: int,
    *,
    target_recall: float,
    seed: int = 0,
    memory: str | int = "4GB",
) -> tuple[np.ndarray, float]:
    """Neighbours of every cell of an index among the others, by (distance, number).

    The index is asked for a recall of .95, and what it finds is improved in two rounds at most, until the
    recall measured on the sample of :func:`.reach_recall` is `target_recall`. If that fails, the index itself
    is asked for it.

    Parameters
    ----------
    index
        Of `points_nk`.
    points_nk
        (cells, dimensions), float, finite; may be memory-mapped.

    Returns
    -------
    indices_nj
        int32 (cells, n_neighbors); in a file without a name if it is large.
    recall
        1.0 if the index is exact.
    """
    own_n = np.arange(index.n)
    shape = index.n, min(n_neighbors, index.n - 1)
    indices_nj, better_nj, back_nj = _room(shape), _room(shape), _room(shape)
    rows, limit_m = recall_sample(index, points_nk, n_neighbors, own_n, seed=seed, memory=memory)
    index.effort = index.efforts[0]  # a search of more neighbours had to look further
    recall = 0.0
    for target in (min(TARGET_RECALL, target_recall), target_recall):
        recall, _ = reach_recall(
            index, points_nk, n_neighbors, own_n, target=target, seed=seed, memory=memory
        )
        for low, some_nk in blocks(points_nk):
            part = slice(low, low + len(some_nk))
            indices_nj[part], _ = index.search(some_nk, n_neighbors, own_n[part])
        for _ in range(ROUNDS):
            if recall >= target_recall:
                return indices_nj, recall
            _improve(index, points_nk, indices_nj, back_nj, better_nj)
            indices_nj, better_nj = better_nj, indices_nj
            offset_mjk = points_nk[indices_nj[rows]].astype(np.float64) - points_nk[rows, None]
            recall = float(np.mean(np.linalg.norm(offset_mjk, axis=2) <= limit_m[:, None] * (1 + 1e-9)))
    return indices_nj, recall


def _room(shape: tuple[int, int]) -> np.ndarray:
    return scratch_array(shape, np.int32, on_disk=4 * shape[0] * shape[1] > IN_MEMORY)


def _improve(
    index: Index, points_nk: np.ndarray, indices_nj: np.ndarray, back_nj: np.ndarray, better_nj: np.ndarray
) -> None:
    """Fill `better_nj`, one piece of the index after the other: cells that lie together share candidates."""
    back_n = np.zeros(len(indices_nj), dtype=np.int32)
    turn(indices_nj, back_nj, back_n)

    def one(rows: np.ndarray) -> None:
        look_around(points_nk, indices_nj, back_nj, back_n, rows, better_nj)

    with ThreadPoolExecutor(index.threads) as pool:
        for _, numbers in index.pieces():
            for _ in pool.map(one, [numbers[low : low + TASK] for low in range(0, len(numbers), TASK)]):
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
