"""Selective retransmission: what is missing alone is sent again, once it is too late to be only out of order.

The responder's ACKs name packets that came out of order (SACK), and the eBPF program notes them in the requester's window.
Packets may overtake each other on several paths, so a packet counts as lost only when a later one's SACK has been known for the
reorder time. One that was sent again counts as lost again when a packet that left behind it has been known for as long. What
nothing later tells of, the timer finds: it sends the first missing packet and the last again, and the SACK of the last shows
the others.

Source:
    The reorder time: Cheng et al., "The RACK-TLP Loss Detection Algorithm for TCP", RFC 8985 (there a quarter of the round trip
    and adaptive), as is the probe with the last packet. Out-of-order receivers and a window in packets: Mittal et al.,
    "Revisiting Network Support for RDMA" (IRN), SIGCOMM 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.engine.delay_line import DelayLine
from testbed.engine.frames import AGAIN_PACKETS, FrameWriter
from testbed.engine.recovery.protocol import Requesters, Resent


class Selective(Requesters):
    """Sends again what SACKs show to be missing, before what is new.

    Args:
        qps: Number of QPs.
        writer: The frames of all QPs.
        wall_timeout_ns: Retransmission timeout.
        describe: Names a QP for error messages.
        table: Rows of the requesters in the QP table, shape ``(qps,)``.
        windows: Which packets beyond the acknowledged ones each responder has named, a bit each, uint64 of shape
            ``(qps, words)``; packet ``n`` has bit ``n % (64 * words)``.
        send: Sends frames of a QP from a slot on and returns how many the kernel took.
        wall_delay_ns: From a frame's arrival at the responder to the tick that may call an earlier packet lost: the way there
            and back and the reorder time, shape ``(qps,)``.
        wall_tick_ns: Length of a tick.
    """

    def __init__(
        self,
        qps: int,
        writer: FrameWriter,
        wall_timeout_ns: int,
        describe: Callable[[int], str],
        *,
        table: npt.NDArray[Any],
        windows: npt.NDArray[np.uint64],
        send: Callable[[int, int, int], int],
        wall_delay_ns: npt.NDArray[np.int64],
        wall_tick_ns: int,
    ) -> None:
        super().__init__(qps, writer, wall_timeout_ns, describe)
        self._acked_now, self._sacked_until = (
            table["acked_packets"].view(np.int64),
            table["sacked_until"].view(np.int64),
        )
        self._windows = windows
        self._window_packets = 64 * windows.shape[1]
        self._send = send
        self._line = DelayLine(wall_delay_ns, 1, wall_tick_ns)
        self._horizon = np.zeros(qps, np.int64)
        # Of each QP: packets to send again, in order, and those sent again with `sent` at that time.
        self._pending: list[dict[int, None]] = [{} for _ in range(qps)]
        self._resent: list[dict[int, int]] = [{} for _ in range(qps)]
        self._pending_count = np.zeros(qps, np.int64)

    def restart(self, now_ns: int, offset: npt.NDArray[np.int64], feedback: npt.NDArray[np.int64]) -> None:
        """Begin an iteration with nothing missing."""
        super().restart(now_ns, offset, feedback)
        self._windows[:] = 0
        self._sacked_until[:] = offset
        self._line.reset(self._sacked_until[None, :])
        np.copyto(self._horizon, offset)
        for qp in range(len(offset)):
            self._pending[qp].clear()
            self._resent[qp].clear()
        self._pending_count[:] = 0
        self.resending = False

    def hear(self, now_ns: int, feedback: npt.NDArray[np.int64]) -> None:
        """Go on after ACKs, and find what is lost by now."""
        self._note_acks(now_ns, feedback[0])
        self._line.next_snapshot[0] = self._sacked_until
        horizon = self._line.advance(now_ns)[0]
        told = horizon > self._horizon
        if told.any():  # the responder lives, and what is missing is found without the timer
            self._progress_ns[told] = now_ns
            self._retries[told] = 0
            np.maximum(self._horizon, horizon, out=self._horizon)
        suspects = self._horizon > self._acked_now
        if suspects.any():
            for qp in np.flatnonzero(suspects).tolist():
                self._find_lost(now_ns, qp, int(self._acked_now[qp]), int(self._horizon[qp]))

    def check_timeouts(self, now_ns: int, released: npt.NDArray[np.int64]) -> None:
        """Send the first missing packet and the last again on every QP whose timer has run out."""
        for qp in self._find_timeouts(now_ns, released).tolist():
            self._resent[qp].clear()
            self._queue(now_ns, qp, [int(self.acked[qp]), int(self.sent[qp]) - 1])

    def wants(self, released: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return what is left to send: what the window lets go, and what is sent again."""
        fresh: npt.NDArray[np.int64] = np.minimum(released, self.acked + self._window_packets) - self.sent
        if self.resending:
            fresh = np.maximum(fresh, 0) + self._pending_count
        return fresh

    def resend(self, shares: npt.NDArray[np.int64]) -> Resent:
        """Send again what is missing, up to ``shares`` packets of each QP, and take that off ``shares``."""
        packets, wire_bytes = np.zeros_like(shares), np.zeros_like(shares)
        for qp in np.flatnonzero(np.minimum(shares, self._pending_count)).tolist():
            count = min(int(shares[qp]), int(self._pending_count[qp]))
            shares[qp] -= count
            low = int(self._acked_now[qp])
            chosen = list(self._pending[qp])[: min(count, AGAIN_PACKETS)]
            numbers = np.array([number for number in chosen if number >= low], np.int64)
            numbers = numbers[~self._is_sacked(qp, numbers)]
            done = 0
            if len(numbers):
                slot = self._writer.write_again(qp, numbers - self._offset[qp])
                done = self._send(qp, slot, len(numbers))
                wire_bytes[qp] = self._writer.wire_bytes(qp, numbers[:done] - self._offset[qp])
            refused = set(numbers[done:].tolist())
            for number in chosen:
                if number not in refused:
                    del self._pending[qp][number]
            for number in numbers[:done].tolist():
                self._resent[qp][number] = int(self.sent[qp])
            packets[qp] = done
            self._pending_count[qp] = len(self._pending[qp])
        self.retransmitted_packets += int(packets.sum())
        self.resending = bool(self._pending_count.any())
        return Resent(packets, wire_bytes)

    def note_sent(self, taken: npt.NDArray[np.int64]) -> None:
        """Note what has left for the first time."""
        self.sent += taken

    def _find_lost(self, now_ns: int, qp: int, low: int, until: int) -> None:
        """Queue what is missing of the packets from ``low`` to ``until``, which have been overtaken for the reorder time."""
        numbers = np.arange(low, until)
        missing = numbers[~self._is_sacked(qp, numbers)].tolist()
        resent = {number: behind for number, behind in self._resent[qp].items() if number >= low}
        self._resent[qp] = resent
        # What was sent again is lost again when something that left behind it has come.
        self._queue(now_ns, qp, [number for number in missing if number not in resent or until > resent[number]])

    def _queue(self, now_ns: int, qp: int, numbers: list[int]) -> None:
        if numbers:
            self._note_resumed(now_ns, qp)
        for number in numbers:
            self._pending[qp].setdefault(number, None)
        self._pending_count[qp] = len(self._pending[qp])
        self.resending = self.resending or bool(self._pending[qp])

    def _is_sacked(self, qp: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which packets the responder has named, of those beyond the acknowledged ones."""
        places = numbers % self._window_packets
        words = self._windows[qp, places >> 6]
        named: npt.NDArray[np.bool_] = (words >> (places & 63).astype(np.uint64) & np.uint64(1)).astype(bool)
        return named
