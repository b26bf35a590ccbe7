"""One interface to all searches, the choice between them, and the recall that a search reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from tqdm.auto import tqdm

from streamx.errors import BadFileError, UsageError, warn
from streamx.neighbors.blocks import blocks, finite_rows, take_rows
from streamx.neighbors.exact import ExactIndex, search_pieces
from streamx.neighbors.nndescent import NNDescentIndex
from streamx.neighbors.stored import read_arrays, write_arrays

METHODS = ("auto", "exact", "ivf", "nndescent")
TARGET_RECALL = 0.95
RECALL_ROWS = 1000
FEWEST = 64  # cells that an approximate search is worth asking

# Seconds, one thread of the build machine: what `auto` weighs. Thread counts must not change results, so they
# don't enter.
_EXACT_PAIR = 1.4e-9
_LISTS_START, _LISTS_BUILD, _LISTS_QUERY = 2.0, 3e-6, 2e-5


class Index(Protocol):
    """Reference cells, ready to be searched.

    Attributes
    ----------
    method
        Its name.
    n, d
        Cells and dimensions.
    efforts, effort
        How hard it can search, least first, and how hard it does.
    """

    method: str
    threads: int
    effort: Any

    @property
    def efforts(self) -> tuple[Any, ...]: ...

    @property
    def n(self) -> int: ...

    @property
    def d(self) -> int: ...

    def search(
        self, query_mk: np.ndarray, n_neighbors: int, own_m: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest cells of every query, as :meth:`.exact.ExactIndex.search` says."""

    def append(self, points_nk: Any) -> Self:
        """The index with more cells, numbered on."""

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All cells in pieces that memory holds: (rows, their numbers)."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What to keep of the index, by name."""


@dataclass(frozen=True)
class Neighbors:
    """Nearest neighbours, ordered by (distance, index).

    Attributes
    ----------
    indices_nm
        (n_query, n_neighbors) int64, rows of the reference; -1 where a query has no latent.
    distances_nm
        Euclidean, float64; NaN there.
    method
        ``"exact"``, ``"ivf"`` or ``"nndescent"``.
    recall
        Share of the true neighbours that were found: 1 by construction if exact, else measured.
    recall_rows
        Query cells that it was measured on (0: exact).
    """

    indices_nm: np.ndarray
    distances_nm: np.ndarray
    method: str
    recall: float
    recall_rows: int

    def first(self, n_neighbors: int) -> Neighbors:
        """The nearest `n_neighbors` of them."""
        return Neighbors(
            self.indices_nm[:, :n_neighbors],
            self.distances_nm[:, :n_neighbors],
            self.method,
            self.recall,
            self.recall_rows,
        )

    def take(self, rows: np.ndarray) -> Neighbors:
        """Only these query cells."""
        return Neighbors(
            self.indices_nm[rows], self.distances_nm[rows], self.method, self.recall, self.recall_rows
        )


def choose_method(n_reference: int, n_query: int, method: str = "auto") -> str:
    """``"exact"`` while that should be faster than filling inverted lists and measuring their recall.

    At 1 M reference cells exact search wins up to about 5 k queries; a graph of a set with itself, up to
    about 50 k cells.
    """
    if method not in METHODS:
        raise UsageError(f"index = {method!r}", fix=f"one of {', '.join(METHODS)}")
    if method != "auto":
        return method
    exact = _EXACT_PAIR * n_reference * n_query
    truth = _EXACT_PAIR * n_reference * min(n_query, RECALL_ROWS)
    lists = _LISTS_START + _LISTS_BUILD * n_reference + _LISTS_QUERY * n_query + truth
    return "exact" if exact <= lists else "ivf"


