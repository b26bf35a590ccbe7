"""Exact nearest neighbours by blocked matrix products, re-ranked so that they are exact to the last tie.

The fast part (one BLAS product per tile of the reference, float32) only proposes candidates. Each
proposal is a *lower bound* of the squared distance, its rounding error subtracted; the few best are then
ranked by differences in float64, and a row is accepted only if its k-th true distance is below every bound
that was set aside. Rows that fail (ties, clusters far from the centre) are searched again in float64, then by
full scan. So the answer is the k smallest (distance, index) pairs whatever the block size, memory, thread
count or BLAS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from streamx.config import parse_bytes
from streamx.errors import BadValuesError, ResourceError
from streamx.neighbors.blocks import blocks, finite_rows
from streamx.threads import thread_count

TILE = 4096  # reference rows per product: 512 x 4096 float32 stay in the cache
BLOCK = 512  # query rows per product


class ExactIndex:
    """Reference cells, ready for exact Euclidean search.

    Parameters
    ----------
    reference_nk
        (n_reference, n_latent), any float dtype, finite.
    threads
        Query blocks searched at once (0: one per core).
    memory
        Bytes that the index and its working blocks may use, results excluded. A reference that doesn't fit is
        searched piece by piece.

    Raises
    ------
    BadValuesError
        If the reference isn't a finite matrix with at least one row.
    ResourceError
        If `memory` can't hold 4,096 cells and a block to work on.
    """

    method = "exact"
    efforts = (0,)
    effort = 0

    def __init__(self, reference_nk: np.ndarray, *, threads: int = 0, memory: str | int = "4GB") -> None:
        self.reference_nk = as_points(reference_nk, "the reference")
        self.threads = thread_count(threads)
        self._stages: dict[Any, _Tiles] = {}
        self.memory = memory
        n, d = self.reference_nk.shape
        self._piece = n
        each = (d + 1) * 12 + 16  # bytes of a cell: both precisions, each with its order
        self._budget = parse_bytes(memory) - n * each
        least = self.threads * _block_bytes(16, 64)
        if self._budget < least:
            self._piece = (parse_bytes(memory) - least) // each
            if self._piece < min(n, TILE):
                least += min(n, TILE) * each
                raise ResourceError(
                    f"exact search over {n:,} reference cells needs {least / 1e9:.2g} GB",
                    fix="raise the memory limit",
                )

    @property
    def n(self) -> int:
        """Cells."""
        return len(self.reference_nk)

    @property
    def d(self) -> int:
        """Dimensions."""
        return self.reference_nk.shape[1]

    def search(
        self, query_mk: np.ndarray, n_neighbors: int, own_m: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest reference cells of every query cell.

        Parameters
        ----------
        query_mk
            (n_query, n_latent). A row that isn't finite has no neighbours.
        n_neighbors
            Neighbours per cell; fewer if the reference is smaller.
        own_m
            For queries that are reference cells: their row there (-1: none), which is left out.

        Returns
        -------
        indices_mj, distances_mj
            int64 and float64, ordered by (distance, index); -1 and NaN where the query isn't finite.
        """
        query_mk = np.asarray(query_mk)
        if query_mk.ndim != 2 or query_mk.shape[1] != self.reference_nk.shape[1]:
            raise BadValuesError(
                f"queries of shape {query_mk.shape} against {self.reference_nk.shape[1]} latent dimensions"
            )
        if self._piece < self.n:
            options: dict[str, Any] = {"threads": self.threads, "memory": self.memory}
            return search_pieces(self.pieces(), query_mk, n_neighbors, own_m, **options)
        k = min(n_neighbors + (own_m is not None), self.n)
        indices = np.full((len(query_mk), k), -1, dtype=np.int64)
        distances = np.full((len(query_mk), k), np.nan)
        todo = np.flatnonzero(np.isfinite(query_mk).all(axis=1))
        for dtype in (np.float32, np.float64):
            if len(todo):
                todo = self._pass(query_mk, todo, k, indices, distances, dtype)
        self._scan(query_mk, todo, k, indices, distances)
        if own_m is not None:
            indices, distances = leave_out(indices, distances, np.asarray(own_m))
        return indices, distances

    def append(self, points_nk: np.ndarray) -> ExactIndex:
        """The index with more cells, numbered on."""
        together_nk = np.concatenate([self.reference_nk, points_nk])
        return ExactIndex(together_nk, threads=self.threads, memory=self.memory)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All cells in pieces that memory holds: (rows, their numbers)."""
        for low, rows_nk in blocks(self.reference_nk, self._piece):
            yield rows_nk, np.arange(low, low + len(rows_nk))

    def arrays(self) -> dict[str, np.ndarray]:
        """What to keep of the index, by name."""
        return {"points": self.reference_nk}

    def _pass(
        self,
        query_mk: np.ndarray,
        rows: np.ndarray,
        k: int,
        indices: np.ndarray,
        distances: np.ndarray,
        dtype: Any,
    ) -> np.ndarray:
        """Search `rows` with products in `dtype`; returns those whose answer isn't certain."""
        from threadpoolctl import threadpool_limits

        if dtype not in self._stages:
            with np.errstate(over="ignore"):
                self._stages[dtype] = _Tiles(self.reference_nk, dtype)
        tiles = self._stages[dtype]
        n_candidates = k + max(8, k // 8)
        size = BLOCK
        while size > 16 and self.threads * _block_bytes(size, n_candidates) > self._budget:
            size //= 2
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]

        def one(block: np.ndarray) -> np.ndarray:
            q_mk = query_mk[block].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                candidates, floor_m = tiles.propose(q_mk, n_candidates)
            found, squares = rank(q_mk, self.reference_nk, candidates, k)
            sure = squares[:, -1] < floor_m
            indices[block[sure]], distances[block[sure]] = found[sure], np.sqrt(squares[sure])
            return block[~sure]

        with threadpool_limits(1, "blas"), ThreadPoolExecutor(self.threads) as pool:
            left = list(pool.map(one, blocks))
        return np.concatenate(left) if left else rows[:0]

    def _scan(
        self, query_mk: np.ndarray, rows: np.ndarray, k: int, indices: np.ndarray, distances: np.ndarray
    ) -> None:
        """Rows with ties at the k-th distance: true distances to the whole reference."""
        for row in rows:
            q_k = query_mk[row].astype(np.float64)
            squares = np.zeros(len(self.reference_nk))
            for j, value in enumerate(q_k):
                squares += (self.reference_nk[:, j].astype(np.float64) - value) ** 2
            limit = np.partition(squares, k - 1)[k - 1]
            near = np.flatnonzero(squares <= limit)
            near = near[np.argsort(squares[near], kind="stable")][:k]
            indices[row], distances[row] = near, np.sqrt(squares[near])


