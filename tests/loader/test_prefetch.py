import gc
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from streamx.loader.prefetch import Pool, prefetched


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("streamx-prefetch")]


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    gc.collect()
    assert alive() == []


def tasks(n: int, started: list[int]) -> list[Callable[[], int]]:
    def task(i: int) -> int:
        started.append(i)
        time.sleep(0.002)
        return i * i

    return [lambda i=i: task(i) for i in range(n)]  # type: ignore[misc]


@pytest.mark.parametrize("depth", [0, 1, 2, 50])
@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order(depth: int, threads: int) -> None:
    assert list(prefetched(tasks(20, []), depth, threads)) == [i * i for i in range(20)]


def test_no_more_than_depth_ahead() -> None:
    started: list[int] = []
    results = prefetched(tasks(100, started), 3)
    next(results)
    time.sleep(0.05)
    assert len(started) == 4
    results.close()  # type: ignore[attr-defined]
    assert alive() == []


def test_an_error_in_a_task_arrives_at_its_place() -> None:
    def fail() -> int:
        raise ZeroDivisionError("block 2")

    jobs = [*tasks(2, []), fail, *tasks(50, [])]
    results = prefetched(jobs, 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="block 2"):
        next(results)
    assert alive() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_loop(error: type[BaseException]) -> None:
    started: list[int] = []

    def loop() -> None:
        for result in prefetched(tasks(1000, started), 2):
            if result == 9:
                raise error

    with pytest.raises(error):
        loop()
    gc.collect()
    assert alive() == []
    assert len(started) < 20


def test_an_abandoned_iterator_is_collected() -> None:
    results = prefetched(tasks(1000, []), 2)
    next(results)
    assert alive()
    del results
    gc.collect()
    assert alive() == []


def test_an_iterator_in_a_cycle_is_collected() -> None:
    class Node:
        results: object
        me: object

    node = Node()
    node.results, node.me = prefetched(tasks(1000, []), 2), node
    next(node.results)  # type: ignore[call-overload]
    del node
    gc.collect()
    assert alive() == []


def test_arrays_are_given_again_for_their_purpose_alone() -> None:
    pool = Pool(4)
    data = pool(1000, np.float32)
    address = data.ctypes.data
    view = data[10:20]
    del data
    assert pool(1000, np.float32).ctypes.data != address  # a slice of it is held
    del view
    held = [pool(900, np.float32), pool(900, np.float32)]
    assert address in [array.ctypes.data for array in held]
    assert pool(900, np.int32).ctypes.data not in [array.ctypes.data for array in held]
    del held
    pool(5000, np.float32)  # what is too short for what is asked for now goes
    assert [len(array) for array in pool._arrays[np.dtype(np.float32)]] == [5000 + 625]
