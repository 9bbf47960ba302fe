"""The egress queues that carry data: those of every port for the observer, those of the NICs ("lanes") for the pacer.

A NIC has a lane per data priority; with one priority a lane is a NIC, and nothing is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.roce.wire import LINK_OVERHEAD_BYTES

Ints = npt.NDArray[np.int64]


class DataQueues:
    """The data priorities of all ports, and how the NICs share their rate among them.

    Args:
        queues: The fabric's queue counters, shape ``(ports + 1, 8)``.
        nic_port: Port id of each NIC, shape ``(nics,)``.
        weights: Every priority that carries data, ascending, and its weight; None: it goes before all that have one, and of
            several such priorities the higher number first.

    Attributes:
        lanes: How many lanes there are: lane ``nic * priorities + place of the priority``.
        is_single: Whether there is one data priority.
    """

    def __init__(self, queues: npt.NDArray[Any], nic_port: Ints, weights: Mapping[int, int | None]) -> None:
        # Signed views of the counters: differences are then plain arithmetic.
        self._enq, self._deq = queues["enq_bytes"].view(np.int64), queues["deq_bytes"].view(np.int64)
        self._deq_packets = queues["deq_packets"].view(np.int64)
        self._priorities = list(weights)
        count, self._nics = len(weights), len(nic_port)
        self._lane_queue = np.repeat(nic_port, count), np.tile(np.array(self._priorities, np.int64), self._nics)
        self._weights = np.tile(np.array([weight or 0 for weight in weights.values()], float), (self._nics, 1))
        self._strict = [place for place, weight in enumerate(weights.values()) if weight is None][::-1]
        self._owed = np.zeros((self._nics, count))
        self.lanes = self._nics * count
        self.is_single = count == 1

    def lanes_of(self, nic: Ints, priorities: Sequence[int]) -> Ints:
        """Return the lane of each connection.

        Args:
            nic: The NIC of each, shape ``(connections,)``.
            priorities: The priority of each.
        """
        place = {priority: index for index, priority in enumerate(self._priorities)}
        return nic * len(self._priorities) + np.array([place[one] for one in priorities], np.int64)

    def lane_enq_bytes(self) -> Ints:
        """Return what has entered each lane's queue, shape ``(lanes,)``."""
        return self._enq[self._lane_queue]

    def lane_deq_bytes(self) -> Ints:
        """Return what has left it."""
        return self._deq[self._lane_queue]

    def of_lanes(self, of_queues: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return the lanes' part of an array of all queues, shape ``(lanes,)``."""
        return of_queues[self._lane_queue]

    def any_of_nics(self, of_lanes: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return whether it holds for any lane of each NIC, shape ``(nics,)``."""
        return np.asarray(of_lanes.reshape(self._nics, -1).any(axis=1))

    def share(self, budget: Ints, sendable: Ints) -> Ints:
        """Divide each NIC's budget over its lanes: strict ones in their order, what they leave by weight, max-min fair.

        What is less than a frame is owed to the lane for the next time, so that shares are exact over many ticks; a lane that
        had nothing to send is owed nothing.

        Args:
            budget: Frames each NIC may send, shape ``(nics,)``.
            sendable: Frames each lane has and its queue has room for, shape ``(lanes,)``.

        Returns:
            Frames for each lane, shape ``(lanes,)``; some of the budget may be left.
        """
        able = sendable.reshape(self._nics, -1)
        first = np.zeros(able.shape, np.int64)
        budget = budget.copy()
        for place in self._strict:
            first[:, place] = np.minimum(able[:, place], budget)
            budget -= first[:, place]
        exact = np.zeros(able.shape)
        left = budget.astype(float)
        for _ in range(able.shape[1]):
            hungry = exact < able
            weight = (self._weights * hungry).sum(axis=1)
            if not (weight * left > 0).any():
                break
            part = np.where(hungry, self._weights * (left / np.maximum(weight, 1.0))[:, None], 0.0)
            more = np.minimum(part, able - exact)
            exact += more
            left -= more.sum(axis=1)
        self._owed = np.where(able > 0, self._owed + exact, 0.0)
        given = np.minimum(np.floor(self._owed + 1e-9), able)
        # Frames that several lanes are owed in part may come due together.
        over = given.sum(axis=1) - budget
        for nic in np.flatnonzero(over > 0).tolist():
            due = np.where(given[nic] > 0, self._owed[nic] - given[nic], np.inf)
            given[nic, np.argsort(due)[: int(over[nic])]] -= 1
        self._owed = np.minimum(self._owed - given, 1.0)
        return (first + given.astype(np.int64)).reshape(-1)

    def observe(
        self, blocked: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return what every port owes its link: depth, wire bytes sent, and whether it owes nothing, shape ``(ports + 1,)`` each.

        With several priorities what stands in a paused queue is not counted: the port still owes the others.
        """
        columns = self._priorities
        if self.is_single:
            (one,) = columns
            deq = self._deq[:, one].copy()
            depth = self._enq[:, one] - deq
            return depth, deq + self._deq_packets[:, one] * LINK_OVERHEAD_BYTES, blocked[:, one]
        deq = self._deq[:, columns]
        depth = ((self._enq[:, columns] - deq) * ~blocked[:, columns]).sum(axis=1)
        wire = deq + self._deq_packets[:, columns] * LINK_OVERHEAD_BYTES
        return depth, wire.sum(axis=1), np.zeros(len(depth), bool)

    def standing_bytes(self) -> int:
        """Return what stands in all of them."""
        columns = self._priorities
        left = self._deq[:, columns].sum()  # before what entered
        return int(self._enq[:, columns].sum() - left)

    def left_bytes(self) -> int:
        """Return what has left all of them."""
        return int(self._deq[:, self._priorities].sum())

    def write_off(self) -> int:
        """Take it that nothing stands in them any more; return how many bytes did."""
        columns = self._priorities
        lost = int((self._enq[:, columns] - self._deq[:, columns]).sum())
        self._deq[:, columns] = self._enq[:, columns]
        return lost
