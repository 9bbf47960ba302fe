"""Which transfers may be sent: a schedule's dependencies, resolved as messages arrive."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.engine.stream import PacketStreams


class Progress:
    """State of one iteration of a schedule.

    A connection sends its transfers in order; ``released_packets`` is how far it may go. A transfer is released when all
    it depends on has arrived and every earlier transfer of its connection is released.
    """

    def __init__(self, schedule: Schedule, streams: PacketStreams) -> None:
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
        self.released_packets: npt.NDArray[np.int64] = np.zeros(len(self._queues), np.int64)
        self.restart()

    def restart(self) -> None:
        """Begin a new iteration."""
        self._waiting = list(self._waiting_at_start)
        self._next_release = [0] * len(self._queues)
        self._arrived_messages = [0] * len(self._queues)
        self.pending_transfers = len(self._waiting)
        self.released_packets[:] = 0
        for connection in range(len(self._queues)):
            self._release(connection)

    def record_arrivals(self, connections: Iterable[int], messages: Iterable[int]) -> None:
        """Take note that ``messages`` messages in all have arrived on each of ``connections``."""
        waiting, dependents, offsets = self._waiting, self._dependents, self._dependent_offsets
        for connection, arrived in zip(connections, messages, strict=True):
            queue = self._queues[connection]
            touched = set()
            for transfer in queue[self._arrived_messages[connection] : arrived]:
                self.pending_transfers -= 1
                for dependent in dependents[offsets[transfer] : offsets[transfer + 1]]:
                    waiting[dependent] -= 1
                    if not waiting[dependent]:
                        touched.add(self._connection[dependent])
            self._arrived_messages[connection] = arrived
            for sender in touched:
                self._release(sender)

    def _release(self, connection: int) -> None:
        queue = self._queues[connection]
        position = self._next_release[connection]
        while position < len(queue) and not self._waiting[queue[position]]:
            position += 1
        if position > self._next_release[connection]:
            self._next_release[connection] = position
            self.released_packets[connection] = self._end_packet[queue[position - 1]]
