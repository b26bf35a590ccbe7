"""Inverted lists: cells in lists around centres, of which a query reads the nearest few.

Centres come from k-means on a seeded sample, in two levels: some groups, and in each as many lists as its
share of the sample. Finding the nearest of thousands of centres then costs a tenth of comparing them all.
Lists hold what the reference holds, so distances are true, and the reference itself isn't needed any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from math import ceil, sqrt
from typing import Any

import numpy as np

from streamx.config import parse_bytes
from streamx.errors import BadValuesError
from streamx.neighbors import lists as loops
from streamx.neighbors.blocks import blocks, finite_rows, scratch_array, take_rows
from streamx.neighbors.exact import leave_out, merge, search_pieces
from streamx.threads import thread_count

# lists that a query reads; 0: all
EFFORTS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 0)
LISTS = 4.0  # lists, in roots of the number of cells
SAMPLE = 48  # cells per list that the centres are trained on
ROUNDS = 10  # of k-means
PIECE = 262_144  # cells that `pieces` gives at a time
SPARE = 8  # candidates beyond k: float32 may order near ties wrongly
TASK = 512  # queries per task
MOST_SEGMENTS = 16
UNEVEN = 1.5  # times as uneven as when trained, and the centres are trained again


@dataclass(frozen=True)
class Centres:
    """Where the lists are.

    Attributes
    ----------
    group_kg
        Centres of the groups, (dimensions, groups).
    list_g
        Group g is lists ``list_g[g]`` to ``list_g[g + 1]``.
    flat
        Centres of the lists, group after group, each (dimensions, lists).
    """

    group_kg: np.ndarray
    list_g: np.ndarray
    flat: np.ndarray

    @property
    def n_lists(self) -> int:
        return int(self.list_g[-1])

    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.group_kg, self.list_g, self.flat

    def groups_for(self, n_lists: int) -> int:
        """Groups whose lists are compared, to find so many: four times what would hold them."""
        n_groups = self.group_kg.shape[1]
        return min(n_groups, 3 + ceil(4 * n_lists * n_groups / self.n_lists))


@dataclass(frozen=True)
class Segment:
    """Cells in lists: those of the first building, or of one append."""

    offset_l: np.ndarray
    number_n: np.ndarray
    flat: np.ndarray


class IVFIndex:
    """Reference cells in inverted lists, as :func:`build_lists` made them; asked like :class:`.ExactIndex`.

    Attributes
    ----------
    n_trained, even_then
        Cells that the centres were trained for, and how uneven the lists were then.
    epoch
        How often the centres were trained again.
    effort
        Lists that a query reads; 0: all.
    """

    method = "ivf"
    efforts = EFFORTS

    def __init__(
        self,
        centres: Centres,
        segments: Sequence[Segment],
        *,
        seed: int,
        threads: int = 0,
        memory: str | int = "4GB",
        epoch: int = 0,
        n_trained: int = 0,
        even_then: float = 0.0,
    ) -> None:
        self.centres, self.segments = centres, list(segments)
        self.seed, self.threads, self.memory = seed, thread_count(threads), parse_bytes(memory)
        self.epoch, self.effort = epoch, EFFORTS[0]
        self.n_trained = n_trained or self.n
        self.even_then = even_then or self.unevenness

    @property
    def n(self) -> int:
        """Cells."""
        return sum(len(segment.number_n) for segment in self.segments)

    @property
    def d(self) -> int:
        """Dimensions."""
        return len(self.centres.group_kg)

    @property
    def unevenness(self) -> float:
        """Mean length of the list that a cell is in, over the mean length of a list."""
        length_sl = np.array([np.diff(segment.offset_l) for segment in self.segments], dtype=np.float64)
        length_l = length_sl.sum(axis=0)
        return float((length_l**2).mean() / length_l.mean() ** 2)

    def search(
        self, query_mk: np.ndarray, n_neighbors: int, own_m: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`.exact.ExactIndex.search`, but neighbours may be missed; distances are true, float64.

        Where the lists that are read hold too few cells, all are read; where all are to be read, blocks of
        queries are compared with blocks of cells, which is exact search and six times as fast.
        """
        query_mk = np.asarray(query_mk)
        if query_mk.ndim != 2 or query_mk.shape[1] != self.d:
            raise BadValuesError(f"queries of shape {query_mk.shape} against {self.d} latent dimensions")
        if not self.effort:
            return search_pieces(
                self.pieces(), query_mk, n_neighbors, own_m, threads=self.threads, memory=self.memory
            )
        k = min(n_neighbors + (own_m is not None), self.n)
        indices = np.full((len(query_mk), k), -1, dtype=np.int64)
        distances = np.full((len(query_mk), k), np.nan)
        list_m = lists_of(self.centres, query_mk, self.threads)
        rows = np.flatnonzero(list_m >= 0)
        rows = rows[np.argsort(list_m[rows], kind="stable")]  # who reads the same lists comes together
        q_mk = query_mk.astype(np.float64)
        self._search(q_mk, rows, self.effort, indices, distances)
        short = rows[indices[rows, -1] < 0] if k else rows[:0]
        self._search(q_mk, short, 0, indices, distances)
        if own_m is not None:
            indices, distances = leave_out(indices, distances, np.asarray(own_m))
        return indices, distances

    def _search(
        self, q_mk: np.ndarray, rows: np.ndarray, effort: int, indices: np.ndarray, distances: np.ndarray
    ) -> None:
        if not len(rows) or not indices.shape[1]:
            return
        n_lists = min(effort or self.centres.n_lists, self.centres.n_lists)
        n_groups = self.centres.groups_for(n_lists)
        for number, segment in enumerate(self.segments):
            found, far = (indices, distances) if number == 0 else (indices.copy(), distances.copy())

            def one(start: int, segment: Segment = segment, found: Any = found, far: Any = far) -> None:
                loops.search_lists(
                    q_mk,
                    rows[start : start + TASK],
                    *self.centres.arguments(),
                    n_groups,
                    n_lists,
                    segment.offset_l,
                    segment.number_n,
                    segment.flat,
                    SPARE,
                    found,
                    far,
                )

            _each(one, len(rows), self.threads)
            if number:
                indices[rows], distances[rows] = merge(
                    (indices[rows], distances[rows]), (found[rows], far[rows]), indices.shape[1]
                )

    def append(self, points_nk: Any) -> IVFIndex:
        """The index with more cells, numbered on: they join the lists, in a segment of their own.

        The centres are trained again on all cells, and segments joined, once the lists are half as uneven
        again as when they were first filled, there are twice as many cells, or more than 16 segments.
        """
        if not points_nk.shape[0]:
            return self
        options: dict[str, Any] = {"seed": self.seed, "threads": self.threads, "memory": self.memory}
        added = fill(self.centres, points_nk, self.n, threads=self.threads, memory=self.memory)
        longer = IVFIndex(
            self.centres,
            [*self.segments, added],
            epoch=self.epoch,
            n_trained=self.n_trained,
            even_then=self.even_then,
            **options,
        )
        longer.effort = self.effort
        worn = longer.unevenness > UNEVEN * self.even_then or len(longer.segments) > MOST_SEGMENTS
        if not worn and longer.n <= 2 * self.n_trained:
            return longer
        return build_lists(longer.in_order(), epoch=self.epoch + 1, **options)

    def in_order(self) -> np.ndarray:
        """All cells by their numbers, (cells, dimensions)."""
        size, dtype = self.n * self.d, self.centres.flat.dtype
        points_nk = scratch_array((self.n, self.d), dtype, on_disk=size * dtype.itemsize > self.memory // 4)
        for some_nk, numbers in self.pieces():
            points_nk[numbers] = some_nk
        return points_nk

    def arrays(self) -> dict[str, np.ndarray]:
        """What to keep of the index, by name."""
        parts: dict[str, Any] = {"centres": self.centres}
        parts |= {f"lists-{number}": segment for number, segment in enumerate(self.segments)}
        return {f"{name}-{key}": value for name, part in parts.items() for key, value in vars(part).items()}

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As :meth:`.exact.ExactIndex.pieces`, some lists at a time."""
        for segment in self.segments:
            for low_list, high_list in parts_of(segment.offset_l, PIECE):
                begin, end = segment.offset_l[low_list], segment.offset_l[high_list]
                rows_nk = np.empty((end - begin, self.d), segment.flat.dtype)
                loops.take_points(
                    np.asarray(segment.flat[begin * self.d : end * self.d]),
                    segment.offset_l[low_list : high_list + 1] - begin,
                    rows_nk,
                )
                yield rows_nk, np.asarray(segment.number_n[begin:end])


def build_lists(
    reference_nk: Any, *, seed: int = 0, threads: int = 0, memory: str | int = "4GB", epoch: int = 0
) -> IVFIndex:
    """Inverted lists of these cells.

    Parameters
    ----------
    reference_nk
        (n_reference, n_latent) float, finite; an array, or anything that slices into arrays. It is read three
        times, block by block, and not kept.
    seed
        Of the sample and of k-means.
    threads
        Threads (0: one per core). They change no result.
    memory
        Where the lists would take more than half of it, they are laid down in a temporary file.

    Raises
    ------
    BadValuesError
        If a cell isn't finite.
    """
    threads, most = thread_count(threads), parse_bytes(memory)
    centres = train(reference_nk, seed)
    segment = fill(centres, reference_nk, 0, threads=threads, memory=most)
    return IVFIndex(centres, [segment], seed=seed, threads=threads, memory=most, epoch=epoch)


def from_arrays(arrays: dict[str, np.ndarray], **settings: Any) -> IVFIndex:
    """The index whose :meth:`IVFIndex.arrays` these are."""

    def part(kind: type[Any], name: str) -> Any:
        return kind(*(arrays[f"{name}-{field.name}"] for field in fields(kind)))

    n_segments = sum(name.endswith("-number_n") for name in arrays)
    segments = [part(Segment, f"lists-{number}") for number in range(n_segments)]
    return IVFIndex(part(Centres, "centres"), segments, **settings)


def train(reference_nk: Any, seed: int) -> Centres:
    """Centres of the lists for these cells, from a seeded sample of them."""
    n = reference_nk.shape[0]
    rng = np.random.default_rng(seed)
    n_lists = max(1, min(int(LISTS * sqrt(n)), n // 32))
    rows = np.sort(rng.choice(n, min(n, SAMPLE * n_lists), replace=False))
    sample_nk = take_rows(reference_nk, rows)
    sample_nk = sample_nk[finite_rows(sample_nk)].astype(np.result_type(sample_nk.dtype, np.float32))
    if not len(sample_nk):
        raise BadValuesError("the reference has no cell without NaN or inf", fix="project it again")
    n_groups = max(1, round(sqrt(n_lists)))
    center_kg = k_means(sample_nk, n_groups, rng)
    group_n = assign(sample_nk, center_kg)
    parts, list_g = [], [0]
    share_g = np.bincount(group_n, minlength=center_kg.shape[1]) * (n_lists / len(sample_nk))
    for g, share in enumerate(share_g):
        centre_kl = k_means(sample_nk[group_n == g], max(1, round(share)), rng)
        parts.append(centre_kl.ravel())
        list_g.append(list_g[-1] + centre_kl.shape[1])
    return Centres(center_kg, np.array(list_g), np.concatenate(parts))


def fill(centres: Centres, points_nk: Any, first: int, *, threads: int, memory: int) -> Segment:
    """Put points, numbered from `first`, into their lists.

    They are read once to see where each belongs, and once more; or, where the lists are laid down in a file,
    once for each part of them that memory holds.
    """
    n, d, dtype = points_nk.shape[0], len(centres.group_kg), centres.flat.dtype
    list_n = np.empty(n, np.int32)
    for low, rows_nk in blocks(points_nk):
        list_n[low : low + len(rows_nk)] = lists_of(centres, rows_nk, threads)
    bad = np.flatnonzero(list_n < 0)
    if len(bad):
        raise BadValuesError(
            f"{len(bad):,} cells with NaN or inf, the first is row {bad[0]}",
            fix="leave out cells without a latent",
        )
    offset_l = np.concatenate([[0], np.cumsum(np.bincount(list_n, minlength=centres.n_lists))])
    on_disk = n * d * dtype.itemsize > memory // 2
    flat = scratch_array((n * d,), dtype, on_disk=on_disk)
    most = max(1, memory // 4 // (d * dtype.itemsize)) if on_disk else n
    number_n, next_l = np.empty(n, np.int64), np.zeros(centres.n_lists, np.int64)
    for low_list, high_list in parts_of(offset_l, most):
        begin, end = offset_l[low_list], offset_l[high_list]
        part = np.empty((end - begin) * d, dtype) if on_disk else flat
        for low, rows_nk in blocks(points_nk):
            loops.place_points(
                np.ascontiguousarray(rows_nk, dtype=dtype),
                list_n[low : low + len(rows_nk)],
                first + low,
                low_list,
                high_list,
                offset_l,
                next_l,
                number_n[begin:end],
                part,
            )
        if on_disk:
            flat[begin * d : end * d] = part
    return Segment(offset_l, number_n, flat)


def parts_of(offset_l: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Runs of lists (first, one behind the last) that hold up to `most` points, or a single list."""
    first, n_lists = 0, len(offset_l) - 1
    while first < n_lists:
        last = int(np.searchsorted(offset_l, offset_l[first] + most, side="right")) - 1
        last = min(max(last, first + 1), n_lists)
        yield first, last
        first = last


def lists_of(centres: Centres, points_nk: np.ndarray, threads: int) -> np.ndarray:
    """The list that each point belongs to; -1 if it isn't finite."""
    points_nk = np.ascontiguousarray(points_nk, dtype=centres.flat.dtype)
    list_n = np.empty(len(points_nk), np.int32)
    n_groups = centres.groups_for(1)

    def one(start: int) -> None:
        rows = slice(start, start + TASK)
        loops.own_lists(points_nk[rows], *centres.arguments(), n_groups, list_n[rows])

    _each(one, len(points_nk), threads)
    return list_n


def _each(one: Callable[[int], None], n: int, threads: int) -> None:
    """Call it with the first row of every task, on some threads."""
    starts = range(0, n, TASK)
    if len(starts) < 2 or threads == 1:
        for start in starts:
            one(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, starts):
            pass


def k_means(points_nk: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """(dimensions, centres) by Lloyd's rounds from random points; a centre without points is dropped."""
    n, d = points_nk.shape
    first = np.sort(rng.choice(n, min(k, n), replace=False))
    centre_kl = np.ascontiguousarray(points_nk[first].T)
    for _ in range(ROUNDS if centre_kl.shape[1] > 1 else 1):
        sum_lk, count_l = np.zeros((centre_kl.shape[1], d)), np.zeros(centre_kl.shape[1], np.int64)
        loops.add_up(points_nk, assign(points_nk, centre_kl), sum_lk, count_l)
        full = count_l > 0
        centre_kl = np.ascontiguousarray((sum_lk[full] / count_l[full, None]).T.astype(points_nk.dtype))
    return centre_kl


def assign(points_nk: np.ndarray, centre_kl: np.ndarray) -> np.ndarray:
    """The nearest centre of every point."""
    center_of_n, square_n = np.empty(len(points_nk), np.int64), np.empty(len(points_nk), points_nk.dtype)
    loops.to_centres(points_nk, centre_kl, center_of_n, square_n)
    return center_of_n
