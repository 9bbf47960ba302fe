"""Pieces of messages handed to whichever queue pair of a connection has credit (``qp_strategy: dynamic``).

Elsewhere a schedule says beforehand what each queue pair sends. Here that is decided as the run goes: a `QpDispatcher` is the
progress of the schedule and, at once, the packets of every queue pair, which grow as pieces are handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.engine.stream import PacketStreams, build_streams

CREDIT_PIECES = 2
"""Pieces that a queue pair may have outstanding: one under way, and one behind it, so that it never waits for an ACK alone."""


class QpDispatcher:
    """One iteration of a schedule whose transfers are shared out as queue pairs have credit.

    The schedule's connections are pairs of ranks; queue pairs ``qps * c`` to ``qps * c + qps - 1`` are those of connection
    ``c``. Its transfers are released in order and count as arrived in order, as on a connection with one queue pair: what
    overtakes waits. In between each goes to the queue pair with the fewest packets outstanding, once one has credit.

    The arrays are those of `testbed.engine.stream.PacketStreams`, with room in every queue pair for all that its connection
    sends; memory that is not written is never there. `restart` must be called before each iteration, the first included.

    Args:
        schedule: The pieces.
        qps: Queue pairs per connection; at least 1.
        mtu: Payload of a full packet, bytes.
        networked: Connections, the first ones, that have queue pairs; by default all. The others stay inside hosts.

    Attributes:
        qps: Queue pairs per connection.
        released_packets: How far each queue pair may send, shape ``(queue pairs,)``.
        released_at_ns: When it was last allowed to go further, likewise.
        pending_transfers: Transfers that have not arrived.
        wire_bytes_at_end: Wire bytes that the queue pair of each transfer has sent at its end, in the arrays' count.

    Source:
        Meta's NCCLX, ``NCCL_CTRAN_IB_VC_MODE=dqplb`` (dynamic queue pair load balancing).
    """

    def __init__(self, schedule: Schedule, qps: int, mtu: int, networked: int | None = None) -> None:
        pairs = self._networked = len(schedule.connections) if networked is None else networked
        self.qps = qps
        self._pieces: PacketStreams = build_streams(
            schedule, mtu, pairs
        )  # a connection's transfers, one after the other
        packets = self._pieces.packets
        self._of_pair = [transfers.tolist() for transfers in self._pieces.transfers_of]
        self._pair_of = schedule.connection.tolist()
        ends = self._pieces.message_end_packet + self._pieces.first_packet[np.minimum(schedule.connection, pairs)]
        size = np.maximum(1, -(-schedule.nbytes // mtu))
        self._begin, self._size = (ends - size).tolist(), size.tolist()
        self._credit_packets = CREDIT_PIECES * int(size[schedule.connection < pairs].max(initial=1))
        waiting = np.diff(schedule.dep_offsets)
        self._waiting_at_start = waiting.tolist()
        owners = np.repeat(np.arange(len(schedule)), waiting)
        self._dependents = owners[np.argsort(schedule.deps, kind="stable")].tolist()
        counts = np.bincount(schedule.deps, minlength=len(schedule))
        self._dependent_offsets = np.concatenate(([0], np.cumsum(counts))).tolist()

        # One more than the packets of a queue pair: its wire bytes have an entry behind the last packet.
        room = np.repeat(packets + 1, qps)
        self.first_packet: npt.NDArray[np.int64] = np.concatenate(([0], np.cumsum(room)))
        total = int(room.sum())
        self.opcode = np.zeros(total, np.uint8)
        self.payload_bytes = np.zeros(total, np.uint16)
        self.message = np.zeros(total, np.int32)
        self.wire_bytes_before = np.zeros(total + 1, np.int64)
        self.released_packets = np.zeros(pairs * qps, np.int64)
        self.released_at_ns = np.zeros(pairs * qps)
        self.transfers_of: list[list[int]] = []

    @property
    def packets(self) -> npt.NDArray[np.int64]:
        """Return the packets that each queue pair was given so far: the array that grows, not a copy."""
        return self.released_packets

    @property
    def messages(self) -> npt.NDArray[np.int64]:
        """Return the messages that each queue pair was given so far."""
        return np.array([len(transfers) for transfers in self.transfers_of], np.int64)

    @property
    def packets_of_connections(self) -> npt.NDArray[np.int64]:
        """Return the packets that the queue pairs of each connection are given in all."""
        return self._pieces.packets

    def restart(self, release_inside: Callable[[int, float], None] | None = None) -> None:
        """Begin a new iteration: every queue pair is empty, and those that may send something are given it.

        Args:
            release_inside: Told of the transfers inside hosts: a transfer and when it was released.
        """
        self._release_inside = release_inside
        self._ended: list[tuple[int, float]] = []
        pairs, rows, count = len(self._of_pair), self._networked * self.qps, len(self._waiting_at_start)
        self._waiting = list(self._waiting_at_start)
        self.pending_transfers = count
        self.wire_bytes_at_end = [0] * count
        self._landed_ns: list[float | None] = [None] * count
        self._arrived = [0] * pairs  # transfers of a connection that have arrived in order
        self._arrived_at_ns = [0.0] * pairs
        self._released = [0] * pairs
        self._dispatched = [0] * pairs
        self._fresh_ns: dict[int, float] = {}  # connections that were released further since the last dispatch
        self._open: set[int] = set()  # connections with released transfers that no queue pair has yet
        self._seen = [0] * rows
        self.transfers_of = [[] for _ in range(rows)]
        self.released_packets[:] = 0
        self.released_at_ns[:] = 0.0
        for pair in range(pairs):
            self._release(pair, 0.0)
        self.dispatch(np.zeros(rows, np.int64), 0.0)

    def record_arrivals(
        self, queue_pairs: Iterable[int], messages: Iterable[int], arrived_at_ns: Callable[[int, int], float]
    ) -> float:
        """Take note of arrivals; as `testbed.engine.progress.Progress.record_arrivals`."""
        latest = 0.0
        for row, arrived in zip(queue_pairs, messages, strict=True):
            for transfer in self.transfers_of[row][self._seen[row] : arrived]:
                self.pending_transfers -= 1
                time_ns = self._landed_ns[transfer] = arrived_at_ns(row, transfer)
                latest = max(latest, time_ns)
            self._seen[row] = arrived
            self._take_in_order(row // self.qps)
        return latest

    def record_inside(self, transfer: int, time_ns: float) -> None:
        """Take note that a transfer inside a host has arrived, and when."""
        self.pending_transfers -= 1
        self._landed_ns[transfer] = time_ns
        self._take_in_order(self._pair_of[transfer])

    def take_ended(self) -> list[tuple[int, float]]:
        """Return the queue pairs whose connection has sent all since the last call, and when the last of it arrived."""
        ended, self._ended = self._ended, []
        return ended

    def dispatch(self, acked_packets: npt.NDArray[np.int64], now_ns: float) -> list[int]:
        """Give released transfers to queue pairs with credit.

        Args:
            acked_packets: Packets of each queue pair that are acknowledged, shape ``(queue pairs,)``.
            now_ns: The clock: when those that had waited for credit may leave.

        Returns:
            The queue pairs that were given something.
        """
        fed: dict[int, None] = {}
        for pair in sorted(self._open):
            rows = range(pair * self.qps, (pair + 1) * self.qps)
            outstanding = {row: int(self.released_packets[row] - acked_packets[row]) for row in rows}
            since_ns = self._fresh_ns.get(pair, now_ns)
            while self._dispatched[pair] < self._released[pair]:
                transfer = self._of_pair[pair][self._dispatched[pair]]
                size = self._size[transfer]
                # Of queue pairs alike, that which was given least.
                row = min(rows, key=lambda one: (outstanding[one], len(self.transfers_of[one]), one))
                if outstanding[row] and outstanding[row] + size > self._credit_packets:
                    break
                self._append(row, transfer)
                outstanding[row] += size
                self.released_at_ns[row] = since_ns
                self._dispatched[pair] += 1
                fed[row] = None
            else:
                self._open.discard(pair)
        self._fresh_ns.clear()
        return list(fed)

    def _append(self, row: int, transfer: int) -> None:
        """Write a transfer's packets behind those of a queue pair."""
        size, source = self._size[transfer], self._begin[transfer]
        into = int(self.first_packet[row] + self.released_packets[row])
        pieces = self._pieces
        self.opcode[into : into + size] = pieces.opcode[source : source + size]
        self.payload_bytes[into : into + size] = pieces.payload_bytes[source : source + size]
        self.message[into : into + size] = transfer
        wire = pieces.wire_bytes_before[source + 1 : source + size + 1] - pieces.wire_bytes_before[source]
        before = int(self.wire_bytes_before[into]) if self.released_packets[row] else 0
        self.wire_bytes_before[into] = before
        self.wire_bytes_before[into + 1 : into + size + 1] = before + wire
        self.wire_bytes_at_end[transfer] = before + int(wire[-1])
        self.transfers_of[row].append(transfer)
        self.released_packets[row] += size

    def _take_in_order(self, pair: int) -> None:
        """Let what waits for the transfers of a connection go on, as far as these have arrived without a gap."""
        queue = self._of_pair[pair]
        offsets = self._dependent_offsets
        while self._arrived[pair] < len(queue):
            transfer = queue[self._arrived[pair]]
            landed_ns = self._landed_ns[transfer]
            if landed_ns is None:
                return
            self._arrived[pair] += 1
            self._arrived_at_ns[pair] = max(self._arrived_at_ns[pair], landed_ns)
            for dependent in self._dependents[offsets[transfer] : offsets[transfer + 1]]:
                self._waiting[dependent] -= 1
                if not self._waiting[dependent]:
                    self._release(self._pair_of[dependent], self._arrived_at_ns[pair])
        if queue and pair < self._networked:
            rows = range(pair * self.qps, (pair + 1) * self.qps)
            self._ended += [(row, self._arrived_at_ns[pair]) for row in rows]

    def _release(self, pair: int, time_ns: float) -> None:
        """Let a connection go as far as it may from now on."""
        queue, before = self._of_pair[pair], self._released[pair]
        position = before
        while position < len(queue) and not self._waiting[queue[position]]:
            position += 1
        if position == before:
            return
        self._released[pair] = position
        if pair < self._networked:
            self._open.add(pair)
            self._fresh_ns[pair] = time_ns
            return
        if self._release_inside is None:
            raise ValueError(f"transfer {queue[before]} stays inside a host, and nothing joins the ranks of a host")
        for transfer in queue[before:position]:
            self._release_inside(transfer, time_ns)
