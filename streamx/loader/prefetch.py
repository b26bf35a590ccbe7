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
    waiting: deque[Future[T]] = deque()

    def submit_next() -> None:
        for task in source:
            waiting.append(pool.submit(task))
            return

    try:
        for _ in range(depth):
            submit_next()
        while waiting:
            # The next task begins when the user lets go of the result before, which may be large: begun
            # earlier, its own would come on top, now and then.
            ready = [waiting.popleft().result()]
            submit_next()
            yield ready.pop()
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
    An array is given out again with its own dtype only. What one pool gives should be about equally long:
    a short array in a long one's place makes the next long one a new one, and memory grows by chance.

    Parameters
    ----------
    most
        Arrays of a dtype that are remembered.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._arrays: dict[np.dtype, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, n: int, dtype: Any) -> np.ndarray:
        """An array of n values, uninitialised."""
        with self._lock:
            arrays = self._arrays.get(np.dtype(dtype), [])
            holders = _holders(arrays)
            free = [k for k in range(len(arrays)) if holders[k] == _ALONE and len(arrays[k]) >= n]
            if free:
                return arrays[min(free, key=lambda k: len(arrays[k]))][:n]
            arrays = [a for a, held in zip(arrays, holders, strict=True) if held > _ALONE]
            array = np.empty(n + n // 8, dtype)
            self._arrays[array.dtype] = [*arrays[max(0, len(arrays) - self.most + 1) :], array]
            return array[:n]
