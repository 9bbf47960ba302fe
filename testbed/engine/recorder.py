"""What is noted along a run, tick by tick: queues, pauses, marks, and what every QP does.

A tick copies counters into a ring that another process empties; nothing is computed, written or waited for here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from testbed.measure.sample_ring import QP_FIELDS, QUEUE_FIELDS, SampleRing
from testbed.roce.congestion import CongestionControl
from testbed.roce.queue_pairs import REQUESTER, qp_index

Ints = npt.NDArray[np.int64]


class Recorder(Protocol):
    """Is shown the fabric once a tick."""

    def start(self, now_ns: int) -> None:
        """Begin an iteration: increments count from here."""

    def sample(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of a tick.

        Args:
            now_ns: The clock.
            sent_packets: Data packets that each QP has sent since `start`, shape ``(qps,)``.
        """

    def finish(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of the end of an iteration, when all is at rest."""


class NoRecorder:
    """Notes nothing."""

    def start(self, now_ns: int) -> None:
        """Do nothing."""

    def sample(self, now_ns: int, sent_packets: Ints) -> None:
        """Do nothing."""

    def finish(self, now_ns: int, sent_packets: Ints) -> None:
        """Do nothing."""


class TickRecorder:
    """Samples ports and QPs every tick; every second, fourth, ... once much has been written.

    Args:
        ring: Where samples go.
        watched: Queues to look at, port id and priority, as many as the ring's samples have.
        queues: The fabric's queues, shape ``(ports + 1, 8)``.
        ingress: Its ingress accounts, the same shape.
        qps: Its QP table.
        limit_bytes: What may be written in all. When half of what is left of it is written, every second tick is left out
            from then on; when all is, nothing more is noted.

    Attributes:
        sample_ticks: Ticks from one sample to the next.
        skipped_samples: Samples left out because the ring was full.
    """

    def __init__(
        self,
        ring: SampleRing,
        watched: Sequence[tuple[int, int]],
        *,
        queues: npt.NDArray[Any],
        ingress: npt.NDArray[Any],
        qps: npt.NDArray[Any],
        limit_bytes: int,
    ) -> None:
        self._ring, self._samples = ring, ring.samples
        self._places = {name: self._samples[name] for name in self._samples.dtype.names or ()}
        self._watched = tuple(np.array(watched, np.int64).reshape(-1, 2).T)
        # In this order: what has left a queue is read before what entered, so a depth is never negative.
        order = sorted(QUEUE_FIELDS, key=lambda name: name != "deq_bytes")
        self._counters = [(QUEUE_FIELDS.index(name), queues[name].view(np.int64)) for name in order]
        self._used_bytes, self._xoff = ingress["used_bytes"], ingress["xoff"]
        self._qps = qps
        self._limit_bytes, self._next_bytes = limit_bytes, limit_bytes // 2
        self.sample_ticks = 1
        self.skipped_samples = 0
        self._ticks = 0

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached, so that nothing more is noted."""
        return self._ring.written_bytes >= self._limit_bytes

    def begin_workload(
        self, row: int, qps: int, closed: npt.NDArray[np.bool_], control: CongestionControl | None
    ) -> None:
        """Look at the QPs of a workload from now on.

        Args:
            row: Its row in the results.
            qps: How many connections it has.
            closed: Whether each queue is paused, kept up to date by flow control, shape ``(ports + 1, 8)``.
            control: The reaction points, if there are any.
        """
        self._row, self._count, self._closed, self._control = row, qps, closed, control
        requesters = self._qps[qp_index(0, REQUESTER) : 2 * qps : 2]
        fields = [name for name in QP_FIELDS if name != "sent_packets"]
        self._qp_counters = [(QP_FIELDS.index(name), requesters[name].view(np.int64)) for name in fields]
        self._sent_index = QP_FIELDS.index("sent_packets")
        self._nothing_sent = np.zeros(qps, np.int64)

    def begin_iteration(self, number: int, *, warmup: bool) -> None:
        """Mark what follows as of an iteration."""
        self._iteration, self._warmup = number, int(warmup)

    def start(self, now_ns: int) -> None:
        """Begin an iteration: increments count from here."""
        self._ticks = 0
        self._first = 1
        self._add(now_ns, self._nothing_sent)

    def sample(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of a tick."""
        self._ticks += 1
        if self._ticks >= self.sample_ticks:
            self._ticks = 0
            self._add(now_ns, sent_packets)

    def finish(self, now_ns: int, sent_packets: Ints) -> None:
        """Take note of the end of an iteration, when all is at rest."""
        self._add(now_ns, sent_packets)

    def _add(self, now_ns: int, sent_packets: Ints) -> None:
        ring, places = self._ring, self._places
        written = ring.written_bytes
        if written >= self._next_bytes:
            self.sample_ticks *= 2
            self._next_bytes = written + max(0, self._limit_bytes - written) // 2
        index = ring.next_place()
        if index is None or written >= self._limit_bytes:
            self.skipped_samples += 1
            return
        watched, count = self._watched, self._count
        places["now_ns"][index] = now_ns
        places["row"][index] = self._row
        places["iteration"][index] = self._iteration
        places["warmup"][index] = self._warmup
        places["first"][index] = self._first
        queues, qps = places["queues"][index], places["qps"][index]
        for field, counter in self._counters:
            queues[field] = counter[watched]
        places["used_bytes"][index] = self._used_bytes[watched]
        places["xoff"][index] = self._xoff[watched]
        places["closed"][index] = self._closed[watched]
        for field, counter in self._qp_counters:
            qps[field, :count] = counter
        qps[self._sent_index, :count] = sent_packets
        if self._control is not None:
            states = places["states"][index]
            states[0, :count] = self._control.rate_bytes_per_s
            for place, values in enumerate(self._control.state().values(), 1):
                states[place, :count] = values
        ring.add()
        self._first = 0  # an iteration begins with the first sample that found room
