"""What admission lets each QP send: grants on their way from receivers to senders, and what those that came admit.

The receivers' half acts on what had arrived one delay ago, as the emulated receiver would see it. Its grants are frames on the
wire: they wait in the fabric's queues as data does. The senders' half acts on what their NICs have counted (``tb_qp.grants``),
again one delay ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from testbed.engine.delay_line import DelayLine
from testbed.engine.delayed_counts import DelayedCounts
from testbed.engine.grant_frames import GrantWriter
from testbed.engine.nic import NicPacer, share_budget
from testbed.measure.samples import AdmissionSamples
from testbed.roce.admission import AdmissionScheme
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, Connection, qp_index
from testbed.roce.wire import CTS_FRAME_BYTES, LINK_OVERHEAD_BYTES

Ints = npt.NDArray[np.int64]


class Admission(Protocol):
    """Limits the QPs of a run.

    Attributes:
        limits: Whether it does anything at all.
    """

    limits: bool

    def restart(self, now_ns: int, offset: Ints, packets: Ints) -> None:
        """Begin an iteration.

        Args:
            now_ns: The clock.
            offset: Packets each QP sent in earlier iterations, shape ``(qps,)``.
            packets: Packets that each QP sends in this one, shape ``(qps,)``; or each connection, shape ``(connections,)``.
        """

    def admit(self, now_ns: int, released: Ints, sent: Ints, pacer: NicPacer) -> Ints:
        """Send the grants that are due, and return how far each QP may send; what it sends again it may.

        Args:
            now_ns: The clock.
            released: End of what each QP was given to send, counted over all iterations, shape ``(qps,)``.
            sent: Next new packet of each.
            pacer: Told of grants that share the NIC's queue with data, and which NICs had nothing admitted.
        """

    def finish(self) -> AdmissionSamples | None:
        """Return what this iteration noted; None where nothing is granted."""


class NoAdmission:
    """Everything is admitted."""

    limits = False

    def restart(self, now_ns: int, offset: Ints, packets: Ints) -> None:
        """Do nothing."""

    def admit(self, now_ns: int, released: Ints, sent: Ints, pacer: NicPacer) -> Ints:
        """Return all that was given."""
        return released

    def finish(self) -> AdmissionSamples | None:
        """Return nothing."""
        return None


class GrantedAdmission:
    """Carries a scheme's grants as CTS frames. A connection's grants travel between its first pair of QPs.

    Args:
        scheme: Both halves.
        connections: Both ends of every QP, those of one connection in a row.
        qps_per_connection: How many those are.
        qps: The fabric's QP table.
        sockets: File descriptor of each NIC's packet socket.
        priority: Priority of the CTS frames.
        shares_queue: Whether CTS frames have the data's queue, and so take time of their NIC.
        mtu: Payload of a full packet, bytes.
        time_dilation: Wall time per emulated time.
        wall_tick_ns: Length of a tick.
        wall_data_delay_ns: Delay of each QP's data, shape ``(qps,)``.
        wall_grant_delay_ns: Delay of each connection's grants, shape ``(connections,)``.
        max_grants: Most grants of a connection that are under way at once.
        max_frames_per_tick: Most CTS frames that a NIC sends in a tick: the kernel's backlog is bounded.
    """

    limits = True

    def __init__(
        self,
        scheme: AdmissionScheme,
        *,
        connections: Sequence[Connection],
        qps_per_connection: int,
        qps: npt.NDArray[Any],
        sockets: Sequence[int],
        priority: int,
        shares_queue: bool,
        mtu: int,
        time_dilation: float,
        wall_tick_ns: int,
        wall_data_delay_ns: Ints,
        wall_grant_delay_ns: Ints,
        max_grants: int,
        max_frames_per_tick: int,
    ) -> None:
        self._scheme, self._sockets = scheme, sockets
        self._dilation, self._mtu, self._shares_queue = time_dilation, mtu, shares_queue
        self._per_connection = qps_per_connection
        count = len(connections)
        self._connection_of = np.arange(count) // qps_per_connection
        firsts = list(connections[::qps_per_connection])
        # Lanes are connections in the order of the NICs that receive: the frames of one NIC stand in a row.
        receivers = np.array([connection.responder.local.nic for connection in firsts], np.int64)
        self._lanes = np.argsort(receivers, kind="stable")
        self._lane_nic = receivers[self._lanes]
        self._writer = GrantWriter([firsts[lane] for lane in self._lanes], priority)
        self._nic = np.array([connection.requester.local.nic for connection in connections], np.int64)
        self._nics = len(sockets)
        self._budget = np.full(self._nics, max_frames_per_tick, np.int64)
        self._arrived_packets = qps[qp_index(0, RESPONDER) : 2 * count : 2]["rx_packets"].view(np.int64)
        step = 2 * qps_per_connection
        self._received_grants = qps[qp_index(0, REQUESTER) : 2 * count : step]["grants"].view(np.int64)
        # Grants leave at ticks: what arrives up to half a tick later counts, so that they are on time in the mean. They are acted
        # on at the tick before they arrive, so that what they admit leaves on time.
        self._arrivals = DelayedCounts(wall_data_delay_ns - wall_tick_ns // 2, wall_tick_ns)
        self._grants = DelayLine(wall_grant_delay_ns, 1, wall_tick_ns, early_ns=wall_tick_ns)
        self._granted_before = np.zeros(len(firsts), np.int64)
        self._granted = np.zeros(len(firsts), np.int64)
        self._granted_at_ns = np.zeros((len(firsts), max_grants), np.int64)

    def restart(self, now_ns: int, offset: Ints, packets: Ints) -> None:
        """Begin an iteration; see `Admission`."""
        self._scheme.restart(now_ns / self._dilation, packets.reshape(len(self._granted), -1).sum(axis=1))
        self._offset = offset.copy()
        self._granted_before += self._granted
        self._granted[:] = 0
        self._received = np.zeros_like(self._granted)
        self._arrivals.reset(self._arrived_packets)
        self._grants.reset(self._received_grants[None, :])
        self._admitted_until = offset.copy()
        self._is_limited = np.ones(len(offset), bool)
        self._turn = 0
        self._frames = self._repeated = 0
        self._delays_ns: list[npt.NDArray[np.float64]] = []

    def admit(self, now_ns: int, released: Ints, sent: Ints, pacer: NicPacer) -> Ints:
        """Send the grants that are due and return what is admitted; see `Admission`."""
        self._turn += 1
        came_at_ns = self._receive(now_ns)  # before any are sent: a snapshot holds what left a tick ago at the latest
        self._hold_starved(now_ns, sent, came_at_ns, pacer)
        self._grant(now_ns, pacer)
        admitted = self._scheme.admitted_packets(self._received)
        wants = released - sent
        new: Ints
        if self._per_connection == 1:
            new = np.minimum(wants, np.maximum(admitted + self._offset - sent, 0))
        else:
            left = admitted - self._of_connections(sent - self._offset)
            new = share_budget(self._connection_of, wants, np.maximum(left, 0), self._turn)
        np.less(new, wants, out=self._is_limited)
        return np.add(sent, new, out=self._admitted_until)

    def finish(self) -> AdmissionSamples | None:
        """Return what this iteration noted."""
        delays_ns = np.concatenate(self._delays_ns) if self._delays_ns else np.zeros(0)
        return AdmissionSamples(self._frames, self._repeated, delays_ns / self._dilation)

    def _of_connections(self, of_qps: Ints) -> Ints:
        if self._per_connection == 1:
            return of_qps
        total: Ints = of_qps.reshape(-1, self._per_connection).sum(axis=1)
        return total

    def _hold_starved(
        self, now_ns: int, sent: Ints, came_at_ns: npt.NDArray[np.float64] | None, pacer: NicPacer
    ) -> None:
        """Let a NIC that had sent all that was admitted begin with the grant that came, and not make up for the time before."""
        left = sent < self._admitted_until
        starved = np.bincount(self._nic, self._is_limited & ~left, self._nics) > 0
        starved &= np.bincount(self._nic, left, self._nics) == 0
        begin_ns = np.full(self._nics, float(now_ns))
        if came_at_ns is not None:
            first_ns = np.full(self._nics, np.inf)
            np.minimum.at(first_ns, self._nic[:: self._per_connection], came_at_ns)
            np.maximum(begin_ns, first_ns, out=begin_ns, where=np.isfinite(first_ns))
        pacer.hold_until(starved, begin_ns)

    def _grant(self, now_ns: int, pacer: NicPacer) -> None:
        """Send CTS frames for what is due."""
        arrived = self._of_connections(self._arrivals.advance(now_ns, self._arrived_packets) - self._offset)
        due = self._scheme.due(now_ns / self._dilation, arrived)
        missing = due.grants - self._granted
        repeated = due.repeat & (missing <= 0) & (self._granted > 0)
        wanted = np.where(repeated, 1, missing)[self._lanes]
        if not wanted.any():
            return
        counts = share_budget(self._lane_nic, wanted, self._budget, self._turn)
        lane = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(lane)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((lane, place, self._lane_nic[lane]))  # the connections of a NIC take turns
        lane, place = lane[order], place[order]
        connection = self._lanes[lane]
        number = self._granted[connection] + np.where(repeated[connection], 0, place + 1)
        begin, packets = self._scheme.granted_packets(connection, number)
        self._writer.write(
            lane, place, self._granted_before[connection] + number, begin * self._mtu, packets * self._mtu
        )
        first = 0
        for nic, frames in enumerate(np.bincount(self._lane_nic[lane], minlength=self._nics).tolist()):
            if frames:
                taken = self._writer.send(self._sockets[nic], first, lane[first : first + frames])
                gone = slice(first, first + taken)
                fresh = ~repeated[connection[gone]]
                connections, numbers = connection[gone][fresh], number[gone][fresh]
                np.add.at(self._granted, connections, 1)
                self._granted_at_ns[connections, (numbers - 1) % self._granted_at_ns.shape[1]] = now_ns
                self._frames += taken
                self._repeated += taken - len(connections)
                first += frames
        if self._shares_queue:
            frames_of = np.bincount(self._lane_nic, counts, self._nics).astype(np.int64)
            pacer.charge(frames_of * (CTS_FRAME_BYTES + LINK_OVERHEAD_BYTES))

    def _receive(self, now_ns: int) -> npt.NDArray[np.float64] | None:
        """Take note of the grants that have come, and how long each was under way.

        Returns:
            When grants came on each connection, shape ``(connections,)``, inf where none did; None where none did at all.
        """
        self._grants.next_snapshot[0] = self._received_grants
        received = self._grants.advance(now_ns)[0] - self._granted_before
        news = np.flatnonzero(received > self._received)
        if not len(news):
            return None
        came_at_ns = np.full(len(received), np.inf)
        came_at_ns[news] = self._grants.newest_at_ns(news)
        counts = (received - self._received)[news]
        connection = np.repeat(news, counts)
        place = np.arange(len(connection)) - np.repeat(np.cumsum(counts) - counts, counts)
        number = self._received[connection] + place  # from 0
        granted_at_ns = self._granted_at_ns[connection, number % self._granted_at_ns.shape[1]]
        self._delays_ns.append(came_at_ns[connection] - granted_at_ns)
        self._received[news] = received[news]
        return came_at_ns
