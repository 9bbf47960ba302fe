"""No congestion control: every QP always sends at line rate."""

from __future__ import annotations

from dataclasses import dataclass

from testbed.roce.congestion.protocol import Feedback, Floats

NAME = "none"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Nothing to set."""


class Algorithm:
    """Line rate for all; see `protocol.CongestionControl`."""

    needs_rtt = False
    marks_cnp = False

    def __init__(self, parameters: Parameters, line_rate_bytes_per_s: Floats) -> None:
        self.rate_bytes_per_s = line_rate_bytes_per_s.copy()

    def restart(self, now_ns: float) -> None:
        """Do nothing: the rates never change."""

    def advance(self, now_ns: float, feedback: Feedback) -> None:
        """Do nothing: the rates never change."""

    def state(self) -> dict[str, Floats]:
        """Return nothing."""
        return {}
