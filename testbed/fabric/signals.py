"""Keeps Ctrl-C and SIGTERM out of the few places where an exception would leave something behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class HeldSignals:
    """Signals that are noted instead of handled, until they are released.

    The handlers are exchanged rather than the signals blocked: a signal blocked in this thread is taken by any other
    thread (numpy has some), and Python then runs the handler here all the same.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._noted: list[int] = []

    def hold(self) -> None:
        """Note signals from now on; without effect outside the main thread, which alone is interrupted by them."""
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None:  # None: not Python's to restore
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def release(self) -> None:
        """Handle signals as before, beginning with those noted."""
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, handler)
        noted, self._noted = self._noted, []
        for number in noted:
            signal.raise_signal(number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted.append(number)


@contextlib.contextmanager
def signals_held() -> Iterator[HeldSignals]:
    """Hold signals for the block; it may release and hold them again."""
    held = HeldSignals()
    held.hold()
    try:
        yield held
    finally:
        held.release()
