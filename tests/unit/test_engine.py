"""The pure parts of the engine: packets of a schedule, its progress, delay, pacing, and the shaping observer."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.collectives import Schedule, find_algorithm
from testbed.collectives.schedule import ScheduleBuilder
from testbed.engine.delay_line import DelayLine
from testbed.engine.nic import NicPacer, share_budget, take_turns
from testbed.engine.observer import ExcessObserver, ShapingObserver
from testbed.engine.progress import Progress
from testbed.engine.stream import build_streams
from testbed.roce.wire import Opcode

TICK_NS = 1_000_000


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Random transfers over random connections, each waiting for random earlier ones that its sender receives."""
    nranks = draw(st.integers(2, 4))
    builder = ScheduleBuilder(nranks, 10_000)
    received: list[list[int]] = [[] for _ in range(nranks)]
    for _ in range(draw(st.integers(1, 25))):
        src = draw(st.integers(0, nranks - 1))
        dst = (src + draw(st.integers(1, nranks - 1))) % nranks
        after = draw(st.lists(st.sampled_from(received[src]), max_size=3, unique=True)) if received[src] else []
        nbytes = draw(st.integers(1, 3000))
        handle = builder.add(src, dst, offset_bytes=draw(st.integers(0, 7000)), nbytes=nbytes, after=after)
        received[dst].append(handle)
    return builder.build()


# --- packets of a schedule --------------------------------------------------------------------------------------------


def cut(schedule: Schedule, connection: int, mtu: int) -> list[tuple[Opcode, int, int]]:
    """Opcode, payload and transfer of every packet of a connection, one by one."""
    packets = []
    for transfer in range(len(schedule)):
        if schedule.connection[transfer] != connection:
            continue
        left, first = int(schedule.nbytes[transfer]), True
        while left > 0:
            payload = min(mtu, left)
            left -= payload
            if first:
                opcode = Opcode.WRITE_FIRST if left else Opcode.WRITE_ONLY
            else:
                opcode = Opcode.WRITE_MIDDLE if left else Opcode.WRITE_LAST
            packets.append((opcode, payload, transfer))
            first = False
    return packets


@settings(max_examples=50)
@given(schedules(), st.sampled_from([256, 1024, 4096]))
def test_streams_cut_every_transfer_as_done_by_hand(schedule: Schedule, mtu: int) -> None:
    streams = build_streams(schedule, mtu)
    for connection in range(len(schedule.connections)):
        rows = slice(streams.first_packet[connection], streams.first_packet[connection + 1])
        found = list(zip(streams.opcode[rows], streams.payload_bytes[rows], streams.message[rows], strict=True))
        expected = cut(schedule, connection, mtu)
        assert found == expected
        assert streams.packets[connection] == len(expected)
        ends = {transfer: number + 1 for number, (_, _, transfer) in enumerate(expected)}
        assert {int(t): int(streams.message_end_packet[t]) for t in streams.transfers_of[connection]} == ends
        assert streams.transfers_of[connection].tolist() == sorted(ends)


# --- progress ---------------------------------------------------------------------------------------------------------


