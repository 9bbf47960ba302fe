"""Receiver-driven admission: windows and their pieces, CTS frames byte by byte, grants on their way, what a plan forecasts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.contrib.roce import BTH
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from testbed.collectives.schedule import ScheduleBuilder
from testbed.engine.admission import GrantedAdmission
from testbed.engine.delayed_counts import DelayedCounts
from testbed.engine.grant_frames import FIFO_ENTRIES, GrantWriter
from testbed.engine.nic import NicPacer
from testbed.errors import ScenarioError
from testbed.kernel.layout import QP
from testbed.plan.admission import forecast_peak_bytes, peak_bound_bytes, throughput_fraction
from testbed.plan.compile import compile_plan
from testbed.roce.admission import find_schemes, make
from testbed.roce.admission.cts import Parameters, Scheme
from testbed.roce.bth import RETH
from testbed.roce.icrc import carried_icrc, compute_icrc
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, Connection, qp_index
from testbed.roce.wire import CTS_FRAME_BYTES, CTS_RKEY, PSN_MASK, Opcode
from testbed.scenario import load_scenario
from tests.unit.test_frames import connect

MTU = 1024
SILENCE_NS = 1000.0


def cts(window_packets: int, grants: int, connections: int = 1) -> Scheme:
    return Scheme(Parameters(window_packets * MTU, grants, MTU, SILENCE_NS), connections)


def ints(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


# --- the scheme ----------------------------------------------------------------------------------------------------------


def test_schemes_are_found_by_themselves_and_refuse_what_they_must() -> None:
    assert list(find_schemes()) == ["cts", "none"]
    with pytest.raises(ValueError, match=r"one of cts, none, got 'credit'"):
        make("credit", {}, 1)
    with pytest.raises(ValueError, match="3 grants must be of a packet"):
        Parameters(2 * MTU, 3, MTU, SILENCE_NS)
    free = make("none", {}, 2)
    free.restart(0.0, ints(5, 7))
    assert not free.grants_needed
    assert free.admitted_packets(ints(0, 0)).tolist() == [5, 7]
    assert free.due(0.0, ints(0, 0)).grants.tolist() == [0, 0]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 200))
def test_pieces_are_whole_packets_and_granted_anew_when_they_have_arrived(window: int, grants: int, total: int) -> None:
    grants = min(grants, window)
    scheme = cts(window, grants)
    scheme.restart(0.0, ints(total))
    ends = [number * window // grants for number in range(10 * total + grants + 2)]
    assert all(later > earlier for earlier, later in itertools.pairwise(ends))
    for arrived in range(total + 1):
        whole = max(number for number in range(len(ends)) if ends[number] <= arrived)
        needed = min(number for number in range(len(ends)) if ends[number] >= total)
        due = int(scheme.due(0.0, ints(arrived)).grants[0])
        assert due == min(whole + grants, needed)
        # Never more than the window beyond what has arrived, and enough to go on with.
        admitted = int(scheme.admitted_packets(ints(due))[0])
        assert admitted == min(ends[due], total)
        assert arrived <= admitted <= arrived + window
        assert admitted > arrived or arrived == total


def test_pieces_of_a_grant_lie_behind_each_other() -> None:
    scheme = cts(10, 3)
    scheme.restart(0.0, ints(12))
    begin, packets = scheme.granted_packets(ints(0, 0, 0, 0), ints(1, 2, 3, 4))
    assert begin.tolist() == [0, 3, 6, 10]
    assert packets.tolist() == [3, 3, 4, 2]  # the last is cut where the data ends


def test_latest_grant_is_repeated_after_each_silence_until_all_has_arrived() -> None:
    scheme = cts(4, 2, connections=2)
    scheme.restart(0.0, ints(8, 8))
    assert not scheme.due(SILENCE_NS - 1, ints(0, 0)).repeat.any()
    assert scheme.due(SILENCE_NS, ints(0, 1)).repeat.tolist() == [True, False]
    assert not scheme.due(SILENCE_NS + 1, ints(0, 1)).repeat.any()
    assert scheme.due(2 * SILENCE_NS, ints(8, 1)).repeat.tolist() == [False, True]
    assert scheme.due(9 * SILENCE_NS, ints(8, 8)).repeat.tolist() == [False, False]


# --- frames --------------------------------------------------------------------------------------------------------------


def both_ways() -> list[Connection]:
    builder = ScheduleBuilder(3, 10)
    for src, dst in ((0, 1), (1, 0), (2, 1)):
        builder.add(src, dst, offset_bytes=0, nbytes=1)
    return connect(builder.build())


def written(writer: GrantWriter, count: int) -> list[bytes]:
    ring = writer._ring
    return [
        ring.headers[slot, : int(ring.header_lengths[slot])].tobytes()
        + ring.payload[: int(ring.payload_lengths[slot])].tobytes()
        + int(ring.icrcs[slot]).to_bytes(4, "little")
        for slot in range(count)
    ]


def test_cts_frame_is_a_write_of_one_fifo_entry_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = both_ways()
    writer = GrantWriter(connections, 3)
    monkeypatch.setattr(writer._ring, "send_slots", lambda fd, first, count: count)
    numbers = ints(1, 2, FIFO_ENTRIES + 1, 2**33 + 5)
    of, places = ints(1, 1, 0, 2), ints(0, 1, 0, 0)
    for round_ in range(2):
        writer.write(of, places, numbers, ints(0, 4096, 2**34 + 1, 7), ints(4096, 8192, 100, 1 << 24))
        for frame, index, place, number, address, length in zip(
            written(writer, 4), of, places, numbers, (0, 4096, 2**34 + 1, 7), (4096, 8192, 100, 1 << 24), strict=True
        ):
            qp = connections[index].responder
            read = Ether(frame)
            bth, reth = read[BTH], read[RETH]
            assert len(frame) == CTS_FRAME_BYTES
            assert carried_icrc(frame) == compute_icrc(frame)
            assert (read.src, read.dst) == (qp.local.mac, qp.local.next_hop_mac)
            assert read[UDP].sport == qp.udp_source_port
            assert read[IP].tos == (8 * 3 + 2) << 2  # the data's code point, not ECN-capable
            assert bytes(IP(bytes(read[IP])))[10:12] == frame[24:26]
            assert (bth.opcode, bth.dqpn, bth.ackreq) == (Opcode.WRITE_ONLY, qp.peer_qpn, 0)
            # A PSN for every frame sent on the connection.
            sent_before = {1: 2 * round_, 0: round_, 2: round_}[int(index)]
            assert bth.psn == (connections[index].initial_psn + sent_before + place) & PSN_MASK
            assert (reth.va, reth.rkey, reth.dmalen) == ((number - 1) % FIFO_ENTRIES * 64, CTS_RKEY, 64)
            entry = bytes(reth.payload)[:64]
            assert int.from_bytes(entry[:8], "little") == address
            assert int.from_bytes(entry[8:16], "little") == length
            assert int.from_bytes(entry[40:48], "little") == number
            assert entry[48:] == bytes(16)
        assert writer.send(0, 0, of) == 4


# --- the engine's half ---------------------------------------------------------------------------------------------------


class World:
    """Two connections of several QPs from NICs 0 and 1 to NIC 2: a network that takes its time with data and may lose grants."""

    TICK_NS = 1000
    TRANSIT_TICKS = 10  # what data waits in queues

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, qps: int, window: int, grants: int, priority: int = 6):
        builder = ScheduleBuilder(3, 10)
        for src in (0, 1):
            for _ in range(qps):
                builder.add(src, 2, offset_bytes=0, nbytes=1)
        schedule = builder.build()
        connections = connect(schedule)
        pairs = len(connections) // 2
        connections = [one for one in connections for _ in range(qps // pairs)]
        self.count = len(connections)
        self.table: npt.NDArray[Any] = np.zeros(2 * self.count, QP)
        self.lose: Sequence[int] = ()
        self.sent_frames: list[tuple[int, int]] = []
        parameters = {"window_bytes": window * MTU, "grants": grants, "mtu_bytes": MTU, "silence_ns": 20_000.0}
        self.admission = GrantedAdmission(
            make("cts", parameters, 2),
            connections=connections,
            qps_per_connection=qps,
            qps=self.table,
            sockets=[10, 11, 12],
            priority=priority,
            shares_queue=priority < 6,
            mtu=MTU,
            time_dilation=1.0,
            wall_tick_ns=self.TICK_NS,
            wall_data_delay_ns=np.full(self.count, 2 * self.TICK_NS),
            wall_grant_delay_ns=np.full(2, 2 * self.TICK_NS),
            max_grants=grants,
            max_frames_per_tick=3,
        )
        writer = self.admission._writer
        numbers: list[npt.NDArray[np.int64]] = []
        write = writer.write

        def note(lanes: Any, places: Any, indices: Any, addresses: Any, lengths: Any) -> None:
            numbers[:] = [indices]
            write(lanes, places, indices, addresses, lengths)

        def send(socket: int, first: int, lanes: npt.NDArray[np.int64]) -> int:
            assert socket == 12  # the receiver's NIC
            for lane, number in zip(lanes.tolist(), numbers[0][first : first + len(lanes)].tolist(), strict=True):
                self.sent_frames.append((lane, number))
                if len(self.sent_frames) not in self.lose:
                    row = self.table[qp_index(lane * qps, REQUESTER)]
                    row["grants"] = max(int(row["grants"]), number)
            return len(lanes)

        monkeypatch.setattr(writer, "write", note)
        monkeypatch.setattr(writer, "send", send)
        self.pacer = NicPacer(np.ones(3), MTU, self.TICK_NS)

    def run(self, packets: int, *, ticks: int = 3000, offset: int = 0) -> int:
        """Send so many packets on every connection, half of them in bursts on one QP; return the ticks that it took."""
        qps = self.count // 2
        each = np.full(self.count, packets // qps)
        base = np.full(self.count, offset // qps)
        sent, now = base.copy(), 0
        self.admission.restart(now, base, each)
        responders = self.table[qp_index(0, RESPONDER) :: 2]
        history = [base.copy()] * self.TRANSIT_TICKS
        for tick in range(ticks):
            now = tick * self.TICK_NS
            until = self.admission.admit(now, base + each, sent, self.pacer)
            assert (until >= sent).all()
            assert (until <= base + each).all()
            sent = until.copy()
            in_flight = (sent - responders["rx_packets"].astype(np.int64)).reshape(2, -1).sum(axis=1)
            self.most_in_flight = max(getattr(self, "most_in_flight", 0), int(in_flight.max()))
            history.append(sent.copy())
            responders["rx_packets"] = history[-self.TRANSIT_TICKS]
            if (sent == base + each).all():
                return tick
        raise AssertionError("some of it is never admitted")


@pytest.mark.parametrize("qps", [1, 2, 4])
@pytest.mark.parametrize(("window", "grants"), [(8, 1), (8, 3), (8, 8), (40, 5)])
def test_no_connection_has_more_than_its_window_under_way(
    monkeypatch: pytest.MonkeyPatch, qps: int, window: int, grants: int
) -> None:
    world = World(monkeypatch, qps=qps, window=window, grants=grants)
    world.run(200)
    assert world.most_in_flight == window
    noted = world.admission.finish()
    assert noted is not None
    assert noted.cts_frames == len(world.sent_frames) == 2 * math.ceil(200 * grants / window)
    assert noted.repeated_frames == 0
    # On time: two ticks of delay; the first ones wait for their turn, three frames a tick.
    assert len(noted.cts_delay_ns) == noted.cts_frames
    assert np.median(noted.cts_delay_ns) == 2 * World.TICK_NS


def test_second_iteration_counts_its_grants_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, qps=2, window=8, grants=4)
    world.run(40)
    first = len(world.sent_frames)
    world.admission.finish()
    world.run(40, offset=40)
    assert [number for lane, number in world.sent_frames if lane == 0] == list(range(1, first + 1))


@pytest.mark.parametrize("lost", [[2], [1, 2, 3], [39, 40]])
def test_lost_grants_are_made_up_for_by_the_next_or_repeated(monkeypatch: pytest.MonkeyPatch, lost: list[int]) -> None:
    world = World(monkeypatch, qps=1, window=8, grants=4)
    world.lose = lost
    took = world.run(40)
    noted = world.admission.finish()
    assert noted is not None
    assert world.most_in_flight <= 8
    last_of_all = lost == [39, 40]  # nothing follows these: only the silence tells
    assert (noted.repeated_frames > 0) == last_of_all
    assert (took >= 20) == last_of_all or took < 100


def test_nic_that_waited_for_a_grant_does_not_make_up_for_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, qps=1, window=8, grants=1)
    world.admission.restart(0, np.zeros(2, np.int64), np.full(2, 100))
    wants, sent = np.full(2, 100), np.zeros(2, np.int64)
    for tick in range(10):
        now = tick * World.TICK_NS
        allowed = world.admission.admit(now, wants, sent, world.pacer)
        if allowed.any():
            break
        world.pacer.budget(now, ints(0, 0, 0), np.full(3, 1e9), np.zeros(3))
    assert allowed.tolist() == [8, 8]
    budget = world.pacer.budget(now, ints(8, 8, 0), np.full(3, 1e9), np.zeros(3))
    # A tick holds less than one of these frames: one may begin in it, not the several of the ticks before.
    assert budget.tolist() == [1, 1, 0]


def test_qp_that_went_back_may_send_again_what_was_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, qps=1, window=8, grants=1)
    world.admission.restart(0, np.zeros(2, np.int64), np.full(2, 100))
    sent = np.zeros(2, np.int64)
    for tick in range(10):
        until = world.admission.admit(tick * World.TICK_NS, np.full(2, 100), sent, world.pacer)
        sent = until.copy()
    assert sent.tolist() == [8, 8]
    # The second lost all but three packets.
    until = world.admission.admit(10 * World.TICK_NS, np.full(2, 100), ints(8, 3), world.pacer)
    assert until.tolist() == [8, 8]


@pytest.mark.parametrize(("priority", "charged"), [(3, 2 * 162), (6, 0)])
def test_grants_in_the_datas_queue_take_time_of_their_nic(
    monkeypatch: pytest.MonkeyPatch, priority: int, charged: int
) -> None:
    world = World(monkeypatch, qps=1, window=8, grants=1, priority=priority)
    world.admission.restart(0, np.zeros(2, np.int64), np.full(2, 100))
    before = world.pacer._free_at[2]
    world.admission.admit(0, np.full(2, 100), np.zeros(2, np.int64), world.pacer)
    assert world.pacer._free_at[2] - before == charged


# --- counters of the past ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(500, 2000), st.integers(0, 50)), min_size=2, max_size=200),
    st.lists(st.integers(0, 9000), min_size=1, max_size=3),
)
def test_counters_of_the_past_are_read_between_snapshots(steps: list[tuple[int, int]], delays: list[int]) -> None:
    line = DelayedCounts(np.array(delays, np.int64), 1000)
    line.reset(np.zeros(len(delays), np.int64))
    times, counts = [0], [0]
    for step, more in steps:
        times.append(times[-1] + step)
        counts.append(counts[-1] + more)
        seen = line.advance(times[-1], np.full(len(delays), counts[-1]))
        for value, delay in zip(seen.tolist(), delays, strict=True):
            # The first snapshot is at times[1]; what is older stands as before.
            expected = np.interp(times[-1] - delay, times[1:], counts[1:], left=0)
            assert abs(value - expected) < 1 + 1e-6
            assert value <= counts[-1]


# --- forecast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("senders", [1, 4, 15])
@pytest.mark.parametrize("grants", [1, 2, 12, 1000])
def test_throughput_of_windows_of_a_share_of_the_bdp(senders: int, grants: int) -> None:
    window = 800e3 / senders
    assert throughput_fraction(senders, window, grants, 800e3, together=True) == pytest.approx(1 / (1 + 1 / grants))
    in_turn = throughput_fraction(senders, window, grants, 800e3, together=False)
    assert in_turn == pytest.approx(1 / (1 + 1 / (senders * grants)))


def test_throughput_and_peak_follow_the_formulas() -> None:
    for together in (True, False):
        assert throughput_fraction(4, 800e3, 8, 800e3, together=together) == 1.0
        assert throughput_fraction(1, 100e3, 1, 800e3, together=together) == pytest.approx(100 / 900)
    assert peak_bound_bytes(4, 200e3, 800e3, 10e3) == 4 * 200e3 - 200e3 + 40e3
    assert peak_bound_bytes(4, 900e3, 800e3, 10e3) == 4 * 900e3 - 800e3 + 40e3


STAR = """
name: star
fabric: {kind: star, hosts_per_leaf: 5, host_link: {rate: 400 Gbit/s, delay: 4 us}}
transport: {admission: {scheme: cts, channels: 2, channel_buffer: 100 KiB, grants: 1}}
workload: [{pattern: incast, fan_in: 4, size: 1 MiB}]
time_dilation: 500
"""


def test_plan_forecasts_the_busiest_nic() -> None:
    plan = compile_plan(load_scenario(STAR), capacity_packets_per_s=None)
    planned = plan.workloads[0]
    found = planned.admission
    assert found is not None
    # Two links of 4 us each way; two frames of 4178 + 16 wire bytes, two of 162.
    assert found.loop_ns == pytest.approx(16_000 + 2 * (4194 + 162) / 50, abs=2)
    assert found.bdp_bytes == pytest.approx(50 * found.loop_ns, abs=50)
    assert (found.senders, found.window_bytes, found.priority, found.shares_queue) == (4, 200 * 1024, 3, True)
    wire = 50 * 4178
    assert found.throughput_fraction == pytest.approx(4 * wire / (found.bdp_bytes + wire))
    assert found.together_throughput_fraction == pytest.approx(4 * wire / (found.bdp_bytes + 4 * wire))
    assert found.grant_ns == pytest.approx(8_000 + 2 * 162 / 50, abs=1)
    # 4 MiB at the predicted rate instead of the link's; what is not transfer is not stretched.
    transfer_ns = 4 * 2**20 / 4096 * 4178 / 50
    slower_ns = transfer_ns / found.throughput_fraction - transfer_ns + found.grant_ns
    assert planned.predicted_cct_ratio == pytest.approx(1 + slower_ns / planned.ideal_cct_ns)
    # Ticks of 2 us: 23.9 frames begin in one, one more where it is late.
    window = 50 * 4170
    assert forecast_peak_bytes(plan, planned) == 4 * window - window + 4 * 25 * 4170
    # Any switch port may carry grants of others, so none is faster than its link allows.
    assert plan.unshared_ports == plan.nic_ports()


def test_ring_has_one_sender_per_nic_and_split_messages_one_window() -> None:
    ring = "workload=[{collective: all_reduce, size: 1 MiB}]"
    for qps in (1, 4):
        plan = compile_plan(
            load_scenario(STAR, [ring, f"transport.qps_per_connection={qps}", "transport.admission.priority=6"]),
            capacity_packets_per_s=None,
        )
        found = plan.workloads[0].admission
        assert found is not None
        assert (found.senders, found.window_bytes, found.shares_queue) == (1, 200 * 1024, False)


def test_without_admission_nothing_is_forecast() -> None:
    plan = compile_plan(load_scenario(STAR, ["transport.admission.scheme=none"]), capacity_packets_per_s=None)
    assert plan.workloads[0].admission is None
    assert plan.workloads[0].predicted_cct_ratio == pytest.approx(1.0)


def test_grants_smaller_than_a_packet_are_a_mistake() -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(STAR, ["transport.admission.grants=51"])
    (mistake,) = caught.value.mistakes
    assert mistake.key == "transport.admission.grants"
    assert "at most 50" in mistake.rule
    load_scenario(STAR, ["transport.admission.grants=51", "transport.admission.scheme=none"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_any_order_of_arrivals_and_losses_keeps_the_window(window: int, grants: int, data: st.DataObject) -> None:
    """The scheme alone against a network that delays and loses at will."""
    grants = min(grants, window)
    scheme, total = cts(window, grants), 50
    scheme.restart(0.0, ints(total))
    sent = arrived = latest = received = 0
    now = 0.0
    for _ in range(2000):
        now += data.draw(st.sampled_from([1.0, SILENCE_NS])) if _ < 50 else SILENCE_NS
        due = scheme.due(now, ints(arrived))
        fresh = int(due.grants[0]) > latest or bool(due.repeat[0])
        latest = int(due.grants[0])
        if fresh and (_ >= 50 or data.draw(st.booleans())):
            received = max(received, latest)
        sent = max(sent, int(scheme.admitted_packets(ints(received))[0]))
        assert sent - arrived <= window
        arrived = min(sent, arrived + (data.draw(st.integers(0, window)) if _ < 50 else window))
        if arrived == total:
            return
    raise AssertionError("it never ends")
