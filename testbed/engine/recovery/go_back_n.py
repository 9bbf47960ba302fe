"""Go-back-N: after a NAK or a timeout everything from the first missing packet on is sent again, as InfiniBand has it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from testbed.engine.frames import FrameWriter
from testbed.engine.recovery.protocol import Requesters, Resent


class GoBackN(Requesters):
    """Rewinds ``sent``; packets leave in order, so nothing ever goes before it.

    Args:
        qps: Number of QPs.
        writer: The frames of all QPs.
        wall_timeout_ns: Retransmission timeout.
        describe: Names a QP for error messages.

    Source:
        InfiniBand Architecture Specification, volume 1, 9.7.5.2.8 (NAK for a PSN sequence error) and 9.9.2.1.1 (retries).
    """

    def __init__(self, qps: int, writer: FrameWriter, wall_timeout_ns: int, describe: Callable[[int], str]) -> None:
        super().__init__(qps, writer, wall_timeout_ns, describe)
        self._naks_seen = np.zeros(qps, np.int64)
        self._high_water = np.zeros(qps, np.int64)
        self._rewound = False  # once a QP went back, sent packets may be sent before

    def restart(self, now_ns: int, offset: npt.NDArray[np.int64], feedback: npt.NDArray[np.int64]) -> None:
        """Begin an iteration; NAKs of an earlier one no longer count."""
        super().restart(now_ns, offset, feedback)
        np.copyto(self._naks_seen, feedback[1])
        np.copyto(self._high_water, offset)
        self._rewound = False

    def hear(self, now_ns: int, feedback: npt.NDArray[np.int64]) -> None:
        """Go on after ACKs and back after NAKs."""
        acked, naks, nak_position = feedback[0], feedback[1], feedback[2]
        if self._note_acks(now_ns, acked) and self._rewound:
            np.maximum(self.sent, self.acked, out=self.sent)
        refused = naks > self._naks_seen
        if refused.any():
            self._naks_seen[refused] = naks[refused]
            target = np.maximum(nak_position, self.acked)
            self._rewind(now_ns, np.flatnonzero(refused & (target < self.sent)), target)

    def check_timeouts(self, now_ns: int, released: npt.NDArray[np.int64]) -> None:
        """Go back to what is acknowledged on every QP whose timer has run out."""
        expired = self._find_timeouts(now_ns, released)
        if len(expired):
            self._rewind(now_ns, expired, self.acked)

    def wants(self, released: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return what is left to send, packets that are sent again included."""
        return released - self.sent

    def resend(self, shares: npt.NDArray[np.int64]) -> Resent:
        """Send nothing: what is sent again is sent in order."""
        return Resent(np.zeros_like(shares), np.zeros_like(shares))

    def note_sent(self, taken: npt.NDArray[np.int64]) -> None:
        """Note what has left; what had left before counts as sent again."""
        if self._rewound:
            self.retransmitted_packets += int(np.maximum(np.minimum(taken, self._high_water - self.sent), 0).sum())
        self.sent += taken
        np.maximum(self._high_water, self.sent, out=self._high_water)

    def _rewind(self, now_ns: int, qps: npt.NDArray[np.intp], target: npt.NDArray[np.int64]) -> None:
        self.sent[qps] = target[qps]
        self._progress_ns[qps] = now_ns
        self._writer.rewind(qps, self.sent - self._offset)
        self._rewound = True
        self._note_resumed(now_ns, qps)
