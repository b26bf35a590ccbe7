"""Inner loops compiled by numba: without the GIL, kept on disk, with one rounding per machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# Sums may be reordered and products contracted, which a compiler does in the same way at every call; NaN and
# infinity keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's nogil compilation, kept on disk where any folder can be written."""
    return _compiled(function, nogil=True)


def compiled_float(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for loops over float32 that are to become vector instructions; x / 0 is infinite."""
    return _compiled(function, nogil=True, fastmath=_FAST, error_model="numpy")


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    try:
        made: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache: compile in every process
        made = numba.njit(**options)(function)
    return made
