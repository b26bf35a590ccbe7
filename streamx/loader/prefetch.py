"""Work done ahead of need on background threads, in order, with a clean stop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_NAME = "streamx-prefetch"


def prefetched(tasks: Sequence[Callable[[], T]], depth: int, threads: int = 1) -> Generator[T]:
    """Results of the tasks in order, up to ``depth`` of them computed ahead.

    However iteration ends (exhausted, an error in a task or in the loop, Ctrl-C, abandoned and collected),
    no thread is left: tasks that have not begun are dropped, the one that runs is waited for.

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
    try:
        waiting: deque[Future[T]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Garbage may be collected on one of our own threads, which can't wait for itself.
        own = threading.current_thread().name.startswith(_NAME)
        pool.shutdown(wait=not own, cancel_futures=True)
