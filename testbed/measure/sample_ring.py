"""Samples on their way from the engine to the process that writes them: a ring in shared memory.

The engine adds a sample a tick and never waits: where the ring is full it leaves the sample out, and the next one's increments
cover both intervals, for counters are sampled, not increments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

QUEUE_FIELDS = (
    "enq_bytes",
    "deq_bytes",
    "deq_packets",
    "marked_packets",
    "drop_packets",
    "lost_packets",
    "pause_frames",
)
"""Counters of an egress queue, int64, in the order of the last axis of `SampleRing.queues`."""
QP_FIELDS = ("sent_packets", "acked_packets", "naks_packets", "cnps_packets", "cts_packets")
"""Counters of a QP, int64, in the order of the last axis of `SampleRing.qps`."""

_MOST_BYTES = 32 << 20
_MOST_SAMPLES = 4096
_FEWEST_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class RingShape:
    """What a sample holds: how many queues of ports, QPs at most, and states of congestion control."""

    ports: int
    qps: int
    states: int

    @property
    def sample(self) -> np.dtype[Any]:
        """Return the type of one sample."""
        return np.dtype(
            [
                ("now_ns", "i8"),
                ("row", "i4"),
                ("iteration", "i4"),
                ("warmup", "i4"),
                ("first", "i4"),
                ("queues", "i8", (len(QUEUE_FIELDS), self.ports)),
                ("used_bytes", "i8", (self.ports,)),
                ("qps", "i8", (len(QP_FIELDS), self.qps)),
                ("states", "f8", (self.states, self.qps)),
                ("xoff", "u1", (self.ports,)),
                ("closed", "u1", (self.ports,)),
            ],
            align=True,
        )

    @property
    def samples(self) -> int:
        """Return how many samples the ring holds."""
        return max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, _MOST_BYTES // self.sample.itemsize))

    @property
    def ring(self) -> np.dtype[Any]:
        """Return the type of the whole ring."""
        return np.dtype(
            [("added", "i8"), ("taken", "i8"), ("written_bytes", "i8"), ("samples", self.sample, (self.samples,))]
        )


class SampleRing:
    """A ring over memory that both sides see.

    Args:
        buffer: At least ``shape.ring.itemsize`` bytes, zeros at first.
        shape: The same on both sides.
    """

    def __init__(self, buffer: Any, shape: RingShape) -> None:
        ring = np.frombuffer(buffer, shape.ring, count=1)
        self.samples: npt.NDArray[Any] = ring["samples"][0]
        self._added, self._taken, self._written = ring["added"], ring["taken"], ring["written_bytes"]

    @property
    def written_bytes(self) -> int:
        """Return what the writer's files hold so far."""
        return int(self._written[0])

    def next_place(self) -> int | None:
        """Return where the next sample goes; None when the ring is full."""
        added = int(self._added[0])
        size = len(self.samples)
        return None if added - int(self._taken[0]) >= size else added % size

    def add(self) -> None:
        """Hand over the sample at `next_place`."""
        self._added[0] += 1

    def waiting(self) -> int:
        """Return how many samples wait to be taken."""
        return int(self._added[0] - self._taken[0])

    def take(self, most: int) -> npt.NDArray[Any]:
        """Take up to that many samples off the ring, the oldest first; return copies."""
        taken = int(self._taken[0])
        count = min(most, self.waiting())
        copies: npt.NDArray[Any] = self.samples[np.arange(taken, taken + count) % len(self.samples)]
        self._taken[0] += count
        return copies

    def note_written(self, written_bytes: int) -> None:
        """Tell the other side how much the files hold."""
        self._written[0] = written_bytes
