"""The tick loop: what arrived, what that releases, what was lost, what each NIC may send now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.engine.admission import Admission, NoAdmission
from testbed.engine.data_queues import DataQueues
from testbed.engine.delay_line import DelayLine
from testbed.engine.dispatch import QpDispatcher
from testbed.engine.faults import Faults, NoFaults
from testbed.engine.flow_control import FlowControl, NoFlowControl
from testbed.engine.frames import FrameWriter
from testbed.engine.intra_host import IntraHostTransfers
from testbed.engine.nic import NicPacer, share_budget
from testbed.engine.observer import ShapingObserver
from testbed.engine.progress import Progress
from testbed.engine.qp_table import adjacent_fields, write_qp_table
from testbed.engine.rate_limit import NoRateLimit, RateLimit
from testbed.engine.recorder import NoRecorder, Recorder
from testbed.engine.recovery import GoBackN, LossRecovery, Resent, Selective
from testbed.engine.sender import FrameSender
from testbed.engine.setup import Clock, EngineSetup, IterationResult, Probe
from testbed.engine.stream import PacketStreams, build_streams
from testbed.errors import RunError
from testbed.measure.samples import MachineSamples
from testbed.roce.queue_pairs import NIC_QUEUE_FRAMES, REQUESTER, RESPONDER, nics_of, qp_index
from testbed.roce.wire import LINK_OVERHEAD_BYTES, Opcode, data_tos, frame_bytes

_MIN_CREDIT_FRAMES = 8
# While the fabric's CPU stalls, what all hosts may have sent must fit into its backlog (net.core.netdev_max_backlog).
_BACKLOG_SHARE = 0.6
# Timeouts are looked for this often; a timeout is hundreds of ticks.
_TIMEOUT_CHECK_TICKS = 16
# Frames leave in bursts of a tick, which part on several paths: beside a round trip, what a packet may be overtaken by.
_REORDER_TICKS = 4
# A probe frame every so many ticks: enough samples for a p99, too few to matter.
_PROBE_TICKS = 8
# What is judged over spans of many ticks is looked at every so many, as are the rings of frames to come.
_LOOK_TICKS = 4
# More than a connection can send between two such looks.
_REFILL_MARGIN_PACKETS = 2 * NIC_QUEUE_FRAMES
# Nothing moved for this many ticks: the fabric is at rest. Far more than the slowest frame time of a dilated link.
_REST_TICKS = 200
# Nothing arrived for this many retransmission timeouts: something else than loss is wrong.
_STALL_TIMEOUTS = 40


@dataclass
class _Recorded:
    lateness_ns: list[int] = field(default_factory=list)
    busy_ns: list[int] = field(default_factory=list)
    nic_lag_ns: list[float] = field(default_factory=list)


class TickLoop:
    """Runs schedules over a fabric's QPs.

    Args:
        setup: The run as values.
        queues: The fabric's queue counters, shape ``(ports + 1, 8)``.
        qps: The fabric's QP table.
        windows: The fabric's windows of packets out of order, a row per QP; only selective recovery needs them.
        sockets: File descriptor of each NIC's packet socket.
        clock: Source of time.
        probe: The machine's fidelity probe.
        describe_connection: Names a connection for error messages.
        flow_control: PFC of the fabric.
        rate_limit: What congestion control lets each QP send.
        admission: What receivers let each QP send.
        recorder: Shown the fabric once a tick.
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
        flow_control: FlowControl | NoFlowControl | None = None,
        rate_limit: RateLimit | None = None,
        admission: Admission | None = None,
        recorder: Recorder | None = None,
        windows: npt.NDArray[Any] | None = None,
    ) -> None:
        self._setup = setup
        self._flow = flow_control or NoFlowControl(len(queues))
        self._limit: RateLimit = rate_limit or NoRateLimit()
        self._admission: Admission = admission or NoAdmission()
        self._recorder: Recorder = recorder or NoRecorder()
        self._clock = clock
        self._probe = probe
        self._sockets = list(sockets)
        connections = list(setup.connections)
        count = len(connections)
        self._nic = nics_of(connections)
        if (np.diff(self._nic) < 0).any():
            raise ValueError("connections must be in the order of the NICs that send")
        # The usual case, and the fast one: every NIC sends on one QP.
        self._data = DataQueues(queues, setup.nic_port, setup.priority_weights)
        self._lane = self._data.lanes_of(self._nic, [connection.priority for connection in connections])
        self._one_qp_per_nic = (
            self._data.is_single and count == len(setup.nic_port) and bool((self._nic == np.arange(count)).all())
        )
        write_qp_table(qps, setup)
        self._requesters = qps[qp_index(0, REQUESTER) : 2 * count : 2]
        self._responders = qps[qp_index(0, RESPONDER) : 2 * count : 2]
        # Signed views of the counters: differences are then plain arithmetic.
        self._rx_messages = self._responders["rx_messages"].view(np.int64)
        self._rx_payload_bytes = self._responders["rx_payload_bytes"].view(np.int64)
        # acked_packets, naks_packets, nak_position and cnps_packets are neighbours: one strided copy takes all four.
        self._feedback_fields = adjacent_fields(self._requesters, "acked_packets", 4)
        self._acked = self._feedback_fields[0]
        dilation = setup.time_dilation
        wall_one_way = np.rint(setup.one_way_ns * dilation).astype(np.int64)
        self._arrivals = DelayLine(wall_one_way, 1, setup.wall_tick_ns, early_ns=setup.wall_tick_ns)
        self._feedback = DelayLine(2 * wall_one_way, 4, setup.wall_tick_ns)
        self._wall_timeout_ns = int(setup.retransmit_timeout_ns * dilation)
        nic_rate = setup.wall_port_rate_bytes_per_s[setup.nic_port]
        self._wall_write_off_ns = self._wall_timeout_ns // 2
        self._frame_wire_bytes = frame_bytes(Opcode.WRITE_MIDDLE, setup.mtu) + LINK_OVERHEAD_BYTES
        self._pacer = NicPacer(1e9 / nic_rate, self._frame_wire_bytes, setup.wall_tick_ns)
        self._shaping = ShapingObserver(setup.wall_port_rate_bytes_per_s, self._frame_wire_bytes)
        senders = len(np.unique(self._nic))
        credit = int(_BACKLOG_SHARE * setup.max_backlog_frames) // senders
        self._credit_frames = max(_MIN_CREDIT_FRAMES, min(NIC_QUEUE_FRAMES, credit))
        initial_psns = np.array([connection.initial_psn for connection in connections], np.int64)
        self._writer = FrameWriter(
            [c.requester for c in connections],
            initial_psns,
            setup.mtu,
            tos=[data_tos(c.priority) for c in connections],
            foreign=setup.foreign,
        )
        self._psn_offset = np.zeros(count, np.int64)
        self._message_offset = np.zeros(count, np.int64)
        self._recovery = self._make_recovery(describe_connection, wall_one_way, windows)
        self._sender = FrameSender(self._writer, self._nic, self._sockets)

    def _make_recovery(
        self,
        describe: Callable[[int], str],
        wall_one_way_ns: npt.NDArray[np.int64],
        windows: npt.NDArray[Any] | None,
    ) -> LossRecovery:
        count = len(self._nic)
        if not self._setup.selective:
            return GoBackN(count, self._writer, self._wall_timeout_ns, describe)
        if self._setup.foreign is not None:
            raise ValueError("selective recovery needs responders that know its encoding: go-back-N talks to others")
        if windows is None:
            raise ValueError("selective recovery needs the windows of packets out of order")
        windows[: 2 * count] = 0
        wall_reorder = 2 * self._setup.reorder_loops * wall_one_way_ns + _REORDER_TICKS * self._setup.wall_tick_ns
        if self._setup.reorder_time_ns is not None:
            wall_reorder = np.full(count, round(self._setup.reorder_time_ns * self._setup.time_dilation))
        sockets, nic, ring = self._sockets, self._nic.tolist(), self._writer.ring
        return Selective(
            count,
            self._writer,
            self._wall_timeout_ns,
            describe,
            table=self._requesters,
            windows=windows["received"][qp_index(0, REQUESTER) : 2 * count : 2],
            send=lambda qp, slot, frames: ring.send_slots(sockets[nic[qp]], slot, frames),
            wall_delay_ns=2 * wall_one_way_ns + wall_reorder,
            wall_tick_ns=self._setup.wall_tick_ns,
        )

    def run_iteration(
        self,
        schedule: Schedule,
        streams: PacketStreams | QpDispatcher | None = None,
        faults: Faults | NoFaults | None = None,
    ) -> IterationResult:
        """Run a schedule once, from the release of its first transfers to its last arrival.

        Args:
            schedule: What to send; its first connections are the setup's.
            streams: ``build_streams(schedule, mtu, len(setup.connections))``, if the caller has it; a dispatcher of the schedule
                where it is decided as the run goes what each QP sends. The schedule's connections are then pairs of ranks, the
                setup's the QPs.
            faults: What breaks meanwhile; it is mended at the end.

        Raises:
            RunError: A QP ran out of retries, or nothing moves any more.
        """
        streams = streams or build_streams(schedule, self._setup.mtu, len(self._nic))
        faults = faults or NoFaults()
        intra_host = IntraHostTransfers(schedule, self._setup.intra_host, self._setup.time_dilation)
        dispatcher: QpDispatcher | None = None
        progress: Progress | QpDispatcher
        message_ends: list[npt.NDArray[np.int64]] | None = None
        if isinstance(streams, QpDispatcher):
            dispatcher = progress = streams
            dispatcher.restart(intra_host.release)
        else:
            progress = Progress(schedule, streams, intra_host.release)
            if self._setup.foreign is not None:
                message_ends = [streams.message_end_packet[one] for one in streams.transfers_of[: len(self._nic)]]
        writer, pacer, clock = self._writer, self._pacer, self._clock
        flow, limit, admission = self._flow, self._limit, self._admission
        recorder, recovery = self._recorder, self._recovery
        writer.restart(schedule, streams, self._psn_offset)
        nic, nic_port = self._nic, self._setup.nic_port
        data, lane, single = self._data, self._lane, self._data.is_single
        nics, count = len(nic_port), len(nic)
        tick_ns = self._setup.wall_tick_ns
        recorded = _Recorded()
        self._shaping.restart()
        self._probe.restart()
        # Packet counts are absolute, as in the QP table: this iteration's first packet is number `offset`.
        offset = self._psn_offset
        released = offset.copy()
        wire_before = streams.wire_bytes_before
        wire_at_end = streams.wire_bytes_at_end
        ns_per_byte = (1e9 / self._setup.wall_port_rate_bytes_per_s[nic_port])[nic].tolist()
        line = self._arrivals

        def arrived_at_ns(connection: int, transfer: int) -> float:
            return line.arrived_at_ns(connection, wire_at_end[transfer], ns_per_byte[connection])

        seen_messages = self._message_offset.copy()
        transmitted = np.zeros(count, np.int64)
        credit_bytes = self._credit_frames * self._frame_wire_bytes
        # What a queue of a NIC may hold. Frames that the kernel lost on the way would fill it for ever: once a queue has not
        # moved for long they are written off.
        allowance = np.full(data.lanes, credit_bytes, np.int64)
        stuck_deq = np.full(data.lanes, -1, np.int64)
        stuck_since_ns = np.zeros(data.lanes, np.int64)
        frames_per_byte = 1.0 / self._frame_wire_bytes
        self._arrivals.reset(self._rx_messages[None, :])
        self._feedback.reset(self._feedback_fields)

        begin = clock.now_ns()
        recovery.restart(begin, offset, self._feedback_fields)
        sent, acked = recovery.sent, recovery.acked  # these very arrays change as the run goes
        last_arrival_ns = moved_ns = due = begin
        progress.released_at_ns[:] = begin
        intra_host.begin(begin)
        nic_released_at = np.full(nics, float(begin))
        # What NICs were late for and a limit does not let them make up.
        forgone_ns = np.zeros(nics)
        paused_before = flow.paused_until(begin)
        last_message = self._message_offset + streams.messages
        last_transfer = [int(transfers[-1]) if len(transfers) else -1 for transfers in streams.transfers_of[:count]]
        end_ns = np.full(count, float(begin))
        payload_before = self._rx_payload_bytes.copy()
        together_ns, together_bytes = 0, np.zeros(count, np.int64)
        flow.lateness_ns.clear()
        # The QPs of a connection begin together.
        of_qps = schedule.start_ns if dispatcher is None else np.repeat(schedule.start_ns, dispatcher.qps)
        starts_ns = begin + np.rint(of_qps[:count] * self._setup.time_dilation).astype(np.int64)
        may_send = np.zeros(count, bool)
        waiting, refresh = True, False
        ticks = 0
        admission.restart(begin, offset, streams.packets if dispatcher is None else dispatcher.packets_of_connections)
        recorder.start(begin)
        faults.begin(begin)
        while True:
            now = clock.now_ns()
            lateness = now - due
            recorder.sample(now, transmitted)
            flow.tick(now)
            rates = faults.tick(now, self._rx_payload_bytes)
            if rates is not None:
                ns_per_byte[:] = self._set_rates(now, rates)[nic].tolist()

            if message_ends is not None:
                self._note_acknowledged(message_ends)
            self._arrivals.next_snapshot[0] = self._rx_messages
            arrivals = self._arrivals.advance(now)[0]
            news = arrivals > seen_messages
            if news.any():
                moved = np.flatnonzero(news)
                messages = (arrivals - self._message_offset)[moved].tolist()
                latest = progress.record_arrivals(moved.tolist(), messages, arrived_at_ns)
                last_arrival_ns = max(last_arrival_ns, round(latest))
                seen_messages[moved] = arrivals[moved]
                if dispatcher is not None:
                    ended = dispatcher.take_ended()
                else:
                    done = moved[seen_messages[moved] >= last_message[moved]].tolist()
                    ended = [(connection, arrived_at_ns(connection, last_transfer[connection])) for connection in done]
                for connection, ended_ns in ended:
                    end_ns[connection] = ended_ns
                    if not together_ns:
                        together_ns = now
                        together_bytes = self._rx_payload_bytes - payload_before
                refresh = True
                moved_ns = now
            if intra_host.busy:
                last_arrival_ns = max(last_arrival_ns, round(intra_host.advance(now + tick_ns, progress)))
                refresh = True
                moved_ns = now
            if not progress.pending_transfers:
                break

            if waiting:
                started = starts_ns <= now + tick_ns
                begun = started & ~may_send
                if begun.any():
                    np.maximum(progress.released_at_ns, starts_ns, out=progress.released_at_ns, where=begun)
                    may_send, refresh, moved_ns, waiting = started, True, now, not started.all()
            if refresh:
                np.add(np.where(may_send, progress.released_packets, 0), offset, out=released)
                refresh = False

            self._feedback.next_snapshot[:] = self._feedback_fields
            feedback = self._feedback.advance(now)
            if limit.limits:
                limit.advance(now, feedback[3], feedback[0])
            recovery.hear(now, feedback)
            if dispatcher is not None and (fed := dispatcher.dispatch(acked - offset, now)):
                np.add(np.where(may_send, progress.released_packets, 0), offset, out=released)
                writer.extend(fed, sent - offset)
            if ticks % _TIMEOUT_CHECK_TICKS == 0:
                recovery.check_timeouts(now, released)
                # Packets may get through one by one for long before a message is whole.
                if now - max(moved_ns, recovery.moved_ns) > _STALL_TIMEOUTS * self._wall_timeout_ns:
                    raise RunError(
                        f"nothing arrived for {_STALL_TIMEOUTS} retransmission timeouts",
                        hint="`testbed inspect` shows where frames are; `testbed doctor` what the machine lacks",
                    )
                deq = data.lane_deq_bytes()
                moving = (deq != stuck_deq) | data.of_lanes(flow.closed)
                stuck_deq[moving], stuck_since_ns[moving] = deq[moving], now
                stuck = now - stuck_since_ns > self._wall_write_off_ns
                if stuck.any():
                    depth = data.lane_enq_bytes() - deq
                    np.maximum(allowance, credit_bytes + depth, out=allowance, where=stuck)
                    stuck_since_ns[stuck] = now

            deq = data.lane_deq_bytes()  # before enq: a depth is never negative
            room = deq - data.lane_enq_bytes()
            room += allowance
            wants = recovery.wants(admission.admit(now, released, sent, pacer) if admission.limits else released)
            if self._setup.selective and (shut := (wants <= 0) & (released > sent)).any():
                # A NIC all of whose QPs have used up their windows does not make up for it.
                closed = np.bincount(nic, weights=shut, minlength=nics) > 0
                closed &= np.bincount(nic, weights=wants > 0, minlength=nics) == 0
                pacer.hold_until(closed, float(now + tick_ns))
            if limit.limits:
                wants = limit.allowed(now, wants)
                starts_at = np.full(nics, np.inf)
                np.minimum.at(starts_at, nic, np.where(wants > 0, limit.free_at_ns, np.inf))
                if limit.due_at_ns is not limit.free_at_ns:
                    due_at = np.full(nics, np.inf)
                    np.minimum.at(due_at, nic, np.where(wants > 0, limit.due_at_ns, np.inf))
                    forgone_ns += pacer.forgone_ns(due_at, starts_at)
                pacer.hold_until(np.isfinite(starts_at), starts_at)
            if flow.any_closed:
                paused = data.of_lanes(flow.closed)
                wants = np.where(paused[lane], 0, wants)
                # A NIC goes on with its other priorities.
                idle = True if single else np.bincount(nic, weights=wants, minlength=nics) == 0
                pacer.hold_until(data.any_of_nics(paused) & idle, float(now + tick_ns))
            again: Resent | None = None
            available_at_ns = progress.released_at_ns
            if recovery.resumed_at_ns is not None:
                available_at_ns = np.maximum(available_at_ns, recovery.resumed_at_ns)
            if wants.any():
                credit = room * frames_per_byte
                if self._one_qp_per_nic:
                    packet = sent - offset
                    shares = pacer.budget(now, wants, credit, available_at_ns)
                    if recovery.resending:
                        again = recovery.resend(shares)
                        pacer.charge(again.wire_bytes)
                    taken = self._sender.send_runs(shares, packet)
                    packet += streams.first_packet[:-1]
                    sent_bytes = wire_before[packet + taken]
                    pacer.charge(sent_bytes - wire_before[packet])
                    gone = np.flatnonzero(taken)
                    self._arrivals.note_sent(gone, pacer.started_at_ns[gone], sent_bytes[gone])
                else:
                    nic_wants = np.bincount(nic, weights=wants, minlength=nics).astype(np.int64)
                    np.maximum.at(nic_released_at, nic, available_at_ns)
                    active = np.flatnonzero(wants)
                    if single:
                        budget = pacer.budget(now, nic_wants, credit, nic_released_at)
                    else:
                        lane_wants = np.bincount(lane, weights=wants, minlength=data.lanes)
                        sendable = np.maximum(np.minimum(lane_wants, credit), 0).astype(np.int64)
                        of_nics = sendable.reshape(nics, -1).sum(axis=1)
                        budget = data.share(pacer.budget(now, nic_wants, of_nics, nic_released_at), sendable)
                        active = active[np.argsort(lane[active], kind="stable")]
                    taken = np.zeros(count, np.int64)
                    shares = share_budget(lane[active], wants[active], budget, ticks)
                    if recovery.resending:
                        of_all = np.zeros(count, np.int64)
                        of_all[active] = shares
                        again = recovery.resend(of_all)
                        shares = of_all[active]
                        pacer.charge(np.bincount(nic, weights=again.wire_bytes, minlength=nics).astype(np.int64))
                    packet = sent - offset
                    taken[active] = self._sender.send_interleaved(active, shares, packet)
                    packet += streams.first_packet[:-1]
                    sent_bytes = wire_before[packet + taken]
                    wire_bytes = sent_bytes - wire_before[packet]
                    pacer.charge(np.bincount(nic, weights=wire_bytes, minlength=nics).astype(np.int64))
                    gone = np.flatnonzero(taken)
                    self._arrivals.note_sent(gone, pacer.started_at_ns[nic[gone]], sent_bytes[gone])
                wire_bytes = sent_bytes - wire_before[packet]
                if again is not None:
                    wire_bytes += again.wire_bytes
                    transmitted += again.packets
                if limit.limits:
                    limit.charge(now, wire_bytes, sent, sent + taken)
                recovery.note_sent(taken)
                transmitted += taken
            else:
                pacer.rest()
            if ticks % _LOOK_TICKS == 0:
                writer.prepare(sent - offset, _REFILL_MARGIN_PACKETS)
                depth, sent_wire_bytes, blocked = data.observe(flow.blocked)
                self._shaping.observe(now, depth, sent_wire_bytes, blocked)
                flow.forget_blocked()
                nic_wants = np.bincount(nic, weights=recovery.wants(released) > 0, minlength=nics)
                recorded.nic_lag_ns.append(pacer.lag_ns(now, nic_wants))
            if ticks % _PROBE_TICKS == 0:
                self._probe.send(now)
            recorded.lateness_ns.append(lateness)
            recorded.busy_ns.append(clock.now_ns() - now)
            ticks += 1
            due = max(due + tick_ns, now)
            clock.sleep_until_ns(due)
        self._shaping.finish()
        rates = faults.end(now)
        if rates is not None:
            self._set_rates(now, rates)
        paused_ns = (flow.paused_until(now) - paused_before).max(axis=1)
        gate_lateness_ns = np.array(flow.lateness_ns, np.int64)
        waits_ns = self._probe.waits_ns()
        unaccounted_bytes = self._settle(streams)
        recorder.finish(clock.now_ns(), transmitted)
        self._psn_offset += streams.packets
        self._message_offset += streams.messages
        lost_ns = self._shaping.lost_ns.copy()
        lost_ns[nic_port] += forgone_ns
        machine = MachineSamples(
            wall_tick_ns=tick_ns,
            wall_lateness_ns=np.array(recorded.lateness_ns, np.int64),
            wall_busy_ns=np.array(recorded.busy_ns, np.int64),
            wall_probe_ns=np.array(waits_ns, np.int64),
            wall_nic_lag_ns=np.array(recorded.nic_lag_ns),
            wall_lost_ns=lost_ns,
            wall_gained_ns=self._gained_ns(),
            wall_duration_ns=last_arrival_ns - begin,
            unaccounted_bytes=unaccounted_bytes,
            resolution_error_fraction=self._setup.resolution_error_fraction,
            wall_gate_lateness_ns=gate_lateness_ns,
        )
        return IterationResult(
            wall_ns=last_arrival_ns - begin,
            wall_seen_ns=moved_ns - begin,
            retransmitted_packets=recovery.retransmitted_packets,
            timeouts=recovery.timeouts,
            machine=machine,
            wall_paused_ns=paused_ns,
            wall_end_ns=end_ns - begin,
            together_bytes=together_bytes,
            wall_together_ns=together_ns - begin,
            nvlink_bytes=intra_host.arrived_bytes,
            admission=admission.finish(),
            wall_inside_end_ns=np.maximum(np.array(intra_host.end_ns) - begin, 0.0),
        )

    def _note_acknowledged(self, message_ends: Sequence[npt.NDArray[np.int64]]) -> None:
        """Take what peers that are not ours have acknowledged as arrived, for nobody counts it there.

        Args:
            message_ends: Packets of each connection up to and including each of its messages.
        """
        acked = (self._acked - self._psn_offset).tolist()
        for connection, ends in enumerate(message_ends):
            whole = int(np.searchsorted(ends, acked[connection], side="right"))
            self._rx_messages[connection] = self._message_offset[connection] + whole

    def _set_rates(self, now_ns: int, wall_rate_bytes_per_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Let every port have another rate from now on; return the time of a byte on each NIC, shape ``(nics,)``."""
        ns_per_byte: npt.NDArray[np.float64] = 1e9 / wall_rate_bytes_per_s[self._setup.nic_port]
        self._pacer.set_rates(ns_per_byte)
        self._shaping.set_rates(wall_rate_bytes_per_s)
        return ns_per_byte

    def _gained_ns(self) -> float:
        """Return the time that the fastest of the congested switch ports gained in this iteration."""
        backlogged_ns = self._shaping.backlogged_ns
        gained_ns = self._setup.shaper_gain_fraction * backlogged_ns + self._setup.wall_burst_ns
        gained_ns[backlogged_ns == 0] = 0.0
        gained_ns[self._setup.nic_port] = 0.0
        return float(gained_ns.max())

    def _settle(self, streams: PacketStreams | QpDispatcher) -> int:
        """Wait until every packet is acknowledged and nothing moves in the data queues any more.

        What is still under way when the last transfer arrives is ACKs and, after a loss, duplicates.

        Returns:
            Bytes that entered a queue and never left it. The qdiscs never drop, so the kernel lost them between two ports
            (softnet backlog); the counters are put right for the next iteration.

        Raises:
            RunError: The fabric never comes to rest.
        """
        total = self._psn_offset + streams.packets
        deadline = self._clock.now_ns() + self._wall_timeout_ns * _STALL_TIMEOUTS
        still, moved = 0, -1
        while self._clock.now_ns() < deadline:
            self._flow.tick(self._clock.now_ns())
            left = self._data.standing_bytes()
            unacked = self._acked < total
            if not left and not unacked.any():
                return 0
            before, moved = moved, self._data.left_bytes() + int(self._acked.sum())
            still = still + 1 if moved == before and not self._flow.any_closed else 0
            if still > _REST_TICKS:
                # An ACK that is not here by now is lost; its data is not.
                self._acked[unacked] = total[unacked]
                lost = self._data.write_off()
                self._flow.forget_frames()
                return lost
            self._clock.sleep_until_ns(self._clock.now_ns() + self._setup.wall_tick_ns)
        raise RunError("the fabric did not come to rest after the last transfer")
