"""A few open files for any number of inputs: an HDF5 file that is open takes more than a megabyte."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from streamx.store.ingest.source import Obsm, Source, Table

MOST_OPEN = 4


@dataclass
class _Open:
    source: Source
    users: int = 0


@dataclass
class Pool:
    """Sources that are opened again when they are read, and closed when others are.

    Genes of inputs that list the same ones are kept once.
    """

    _open: OrderedDict[int, _Open] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _genes: list[pd.DataFrame] = field(default_factory=list)
    _number: int = 0

    def keep(self, make: Callable[[], Source]) -> Source:
        """The source that `make` opens, as one that need not stay open."""
        source = make()
        if not source.reopens:
            return source
        number, self._number = self._number, self._number + 1
        with self._lock:
            self._open[number] = _Open(source)
            idle = self._idle()
        _close(idle)

        def reader(of: Callable[[Source], Callable[..., Any]]) -> Callable[..., Any]:
            def read(*args: Any) -> Any:
                with self._use(number, make) as opened:
                    return of(opened)(*args)

            return read

        cells = Table(
            source.cells.n,
            source.cells.columns,
            reader(lambda s: s.cells.rows),
            reader(lambda s: s.cells.names),
        )
        return replace(
            source,
            cells=cells,
            var=self._shared(source.var),
            rows=reader(lambda s: s.rows),
            digest=source.digest,
            modalities={
                name: Obsm(modality.names, reader(partial(_rows_of, name)))
                for name, modality in source.modalities.items()
            },
            alternatives=reader(lambda s: s.alternatives),
            close=lambda: self._forget(number),
        )

    def _shared(self, var: pd.DataFrame) -> pd.DataFrame:
        for known in self._genes:
            if known.equals(var) and np.array_equal(known.index, var.index):
                return known
        self._genes.append(var)
        return var

    @contextmanager
    def _use(self, number: int, make: Callable[[], Source]) -> Iterator[Source]:
        with self._lock:
            entry = self._open.pop(number, None)
            if entry is None:
                entry = _Open(make())
            self._open[number] = entry  # now the last to be closed
            entry.users += 1
            idle = self._idle()
        _close(idle)
        try:
            yield entry.source
        finally:
            with self._lock:
                entry.users -= 1

    def _idle(self) -> list[Source]:
        """Sources to close: the ones longest unused, while too many are open."""
        spare = [number for number, entry in self._open.items() if not entry.users]
        return [self._open.pop(number).source for number in spare[: max(0, len(self._open) - MOST_OPEN)]]

    def _forget(self, number: int) -> None:
        with self._lock:
            entry = self._open.pop(number, None)
        _close([entry.source] if entry is not None else [])


def _rows_of(name: str, source: Source) -> Callable[..., Any]:
    return source.modalities[name].rows


def _close(sources: Sequence[Source]) -> None:
    for source in sources:
        source.close()
