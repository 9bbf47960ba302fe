"""What congestion control lets each QP send: its rate as frames per tick, and what it is told in return."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from testbed.engine.frames import ACK_EVERY_PACKETS
from testbed.roce.congestion import CongestionControl, Feedback


class RateLimit(Protocol):
    """Limits the QPs of a run, shape ``(qps,)`` all."""

    limits: bool
    free_at_ns: npt.NDArray[np.float64]
    due_at_ns: npt.NDArray[np.float64]

    def advance(self, now_ns: int, cnps: npt.NDArray[np.int64], acked: npt.NDArray[np.int64]) -> None:
        """Act on what was fed back."""

    def allowed(self, now_ns: int, wants: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many of the frames each QP wants to send it may begin before the next tick."""

    def charge(
        self,
        now_ns: int,
        wire_bytes: npt.NDArray[np.int64],
        before: npt.NDArray[np.int64],
        after: npt.NDArray[np.int64],
    ) -> None:
        """Charge what was sent: wire bytes, and the number of the next packet before and after."""


class NoRateLimit:
    """Every QP may send at its NIC's rate."""

    limits = False
    free_at_ns: npt.NDArray[np.float64] = np.zeros(0)
    due_at_ns: npt.NDArray[np.float64] = np.zeros(0)

    def advance(self, now_ns: int, cnps: npt.NDArray[np.int64], acked: npt.NDArray[np.int64]) -> None:
        """Do nothing."""

    def allowed(self, now_ns: int, wants: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return what it wants."""
        return wants

    def charge(
        self,
        now_ns: int,
        wire_bytes: npt.NDArray[np.int64],
        before: npt.NDArray[np.int64],
        after: npt.NDArray[np.int64],
    ) -> None:
        """Do nothing."""


class CongestionLimit:
    """Paces every QP at the rate of a congestion control.

    Args:
        control: The reaction points of all QPs.
        time_dilation: Wall time per emulated time.
        frame_wire_bytes: Wire bytes of a full frame.
        wall_tick_ns: Length of a tick.

    Attributes:
        free_at_ns: When each QP may begin its next frame, wall.
        due_at_ns: When each might have, had its NIC taken all that this limit had allowed; no later than that.
        control: The reaction points.
    """

    limits = True

    def __init__(
        self, control: CongestionControl, *, time_dilation: float, frame_wire_bytes: int, wall_tick_ns: int
    ) -> None:
        count = len(control.rate_bytes_per_s)
        self.control = control
        self._dilation = time_dilation
        self._frame_bytes = frame_wire_bytes
        self._tick_ns = wall_tick_ns
        self.free_at_ns = np.zeros(count)
        self._begun = False
        self._last_ns = 0
        self.due_at_ns = self.free_at_ns
        self._held_back = np.zeros(count, bool)
        self._cut_short = np.zeros(count, bool)
        self._allowed = np.zeros(count, np.int64)
        self._cnps_seen = np.zeros(count, np.int64)
        self._acked_seen = np.zeros(count, np.int64)
        self._sent_bytes = np.zeros(count, np.int64)
        self._outstanding = np.zeros(count, np.int64)
        # The packet whose round trip is being timed, -1 for none.
        self._timed_packet = np.full(count, -1, np.int64)
        self._timed_since_ns = np.zeros(count)

    def advance(self, now_ns: int, cnps: npt.NDArray[np.int64], acked: npt.NDArray[np.int64]) -> None:
        """Tell the reaction points what has happened since the last tick.

        Args:
            now_ns: The clock.
            cnps: CNPs each QP has received so far.
            acked: Packets of each acknowledged so far.
        """
        emulated_ns = now_ns / self._dilation
        if not self._begun:
            self._begun = True
            self.control.restart(emulated_ns)
            self._cnps_seen, self._acked_seen = cnps.copy(), acked.copy()
            return
        rtt_ns = np.full(len(cnps), np.nan)
        done = (self._timed_packet >= 0) & (acked > self._timed_packet)
        if done.any():
            rtt_ns[done] = (now_ns - self._timed_since_ns[done]) / self._dilation
            self._timed_packet[done] = -1
        feedback = Feedback(
            cnps=cnps - self._cnps_seen,
            sent_bytes=self._sent_bytes,
            acked_bytes=(acked - self._acked_seen) * self._frame_bytes,
            rtt_ns=rtt_ns,
            active=(self._outstanding > acked) | (self._sent_bytes > 0),
        )
        self.control.advance(emulated_ns, feedback)
        np.copyto(self._cnps_seen, cnps)
        np.copyto(self._acked_seen, acked)
        self._sent_bytes = np.zeros_like(self._sent_bytes)

    def allowed(self, now_ns: int, wants: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many of the frames each QP wants to send it may begin before the next tick."""
        # What a QP did not use, for want of data or of its NIC's turn, is kept for a tick and no longer. One that this limit
        # holds back makes up for a late tick.
        before = self.free_at_ns
        self.free_at_ns = np.where(self._held_back, before, np.maximum(before, self._last_ns - self._tick_ns))
        self.due_at_ns = (
            np.where(self._cut_short, before, self.free_at_ns) if self._cut_short.any() else self.free_at_ns
        )
        self._cut_short = np.zeros(len(before), bool)
        self._last_ns = now_ns
        frames = (now_ns + self._tick_ns - self.free_at_ns) * self._frames_per_ns() + 1.0
        self._allowed = np.minimum(wants, np.maximum(frames, 0.0).astype(np.int64))
        self._held_back = self._allowed < wants
        return self._allowed

    def charge(
        self,
        now_ns: int,
        wire_bytes: npt.NDArray[np.int64],
        before: npt.NDArray[np.int64],
        after: npt.NDArray[np.int64],
    ) -> None:
        """Charge what was sent: wire bytes, and the number of the next packet before and after."""
        self.free_at_ns += wire_bytes / (self._frames_per_ns() * self._frame_bytes)
        self._sent_bytes += wire_bytes
        self._cut_short = after - before < self._allowed
        self._held_back &= ~self._cut_short
        np.maximum(self._outstanding, after, out=self._outstanding)
        # An ACK comes for every ACK_EVERY_PACKETS-th packet: the last of those that has just left is timed.
        asking = after // ACK_EVERY_PACKETS * ACK_EVERY_PACKETS - 1
        timed = (self._timed_packet < 0) & (asking >= before)
        self._timed_packet[timed] = asking[timed]
        self._timed_since_ns[timed] = now_ns

    def _frames_per_ns(self) -> npt.NDArray[np.float64]:
        return self.control.rate_bytes_per_s / (1e9 * self._dilation * self._frame_bytes)
