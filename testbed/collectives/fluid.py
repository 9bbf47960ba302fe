"""Ports that connections share, as fluids: the event model behind the ideal completion time."""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence

_CLOCK_TOLERANCE = 1e-12
"""Relative difference below which two transfers end together: far above float64 rounding, far below a byte."""

# What an event is, in the order in which those of one moment are taken; below it, an event's number names whom it concerns.
_KIND_SHIFT = 40
_ARRIVED, _REACHED, _CHANGED, _SENT, _DIVIDE = (kind << _KIND_SHIFT for kind in range(5))
_NUMBER_MASK = (1 << _KIND_SHIFT) - 1


class FluidPorts:
    """Transfers over connections that share ports.

    A port shares its rate out evenly among its connections that have something to send. What reaches a port from several
    queues before it, first come first served, and enters at the port's rate; nothing slows senders down. A connection sends
    the transfers that were released, in order, one at a time.

    One heap holds all events as ``(time, kind and number)``: a transfer has arrived, its last byte has reached the queue
    before the receiver, the rate of a connection has changed there, a port has sent a transfer whole, a port's rate is to be
    divided anew (so that what becomes ready at the same moment is counted once). Where a port has a single connection out,
    and its peer a single one in, sending and receiving are plain sums and only the first kind is needed.

    Sending is kept in virtual time: a port's clock of served bytes per connection runs at ``rate / active``, so a transfer
    ends when it shows what it showed at the transfer's begin plus the transfer's bytes.

    Args:
        connection: Connection of each transfer.
        nbytes: Size of each transfer.
        source: Port that each connection leaves by.
        target: Port that each connection enters by.
        latency_ns: Of each connection.
        rate_bytes_per_ns: Of each port, out and in alike.
    """

    def __init__(
        self,
        *,
        connection: Sequence[int],
        nbytes: Sequence[int],
        source: Sequence[int],
        target: Sequence[int],
        latency_ns: Sequence[float],
        rate_bytes_per_ns: Sequence[float],
    ) -> None:
        connections, ports = len(source), len(rate_bytes_per_ns)
        self._connection = connection
        self._nbytes = nbytes
        self._source = source
        self._target = target
        self._latencies = latency_ns
        self._rates = rate_bytes_per_ns
        fan_out, fan_in = Counter(source), Counter(target)
        self._alone = [fan_out[src] == 1 and fan_in[dst] == 1 for src, dst in zip(source, target, strict=True)]
        # A connection on its own: until when its ports are busy.
        self._out_free = [0.0] * connections
        self._in_free = [0.0] * connections
        # A port that sends: active connections as (clock at the end of the transfer, connection).
        self._active: list[list[tuple[float, int]]] = [[] for _ in range(ports)]
        # Released and not yet sent whole; the first is being sent.
        self._released: list[deque[int]] = [deque() for _ in range(connections)]
        self._clock_bytes = [0.0] * ports
        self._clock_read_ns = [0.0] * ports
        self._next_sent_ns = [math.inf] * ports
        self._to_divide = [False] * ports
        self._rate_now = [0.0] * connections  # as it leaves the sender
        # A port that receives: its queue and what flows in, as of the time it was looked at last.
        self._rate_changes: list[deque[float]] = [deque() for _ in range(connections)]
        self._rate_there = [0.0] * connections  # as it reaches the receiver
        self._inflow = [0.0] * ports
        self._queued_bytes = [0.0] * ports
        self._queue_read_ns = [0.0] * ports
        self._events: list[tuple[float, int]] = []

    @property
    def next_ns(self) -> float:
        """Return when the next event is; infinite when nothing is under way."""
        return self._events[0][0] if self._events else math.inf

    def release(self, transfer: int, now_ns: float) -> None:
        """Let a transfer be sent from ``now_ns`` on, which is not before the last event."""
        connection = self._connection[transfer]
        if self._alone[connection]:
            self._send_alone(transfer, connection, now_ns)
            return
        released = self._released[connection]
        released.append(transfer)
        if len(released) == 1:
            port = self._source[connection]
            self._read_clock(port, now_ns)
            heapq.heappush(self._active[port], (self._clock_bytes[port] + self._nbytes[transfer], connection))
            self._divide_soon(port, now_ns)

    def arrivals(self, until_ns: float = math.inf) -> Iterator[tuple[float, int]]:
        """Yield what arrives up to a time as ``(time, transfer)``, in order; more may be released meanwhile."""
        events = self._events
        while events and events[0][0] <= until_ns:
            now, code = heapq.heappop(events)
            number = code & _NUMBER_MASK
            if code < _REACHED:
                yield now, number
            elif code < _CHANGED:
                self._take_last_byte(number, now)
            elif code < _SENT:
                self._change_inflow(number, now)
            elif code < _DIVIDE:
                if now == self._next_sent_ns[number]:  # else the rate was divided anew since
                    self._finish_sending(number, now)
            else:
                self._divide_rate(number, now)

    def _push(self, when_ns: float, kind: int, number: int) -> None:
        heapq.heappush(self._events, (when_ns, kind | number))

    def _send_alone(self, transfer: int, connection: int, now: float) -> None:
        nbytes, latency = self._nbytes[transfer], self._latencies[connection]
        start = max(now, self._out_free[connection])
        sent = start + nbytes / self._rates[self._source[connection]]
        entered = max(start + latency, self._in_free[connection]) + nbytes / self._rates[self._target[connection]]
        self._out_free[connection], self._in_free[connection] = sent, entered
        self._push(max(sent + latency, entered), _ARRIVED, transfer)

    def _read_clock(self, port: int, now: float) -> None:
        """Bring a port's clock of served bytes up to date."""
        active = len(self._active[port])
        if active:
            self._clock_bytes[port] += (now - self._clock_read_ns[port]) * self._rates[port] / active
        self._clock_read_ns[port] = now

    def _divide_soon(self, port: int, now: float) -> None:
        self._next_sent_ns[port] = math.inf
        if not self._to_divide[port]:
            self._to_divide[port] = True
            self._push(now, _DIVIDE, port)

    def _divide_rate(self, port: int, now: float) -> None:
        """Divide a port's rate among the connections that now send; those that stopped have been told."""
        self._to_divide[port] = False
        active = self._active[port]
        if not active:
            return
        share = self._rates[port] / len(active)
        for _, connection in active:
            self._set_rate(connection, share, now)
        self._plan_next_sent(port, share, now)

    def _plan_next_sent(self, port: int, share: float, now: float) -> None:
        self._next_sent_ns[port] = max(now, now + (self._active[port][0][0] - self._clock_bytes[port]) / share)
        self._push(self._next_sent_ns[port], _SENT, port)

    def _set_rate(self, connection: int, rate: float, now: float) -> None:
        if rate != self._rate_now[connection]:
            self._rate_now[connection] = rate
            self._rate_changes[connection].append(rate)
            self._push(now + self._latencies[connection], _CHANGED, connection)

    def _finish_sending(self, port: int, now: float) -> None:
        """Note that the transfers which end now are sent whole; their connections go on with the next, if it is released."""
        active = self._active[port]
        self._read_clock(port, now)
        clock = self._clock_bytes[port] = active[0][0]  # what it shows but for rounding
        stopped = False
        while active and active[0][0] <= clock * (1 + _CLOCK_TOLERANCE):
            end, connection = heapq.heappop(active)
            released = self._released[connection]
            self._push(now + self._latencies[connection], _REACHED, released.popleft())
            if released:
                heapq.heappush(active, (end + self._nbytes[released[0]], connection))
            else:
                self._set_rate(connection, 0.0, now)
                stopped = True
        if stopped or not active:
            self._divide_soon(port, now)
        else:
            self._plan_next_sent(port, self._rates[port] / len(active), now)

    def _read_queue(self, port: int, now: float) -> None:
        """Bring the queue before a port up to date."""
        growth = (now - self._queue_read_ns[port]) * (self._inflow[port] - self._rates[port])
        self._queued_bytes[port] = max(0.0, self._queued_bytes[port] + growth)
        self._queue_read_ns[port] = now

    def _change_inflow(self, connection: int, now: float) -> None:
        port, rate = self._target[connection], self._rate_changes[connection].popleft()
        self._read_queue(port, now)
        self._inflow[port] += rate - self._rate_there[connection]
        self._rate_there[connection] = rate

    def _take_last_byte(self, transfer: int, now: float) -> None:
        """Note that a transfer has reached the queue before its receiver: it has arrived when that has drained."""
        port = self._target[self._connection[transfer]]
        self._read_queue(port, now)
        self._push(now + self._queued_bytes[port] / self._rates[port], _ARRIVED, transfer)