def build_index(
    reference_nk: Any,
    n_query: int,
    *,
    method: str = "auto",
    seed: int = 0,
    threads: int = 0,
    memory: str | int = "4GB",
) -> Index:
    """The index for `n_query` queries against these reference cells.

    Parameters
    ----------
    reference_nk
        (n_reference, n_latent) float, finite; for inverted lists, anything that slices into arrays.
    n_query
        Queries to expect, for ``method="auto"`` (:func:`choose_method`).
    """
    method = choose_method(reference_nk.shape[0], n_query, method)
    if method == "exact" or reference_nk.shape[0] < FEWEST:
        return ExactIndex(reference_nk, threads=threads, memory=memory)
    if method == "nndescent":
        return NNDescentIndex(reference_nk, seed=seed, threads=threads)
    from streamx.neighbors.ivf import build_lists

    return build_lists(reference_nk, seed=seed, threads=threads, memory=memory)


def save_index(index: Index, folder: str | Path) -> None:
    """Write an index into a folder, as plain arrays with checksums; of one opened there, only what is new.

    A reader, or a kill, finds the old index or the new one.
    """
    card = {"method": index.method, "n": index.n, "d": index.d, "effort": index.effort}
    card |= {name: getattr(index, name) for name in _SETTINGS if hasattr(index, name)}
    write_arrays(Path(folder), card, index.arrays())


_SETTINGS = ("seed", "epoch", "n_trained", "even_then")


def open_index(folder: str | Path, *, threads: int = 0, memory: str | int = "4GB") -> Index:
    """The index of a folder that :func:`save_index` wrote; its arrays are mapped, not read.

    Raises
    ------
    BadFileError
        If the folder holds no index.
    IntegrityError
        If a file is not what was written.
    """
    card, arrays = read_arrays(Path(folder))
    settings = {name: card[name] for name in _SETTINGS if name in card}
    index: Index
    if card.get("method") == "ivf":
        from streamx.neighbors.ivf import from_arrays

        index = from_arrays(arrays, threads=threads, memory=memory, **settings)
    elif card.get("method") in METHODS:
        (points_nk,) = arrays.values()
        options: dict[str, Any] = {"threads": threads}
        kind = ExactIndex if card["method"] == "exact" else NNDescentIndex
        options |= {"memory": memory} if kind is ExactIndex else settings
        index = kind(points_nk, **options)
    else:
        raise BadFileError("holds another kind of arrays", where=str(folder))
    index.effort = card["effort"]
    return index


def reach_recall(
    index: Index,
    query_mk: Any,
    n_neighbors: int,
    own_m: np.ndarray | None = None,
    *,
    target: float = TARGET_RECALL,
    seed: int = 0,
    memory: str | int = "4GB",
    truth: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, int]:
    """Measure the recall on a seeded sample of the queries, and search harder until it reaches `target`.

    A neighbour counts as found if its true distance is at most the true k-th (so equal distances are no
    misses). Changes ``index.effort``; warns if even the widest search stays below. `truth` is what
    :func:`recall_sample` gave for the same queries, if it was asked before.

    Returns
    -------
    recall, rows
        What the index reaches now, and on how many cells that was measured (exact: 1.0, 0).
    """
    if index.method == "exact":
        return 1.0, 0
    if truth is None:
        truth = recall_sample(index, query_mk, n_neighbors, own_m, seed=seed, memory=memory)
    rows, limit_m = truth
    if not len(rows):
        return 1.0, 0
    sample_mk = take_rows(query_mk, rows)
    own = None if own_m is None else np.asarray(own_m)[rows]
    recall = 0.0
    for effort in index.efforts[index.efforts.index(index.effort) :]:
        index.effort = effort
        _, distances = index.search(sample_mk, n_neighbors, own)
        recall = float(np.mean(distances <= limit_m[:, None]))
        if recall >= target:
            return recall, len(rows)
    warn(
        f"the neighbour search reached a recall of {recall:.3f}, below {target}",
        fix="search exactly (index exact)",
    )
    return recall, len(rows)


