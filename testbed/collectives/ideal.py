"""The completion time that a schedule would have over a core that never blocks.

What limits it: each NIC's out rate, each NIC's in rate, and each path's latency. The core's capacity is never
in it, so CCT / ideal CCT is what the fabric did to the collective.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from testbed.collectives.schedule import Schedule

PACKET_OVERHEAD_BYTES = 82
"""Wire bytes of a packet beside its padded payload: 58 of headers and ICRC, 24 of FCS, preamble and gap.

The same as `testbed.roce.wire`, which this package must not import; a test keeps them equal.
"""
RETH_BYTES = 16
"""Further bytes of a message's first (or only) packet."""

Latency = npt.ArrayLike | Callable[[int, int], float]


def wire_bytes(nbytes: npt.ArrayLike, mtu: int) -> npt.NDArray[np.int64]:
    """Return the bytes that messages occupy on a link, all their packets together.

    Args:
        nbytes: Payload of each message, bytes.
        mtu: Payload of a full packet, bytes; a multiple of 4.

    Returns:
        Array of the shape of ``nbytes``, int64, with FCS, preamble and gap.

    Raises:
        ValueError: If ``mtu`` is not a positive multiple of 4.

    Source:
        docs/architecture.md, "On the wire".
    """
    payload = np.asarray(nbytes, np.int64)
    _check_mtu(mtu)
    packets = np.maximum(-(-payload // mtu), 1)
    return np.asarray(-(-payload // 4) * 4 + packets * PACKET_OVERHEAD_BYTES + RETH_BYTES)


def largest_frame_wire_bytes(nbytes: npt.ArrayLike, mtu: int) -> int:
    """Return the wire bytes of the largest packet of any of these messages.

    A path of ``h`` hops adds ``h - 1`` times this to the time of a message: switches forward whole frames.
    Use it for the ``latency_ns`` of `ideal_cct_ns`; with messages below one MTU a full frame would be too
    much.

    Args:
        nbytes: Payload of each message, bytes.
        mtu: Payload of a full packet, bytes.
    """
    _check_mtu(mtu)
    payload = min(int(np.max(nbytes)), mtu)
    return -(-payload // 4) * 4 + PACKET_OVERHEAD_BYTES + RETH_BYTES


def ideal_cct_ns(schedule: Schedule, *, nic_rate_bits_per_s: npt.ArrayLike, latency_ns: Latency, mtu: int) -> float:
    """Return the time at which the last transfer of a schedule arrives; see `ideal_arrivals_ns`."""
    arrivals = ideal_arrivals_ns(schedule, nic_rate_bits_per_s=nic_rate_bits_per_s, latency_ns=latency_ns, mtu=mtu)
    return float(arrivals.max(initial=0.0))


def ideal_arrivals_ns(
    schedule: Schedule, *, nic_rate_bits_per_s: npt.ArrayLike, latency_ns: Latency, mtu: int
) -> npt.NDArray[np.float64]:
    """Return when each transfer has arrived whole, over a core that never blocks.

    A NIC sends one transfer at a time, round robin over its connections whose next transfer is ready (those
    ready first go first); a transfer is ready when its dependencies have arrived. A NIC receives transfers in
    the order in which their first frames reach it: a transfer has arrived at ``max(send end + latency,
    previous arrival + own serialisation)``.

    Args:
        schedule: What is sent.
        nic_rate_bits_per_s: Rate of each rank's NIC, in and out alike: one number, or shape ``(nranks,)``.
        latency_ns: Propagation delay of the path plus one frame time for each hop after the first, ns: shape
            ``(nranks, nranks)``, ``[src, dst]``, or a function of source and destination rank.
        mtu: Payload of a full packet, bytes.

    Returns:
        Arrival time of each transfer, shape ``(transfers,)``, float64, ns after the collective began.

    Raises:
        ValueError: If a rate is not positive, a latency is negative, or ``mtu`` is no multiple of 4.

    Source:
        facts.md section 3 (the definition of cct_ideal).
    """
    rates = np.broadcast_to(np.asarray(nic_rate_bits_per_s, np.float64), (schedule.nranks,))
    if (rates <= 0).any():
        raise ValueError("a NIC's rate must be above 0")
    latencies = _latency_of_connections(schedule, latency_ns)
    if any(latency < 0 for latency in latencies):
        raise ValueError("a path's latency must not be negative")
    wire_bits_e9 = wire_bytes(schedule.nbytes, mtu) * 8e9
    model = _IdealModel(schedule, latencies, wire_bits_e9 / rates[schedule.src], wire_bits_e9 / rates[schedule.dst])
    return model.run()


class _IdealModel:
    """The event model behind `ideal_arrivals_ns`.

    One heap holds all events as ``(time, code)``: ``code`` in ``[0, n)`` is the arrival of a transfer, in
    ``[n, 2 n)`` its first frame reaching the receiving NIC, from ``2 n`` on a rank's NIC becoming free. Where
    a NIC has a single connection out (or in) the order is known beforehand and the second and third kinds are
    not needed.
    """

    def __init__(
        self,
        schedule: Schedule,
        latencies: list[float],
        out_ns: npt.NDArray[np.float64],
        in_ns: npt.NDArray[np.float64],
    ) -> None:
        self.count = len(schedule)
        self.latencies = latencies
        self.out_ns: list[float] = out_ns.tolist()
        self.in_ns: list[float] = in_ns.tolist()
        self.src: list[int] = schedule.src.tolist()
        self.dst: list[int] = schedule.dst.tolist()
        self.connection: list[int] = schedule.connection.tolist()
        self.missing: list[int] = np.diff(schedule.dep_offsets).tolist()

        # The transfers of connection c are queue[head[c]:end[c]].
        self.queue: list[int] = np.argsort(schedule.connection, kind="stable").tolist()
        ends = np.cumsum(np.bincount(schedule.connection, minlength=len(schedule.connections)))
        self.end: list[int] = ends.tolist()
        self.head: list[int] = [0, *self.end[:-1]]
        # The transfers that wait for transfer i are follower[first_follower[i]:first_follower[i + 1]].
        waiting = np.repeat(np.arange(self.count), np.diff(schedule.dep_offsets))
        self.follower: list[int] = waiting[np.argsort(schedule.deps, kind="stable")].tolist()
        followers = np.bincount(schedule.deps, minlength=self.count)
        self.first_follower: list[int] = [0, *np.cumsum(followers).tolist()]

        sources = [src for src, _ in schedule.connections]
        targets = [dst for _, dst in schedule.connections]
        self.source_of = sources
        self.single_out = [sources.count(rank) <= 1 for rank in range(schedule.nranks)]
        self.single_in = [targets.count(rank) <= 1 for rank in range(schedule.nranks)]
        self.out_free = [0.0] * schedule.nranks
        self.in_free = [0.0] * schedule.nranks
        self.ready: list[deque[int]] = [deque() for _ in range(schedule.nranks)]
        self.sending: list[int | None] = [None] * schedule.nranks  # the connection being served
        self.events: list[tuple[float, int]] = []
        self.first_frame_ns = [0.0] * self.count
        self.sent_and_crossed_ns = [0.0] * self.count
        self.arrival_ns = [0.0] * self.count

    def run(self) -> npt.NDArray[np.float64]:
        """Run the model to its end and return the arrival times."""
        for connection in range(len(self.head)):
            if self._is_ready(connection):
                self._offer(connection, 0.0)
        events, count, follower, missing = self.events, self.count, self.follower, self.missing
        arrived = 0
        while events:
            now, code = heapq.heappop(events)
            if code < count:
                arrived += 1
                for at in range(self.first_follower[code], self.first_follower[code + 1]):
                    transfer = follower[at]
                    missing[transfer] -= 1
                    if missing[transfer] == 0:
                        connection = self.connection[transfer]
                        if self.queue[self.head[connection]] == transfer:
                            self._offer(connection, now)
            elif code < 2 * count:
                self._receive(code - count)
            else:
                self._finish_sending(code - 2 * count, now)
        assert arrived == count, "a schedule is in topological order"
        return np.array(self.arrival_ns, np.float64)

    def _is_ready(self, connection: int) -> bool:
        head = self.head[connection]
        return head < self.end[connection] and self.missing[self.queue[head]] == 0

    def _offer(self, connection: int, now: float) -> None:
        """Let a connection send, whose next transfer has just become ready."""
        rank = self.source_of[connection]
        if self.single_out[rank]:
            while self._is_ready(connection):
                self._send(self.queue[self.head[connection]], max(now, self.out_free[rank]))
                self.head[connection] += 1
        elif self.sending[rank] != connection:  # else it queues up again when it has finished
            self.ready[rank].append(connection)
            self._serve(rank, now)

    def _serve(self, rank: int, now: float) -> None:
        """Begin to send from the connection that has been ready longest, if the rank's NIC is free."""
        if self.sending[rank] is None and self.ready[rank]:
            connection = self.ready[rank].popleft()
            self.sending[rank] = connection
            self._send(self.queue[self.head[connection]], now)
            self.head[connection] += 1
            heapq.heappush(self.events, (self.out_free[rank], 2 * self.count + rank))

    def _finish_sending(self, rank: int, now: float) -> None:
        connection = self.sending[rank]
        self.sending[rank] = None
        if connection is not None and self._is_ready(connection):
            self.ready[rank].append(connection)
        self._serve(rank, now)

    def _send(self, transfer: int, start: float) -> None:
        latency = self.latencies[self.connection[transfer]]
        sent = start + self.out_ns[transfer]
        self.out_free[self.src[transfer]] = sent
        self.first_frame_ns[transfer] = start + latency
        self.sent_and_crossed_ns[transfer] = sent + latency
        if self.single_in[self.dst[transfer]]:
            self._receive(transfer)
        else:
            heapq.heappush(self.events, (start + latency, self.count + transfer))

    def _receive(self, transfer: int) -> None:
        rank = self.dst[transfer]
        received = max(self.in_free[rank], self.first_frame_ns[transfer]) + self.in_ns[transfer]
        self.in_free[rank] = received
        arrival = max(received, self.sent_and_crossed_ns[transfer])
        self.arrival_ns[transfer] = arrival
        heapq.heappush(self.events, (arrival, transfer))


def _latency_of_connections(schedule: Schedule, latency_ns: Latency) -> list[float]:
    if callable(latency_ns):
        return [float(latency_ns(src, dst)) for src, dst in schedule.connections]
    table = np.asarray(latency_ns, np.float64)
    if table.shape != (schedule.nranks, schedule.nranks):
        raise ValueError(f"latency_ns must have shape ({schedule.nranks}, {schedule.nranks}), got {table.shape}")
    return [float(table[src, dst]) for src, dst in schedule.connections]


def _check_mtu(mtu: int) -> None:
    if mtu < 4 or mtu % 4:
        raise ValueError(f"mtu must be a positive multiple of 4, got {mtu}")
