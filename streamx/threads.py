"""Many small tasks on a few threads, with a progress bar and a clean stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def thread_count(threads: int) -> int:
    """The number asked for, or (0) the cores that this process may use."""
    if threads > 0:
        return threads
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def run_all(tasks: Sequence[Callable[[], T]], threads: int, progress: str | None = None) -> list[T]:
    """Results of all tasks, in their order. The first error (or Ctrl-C) stops what has not begun."""
    bar = tqdm(total=len(tasks), desc=progress, disable=None if progress else True, leave=False)
    with bar, ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        futures: list[Future[T]] = [pool.submit(task) for task in tasks]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:  # not in their order: one before the failed one may still run for long
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
