"""Many small tasks on a few threads, with a progress bar and a clean stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
_here = threading.local()


def thread_count(threads: int) -> int:
    """The number asked for, or (0) the cores that this process may use."""
    if threads > 0:
        return threads
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def run_all(tasks: Sequence[Callable[[], T]], threads: int, progress: str | None = None) -> list[T]:
    """Results of all tasks, in their order. The first error (or Ctrl-C) stops all that waits."""
    stop = threading.Event()
    stops = (*_stops(), stop)
    bar = tqdm(total=len(tasks), desc=progress, disable=None if progress else True, leave=False)
    pool = ThreadPoolExecutor(max(1, threads), initializer=setattr, initargs=(_here, "stops", stops))
    with bar, pool:
        futures: list[Future[T]] = [pool.submit(task) for task in tasks]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:  # not in their order: one before the failed one may still run for long
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def pause(seconds: float) -> bool:
    """Sleep; or return True at once if the :func:`run_all` that the caller works for is stopping."""
    end = time.monotonic() + seconds
    while not any(stop.is_set() for stop in _stops()):
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, 0.1))
    return True


def _stops() -> tuple[threading.Event, ...]:
    return getattr(_here, "stops", ())
