"""Transfers inside hosts while the engine runs: the NVLink model, in step with the ticks.

No packet is sent. The model (`testbed.collectives.intra_host.IntraHostModel`) says to the nanosecond when a transfer arrives;
the tick loop asks at every tick for what arrives before the next, so that what it releases can still leave on time, as the
delay line does for what arrives over the network.
"""

from __future__ import annotations

import math

from testbed.collectives import IntraHostLinks, Schedule
from testbed.collectives.intra_host import IntraHostModel
from testbed.engine.dispatch import QpDispatcher
from testbed.engine.progress import Progress
from testbed.engine.stream import PacketStreams, build_streams


class IntraHostTransfers:
    """The transfers inside hosts of one iteration.

    The model counts emulated time from the iteration's begin; all times here are wall time.

    Args:
        schedule: What is sent.
        links: What carries it inside hosts; None where all of it goes over the network.
        time_dilation: Wall time per emulated time.

    Attributes:
        arrived_bytes: Payload that has arrived.
        end_ns: When the last transfer of each of the schedule's connections arrived; 0 where none has.
    """

    def __init__(self, schedule: Schedule, links: IntraHostLinks | None, time_dilation: float) -> None:
        self._model = None if links is None else IntraHostModel(schedule, links)
        self._nbytes: list[int] = schedule.nbytes.tolist() if links is not None else []
        self._dilation = time_dilation
        self._begin_ns = 0.0
        self.arrived_bytes = 0
        self._connection: list[int] = schedule.connection.tolist() if links is not None else []
        self._start_ns: list[int] = schedule.start_ns.tolist()
        self.end_ns = [0.0] * len(schedule.connections)

    def release(self, transfer: int, wall_ns: float) -> None:
        """Let a transfer leave from ``wall_ns`` on, or from its connection's start where that is later."""
        if self._model is None:
            raise ValueError(f"transfer {transfer} stays inside a host, and nothing joins the ranks of a host")
        start_ns = self._start_ns[self._connection[transfer]]
        self._model.release(transfer, max(start_ns, (wall_ns - self._begin_ns) / self._dilation))

    def begin(self, wall_ns: float) -> None:
        """Count time from ``wall_ns`` on."""
        self._begin_ns = wall_ns

    @property
    def busy(self) -> bool:
        """Return whether anything is under way."""
        return self._model is not None and self._model.next_ns < math.inf

    def advance(self, until_wall_ns: float, progress: Progress | QpDispatcher) -> float:
        """Hand all that arrives up to a time to ``progress``; return the latest arrival, 0 when there was none."""
        latest = 0.0
        if self._model is not None:
            for time_ns, transfer in self._model.arrivals((until_wall_ns - self._begin_ns) / self._dilation):
                latest = self._begin_ns + time_ns * self._dilation
                self.arrived_bytes += self._nbytes[transfer]
                self.end_ns[self._connection[transfer]] = latest
                progress.record_inside(transfer, latest)
        return latest


def run_inside_hosts(schedule: Schedule, links: IntraHostLinks) -> tuple[float, int]:
    """Run a schedule that needs no network; nothing is measured, the model alone tells its time.

    Returns:
        When the last transfer arrived, emulated ns from the begin, and the payload that all carried.

    Raises:
        ValueError: If a connection joins ranks of different hosts.
    """
    if not links.find_connections(schedule).all():
        raise ValueError("a connection joins ranks of different hosts")
    transfers = IntraHostTransfers(schedule, links, 1.0)
    progress = Progress(schedule, _without_packets(schedule), transfers.release)
    latest = transfers.advance(math.inf, progress)
    if progress.pending_transfers:
        raise ValueError(f"{progress.pending_transfers} transfers wait for others that never come")
    return latest, transfers.arrived_bytes


def _without_packets(schedule: Schedule) -> PacketStreams:
    return build_streams(schedule, 4096, networked=0)
