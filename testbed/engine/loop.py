"""The tick loop: what arrived, what that releases, what was lost, what each NIC may send now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.engine.delay_line import DelayLine
from testbed.engine.frames import FrameWriter
from testbed.engine.nic import NicPacer, share_budget
from testbed.engine.observer import ShapingObserver
from testbed.engine.progress import Progress
from testbed.measure.samples import MachineSamples
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, Connection, qp_index, ranks_of
from testbed.engine.stream import PacketStreams, build_streams
from testbed.errors import RunError
from testbed.roce.wire import LINK_OVERHEAD_BYTES, Opcode, frame_bytes

# Frames in a host's queue beyond which its NIC waits: a paused or starved host then stops by itself.
_CREDIT_FRAMES = 48
# Timeouts are looked for this often; a timeout is hundreds of ticks.
_TIMEOUT_CHECK_TICKS = 16
# IB's retry_cnt is three bits: seven retries.
RETRY_LIMIT = 7
# A probe frame every so many ticks: enough samples for a p99, too few to matter.
_PROBE_TICKS = 8
# Shaping is judged over spans of many ticks, so a look every so many is enough.
_SHAPING_TICKS = 4
# Nothing arrived for this many retransmission timeouts: something else than loss is wrong.
_STALL_TIMEOUTS = 40


class Clock(Protocol):
    """The only source of time."""

    def now_ns(self) -> int:
        """Return the time, ns."""

    def sleep_until_ns(self, when_ns: int) -> None:
        """Sleep until a time."""


class Probe(Protocol):
    """A frame sent through the fabric's CPU alone, to see how long it waits there."""

    def send(self, now_ns: int) -> None:
        """Send a probe unless one is under way."""

    def waits_ns(self) -> list[int]:
        """Return the wait of every probe so far."""


@dataclass(frozen=True)
class EngineSetup:
    """All that the loop needs to know, as values.

    Attributes:
        connections: Both ends of every connection.
        one_way_ns: Propagation and frame times of each connection's path, shape ``(connections,)``, emulated.
        time_dilation: Wall time per emulated time.
        wall_tick_ns: Length of a tick.
        mtu: Payload of a full packet, bytes.
        nic_port: Port id of each rank's NIC, shape ``(ranks,)``.
        wall_port_rate_bytes_per_s: Line rate of each port id, shape ``(ports + 1,)``.
        data_priority: Priority of the data frames.
        retransmit_timeout_ns: Emulated.
    """

    connections: Sequence[Connection]
    one_way_ns: npt.NDArray[np.int64]
    time_dilation: float
    wall_tick_ns: int
    mtu: int
    nic_port: npt.NDArray[np.int64]
    wall_port_rate_bytes_per_s: npt.NDArray[np.float64]
    data_priority: int
    retransmit_timeout_ns: int


@dataclass
class IterationResult:
    """What one iteration did.

    Attributes:
        wall_ns: From release to the last arrival.
        retransmitted_packets: Packets sent again.
    """

    wall_ns: int
    retransmitted_packets: int


@dataclass
class _Recorded:
    lateness_ns: list[int] = field(default_factory=list)
    busy_ns: list[int] = field(default_factory=list)
    nic_lag_ns: list[float] = field(default_factory=list)
    wall_duration_ns: int = 0


