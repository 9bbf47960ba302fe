"""Propagation delay: the engine acts on what it saw one delay ago.

The veth fabric carries a frame in some 50 µs of wall time, tens of nanoseconds emulated; real fabrics need microseconds.
So the engine keeps a ring of snapshots of what the NICs have seen and acts on the one that is old enough. A snapshot holds
what arrived since the one before, which was sent at the tick before that one at the latest. Each snapshot therefore carries
the time at which its newest frames were *sent*. What releases other transfers is acted on at the last tick before that time
plus the delay (``early_ns`` of a tick), so that they can still leave on time; all else at the first tick after.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class DelayLine:
    """A ring of snapshots of a per-QP quantity, read with a delay of its own per QP.

    Args:
        wall_delay_ns: Delay of each QP, shape ``(qps,)``, wall ns.
        fields: Quantities in a snapshot.
        wall_tick_ns: Length of a tick.
        early_ns: Act up to this much before the delay is over; see above.
    """

    _SLACK_TICKS = 64

    def __init__(self, wall_delay_ns: npt.NDArray[np.int64], fields: int, wall_tick_ns: int, early_ns: int = 0) -> None:
        delays, which = np.unique(wall_delay_ns, return_inverse=True)
        self._delays: list[int] = delays.tolist()
        self._masks = [which == index for index in range(len(delays))]
        self._delay_index: list[int] = which.tolist()
        depth = 2 * int(max(self._delays, default=0) // wall_tick_ns) + self._SLACK_TICKS
        self._ring = np.zeros((depth, fields, len(wall_delay_ns)), np.int64)
        self._times = [0] * depth
        # What left at a snapshot's tick; rows are valid where something was noted.
        self._noted = [False] * depth
        self._sent_at = np.zeros((depth, len(wall_delay_ns)))
        self._sent_bytes = np.zeros((depth, len(wall_delay_ns)))
        self._early_ns = early_ns
        self._count = 0
        self._cursors = [0] * len(delays)
        # Of each delay: the slot of the tick at which the newest frames in the view left.
        self._newest = [0] * len(delays)
        self.view: npt.NDArray[np.int64] = np.zeros((fields, len(wall_delay_ns)), np.int64)

    def reset(self, values: npt.NDArray[np.int64]) -> None:
        """Forget all snapshots; the view becomes ``values``, shape ``(fields, qps)``."""
        self._count = 0
        self._cursors = [0] * len(self._delays)
        self.view = values.copy()

    @property
    def next_snapshot(self) -> npt.NDArray[np.int64]:
        """Where the next snapshot goes, shape ``(fields, qps)``: write it, then call :meth:`advance`."""
        row: npt.NDArray[np.int64] = self._ring[self._count % len(self._times)]
        return row

    def advance(self, now_ns: int) -> npt.NDArray[np.int64]:
        """Take the snapshot at ``now_ns`` and return what may be acted on now, shape ``(fields, qps)``."""
        times = self._times
        depth = len(times)
        slot = self._count % depth
        times[slot] = now_ns
        self._noted[slot] = False
        self._count += 1
        horizon_ns = now_ns + self._early_ns
        for index, delay in enumerate(self._delays):
            cursor = before = self._cursors[index]
            # `cursor` is the number of snapshots already acted on. The frames in snapshot c left at tick c - 1 or before.
            while cursor < self._count and (cursor == 0 or times[(cursor - 1) % depth] + delay <= horizon_ns):
                cursor += 1
            if cursor > before:
                row = self._ring[(cursor - 1) % depth]
                if len(self._delays) == 1:
                    self.view = row
                else:
                    np.copyto(self.view, row, where=self._masks[index])  # far faster than indexing by the mask
                self._newest[index] = (cursor - 2) % depth
                self._cursors[index] = cursor
        return self.view

    def note_sent(
        self, qps: npt.NDArray[np.intp], sent_at_ns: npt.NDArray[np.float64], sent_bytes: npt.NDArray[np.int64]
    ) -> None:
        """Note what some QPs send in the tick of the last snapshot.

        Args:
            qps: The QPs.
            sent_at_ns: When the newest frame of each begins.
            sent_bytes: All that each has sent, that frame included.
        """
        slot = (self._count - 1) % len(self._times)
        if not self._noted[slot]:
            self._noted[slot] = True
            self._sent_at[slot] = self._times[slot]
            self._sent_bytes[slot] = np.inf
        self._sent_at[slot, qps] = sent_at_ns
        self._sent_bytes[slot, qps] = sent_bytes

    def newest_at_ns(self, qps: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """Return when the newest in the view arrived, of some QPs: sent at the tick before its snapshot, one delay ago."""
        at_ns = [float(self._times[slot] + delay) for slot, delay in zip(self._newest, self._delays, strict=True)]
        return np.array(at_ns)[np.array(self._delay_index, np.int64)[qps]]

    def arrived_at_ns(self, qp: int, sent_bytes: int, ns_per_byte: float) -> float:
        """Return when something in the view arrived: exact, not rounded to ticks.

        Args:
            qp: The QP that sent it.
            sent_bytes: All that the QP had sent when it was out.
            ns_per_byte: Wall time of a byte on the sender's link.
        """
        index = self._delay_index[qp]
        slot = self._newest[index]
        # What waited in the fabric counts as sent in the tick before it arrived.
        sent_at = float(self._times[slot])
        if self._noted[slot]:
            sent_at = max(sent_at, self._sent_at[slot, qp] - (self._sent_bytes[slot, qp] - sent_bytes) * ns_per_byte)
        return float(sent_at + self._delays[index])
