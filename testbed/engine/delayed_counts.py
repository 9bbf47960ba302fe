"""Counters as they stood one delay ago, between snapshots too.

`delay_line` acts on whole snapshots, because what is released must carry the time at which it was sent. Who only needs how much
has arrived by now takes it from here: a counter is read at an instant of the past, as if what came between two snapshots had come
at an even rate. That is so where a queue lets it go, and where a NIC sends for a whole tick.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SLACK_TICKS = 64


class DelayedCounts:
    """A ring of snapshots of counters, read with a delay of its own per counter.

    Args:
        wall_delay_ns: Delay of each counter, shape ``(counters,)``, wall ns; a negative one is as 0.
        wall_tick_ns: Time between snapshots.
    """

    def __init__(self, wall_delay_ns: npt.NDArray[np.int64], wall_tick_ns: int) -> None:
        delays, which = np.unique(np.maximum(wall_delay_ns, 0), return_inverse=True)
        self._delays: list[int] = delays.tolist()
        self._masks = [which == index for index in range(len(delays))]
        self._depth = 2 * int(max(self._delays, default=0) // wall_tick_ns) + _SLACK_TICKS
        self._ring = np.zeros((self._depth, len(wall_delay_ns)), np.int64)
        self._times = [0] * self._depth
        self._count = 0
        self._cursors = [0] * len(self._delays)
        self._view = np.zeros(len(wall_delay_ns), np.int64)

    def reset(self, counts: npt.NDArray[np.int64]) -> None:
        """Forget all snapshots: before the next one the counters stood at ``counts``."""
        self._count = 0
        self._cursors = [0] * len(self._delays)
        self._view = counts.copy()

    def advance(self, now_ns: int, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Take a snapshot and return where each counter stood one delay ago, rounded down, shape ``(counters,)``."""
        times, depth = self._times, self._depth
        times[self._count % depth] = now_ns
        self._ring[self._count % depth] = counts
        self._count += 1
        for index, delay in enumerate(self._delays):
            when = now_ns - delay
            # `cursor` is the last snapshot at or before that time.
            cursor = max(self._cursors[index], self._count - depth)
            if times[cursor % depth] > when:
                continue  # nothing is that old yet
            while cursor + 1 < self._count and times[(cursor + 1) % depth] <= when:
                cursor += 1
            self._cursors[index] = cursor
            at = self._ring[cursor % depth]
            if cursor + 1 < self._count:
                begin_ns = times[cursor % depth]
                share = (when - begin_ns) / (times[(cursor + 1) % depth] - begin_ns)
                at = at + ((self._ring[(cursor + 1) % depth] - at) * share).astype(np.int64)
            np.copyto(self._view, at, where=self._masks[index])
        return self._view
