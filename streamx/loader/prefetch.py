"""Work done ahead of need on background threads, in order, with a clean stop; and memory used again."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
_NAME = "streamx-prefetch"


def prefetched(tasks: Iterable[Callable[[], T]], depth: int, threads: int = 1) -> Generator[T]:
    """Results of the tasks in order, up to ``depth`` of them computed ahead.

    However iteration ends (exhausted, an error in a task or in the loop, Ctrl-C, abandoned and collected),
    no thread is left: tasks that have not begun are dropped, the one that runs is waited for, and where the
    tasks come from a generator, it is closed.

    Parameters
    ----------
    depth
        Results that may wait; 0 computes each when it is asked for, without threads.
    """
    if depth <= 0:
        for task in tasks:
            yield task()
        return
    pool = ThreadPoolExecutor(max_workers=max(1, threads), thread_name_prefix=_NAME)
    source = iter(tasks)
    try:
        waiting: deque[Future[T]] = deque()
        for task in source:
            waiting.append(pool.submit(task))
            del task  # it may hold memory that its result no longer needs
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Garbage may be collected on one of our own threads, which can't wait for itself.
        own = threading.current_thread().name.startswith(_NAME)
        pool.shutdown(wait=not own, cancel_futures=True)
        if isinstance(source, Generator):
            source.close()


def _holders(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_ALONE = _holders([np.empty(0, np.uint8)])[0]  # what Python counts where nobody else holds an array


class Pool:
    """Large arrays that are given out again once nobody holds them, which saves asking the system for pages.

    What a user keeps is never given out: an array, a slice of it or a tensor over it counts as held.

    Parameters
    ----------
    most
        Arrays that are remembered.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def __call__(self, n: int, dtype: Any) -> np.ndarray:
        """An array of n values, uninitialised."""
        size = n * np.dtype(dtype).itemsize
        with self._lock:
            holders = _holders(self._arrays)
            # Arrays of one purpose are about equally long. A much longer one is another purpose's, which
            # would have to make a new one: the pool would grow for as long as chance finds worse pairs.
            like = [k for k, array in enumerate(self._arrays) if size / 2 < array.size < 2 * size]
            free = [k for k in like if holders[k] == _ALONE]
            fits = [k for k in free if self._arrays[k].size >= size]
            if fits:
                return self._arrays[min(fits, key=lambda k: self._arrays[k].size)][:size].view(dtype)
            array = np.empty(size + size // 8, np.uint8)
            kept = [a for k, a in enumerate(self._arrays) if k not in free]
            self._arrays = [*kept[max(0, len(kept) - self.most + 1) :], array]
            return array[:size].view(dtype)
