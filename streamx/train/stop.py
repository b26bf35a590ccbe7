"""SIGTERM and Ctrl-C in the middle of training: the step is finished and kept first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stop:
    """As long as the ``with`` block runs, a signal to stop is only noted; a second one acts at once.

    Attributes
    ----------
    asked
        Number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # others can't set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def obey(self) -> None:
        """Do what the signal would have done without us (if another process got it: what SIGTERM does)."""
        self._act(self.asked or signal.SIGTERM, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._act(number, frame)
        self.asked = number

    def _act(self, number: int, frame: FrameType | None) -> None:
        handler = self._former.get(number, signal.SIG_DFL)
        self.__exit__()
        if callable(handler):
            handler(number, frame)
        else:
            signal.raise_signal(number)
