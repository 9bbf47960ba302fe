"""The completion time that a schedule would have over a core that never blocks.

What limits it: each NIC's out rate, each NIC's in rate, and each path's latency. The core's capacity is never
in it, so CCT / ideal CCT is what the fabric did to the collective.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
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

_CLOCK_TOLERANCE = 1e-12
"""Relative difference below which two transfers end together: far above float64 rounding, far below a byte."""

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

    Connections are fluids. A NIC shares its rate evenly among its connections whose next transfer is ready, as a NIC does
    that serves its QPs in turn, packet by packet; a transfer is ready when its dependencies have arrived. What reaches a
    NIC from several senders queues before it, first come first served, and enters at the NIC's rate. Nothing slows the
    senders down: the queue is as long as it gets.

    Real packets come one after the other: where ``k`` connections share a NIC, a message of few packets ends up to
    ``k - 1`` frames earlier than here, and what waits for it begins earlier. Against a simulation packet by packet
    (tests/unit/test_ideal.py) rings, chains, exchanges, incasts and all-to-alls are exact, trees within 1.5 % at a packet
    per slice and 0.4 % from 32 packets on, random schedules of messages of 1 to 8 packets between -2 % and +10 %.

    Args:
        schedule: What is sent.
        nic_rate_bits_per_s: Rate of each rank's NIC, in and out alike: one number, or shape ``(nranks,)``.
        latency_ns: Propagation delay of the path plus one frame time for each hop after the first, ns: shape
            ``(connections,)``, or ``(nranks, nranks)``, ``[src, dst]``, or a function of source and destination rank.
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
    return _IdealModel(schedule, latencies, wire_bytes(schedule.nbytes, mtu), rates / 8e9).run()


class _IdealModel:
    """The event model behind `ideal_arrivals_ns`.

    One heap holds all events as ``(time, code)``. With ``n`` transfers, ``c`` connections and ``r`` ranks, the codes are in
    turn: a transfer has arrived (``n`` codes), its last byte has reached the queue before the receiver (``n``), the rate of
    a connection has changed there (``c``), a NIC has sent a transfer whole (``r``), a NIC's rate is to be divided anew
    (``r``; so that what becomes ready at the same moment is counted once). Where a NIC has a single connection out, and its
    peer a single one in, sending and receiving are plain sums and only the first kind is needed.

    Sending is kept in virtual time: a NIC's clock of served bytes per connection runs at ``rate / active``, so a transfer
    ends when it shows what it showed at the transfer's begin plus the transfer's bytes.
    """

    def __init__(
        self,
        schedule: Schedule,
        latencies: list[float],
        nbytes: npt.NDArray[np.int64],
        rates_bytes_per_ns: npt.NDArray[np.float64],
    ) -> None:
        count, connections, nranks = len(schedule), len(schedule.connections), schedule.nranks
        self.count = count
        self.reached, self.changed = count, 2 * count
        self.sent, self.divide = 2 * count + connections, 2 * count + connections + nranks
        self.latencies = latencies
        self.nbytes: list[int] = nbytes.tolist()
        self.rates: list[float] = rates_bytes_per_ns.tolist()
        self.connection: list[int] = schedule.connection.tolist()
        self.missing: list[int] = np.diff(schedule.dep_offsets).tolist()

        # The transfers of connection c are queue[head[c]:end[c]].
        self.queue: list[int] = np.argsort(schedule.connection, kind="stable").tolist()
        ends = np.cumsum(np.bincount(schedule.connection, minlength=connections))
        self.end: list[int] = ends.tolist()
        self.head: list[int] = [0, *self.end[:-1]]
        # The transfers that wait for transfer i are follower[first_follower[i]:first_follower[i + 1]].
        waiting = np.repeat(np.arange(count), np.diff(schedule.dep_offsets))
        self.follower: list[int] = waiting[np.argsort(schedule.deps, kind="stable")].tolist()
        followers = np.bincount(schedule.deps, minlength=count)
        self.first_follower: list[int] = [0, *np.cumsum(followers).tolist()]

        self.source = [src for src, _ in schedule.connections]
        self.target = [dst for _, dst in schedule.connections]
        fan_out, fan_in = Counter(self.source), Counter(self.target)
        self.alone = [fan_out[src] == 1 and fan_in[dst] == 1 for src, dst in schedule.connections]
        # A connection on its own: until when its NICs are busy.
        self.out_free = [0.0] * connections
        self.in_free = [0.0] * connections
        # A NIC that sends: active connections as (clock at the end of the transfer, connection).
        self.active: list[list[tuple[float, int]]] = [[] for _ in range(nranks)]
        self.sending = [False] * connections
        self.clock_bytes = [0.0] * nranks
        self.clock_read_ns = [0.0] * nranks
        self.next_sent_ns = [math.inf] * nranks
        self.to_divide = [False] * nranks
        self.rate_now = [0.0] * connections  # as it leaves the sender
        # A NIC that receives: its queue and what flows in, as of the time it was looked at last.
        self.rate_changes: list[deque[float]] = [deque() for _ in range(connections)]
        self.rate_there = [0.0] * connections  # as it reaches the receiver
        self.inflow = [0.0] * nranks
        self.queued_bytes = [0.0] * nranks
        self.queue_read_ns = [0.0] * nranks

        self.events: list[tuple[float, int]] = []
        self.arrival_ns = [0.0] * count

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
                self.arrival_ns[code] = now
                for at in range(self.first_follower[code], self.first_follower[code + 1]):
                    transfer = follower[at]
                    missing[transfer] -= 1
                    if missing[transfer] == 0:
                        connection = self.connection[transfer]
                        if self.queue[self.head[connection]] == transfer:
                            self._offer(connection, now)
            elif code < self.changed:
                self._take_last_byte(code - self.reached, now)
            elif code < self.sent:
                self._change_inflow(code - self.changed, now)
            elif code < self.divide:
                if now == self.next_sent_ns[code - self.sent]:  # else the rate was divided anew since
                    self._finish_sending(code - self.sent, now)
            else:
                self._divide_rate(code - self.divide, now)
        assert arrived == count, "a schedule is in topological order"
        return np.array(self.arrival_ns, np.float64)

    def _is_ready(self, connection: int) -> bool:
        head = self.head[connection]
        return head < self.end[connection] and self.missing[self.queue[head]] == 0

    def _offer(self, connection: int, now: float) -> None:
        """Let a connection send, whose next transfer has just become ready."""
        if self.alone[connection]:
            while self._is_ready(connection):
                self._send_alone(connection, now)
                self.head[connection] += 1
        elif not self.sending[connection]:  # else it goes on when it has finished
            rank = self.source[connection]
            self._read_clock(rank, now)
            self.sending[connection] = True
            end = self.clock_bytes[rank] + self.nbytes[self.queue[self.head[connection]]]
            heapq.heappush(self.active[rank], (end, connection))
            self._divide_soon(rank, now)

    def _send_alone(self, connection: int, now: float) -> None:
        transfer, latency = self.queue[self.head[connection]], self.latencies[connection]
        nbytes = self.nbytes[transfer]
        start = max(now, self.out_free[connection])
        sent = start + nbytes / self.rates[self.source[connection]]
        entered = max(start + latency, self.in_free[connection]) + nbytes / self.rates[self.target[connection]]
        self.out_free[connection], self.in_free[connection] = sent, entered
        heapq.heappush(self.events, (max(sent + latency, entered), transfer))

    def _read_clock(self, rank: int, now: float) -> None:
        """Bring a NIC's clock of served bytes up to date."""
        active = len(self.active[rank])
        if active:
            self.clock_bytes[rank] += (now - self.clock_read_ns[rank]) * self.rates[rank] / active
        self.clock_read_ns[rank] = now

    def _divide_soon(self, rank: int, now: float) -> None:
        self.next_sent_ns[rank] = math.inf
        if not self.to_divide[rank]:
            self.to_divide[rank] = True
            heapq.heappush(self.events, (now, self.divide + rank))

    def _divide_rate(self, rank: int, now: float) -> None:
        """Divide a NIC's rate among the connections that now send; those that stopped have been told."""
        self.to_divide[rank] = False
        active = self.active[rank]
        if not active:
            return
        share = self.rates[rank] / len(active)
        for _, connection in active:
            self._set_rate(connection, share, now)
        self.next_sent_ns[rank] = max(now, now + (active[0][0] - self.clock_bytes[rank]) / share)
        heapq.heappush(self.events, (self.next_sent_ns[rank], self.sent + rank))

    def _set_rate(self, connection: int, rate: float, now: float) -> None:
        if rate != self.rate_now[connection]:
            self.rate_now[connection] = rate
            self.rate_changes[connection].append(rate)
            heapq.heappush(self.events, (now + self.latencies[connection], self.changed + connection))

    def _finish_sending(self, rank: int, now: float) -> None:
        """Note that the transfers which end now are sent whole; their connections go on with the next, if it is ready."""
        active = self.active[rank]
        self._read_clock(rank, now)
        clock = self.clock_bytes[rank] = active[0][0]  # what it shows but for rounding
        stopped = False
        while active and active[0][0] <= clock * (1 + _CLOCK_TOLERANCE):
            end, connection = heapq.heappop(active)
            transfer = self.queue[self.head[connection]]
            self.head[connection] += 1
            heapq.heappush(self.events, (now + self.latencies[connection], self.reached + transfer))
            if self._is_ready(connection):
                heapq.heappush(active, (end + self.nbytes[self.queue[self.head[connection]]], connection))
            else:
                self.sending[connection] = False
                self._set_rate(connection, 0.0, now)
                stopped = True
        if stopped or not active:
            self._divide_soon(rank, now)
        else:
            share = self.rates[rank] / len(active)
            self.next_sent_ns[rank] = max(now, now + (active[0][0] - clock) / share)
            heapq.heappush(self.events, (self.next_sent_ns[rank], self.sent + rank))

    def _read_queue(self, rank: int, now: float) -> None:
        """Bring the queue before a NIC up to date."""
        growth = (now - self.queue_read_ns[rank]) * (self.inflow[rank] - self.rates[rank])
        self.queued_bytes[rank] = max(0.0, self.queued_bytes[rank] + growth)
        self.queue_read_ns[rank] = now

    def _change_inflow(self, connection: int, now: float) -> None:
        rank, rate = self.target[connection], self.rate_changes[connection].popleft()
        self._read_queue(rank, now)
        self.inflow[rank] += rate - self.rate_there[connection]
        self.rate_there[connection] = rate

    def _take_last_byte(self, transfer: int, now: float) -> None:
        """Note that a transfer has reached the queue before its receiver: it has arrived when that has drained."""
        rank = self.target[self.connection[transfer]]
        self._read_queue(rank, now)
        heapq.heappush(self.events, (now + self.queued_bytes[rank] / self.rates[rank], transfer))


def _latency_of_connections(schedule: Schedule, latency_ns: Latency) -> list[float]:
    if callable(latency_ns):
        return [float(latency_ns(src, dst)) for src, dst in schedule.connections]
    table = np.asarray(latency_ns, np.float64)
    if table.shape == (len(schedule.connections),):
        return [float(latency) for latency in table]
    if table.shape != (schedule.nranks, schedule.nranks):
        raise ValueError(
            f"latency_ns must have shape ({schedule.nranks}, {schedule.nranks}) or ({len(schedule.connections)},), "
            f"got {table.shape}"
        )
    return [float(table[src, dst]) for src, dst in schedule.connections]


def _check_mtu(mtu: int) -> None:
    if mtu < 4 or mtu % 4:
        raise ValueError(f"mtu must be a positive multiple of 4, got {mtu}")
