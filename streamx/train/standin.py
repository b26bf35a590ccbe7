"""Until the loader gives sparse minibatches itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from streamx.loader.loader import Loader as Plain
from streamx.loader.loader import Minibatch


@dataclass(frozen=True)
class Csr:
    indptr: Any
    indices: Any
    data: Any
    n_genes: int


class Loader(Plain):
    def __init__(
        self, view: Any, size: int, *, output: str = "dense", rank: int = 0, world: int = 1, **options: Any
    ) -> None:
        self.output, self.rank, self.world, self.first = output, rank, world, 0
        super().__init__(view, size, **options)

    def __len__(self) -> int:
        n = super().__len__()
        return (
            max(n // self.world, 1 if self.rank < n else 0)
            if self.drop_last
            else (n - self.rank + self.world - 1) // self.world
        )

    def at(self, epoch: int, minibatch: int = 0) -> Any:
        loader: Any = super().at(epoch)
        loader.first = minibatch
        return loader

    def __iter__(self) -> Any:
        stop = None if not self.drop_last else len(self) * self.world
        return islice(super().__iter__(), self.first + self.rank, stop, self.world)

    def _deliver(self, block: Any, start: int, stop: int) -> Minibatch:
        if self.output != "csr":
            return super()._deliver(block, start, stop)
        x, part = block.x_ng, slice(start, stop)
        low, high = int(x.indptr[start]), int(x.indptr[stop])
        indptr = x.indptr[start : stop + 1].astype(np.int64) - low
        csr = Csr(indptr, x.indices[low:high], x.data[low:high], x.shape[1])
        total_n = None if block.total_n is None else block.total_n[part]
        return Minibatch(csr, block.batch_n[part], block.row_n[part], total_n, {})