class _Tiles:
    """The reference in random order, centred and rounded, with what the bounds need.

    Random order, because neighbours often lie together in a file: then the first tiles already give a limit
    that prunes the others. It changes no result.
    """

    def __init__(self, reference_nk: np.ndarray, dtype: Any) -> None:
        n, d = reference_nk.shape
        self.order = np.random.default_rng(0).permutation(n)
        self.center = reference_nk.mean(axis=0, dtype=np.float64)
        # |rounding error| <= slack * (|q|^2 + |r|^2): both points' rounding, the product's d terms, the sum
        self.slack = (d + 16) * float(np.finfo(dtype).eps)
        self.smallest = (d + 16) * float(np.finfo(dtype).tiny)  # products below it have no relative precision
        self.largest = float(np.finfo(dtype).max) ** 0.8
        self.points_nk = np.empty((n, d + 1), dtype=dtype)
        for start in range(0, n, TILE):
            rows = slice(start, start + TILE)
            r_nk = reference_nk[self.order[rows]].astype(np.float64) - self.center
            self.points_nk[rows, :d] = -2 * r_nk
            self.points_nk[rows, d] = (1 - self.slack) * np.einsum("nk,nk->n", r_nk, r_nk)

    def propose(self, q_mk: np.ndarray, n_candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """(candidates, floor): reference rows, and a bound below which no other reference cell lies."""
        m, d = q_mk.shape
        centred_mk = q_mk - self.center
        left_mk = np.ones((m, d + 1), dtype=self.points_nk.dtype)
        left_mk[:, :d] = centred_mk
        n = len(self.points_nk)
        first = min(n, max(1024, 4 * n_candidates))
        bounds = left_mk @ self.points_nk[:first].T
        best = np.broadcast_to(np.arange(first), bounds.shape)
        if first > n_candidates:
            best = np.argpartition(bounds, n_candidates - 1, axis=1)[:, :n_candidates]
            bounds = np.take_along_axis(bounds, best, axis=1)
        if n > first:
            best = best.copy()
            buffer = np.empty((m, TILE), dtype=bounds.dtype)
            for start in range(first, n, TILE):
                tile = self.points_nk[start : start + TILE]
                _merge(best, bounds, np.matmul(left_mk, tile.T, out=buffer[:, : len(tile)]), start)
        floor_m = np.full(m, np.inf)
        if n > best.shape[1]:
            norm_m = np.einsum("mk,mk->m", centred_mk, centred_mk)
            floor_m = bounds.max(axis=1) + (1 - self.slack) * norm_m - self.smallest
            floor_m[(norm_m > self.largest) | ~np.isfinite(floor_m)] = -np.inf  # may have overflowed
        return self.order[best], floor_m


def _merge(best: np.ndarray, bounds: np.ndarray, tile: np.ndarray, start: int) -> None:
    """Put the tile's entries that beat a row's worst candidate in its place."""
    hits = np.flatnonzero(tile < bounds.max(axis=1)[:, None])
    if not len(hits):
        return
    width = tile.shape[1]
    rows = hits // width
    counts = np.bincount(rows, minlength=len(best))
    touched = np.flatnonzero(counts)
    kept = best.shape[1]
    wide_bounds = np.full((len(touched), kept + counts.max()), np.inf, dtype=bounds.dtype)
    wide_best = np.zeros(wide_bounds.shape, dtype=np.int64)
    wide_bounds[:, :kept], wide_best[:, :kept] = bounds[touched], best[touched]
    begin = np.cumsum(counts) - counts
    column = kept + np.arange(len(hits)) - begin[rows]
    line = np.searchsorted(touched, rows)
    columns = hits - rows * width
    wide_bounds[line, column], wide_best[line, column] = tile[rows, columns], columns + start
    keep = np.argpartition(wide_bounds, kept - 1, axis=1)[:, :kept]
    bounds[touched] = np.take_along_axis(wide_bounds, keep, axis=1)
    best[touched] = np.take_along_axis(wide_best, keep, axis=1)


def rank(
    q_mk: np.ndarray, reference_nk: np.ndarray, candidates_mc: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each row's candidates by (distance, index), and their squared distances in float64.

    Sums run over the dimensions one by one, so that a pair's distance has the same bits in any block.
    """
    candidates_mc = np.sort(candidates_mc, axis=1)
    squares_mc = np.zeros(candidates_mc.shape)
    r_mck = reference_nk[candidates_mc]
    for j in range(q_mk.shape[1]):
        squares_mc += (r_mck[:, :, j].astype(np.float64) - q_mk[:, j, None]) ** 2
    order = np.argsort(squares_mc, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(candidates_mc, order, axis=1), np.take_along_axis(squares_mc, order, axis=1)


def leave_out(indices: np.ndarray, distances: np.ndarray, own_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own cell, or its last neighbour where the cell isn't among them."""
    drop = indices == own_m[:, None]
    drop[~drop.any(axis=1), -1] = True
    drop[:, 1:] &= np.cumsum(drop, axis=1)[:, :-1] == 0  # a row without neighbours repeats -1
    shape = (len(indices), indices.shape[1] - 1)
    return indices[~drop].reshape(shape), distances[~drop].reshape(shape)


def search_pieces(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]],
    query_mk: np.ndarray,
    n_neighbors: int,
    own_m: np.ndarray | None = None,
    *,
    threads: int = 0,
    memory: str | int = "4GB",
) -> tuple[np.ndarray, np.ndarray]:
    """Exact search over cells that come in pieces, as :meth:`ExactIndex.search` over all of them.

    Parameters
    ----------
    pieces
        (rows, their numbers in the reference) of each; any order.
    """
    m, k = len(query_mk), n_neighbors + (own_m is not None)
    best = np.empty((m, 0), dtype=np.int64), np.empty((m, 0))
    for rows_nk, numbers in pieces:
        order = np.argsort(numbers)  # equal distances go by number
        index = ExactIndex(rows_nk[order], threads=threads, memory=memory)
        found, distances = index.search(query_mk, k)
        best = merge(best, (np.where(found < 0, -1, numbers[order][found]), distances), k)
    return best if own_m is None else leave_out(*best, np.asarray(own_m))


def merge(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of two searches over different cells, by (distance, index)."""
    indices = np.concatenate([one[0], other[0]], axis=1)
    distances = np.concatenate([one[1], other[1]], axis=1)
    order = np.lexsort((indices, distances))[:, :k]  # NaN, where nothing was found, comes last
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(distances, order, axis=1)


def as_points(points_nk: np.ndarray, name: str) -> np.ndarray:
    """A finite 2-D float array with at least one row, or an error that says what is wrong."""
    points_nk = np.asarray(points_nk)
    if points_nk.ndim != 2 or not len(points_nk):
        raise BadValuesError(f"{name} has shape {points_nk.shape}, not (cells, dimensions)")
    if points_nk.dtype.kind != "f":
        points_nk = points_nk.astype(np.float64)
    bad = np.flatnonzero(~finite_rows(points_nk))
    if len(bad):
        raise BadValuesError(
            f"{name} has {len(bad):,} rows with NaN or inf, the first is row {bad[0]}",
            fix="leave out cells without a latent",
        )
    return points_nk


def _block_bytes(size: int, n_candidates: int) -> int:
    """Working memory of one block: the product and its comparison, merging, and float64 differences."""
    return size * (TILE * 5 + n_candidates * 80) + 2**20
