"""What is known of memory and disk before work begins: how much there is, and how it is given back."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's mallopt
LARGE = 1 << 18
LARGEST = 1 << 25  # what glibc takes at most


def steady_memory() -> None:
    """Ask glibc to return large blocks to the system as soon as they are free.

    Else it raises, with every large block that is freed, the size from which it does so, up to 32 MB, and
    keeps what is smaller: resident memory grows with the time that a process works, not with what it holds.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_TRIM_THRESHOLD, LARGE)
        libc.mallopt(_ARENA_MAX, 2)
    except (OSError, AttributeError):  # another C library
        return


def recycled_memory() -> None:
    """Ask glibc to keep blocks that are freed for the next ones: of a step that is repeated, all its tensors.

    Returned and asked for anew, as :func:`steady_memory` has it, they cost a page fault for every 4 kB and
    step: a fifth of the CPU time of training. What is kept is what one step takes, however long it goes on.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * LARGEST)
    except (OSError, AttributeError):
        return


def give_back() -> None:
    """Return what glibc holds between blocks that are in use, after a stage of the work or a large piece."""
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def resident_bytes() -> int:
    """Anonymous memory of this process: what can't be given back and read again."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        import psutil

        return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    ``VmHWM`` where the kernel offers it: ``getrusage`` also remembers the parent that forked us.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let :func:`peak_rss_bytes` count from now on, where the kernel can do that."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as what:
        what.write("5")


def available_bytes() -> int:
    """Memory that the machine can still give."""
    import psutil

    return int(psutil.virtual_memory().available)
