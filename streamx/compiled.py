"""numba's compilation of a loop: without the GIL, kept on disk where any folder can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function, compiled at its first call for each kind of arguments; `options` are numba's."""
    try:
        made: Any = numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache: compile in every process
        made = numba.njit(nogil=True, **options)(function)
    return made
