"""What reading a collection keeps for the next read, bounded for all of its shards together."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Row offsets take 1 or 2 bytes per row, the index of a zarr shard 8 KB. Who reads in order needs few of them
# again; a loader needs all, and has those of five million cells: beyond, a fetch reads some once more.
NBYTES, NBYTES_OF_LOADER = 4 << 20, 12 << 20
NBYTES_OF_BUCKET = 64 << 20  # what is read again there costs a request
FILES = 256  # that are kept open: a usual limit is 1,024 per process


class Cache(Generic[T]):
    """Values by key, up to a cost in all; those that were used last stay, and always the newest one.

    Parameters
    ----------
    most
        Cost of all that is kept.
    cost
        Of a value.
    """

    def __init__(self, most: int, cost: Callable[[T], int]) -> None:
        self.most, self.cost, self.used = most, cost, 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made now if it is not kept; threads that ask at once may all make it."""
        with _locks[0]:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        dropped = []  # freed only when nobody waits
        with _locks[0]:
            if key not in self._values:
                self._values[key] = made
                self.used += self.cost(made)
                while self.used > self.most and len(self._values) > 1:
                    _, value = self._values.popitem(last=False)
                    self.used -= self.cost(value)
                    dropped.append(value)
        return made


# One for all caches, held for moments only. A child that is forked while another thread holds it would wait
# for ever.
_locks = [threading.Lock()]


def _new_lock() -> None:
    _locks[0] = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class Kept:
    """The caches of a collection.

    Attributes
    ----------
    parts
        Row offsets, indexes of zarr shards and opened groups, by bytes.
    files
        Open files, by their number.
    """

    def __init__(self, nbytes: int = NBYTES) -> None:
        self.parts: Cache[Any] = Cache(nbytes, _nbytes)
        self.files: Cache[Any] = Cache(FILES, lambda _: 1)


GROUP_BYTES = 1 << 16  # of a zarr group with its metadata, about


def _nbytes(value: Any) -> int:
    return 64 if value is None else int(getattr(value, "nbytes", GROUP_BYTES))
