"""NVLink as a model: what carries transfers between ranks of one host, without packets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.collectives.schedule import Schedule


@dataclass(frozen=True, eq=False)
class IntraHostLinks:
    """The links between the GPUs of a host; how they carry transfers is written at `IntraHostModel`.

    Attributes:
        host_of_rank: Host of each rank, shape ``(nranks,)``.
        rate_bits_per_s: Rate of each GPU, out and in alike; at least 1.
        latency_ns: From a byte's leaving a GPU to its arrival at another; at least 0.
    """

    host_of_rank: npt.NDArray[np.int64]
    rate_bits_per_s: int
    latency_ns: int

    def find_connections(self, schedule: Schedule) -> npt.NDArray[np.bool_]:
        """Return which connections of a schedule join ranks of one host, shape ``(connections,)``."""
        ends = np.array(schedule.connections, np.int64).reshape(-1, 2)
        return np.asarray(self.host_of_rank[ends[:, 0]] == self.host_of_rank[ends[:, 1]])


class IntraHostModel:
    """Transfers inside hosts, as over an NVSwitch: every GPU reaches every other of its host, and only GPUs limit.

    A GPU sends one transfer at a time at ``rate_bits_per_s``, of those released the first in the schedule. ``latency_ns``
    after it began to leave, a transfer begins to enter its receiver, at the same rate and one at a time: what meets another
    waits its turn, first come first served. So a transfer of ``n`` bytes arrives ``latency_ns + 8e9 * n / rate_bits_per_s``
    after its release, and later where a GPU was busy. Only payload counts. There are no headers, no losses, no time to copy
    or to reduce, and the switch between the GPUs never blocks.

    The ideal completion time and the engine (`testbed.engine.intra_host`) both execute this model.

    Args:
        schedule: What is sent; only transfers between ranks of one host are ever released.
        links: Rate and latency.
    """

    # Kinds of events, in the order in which those of one moment are taken.
    _ARRIVED, _RELEASED, _ENTERS, _SENT = range(4)

    def __init__(self, schedule: Schedule, links: IntraHostLinks) -> None:
        self._src: list[int] = schedule.src.tolist()
        self._dst: list[int] = schedule.dst.tolist()
        self._times_ns: list[float] = (8e9 * schedule.nbytes / links.rate_bits_per_s).tolist()
        self._latency_ns = links.latency_ns
        self._waiting: list[list[int]] = [[] for _ in range(schedule.nranks)]
        self._sending = [False] * schedule.nranks
        self._out_free_ns = [0.0] * schedule.nranks
        self._in_free_ns = [0.0] * schedule.nranks
        self._events: list[tuple[float, int, int]] = []

    @property
    def next_ns(self) -> float:
        """Return when the next event is; infinite when nothing is under way."""
        return self._events[0][0] if self._events else math.inf

    def release(self, transfer: int, now_ns: float) -> None:
        """Let a transfer leave from ``now_ns`` on."""
        heapq.heappush(self._events, (now_ns, self._RELEASED, transfer))

    def arrivals(self, until_ns: float = math.inf) -> Iterator[tuple[float, int]]:
        """Yield what arrives up to a time as ``(time, transfer)``, in order; more may be released meanwhile."""
        events = self._events
        while events and events[0][0] <= until_ns:
            now, kind, number = heapq.heappop(events)
            if kind == self._ARRIVED:
                yield now, number
            elif kind == self._RELEASED:
                src = self._src[number]
                heapq.heappush(self._waiting[src], number)
                if not self._sending[src]:
                    self._send_next(src, now)
            elif kind == self._ENTERS:
                dst = self._dst[number]
                self._in_free_ns[dst] = max(now, self._in_free_ns[dst]) + self._times_ns[number]
                heapq.heappush(events, (self._in_free_ns[dst], self._ARRIVED, number))
            else:
                self._sending[number] = False
                if self._waiting[number]:
                    self._send_next(number, now)

    def _send_next(self, src: int, now_ns: float) -> None:
        transfer = heapq.heappop(self._waiting[src])
        start = max(now_ns, self._out_free_ns[src])
        self._sending[src] = True
        self._out_free_ns[src] = start + self._times_ns[transfer]
        heapq.heappush(self._events, (self._out_free_ns[src], self._SENT, src))
        heapq.heappush(self._events, (start + self._latency_ns, self._ENTERS, transfer))
