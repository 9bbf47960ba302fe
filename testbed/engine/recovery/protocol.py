"""What all schemes of loss recovery share: the packets of every QP as numbers, and the retransmission timer.

Packets are counted per QP as in the QP table: packet ``n`` has PSN ``initial_psn + n``, and counting goes on from one iteration
to the next. ``sent`` is the next packet that leaves unless something is to be sent again, ``acked`` how many are acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from testbed.engine.frames import ACK_EVERY_PACKETS, FrameWriter
from testbed.errors import RunError

# IB's retry_cnt is three bits: seven retries.
RETRY_LIMIT = 7


class Resent(NamedTuple):
    """What was sent again in a tick, shape ``(qps,)`` both: packets, and their bytes on the wire."""

    packets: npt.NDArray[np.int64]
    wire_bytes: npt.NDArray[np.int64]


class LossRecovery(Protocol):
    """The sending half of a scheme of loss recovery, for all QPs of a run; arrays have the shape ``(qps,)``.

    Attributes:
        sent: Next packet of each QP.
        acked: Packets of each that are acknowledged, as far as the sender may know.
        resending: Whether any QP has packets that go before ``sent``.
        retransmitted_packets: Packets sent again in this iteration.
        timeouts: Timers that ran out in this iteration.
        moved_ns: When the last packet of any QP was acknowledged.
        resumed_at_ns: When each QP was last given something to send again; None before the first.
    """

    sent: npt.NDArray[np.int64]
    acked: npt.NDArray[np.int64]
    resending: bool
    retransmitted_packets: int
    timeouts: int
    moved_ns: int
    resumed_at_ns: npt.NDArray[np.float64] | None

    def restart(self, now_ns: int, offset: npt.NDArray[np.int64], feedback: npt.NDArray[np.int64]) -> None:
        """Begin an iteration whose first packets are ``offset``; ``feedback`` is as for :meth:`hear`."""

    def hear(self, now_ns: int, feedback: npt.NDArray[np.int64]) -> None:
        """Act on what was fed back: ``acked_packets``, ``naks_packets`` and ``nak_position`` of each QP, a row each."""

    def check_timeouts(self, now_ns: int, released: npt.NDArray[np.int64]) -> None:
        """Act on timers that have run out; ``released`` is the end of what each QP was given to send.

        Raises:
            RunError: A QP has no retry left.
        """

    def wants(self, released: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many packets each QP has to send, of those before ``released``."""

    def resend(self, shares: npt.NDArray[np.int64]) -> Resent:
        """Send again what goes before ``sent``, at most ``shares`` packets of each QP, and take that off ``shares``."""

    def note_sent(self, taken: npt.NDArray[np.int64]) -> None:
        """Note that ``taken`` packets of each QP have left from ``sent`` on."""


class Requesters:
    """The state that every scheme has, and the timer.

    A QP's timer runs while a packet that asked for an ACK is under way, or while it may not send on, and begins anew with every
    ACK that acknowledges more. A retry is counted only where an ACK was asked for.

    Args:
        qps: Number of QPs.
        writer: The frames of all QPs.
        wall_timeout_ns: Retransmission timeout.
        describe: Names a QP for error messages.
    """

    resending = False

    def __init__(self, qps: int, writer: FrameWriter, wall_timeout_ns: int, describe: Callable[[int], str]) -> None:
        self._writer = writer
        self._wall_timeout_ns = wall_timeout_ns
        self._describe = describe
        self._offset = np.zeros(qps, np.int64)
        self.sent = np.zeros(qps, np.int64)
        self.acked = np.zeros(qps, np.int64)
        self._progress_ns = np.zeros(qps, np.int64)
        self._retries = np.zeros(qps, np.int64)
        self._sent_seen = np.zeros(qps, np.int64)
        self.retransmitted_packets = 0
        self.timeouts = 0
        self.moved_ns = 0
        self.resumed_at_ns: npt.NDArray[np.float64] | None = None

    def restart(self, now_ns: int, offset: npt.NDArray[np.int64], feedback: npt.NDArray[np.int64]) -> None:
        """Begin an iteration: nothing is sent, everything before ``offset`` acknowledged."""
        self._offset = offset.copy()
        np.copyto(self.sent, offset)
        np.copyto(self.acked, offset)
        self._progress_ns[:] = now_ns
        self._retries[:] = 0
        self.retransmitted_packets = self.timeouts = 0
        self.moved_ns = now_ns
        self.resumed_at_ns = None

    def _note_resumed(self, now_ns: int, qps: npt.NDArray[np.intp] | int) -> None:
        """Note that QPs have something to send again: a NIC that had nothing does not make up for the time before."""
        if self.resumed_at_ns is None:
            self.resumed_at_ns = np.zeros(len(self.sent))
        self.resumed_at_ns[qps] = now_ns

    def _note_acks(self, now_ns: int, acked: npt.NDArray[np.int64]) -> bool:
        """Take note of ACKs; return whether any QP got on."""
        advanced = acked > self.acked
        if not advanced.any():
            return False
        np.maximum(self.acked, acked, out=self.acked)
        self._progress_ns[advanced] = now_ns
        self._retries[advanced] = 0
        self.moved_ns = now_ns
        return True

    def _find_timeouts(self, now_ns: int, released: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        """Return the QPs whose ACK has not come in time, and count a retry of each.

        Raises:
            RunError: One of them has no retry left.
        """
        # The last packet that asked: the last of all that was given, or one that asks for its number's sake.
        asked = self.sent - (self.sent - self._offset) % ACK_EVERY_PACKETS
        waiting = (asked > self.acked) | ((self.sent >= released) & (self.sent > self.acked))
        # One that may not send on has asked for nothing, and is not answered; what it sent may be lost all the same.
        held = (self.sent > self.acked) & (self.sent == self._sent_seen)
        np.copyto(self._sent_seen, self.sent)
        self._progress_ns[~(waiting | held)] = now_ns
        expired = np.flatnonzero(now_ns - self._progress_ns > self._wall_timeout_ns)
        if not len(expired):
            return expired
        self._retries[expired] += waiting[expired]
        self._progress_ns[expired] = now_ns
        self.timeouts += len(expired)
        dead = np.flatnonzero(self._retries > RETRY_LIMIT)
        if len(dead):
            raise RunError(f"{self._describe(int(dead[0]))}: no ACK after {RETRY_LIMIT} retries")
        return expired
