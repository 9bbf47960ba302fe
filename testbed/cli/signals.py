"""How the command line ends on Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import signal
import sys
from types import FrameType

_SIGNAL_EXIT = 128
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_on_signals() -> None:
    """Leave by way of every ``with`` and ``finally`` on a signal, so that nothing stays behind."""
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays what it is
            signal.signal(number, _end)


def ignore_signals() -> None:
    """Let nothing end this process any more but its own last lines: what it made is made."""
    for number in _ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, _frame: FrameType | None) -> None:
    print(f"ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    raise SystemExit(_SIGNAL_EXIT + number)