def recall_sample(
    index: Index,
    query_mk: Any,
    n_neighbors: int,
    own_m: np.ndarray | None = None,
    *,
    seed: int = 0,
    memory: str | int = "4GB",
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the queries that recall is measured on, and the true distance of the k-th neighbour of each."""
    rows = np.flatnonzero(finite_rows(query_mk))
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:RECALL_ROWS])
    own = None if own_m is None else np.asarray(own_m)[rows]
    _, distances = search_pieces(
        index.pieces(), take_rows(query_mk, rows), n_neighbors, own, threads=index.threads, memory=memory
    )
    return rows, distances[:, -1]


def nearest(
    reference_nk: Any,
    query_mk: Any = None,
    n_neighbors: int = 15,
    *,
    own_m: np.ndarray | None = None,
    method: str = "auto",
    index: Index | None = None,
    target_recall: float = TARGET_RECALL,
    seed: int = 0,
    threads: int = 0,
    memory: str | int = "4GB",
    out: str | Path | None = None,
    progress: str | None = None,
) -> Neighbors:
    """Nearest reference cells of every query cell, or (no query) of every reference cell among the others.

    Parameters
    ----------
    reference_nk, query_mk
        (cells, n_latent) float: arrays, mapped files, or anything that slices into arrays. Reference rows
        must be finite; a query row that isn't has no neighbours.
    n_neighbors
        Fewer where the reference has fewer cells.
    own_m
        For queries that are reference cells: their row there, which is left out (-1: none).
    method
        ``exact``, ``ivf``, ``nndescent`` or ``auto`` (:func:`choose_method`).
    index
        Made before, over these reference cells: none is built.
    target_recall
        What an approximate search must reach, measured on 1,000 queries.
    memory
        For the index and working blocks. Latents that don't fit stay on disk, the lists go there as well.
    out
        Folder for the result: its arrays are mapped files (:func:`open_neighbors` opens them again), and
        memory holds one block of them.
    progress
        Title of a progress bar.
    """
    if query_mk is None:
        query_mk, own_m = reference_nk, np.arange(reference_nk.shape[0])
    if index is None:
        index = build_index(
            reference_nk, query_mk.shape[0], method=method, seed=seed, threads=threads, memory=memory
        )
    recall, rows = reach_recall(
        index, query_mk, n_neighbors, own_m, target=target_recall, seed=seed, memory=memory
    )
    own = own_m is not None
    shape = query_mk.shape[0], min(n_neighbors + own, index.n) - own
    indices, distances = _results(shape, None if out is None else Path(out))
    bar = tqdm(total=shape[0], desc=progress, disable=None if progress else True, leave=False, unit=" cells")
    with bar:
        for low, some_mk in blocks(query_mk):
            high = low + len(some_mk)
            mine = None if own_m is None else np.asarray(own_m[low:high])
            indices[low:high], distances[low:high] = index.search(some_mk, n_neighbors, mine)
            bar.update(len(some_mk))
    found = Neighbors(indices, distances, index.method, recall, rows)
    if out is not None:
        _finish(found, Path(out))
    return found


def _results(shape: tuple[int, int], folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Room for indices and distances, in memory or in a folder whose card is gone until they are filled."""
    if folder is None or not min(shape):
        return np.empty(shape, dtype=np.int64), np.empty(shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    return (
        np.lib.format.open_memmap(folder / "indices.npy", mode="w+", dtype=np.int64, shape=shape),
        np.lib.format.open_memmap(folder / "distances.npy", mode="w+", dtype=np.float64, shape=shape),
    )


CARD = "neighbors.json"


def _finish(found: Neighbors, folder: Path) -> None:
    for name, values in (("indices", found.indices_nm), ("distances", found.distances_nm)):
        if isinstance(values, np.memmap):
            values.flush()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{name}.npy", values)
    card = {"method": found.method, "recall": found.recall, "recall_rows": found.recall_rows}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def open_neighbors(folder: str | Path) -> Neighbors:
    """The result that :func:`nearest` wrote into a folder; its arrays are mapped, not read.

    Raises
    ------
    BadFileError
        If the folder holds no finished result.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text())
        indices, distances = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("indices", "distances")
        )
        return Neighbors(indices, distances, **card)
    except (OSError, ValueError, TypeError) as error:
        raise BadFileError(
            "holds no finished graph of neighbours", where=str(folder), fix="let it be made again"
        ) from error