def releasable_packets(schedule: Schedule, arrived: set[int], mtu: int) -> list[int]:
    """How far each connection may send: whole transfers, in order, none whose dependencies have not arrived."""
    limits = []
    for connection in range(len(schedule.connections)):
        packets = 0
        for transfer in np.flatnonzero(schedule.connection == connection).tolist():
            if not set(schedule.dependencies(transfer).tolist()) <= arrived:
                break
            packets += -(-int(schedule.nbytes[transfer]) // mtu)
        limits.append(packets)
    return limits


@settings(max_examples=40)
@given(schedules(), st.integers(0, 2**32 - 1))
def test_progress_releases_what_brute_force_releases(schedule: Schedule, seed: int) -> None:
    rng = random.Random(seed)
    mtu = 256
    streams = build_streams(schedule, mtu)
    progress = Progress(schedule, streams)
    queues = [transfers.tolist() for transfers in streams.transfers_of]
    for _ in range(2):  # a second iteration begins like the first
        arrived: set[int] = set()
        counts = [0] * len(queues)
        while True:
            expected = releasable_packets(schedule, arrived, mtu)
            assert progress.released_packets.tolist() == expected
            assert progress.pending_transfers == len(schedule) - len(arrived)
            ready = {
                connection: sum(streams.message_end_packet[transfer] <= limit for transfer in queues[connection])
                for connection, limit in enumerate(expected)
            }
            movable = [connection for connection, limit in ready.items() if limit > counts[connection]]
            if not movable:
                break
            moving = rng.sample(movable, rng.randint(1, len(movable)))
            new_arrivals: set[int] = set()
            for connection in moving:
                new = rng.randint(counts[connection] + 1, ready[connection])
                new_arrivals |= set(queues[connection][counts[connection] : new])
                counts[connection] = new
            arrived |= new_arrivals
            latest = progress.record_arrivals(
                moving, [counts[connection] for connection in moving], lambda connection, transfer: 10.0 * transfer
            )
            assert latest == 10.0 * max(new_arrivals)
        assert progress.pending_transfers == 0, "a schedule in topological order can always be finished"
        progress.restart()


# --- delay line -------------------------------------------------------------------------------------------------------


def tick_times(gaps_ns: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(gaps_ns, initial=5))


on_time = st.just(TICK_NS)
late = st.integers(TICK_NS // 10, 20 * TICK_NS)


@given(
    delays=st.lists(st.sampled_from([0, 1, 999_999, 1_000_000, 2_500_000, 40_000_000]), min_size=1, max_size=6),
    gaps=st.lists(st.one_of(on_time, on_time, late), min_size=1, max_size=150),
    early=st.sampled_from([0, TICK_NS]),
)
def test_a_snapshot_is_acted_on_when_it_is_due(delays: list[int], gaps: list[int], early: int) -> None:
    times = tick_times(gaps)
    line = DelayLine(np.array(delays), 2, TICK_NS, early_ns=early)
    line.reset(np.zeros((2, len(delays)), np.int64))
    views = []
    for number, now in enumerate(times):
        # Counters that grow with every tick: the value in a view says which snapshot it is.
        line.next_snapshot[0] = number + 1
        line.next_snapshot[1] = 10 * (number + 1) + np.arange(len(delays))
        views.append(line.advance(now).copy())
    for qp, delay in enumerate(delays):
        for number, now in enumerate(times):
            # Snapshot n (counting from 1) holds what happened after tick n - 1, at the earliest then.
            due = [n for n in range(1, number + 2) if n == 1 or times[n - 2] + delay <= now + early]
            assert views[number][0, qp] == max(due, default=0)
            assert views[number][1, qp] == 10 * max(due) + qp


@pytest.mark.parametrize("delay_ticks", [0.0, 0.5, 1.0, 2.3, 17.9])
@pytest.mark.parametrize("phase", [0.01, 0.5, 0.99])
def test_delay_is_exact_to_a_tick_on_regular_ticks(delay_ticks: float, phase: float) -> None:
    delay, event = round(delay_ticks * TICK_NS), round((3 + phase) * TICK_NS)
    line = DelayLine(np.array([delay]), 1, TICK_NS)
    line.reset(np.zeros((1, 1), np.int64))
    for now in range(0, 100 * TICK_NS, TICK_NS):
        line.next_snapshot[0] = now >= event
        if line.advance(now)[0, 0]:
            assert abs(now - event - delay) <= TICK_NS
            return
    pytest.fail("the event was never seen")


def test_reset_forgets_snapshots_under_way() -> None:
    line = DelayLine(np.array([3 * TICK_NS, 0]), 1, TICK_NS)
    for now in range(0, 5 * TICK_NS, TICK_NS):
        line.next_snapshot[0] = 7
        line.advance(now)
    line.reset(np.array([[20, 30]]))
    assert line.view.tolist() == [[20, 30]]
    line.next_snapshot[0] = 21
    line.advance(100 * TICK_NS)
    line.next_snapshot[0] = 22
    assert line.advance(101 * TICK_NS).tolist() == [[21, 22]]


# --- NIC --------------------------------------------------------------------------------------------------------------

FRAME_BYTES = 4178
FRAME_NS = 83_560.0
PLENTY = np.array([10**9])


class Pacer:
    """A NicPacer of full frames whose NICs get what they send at the very tick."""

    def __init__(self, nics: int = 1, tick_ns: int = 0) -> None:
        self.nic = NicPacer(np.full(nics, FRAME_NS / FRAME_BYTES), FRAME_BYTES, tick_ns)
        self.rest, self.lag_ns = self.nic.rest, self.nic.lag_ns

    def budget(self, now_ns: int, wants: Any, credit: Any) -> Any:
        return self.nic.budget(now_ns, wants, credit, np.full(len(wants), float(now_ns)))

    def charge(self, frames: Any) -> None:
        self.nic.charge(frames * FRAME_BYTES)


def make_pacer(nics: int = 1) -> Pacer:
    return Pacer(nics)


def test_frames_of_a_tick_leave_at_its_beginning_and_count_when_they_start() -> None:
    pacer = Pacer(tick_ns=TICK_NS)
    frames = pacer.budget(0, PLENTY, np.array([1e9]))
    assert frames.tolist() == [12]  # begun at 0, 83 560, … 919 160 ns
    pacer.charge(frames)
    assert pacer.nic.started_at_ns.tolist() == pytest.approx([11 * FRAME_NS])
    assert pacer.budget(TICK_NS, PLENTY, np.array([1e9])).tolist() == [12]


def test_a_nic_begins_when_it_got_something_not_when_the_tick_came() -> None:
    pacer = NicPacer(np.array([FRAME_NS / FRAME_BYTES]), FRAME_BYTES, 0)
    got_at = np.array([TICK_NS - 3.5 * FRAME_NS])
    assert pacer.budget(TICK_NS, PLENTY, np.array([1e9]), got_at).tolist() == [4]


def test_arrivals_are_exact_between_ticks() -> None:
    line = DelayLine(np.array([5 * TICK_NS, 5 * TICK_NS]), 1, TICK_NS)
    line.reset(np.zeros((1, 2), np.int64))
    ns_per_byte = 10.0
    for tick in range(7):
        line.next_snapshot[0] = 0 if tick < 2 else 1
        line.advance(tick * TICK_NS)
        if tick == 1:  # 10 000 bytes are out, the last frame begins 0.7 ticks after this tick
            line.note_sent(np.array([0]), np.array([1.7 * TICK_NS]), np.array([10_000]))
    assert line.view[0].tolist() == [1, 1]
    assert line.arrived_at_ns(0, 10_000, ns_per_byte) == pytest.approx(6.7 * TICK_NS)
    assert line.arrived_at_ns(0, 4_000, ns_per_byte) == pytest.approx(6.7 * TICK_NS - 60_000)
    # What is not of this tick's frames waited in the fabric: it counts from the tick.
    assert line.arrived_at_ns(1, 10_000, ns_per_byte) == pytest.approx(6 * TICK_NS)


@given(st.lists(st.one_of(on_time, late), min_size=1, max_size=100))
def test_a_busy_nic_sends_exactly_at_its_rate_whatever_the_ticks(gaps: list[int]) -> None:
    pacer = make_pacer()
    times = tick_times(gaps)
    sent = 0
    for now in times:
        frames = pacer.budget(now, PLENTY, np.array([1e9]))
        pacer.charge(frames)
        sent += int(frames[0])
        assert sent == pytest.approx((now - times[0]) / FRAME_NS + 1, abs=1.0)
        assert sent <= (now - times[0]) / FRAME_NS + 1 + 1e-6


def test_an_idle_nic_saves_no_credit_and_a_busy_one_stays_busy() -> None:
    pacer = make_pacer()
    pacer.charge(pacer.budget(0, PLENTY, np.array([1e9])))
    assert pacer.budget(round(0.5 * FRAME_NS), PLENTY, np.array([1e9])).tolist() == [0], "the first frame is under way"
    pacer.rest()
    assert pacer.budget(round(1000.5 * FRAME_NS), PLENTY, np.array([1e9])).tolist() == [1], (
        "nothing was to send till now"
    )


def test_a_new_demand_waits_for_the_frame_under_way() -> None:
    pacer = make_pacer()
    pacer.charge(pacer.budget(0, np.array([1]), np.array([1e9])))
    pacer.budget(10, np.array([0]), np.array([1e9]))
    assert pacer.budget(round(0.9 * FRAME_NS), PLENTY, np.array([1e9])).tolist() == [0]
    assert pacer.budget(round(1.1 * FRAME_NS), PLENTY, np.array([1e9])).tolist() == [1]


def test_budget_is_limited_by_wants_and_credit_and_caught_up_later() -> None:
    pacer = make_pacer(4)
    now = round(10.5 * FRAME_NS)
    wants = np.array([0, 3, 100, 100])
    pacer.budget(0, np.array([0, 3, 100, 100]), np.full(4, 1e9))
    credit = np.array([1e9, 1e9, 4.9, -2.0])
    frames = pacer.budget(now, wants, credit)
    assert frames.tolist() == [0, 3, 4, 0]
    pacer.charge(frames)
    assert pacer.budget(now, np.array([0, 0, 96, 100]), np.full(4, 1e9)).tolist() == [0, 0, 7, 11]


def test_lag_is_that_of_the_latest_nic_that_has_something_to_send() -> None:
    pacer = make_pacer(3)
    pacer.budget(0, np.array([5, 5, 5]), np.full(3, 1e9))
    pacer.charge(np.array([3, 1, 0]))
    now = round(4 * FRAME_NS)
    assert pacer.lag_ns(now, np.array([1, 1, 0])) == pytest.approx(3 * FRAME_NS, rel=1e-6)
    assert pacer.lag_ns(now, np.array([1, 0, 0])) == pytest.approx(FRAME_NS, rel=1e-6)
    assert pacer.lag_ns(now, np.array([0, 0, 0])) == 0


queue_pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=12)
budgets = st.lists(st.integers(0, 60), min_size=4, max_size=4)


@given(queue_pairs, budgets, st.integers(0, 1000))
def test_a_budget_is_shared_max_min_fair(qps: list[tuple[int, int]], budget: list[int], turn: int) -> None:
    qps.sort(key=lambda one: one[0])
    nic = np.array([one[0] for one in qps], np.int64)
    wants = np.array([one[1] for one in qps], np.int64)
    given_frames = share_budget(nic, wants, np.array(budget), turn)
    assert (given_frames >= 0).all()
    assert (given_frames <= wants).all()
    for number in range(4):
        mine, wanted = given_frames[nic == number], wants[nic == number]
        assert mine.sum() == min(budget[number], wanted.sum()), "all of it is used, and no more"
        hungry = mine < wanted
        if hungry.any():
            assert mine.max() <= mine[hungry].min() + 1, "whoever has more than a frame more than another is sated"


@pytest.mark.parametrize(("qps", "budget"), [(3, 1), (3, 5), (5, 2), (4, 7)])
def test_the_odd_frame_goes_round(qps: int, budget: int) -> None:
    nic = np.array([0] + [1] * qps)
    total = sum(share_budget(nic, np.full(qps + 1, 100), np.array([9, budget]), turn) for turn in range(qps))
    assert total.tolist() == [9 * qps] + [budget] * qps


@pytest.mark.parametrize("frames", [[0, 3, 3, 3, 3], [0, 0, 0, 1, 2], [2, 0, 0, 0, 5, 1], [4]])
def test_every_nic_that_sends_has_each_place_of_a_tick_equally_often(frames: list[int]) -> None:
    senders = [nic for nic, count in enumerate(frames) if count]
    orders = [take_turns(frames, turn) for turn in range(4 * len(senders))]
    assert all(sorted(order) == senders for order in orders)
    for place in range(len(senders)):
        assert Counter(order[place] for order in orders) == dict.fromkeys(senders, 4)


def test_no_nic_has_a_turn_where_none_sends() -> None:
    assert take_turns([0, 0], 7) == []


# --- shaping observer -------------------------------------------------------------------------------------------------

RATE_BYTES_PER_S = 50_000_000.0  # 50,000 bytes a tick
FULL_QUEUE = 20 * FRAME_BYTES


def observe_backlogs(observer: ShapingObserver, backlogs: Sequence[tuple[int, float]]) -> None:
    """Show backlogs of so many ticks at such a share of the rate, with idle ticks around them."""
    now, sent = 0, 0.0
    for ticks, share in backlogs:
        for tick in range(ticks + 5):
            depth = FULL_QUEUE if tick < ticks else 0
            observer.observe(now, np.array([0, depth]), np.array([0, int(sent)]), np.zeros(2, bool))
            now += TICK_NS
            sent += share * RATE_BYTES_PER_S * TICK_NS / 1e9
    observer.finish()


@pytest.mark.parametrize(
    ("backlogs", "lost_ticks", "backlogged_ticks"),
    [
        ([(101, 1.0)], 0, 100),
        ([(101, 0.9)], 10, 100),
        ([(101, 0.0)], 100, 100),
        ([(101, 1.005)], 0, 100),  # faster than the link is no loss
        ([(41, 0.5), (61, 1.0), (21, 0.75)], 25, 120),
        ([(101, 0.9), (101, 1.2)], 10, 200),  # lost time is not made good by a faster stretch
        ([(7, 0.0)] * 5, 0, 0),  # too short to judge
        ([(8, 0.0)], 7, 7),
    ],
)
def test_time_lost_in_backlogs_is_found(
    backlogs: list[tuple[int, float]], lost_ticks: float, backlogged_ticks: float
) -> None:
    observer = ShapingObserver(np.array([1.0, RATE_BYTES_PER_S]), FRAME_BYTES)
    for _ in range(2):
        observe_backlogs(observer, backlogs)
        assert observer.lost_ns == pytest.approx([0, lost_ticks * TICK_NS], abs=0.01 * TICK_NS)
        assert observer.backlogged_ns == pytest.approx([0, backlogged_ticks * TICK_NS])
        observer.restart()


def test_a_backlog_that_lasts_to_the_end_counts() -> None:
    observer = ShapingObserver(np.array([RATE_BYTES_PER_S]), FRAME_BYTES)
    for tick in range(51):
        observer.observe(tick * TICK_NS, np.array([FULL_QUEUE]), np.array([tick * 40_000]), np.zeros(1, bool))
    observer.finish()
    assert observer.lost_ns == pytest.approx([10 * TICK_NS])


def test_a_few_frames_are_no_backlog() -> None:
    observer = ShapingObserver(np.array([RATE_BYTES_PER_S]), FRAME_BYTES)
    for tick in range(50):
        observer.observe(tick * TICK_NS, np.array([3 * FRAME_BYTES]), np.array([0]), np.zeros(1, bool))
    observer.finish()
    assert observer.backlogged_ns.tolist() == [0]


@pytest.mark.parametrize(
    ("ticks_sent", "excess_ticks"),
    [
        ([1.0] * 100, 0),
        ([0.0] * 50 + [10.0] + [1.0] * 50, 0),  # what its bucket held
        ([0.0] * 50 + [13.0] + [1.0] * 50, 2),
        (
            [0.0] * 50 + [0.0, 0.0, 30.0],
            19,
        ),  # time before does not excuse it: a shaper saves up no more than its bucket
        ([1.5] * 100, 40),
        ([5.0] * 5 + [0.0] * 100 + [5.0] * 5, 10),  # the highest counts
    ],
)
def test_what_went_past_a_shaper_is_found(ticks_sent: list[float], excess_ticks: float) -> None:
    observer = ExcessObserver(np.array([0.0, RATE_BYTES_PER_S]), np.array([0.0, 10.0 * TICK_NS]))
    tick_bytes = round(RATE_BYTES_PER_S * TICK_NS / 1e9)
    for begin in (10**9, 10**10):
        sent = begin  # whatever the counters were
        observer.restart(begin, np.array([0, sent]))
        assert observer.excess_ns == 0
        for tick, share in enumerate(ticks_sent, 1):
            sent += round(share * tick_bytes)
            observer.observe(begin + tick * TICK_NS, np.array([sent, sent]))
        assert observer.excess_ns == pytest.approx(excess_ticks * TICK_NS)


def test_ring_streams_have_one_message_per_slice() -> None:
    schedule = find_algorithm("all_reduce", "ring").build_schedule([0, 1, 2, 3], 4 * 8 * 4096, 8)
    streams = build_streams(schedule, 4096)
    assert streams.packets.tolist() == [6 * 8] * 4
    assert set(streams.opcode.tolist()) == {Opcode.WRITE_ONLY}
