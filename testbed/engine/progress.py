"""Which transfers may be sent: a schedule's dependencies, resolved as messages arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.engine.stream import PacketStreams


class Progress:
    """State of one iteration of a schedule.

    A connection sends its transfers in order; ``released_packets`` is how far it may go. A transfer is released when all
    it depends on has arrived and every earlier transfer of its connection is released.

    Args:
        schedule: What is sent.
        streams: The same as packets, of the connections that the network carries.
        release_inside: Told of the transfers inside hosts, the other connections': a transfer and when it was released.
    """

    def __init__(
        self,
        schedule: Schedule,
        streams: PacketStreams,
        release_inside: Callable[[int, float], None] | None = None,
    ) -> None:
        self._networked = len(streams.packets)
        self._release_inside = release_inside
        self._queues = [transfers.tolist() for transfers in streams.transfers_of]
        self._end_packet = streams.message_end_packet.tolist()
        self._connection = schedule.connection.tolist()
        count = len(schedule)
        waiting = np.diff(schedule.dep_offsets)
        self._waiting_at_start = waiting.tolist()
        # The dependents of each transfer, as CSR.
        owners = np.repeat(np.arange(count), waiting)
        order = np.argsort(schedule.deps, kind="stable")
        self._dependents = owners[order].tolist()
        offsets = np.concatenate(([0], np.cumsum(np.bincount(schedule.deps, minlength=count))))
        self._dependent_offsets = offsets.tolist()
        self.released_packets: npt.NDArray[np.int64] = np.zeros(self._networked, np.int64)
        self.released_at_ns: npt.NDArray[np.float64] = np.zeros(self._networked)
        self.restart()

    def restart(self) -> None:
        """Begin a new iteration."""
        self._waiting = list(self._waiting_at_start)
        self._next_release = [0] * len(self._queues)
        self._arrived_messages = [0] * len(self._queues)
        self.pending_transfers = len(self._waiting)
        self.released_packets[:] = 0
        self.released_at_ns[:] = 0.0
        for connection in range(len(self._queues)):
            self._release(connection, 0.0)

    def record_arrivals(
        self, connections: Iterable[int], messages: Iterable[int], arrived_at_ns: Callable[[int, int], float]
    ) -> float:
        """Take note that ``messages`` messages in all have arrived on each of ``connections``.

        ``released_at_ns`` of a connection that may go on is then the arrival that released it.

        Args:
            connections: Connections on which something arrived.
            messages: Messages that have arrived on each so far.
            arrived_at_ns: Tells when a transfer arrived, given its connection and the transfer.

        Returns:
            The latest of these arrivals.
        """
        latest = 0.0
        waiting, dependents, offsets = self._waiting, self._dependents, self._dependent_offsets
        for connection, arrived in zip(connections, messages, strict=True):
            queue = self._queues[connection]
            for transfer in queue[self._arrived_messages[connection] : arrived]:
                self.pending_transfers -= 1
                time_ns = arrived_at_ns(connection, transfer)
                latest = max(latest, time_ns)
                for dependent in dependents[offsets[transfer] : offsets[transfer + 1]]:
                    waiting[dependent] -= 1
                    if not waiting[dependent]:
                        self._release(self._connection[dependent], time_ns)
            self._arrived_messages[connection] = arrived
        return latest

    def record_inside(self, transfer: int, time_ns: float) -> None:
        """Take note that a transfer inside a host has arrived, and when."""
        self.pending_transfers -= 1
        for dependent in self._dependents[self._dependent_offsets[transfer] : self._dependent_offsets[transfer + 1]]:
            self._waiting[dependent] -= 1
            if not self._waiting[dependent]:
                self._release(self._connection[dependent], time_ns)

    def _release(self, connection: int, time_ns: float) -> None:
        """Let a connection go as far as it may from now on."""
        queue = self._queues[connection]
        before = position = self._next_release[connection]
        while position < len(queue) and not self._waiting[queue[position]]:
            position += 1
        if position == before:
            return
        self._next_release[connection] = position
        if connection < self._networked:
            self.released_packets[connection] = self._end_packet[queue[position - 1]]
            self.released_at_ns[connection] = time_ns
        elif self._release_inside is not None:
            for transfer in queue[before:position]:
                self._release_inside(transfer, time_ns)