class TickLoop:
    """Runs schedules over a fabric's QPs.

    Args:
        setup: The run as values.
        queues: The fabric's queue counters, shape ``(ports + 1, 8)``.
        qps: The fabric's QP table.
        sockets: File descriptor of each rank's packet socket.
        clock: Source of time.
        probe: The machine's fidelity probe.
        describe_connection: Names a connection for error messages.
    """

    def __init__(
        self,
        setup: EngineSetup,
        *,
        queues: npt.NDArray[Any],
        qps: npt.NDArray[Any],
        sockets: Sequence[int],
        clock: Clock,
        probe: Probe,
        describe_connection: Callable[[int], str],
    ) -> None:
        self._setup = setup
        self._clock = clock
        self._probe = probe
        self._sockets = list(sockets)
        self._describe = describe_connection
        connections = list(setup.connections)
        count = len(connections)
        self._nic = ranks_of(connections)
        self._by_nic = np.argsort(self._nic, kind="stable")
        self._configure(qps, connections)
        self._requesters = qps[qp_index(0, REQUESTER) : 2 * count : 2]
        self._responders = qps[qp_index(0, RESPONDER) : 2 * count : 2]
        # Signed views of the counters: differences are then plain arithmetic.
        data = queues[:, setup.data_priority]
        self._enq_bytes, self._deq_bytes = data["enq_bytes"].view(np.int64), data["deq_bytes"].view(np.int64)
        self._deq_packets = data["deq_packets"].view(np.int64)
        self._rx_messages = self._responders["rx_messages"].view(np.int64)
        self._acked = self._requesters["acked_packets"].view(np.int64)
        self._naks = self._requesters["naks_packets"].view(np.int64)
        self._nak_position = self._requesters["nak_position"].view(np.int64)
        dilation = setup.time_dilation
        wall_one_way = np.rint(setup.one_way_ns * dilation).astype(np.int64)
        self._arrivals = DelayLine(wall_one_way, 1, setup.wall_tick_ns)
        self._feedback = DelayLine(2 * wall_one_way, 3, setup.wall_tick_ns)
        self._wall_timeout_ns = int(setup.retransmit_timeout_ns * dilation)
        nic_rate = setup.wall_port_rate_bytes_per_s[setup.nic_port]
        self._frame_wire_bytes = frame_bytes(Opcode.WRITE_MIDDLE, setup.mtu) + LINK_OVERHEAD_BYTES
        self._pacer = NicPacer(1e9 / nic_rate, self._frame_wire_bytes)
        self._shaping = ShapingObserver(setup.wall_port_rate_bytes_per_s, self._frame_wire_bytes)
        initial_psns = np.array([connection.initial_psn for connection in connections], np.int64)
        self._writer = FrameWriter([c.requester for c in connections], initial_psns, setup.mtu)
        self._psn_offset = np.zeros(count, np.int64)
        self._message_offset = np.zeros(count, np.int64)
        self._nak_seen = np.zeros(count, np.int64)
        self._recorded = _Recorded()

    def _configure(self, qps: npt.NDArray[Any], connections: list[Connection]) -> None:
        """Write the QP table; a QP is made active last."""
        qps["active"] = 0
        for name in qps.dtype.names or ():
            if name != "active":
                qps[name] = 0
        for index, connection in enumerate(connections):
            for role, end in ((REQUESTER, connection.requester), (RESPONDER, connection.responder)):
                row = qps[qp_index(index, role)]
                row["peer_qpn"] = end.peer_qpn
                row["udp_source_port"] = end.udp_source_port
                row["initial_rx_psn"] = connection.initial_psn
                row["initial_tx_psn"] = connection.initial_psn
        qps["active"][: 2 * len(connections)] = 1

    def run_iteration(
        self, schedule: Schedule, *, record: bool, streams: PacketStreams | None = None
    ) -> IterationResult:
        """Run a schedule once, from the release of its first transfers to its last arrival.

        Args:
            schedule: What to send; its connections are the setup's.
            record: Keep the machine's samples (not while warming up).
            streams: ``build_streams(schedule, mtu)``, if the caller has it.

        Raises:
            RunError: A QP ran out of retries, or nothing moves any more.
        """
        streams = streams or build_streams(schedule, self._setup.mtu)
        progress = Progress(schedule, streams)
        writer, pacer, clock = self._writer, self._pacer, self._clock
        writer.restart(schedule, streams, self._psn_offset)
        nic, nic_port = self._nic, self._setup.nic_port
        nics, count = len(nic_port), len(nic)
        tick_ns = self._setup.wall_tick_ns
        recorded = self._recorded
        released = progress.released_packets
        sent = np.zeros(count, np.int64)
        high_water = np.zeros(count, np.int64)
        seen_messages = np.zeros(count, np.int64)
        acked_before = np.zeros(count, np.int64)
        retries = np.zeros(count, np.int64)
        retransmitted = 0
        rewound = False  # once a QP went back, sent packets may be sent before
        self._arrivals.reset((self._rx_messages - self._message_offset)[None, :])
        self._take_feedback()
        self._feedback.reset(self._feedback.next_snapshot)
        self._nak_seen[:] = self._naks

        begin = clock.now_ns()
        progress_ns = np.full(count, begin, np.int64)
        last_arrival_ns = due = begin
        ticks = 0
        while True:
            now = clock.now_ns()
            lateness = now - due

            np.subtract(self._rx_messages, self._message_offset, out=self._arrivals.next_snapshot[0])
            arrivals = self._arrivals.advance(now)[0]
            moved = np.flatnonzero(arrivals > seen_messages)
            if len(moved):
                progress.record_arrivals(moved.tolist(), arrivals[moved].tolist())
                seen_messages[moved] = arrivals[moved]
                last_arrival_ns = now
                if not progress.pending_transfers:
                    break

            self._take_feedback()
            acked, naks, nak_position = self._feedback.advance(now)
            advanced = acked > acked_before
            if advanced.any():
                np.maximum(acked_before, acked, out=acked_before)
                progress_ns[advanced] = now
                retries[advanced] = 0
                if rewound:
                    np.maximum(sent, acked_before, out=sent)
            refused = naks > self._nak_seen
            if refused.any():
                self._nak_seen[refused] = naks[refused]
                target = np.maximum(nak_position, acked_before)
                back = np.flatnonzero(refused & (target < sent))
                sent[back] = target[back]
                progress_ns[back] = now
                writer.rewind(back, sent)
                rewound = True
            if ticks % _TIMEOUT_CHECK_TICKS == 0:
                back = self._find_timeouts(now, sent, acked_before, progress_ns, retries)
                if len(back):
                    sent[back] = acked_before[back]
                    progress_ns[back] = now
                    writer.rewind(back, sent)
                    rewound = True
                if now - last_arrival_ns > _STALL_TIMEOUTS * self._wall_timeout_ns:
                    raise RunError(
                        f"nothing arrived for {_STALL_TIMEOUTS} retransmission timeouts",
                        hint="`testbed inspect` shows where frames are; `testbed doctor` what the machine lacks",
                    )
                progress_ns[sent == acked_before] = now

            deq = self._deq_bytes.copy()  # before enq: a depth is never negative
            depth = self._enq_bytes - deq
            if record and ticks % _SHAPING_TICKS == 0:
                self._shaping.observe(now, depth, deq + self._deq_packets * LINK_OVERHEAD_BYTES)
            wants = released - sent
            active = self._by_nic[(wants > 0)[self._by_nic]]
            if len(active):
                credit = _CREDIT_FRAMES - depth[nic_port] // self._frame_wire_bytes
                active_nic = nic[active]
                nic_wants = np.bincount(active_nic, weights=wants[active], minlength=nics).astype(np.int64)
                budget = pacer.budget(now, nic_wants, credit)
                shares = share_budget(active_nic, wants[active], budget, ticks)
                taken = self._send(active, active_nic, shares, sent)
                if rewound:
                    again = np.minimum(taken, high_water[active] - sent[active])
                    retransmitted += int(np.maximum(again, 0).sum())
                sent[active] += taken
                np.maximum(high_water, sent, out=high_water)
                frames = np.bincount(active_nic, weights=taken, minlength=nics)
                pacer.charge(now, frames, nic_wants > frames)
                writer.prepare(sent, _CREDIT_FRAMES)
            else:
                pacer.rest()

            if ticks % _PROBE_TICKS == 0:
                self._probe.send(now)
            if record:
                recorded.lateness_ns.append(lateness)
                recorded.nic_lag_ns.append(float(pacer.lag_ns.max()))
                recorded.busy_ns.append(clock.now_ns() - now)
            ticks += 1
            due = max(due + tick_ns, now)
            clock.sleep_until_ns(due)
        end = clock.now_ns()
        if record:
            recorded.wall_duration_ns += end - begin
        self._settle(streams)
        self._psn_offset += streams.packets
        self._message_offset += np.array([len(t) for t in streams.transfers_of], np.int64)
        return IterationResult(last_arrival_ns - begin, retransmitted)

    def _take_feedback(self) -> None:
        """Write acked, NAK count and NAK position of every requester, in packets of this iteration, as a snapshot."""
        row = self._feedback.next_snapshot
        np.subtract(self._acked, self._psn_offset, out=row[0])
        row[1] = self._naks
        np.subtract(self._nak_position, self._psn_offset, out=row[2])

    def _find_timeouts(
        self,
        now_ns: int,
        sent: npt.NDArray[np.int64],
        acked: npt.NDArray[np.int64],
        progress_ns: npt.NDArray[np.int64],
        retries: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.intp]:
        """Return the QPs whose oldest packet has waited too long for its ACK.

        Raises:
            RunError: One of them has no retry left.
        """
        expired = np.flatnonzero((sent > acked) & (now_ns - progress_ns > self._wall_timeout_ns))
        retries[expired] += 1
        dead = np.flatnonzero(retries > RETRY_LIMIT)
        if len(dead):
            raise RunError(f"{self._describe(int(dead[0]))}: no ACK after {RETRY_LIMIT} retries")
        return expired

    def _send(
        self,
        active: npt.NDArray[np.int64],
        nic: npt.NDArray[np.int64],
        shares: npt.NDArray[np.int64],
        sent: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Send ``shares`` packets of the active connections; return how many the kernel took of each.

        Args:
            active: Connections, in the order of their NICs, shape ``(n,)``.
            nic: NIC of each.
            shares: Packets of each.
            sent: Next packet of every connection.
        """
        writer = self._writer
        first = sent[active]
        shares = np.minimum(shares, writer.ready(sent)[active])
        total = int(shares.sum())
        if not total:
            return shares
        row = np.repeat(np.arange(len(active)), shares)
        offset = np.arange(total) - np.repeat(np.cumsum(shares) - shares, shares)
        if len(nic) > 1 and (nic[1:] == nic[:-1]).any():
            order = np.lexsort((row, offset, nic[row]))  # QPs of a NIC take turns, packet by packet
            row, offset = row[order], offset[order]
        ring = writer.ring
        ring.load(writer.slots_of(active[row], first[row] + offset))
        position = 0
        taken = shares
        for host, frames in enumerate(np.bincount(nic, weights=shares).astype(np.int64).tolist()):
            if frames:
                done = ring.send(self._sockets[host], position, frames)
                if done < frames:
                    refused = np.bincount(row[position + done : position + frames], minlength=len(active))
                    taken = taken - refused
                position += frames
        return taken

    def _settle(self, streams: PacketStreams) -> None:
        """Wait until every packet is acknowledged and every data queue empty.

        What is still under way when the last transfer arrives is ACKs and, after a loss, duplicates.
        """
        deadline = self._clock.now_ns() + self._wall_timeout_ns * _STALL_TIMEOUTS
        total = self._psn_offset + streams.packets
        while self._clock.now_ns() < deadline:
            unacked = self._acked < total
            if int(self._deq_bytes.sum()) == int(self._enq_bytes.sum()):
                if not unacked.any():
                    return
                # The data queues are empty and control queues drain in microseconds: this ACK is lost, its data is not.
                self._acked[unacked] = total[unacked]
            self._clock.sleep_until_ns(self._clock.now_ns() + self._setup.wall_tick_ns)
        raise RunError("the fabric did not drain after the last transfer")

    def samples(self) -> MachineSamples:
        """Return what was noted about the machine in the recorded iterations."""
        self._shaping.finish()
        recorded = self._recorded
        return MachineSamples(
            np.array(recorded.lateness_ns, np.int64),
            np.array(recorded.busy_ns, np.int64),
            np.array(self._probe.waits_ns(), np.int64),
            np.array(recorded.nic_lag_ns),
            self._shaping.lost_ns,
            self._shaping.backlogged_ns,
            recorded.wall_duration_ns,
        )
