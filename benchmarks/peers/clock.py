"""CPU and wall seconds, and peak memory, of a benchmark process; needs no package."""

from __future__ import annotations

import os
import resource
import sys
import time


def pin_threads() -> None:
    """One thread for every numerical library; call it before they are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"


def clock() -> tuple[float, float]:
    """CPU seconds of this process and its children, and wall seconds."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system, time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    """CPU and wall seconds since :func:`clock`."""
    cpu, wall = clock()
    return {"cpu_s": round(cpu - start[0], 2), "wall_s": round(wall - start[1], 2)}


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far (``getrusage`` also remembers who forked it)."""
    try:
        with open("/proc/self/status") as status:
            return round(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3)
    except (OSError, StopIteration):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)
