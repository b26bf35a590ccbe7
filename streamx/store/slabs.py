"""A source's rows as slabs: read, checked, moved to the store's genes and places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

from streamx.config import ConvertConfig
from streamx.errors import InputError
from streamx.store import genes
from streamx.store.collection import Collection
from streamx.store.ingest import Source, check_counts
from streamx.store.spill import Slab
from streamx.threads import thread_count

MIN_SLAB_ROWS, MAX_SLAB_ROWS = 64, 1 << 16


class SourceError(Exception):
    """An input that turned out to be unusable while it was read."""

    def __init__(self, source: Source, error: InputError) -> None:
        super().__init__(str(error))
        self.source, self.error = source, error

    def __reduce__(self) -> tuple[type[SourceError], tuple[Source, InputError]]:
        return SourceError, (self.source, self.error)


@contextmanager
def blame(source: Source) -> Iterator[None]:
    """What is wrong with the input while this runs is this source's fault."""
    try:
        yield
    except InputError as error:
        raise SourceError(source, error) from error


def modalities(
    sources: list[Source],
    wanted: Sequence[str],
    code_n: np.ndarray,
    batches: Sequence[str],
    base: Collection | None,
) -> dict[str, tuple[list[str], dict[str, list[bool]]]]:
    """Features of each dense matrix to carry, and per batch which were measured (not zero throughout).

    Parameters
    ----------
    code_n, batches
        Batch of each cell of all sources, one after the other, as a position in `batches`.
    """
    found: dict[str, tuple[list[str], dict[str, list[bool]]]] = {}
    for name in wanted:
        offered = [source.obsm[name] for source in sources if name in source.obsm]
        known = base.modalities[name]["names"] if base is not None and name in base.modalities else []
        if not offered or (base is not None and not known):
            continue
        names = known or list(dict.fromkeys(feature for features in offered for feature in features))
        sums: dict[str, np.ndarray] = {}
        first = 0
        for source in sources:
            for low, dense in _dense_rows(source, name, names):
                mine = code_n[first + low : first + low + len(dense)]
                for code in np.unique(mine).tolist():
                    total = np.abs(dense[mine == code]).sum(axis=0)
                    batch = batches[code]
                    sums[batch] = sums.get(batch, np.zeros(len(names))) + total
            first += source.n_obs
        found[name] = (names, {batch: (total > 0).tolist() for batch, total in sorted(sums.items())})
    return found


def _dense_rows(source: Source, name: str, names: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    for low in range(0, source.n_obs, MAX_SLAB_ROWS):
        with blame(source):
            dense = _dense(source, name, names, low, min(low + MAX_SLAB_ROWS, source.n_obs))
        yield low, dense


def _dense(source: Source, name: str, names: list[str], low: int, high: int) -> np.ndarray:
    if name not in source.obsm:
        return np.zeros((high - low, len(names)), dtype=np.float32)
    position = {feature: i for i, feature in enumerate(source.obsm[name])}
    stored = source.read_obsm(name, low, high)
    dense = np.zeros((high - low, len(names)), dtype=stored.dtype)
    shared = [(i, position[feature]) for i, feature in enumerate(names) if feature in position]
    dense[:, [i for i, _ in shared]] = stored[:, [j for _, j in shared]]
    return dense


def probe(source: Source, columns: np.ndarray, n_genes: int) -> tuple[float, sparse.csr_matrix]:
    """The most values per row that eight places of a file show, and these rows on the store's genes."""
    most, found = 0.0, []
    for low in range(0, source.n_obs, max(64, -(-source.n_obs // 8))):
        with blame(source):
            rows = source.read(low, low + 64)
        most = max(most, rows.nnz / rows.shape[0])
        found.append(genes.map_columns(rows, columns, n_genes))
    return most, sparse.vstack(found, format="csr")


def slabs_of(
    source: Source, key: str, columns: np.ndarray, rows: np.ndarray, n_genes: int,
    obsm: Mapping[str, tuple[list[str], Any]], config: ConvertConfig, memory: int, per_row: float,
) -> Iterator[Slab]:  # fmt: skip
    """A file in slabs that `threads` threads can hold at once; it has up to `per_row` values per row."""
    # a slab is held about four times over while it is mapped and sorted: indices and values, 16 bytes each
    row_bytes = 4 * 16 * (per_row + 16)
    size = int(np.clip(memory / 6 / thread_count(config.threads) / row_bytes, MIN_SLAB_ROWS, MAX_SLAB_ROWS))
    # the name of a file or key may be anything, a slab's becomes a folder
    name = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    for low in range(0, source.n_obs, size):
        high = min(low + size, source.n_obs)
        read = partial(_read_slab, source, low, high, columns, n_genes, obsm, config.allow_float)
        yield Slab(f"{name}-{low}-{high}", rows[low:high], read, portable=source.opener is not None)


def _read_slab(
    source: Source, low: int, high: int, columns: np.ndarray, n_genes: int,
    obsm: Mapping[str, tuple[list[str], Any]], allow_float: bool,
) -> tuple[sparse.csr_matrix, dict[str, np.ndarray]]:  # fmt: skip
    with blame(source):
        x_ng = source.read(low, high)
        check_counts(x_ng, source=source, first_row=low, allow_float=allow_float)
        if x_ng.dtype.kind == "f" and not allow_float:  # whole numbers, as the check has shown
            x_ng = x_ng.astype(np.int32 if x_ng.nnz == 0 or x_ng.data.max() < 2**31 else np.int64)
        dense = {name: _dense(source, name, names, low, high) for name, (names, _) in obsm.items()}
    return genes.map_columns(x_ng, columns, n_genes), dense
