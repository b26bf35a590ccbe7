"""What a pass reads: contiguous rows as CSR, from a store, from a dense matrix of a store, or from memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy.sparse import csr_matrix

from streamx.store.collection import Collection, open_collection
from streamx.store.location import Location


class Rows(Protocol):
    @property
    def n_obs(self) -> int: ...

    @property
    def n_vars(self) -> int: ...

    def read(self, start: int, stop: int) -> csr_matrix: ...


@dataclass(frozen=True)
class MatrixRows:
    """Rows of a CSR matrix in memory."""

    matrix: csr_matrix

    @property
    def n_obs(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def n_vars(self) -> int:
        return int(self.matrix.shape[1])

    def read(self, start: int, stop: int) -> csr_matrix:
        return csr_matrix(self.matrix[start:stop])


@dataclass(frozen=True)
class StoreRows:
    """Rows of a store, or (`obsm`) of one of its dense matrices. Picklable: workers open it themselves."""

    location: Location
    n_obs: int
    n_vars: int
    obsm: str | None = None

    def read(self, start: int, stop: int) -> csr_matrix:
        """Stored dtypes: small unsigned integers, or float32."""
        if self.obsm is not None:
            return csr_matrix(np.asarray(self.store.read_obsm(self.obsm, start, stop), dtype=np.float32))
        return self.store.read(start, stop, dtype="stored")

    @property
    def store(self) -> Collection:
        """What they are rows of."""
        return _opened(self.location, self.n_obs)


def rows_of(collection: Collection, obsm: str | None = None) -> StoreRows:
    """The rows of a collection, or of a dense matrix in it."""
    n_vars = collection.n_vars if obsm is None else len(collection.modalities[obsm]["names"])
    return StoreRows(collection.location, collection.n_obs, n_vars, obsm)


@lru_cache(maxsize=4)
def _opened(location: Location, n_obs: int) -> Collection:
    """One Collection per process; rows that are there never change, so a newer generation serves as well."""
    return open_collection(location)
