"""Tasks on threads: results in order, the first error stops what has not begun."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from streamx.threads import pause, run_all, thread_count


def test_results_in_order() -> None:
    def task(i: int) -> int:
        time.sleep(0.001 * (5 - i % 5))
        return i

    assert run_all([partial(task, i) for i in range(30)], 4) == list(range(30))
    assert run_all([], 4) == []
    assert thread_count(3) == 3
    assert thread_count(0) >= 1


def test_an_error_does_not_wait_for_all_tasks() -> None:
    """The first task is slow, the second fails: hundreds of others behind them are not begun."""
    failed, begun = threading.Event(), []

    def slow() -> None:
        failed.wait(10)
        time.sleep(0.3)

    def fail() -> None:
        failed.set()
        raise ValueError("no")

    def other() -> None:
        begun.append(1)
        time.sleep(0.01)

    with pytest.raises(ValueError, match="no"):
        run_all([slow, fail, *[other] * 500], 2)
    assert len(begun) < 20


def test_a_pause_ends_when_the_work_stops() -> None:
    """Also that of a task of a task: retries of a bucket that does not answer must not hold up Ctrl-C."""
    ended: list[bool] = []
    began = threading.Barrier(3)

    def patient() -> None:
        began.wait()
        ended.append(pause(60))

    def fail() -> None:
        began.wait()
        raise ValueError("no")

    begun = time.perf_counter()
    with pytest.raises(ValueError, match="no"):
        run_all([partial(run_all, [patient], 1), patient, fail], 3)
    assert time.perf_counter() - begun < 5
    assert ended == [True, True]
    assert not pause(0.01)
