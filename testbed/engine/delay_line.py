"""Propagation delay: the engine acts on what it saw one delay ago.

The veth fabric carries a frame in some 50 µs of wall time, tens of nanoseconds emulated; real fabrics need microseconds.
So the engine keeps a ring of snapshots of what the NICs have seen and acts on the one that is old enough. A snapshot holds
what arrived since the one before, which was sent at the tick before that one at the latest: it may be acted on when the
*previous* snapshot is one delay old. That makes the delay exact to a tick.
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
    """

    _SLACK_TICKS = 64

    def __init__(self, wall_delay_ns: npt.NDArray[np.int64], fields: int, wall_tick_ns: int) -> None:
        delays, which = np.unique(wall_delay_ns, return_inverse=True)
        self._delays: list[int] = delays.tolist()
        self._masks = [which == index for index in range(len(delays))]
        depth = 2 * int(max(self._delays, default=0) // wall_tick_ns) + self._SLACK_TICKS
        self._ring = np.zeros((depth, fields, len(wall_delay_ns)), np.int64)
        self._times = [0] * depth
        self._count = 0
        self._cursors = [0] * len(delays)
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
        times[self._count % depth] = now_ns
        self._count += 1
        for index, delay in enumerate(self._delays):
            cursor = before = self._cursors[index]
            # `cursor` is the number of snapshots already acted on; snapshot c is due when c - 1 is one delay old.
            while cursor < self._count and (cursor == 0 or times[(cursor - 1) % depth] + delay <= now_ns):
                cursor += 1
            if cursor > before:
                row = self._ring[(cursor - 1) % depth]
                if len(self._delays) == 1:
                    self.view = row
                else:
                    self.view[:, self._masks[index]] = row[:, self._masks[index]]
                self._cursors[index] = cursor
        return self.view
