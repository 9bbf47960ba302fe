from __future__ import annotations

import heapq
import time
from collections import Counter, defaultdict, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.collectives import (
    ALGORITHMS,
    CollectiveAlgorithm,
    Flow,
    RingAllReduce,
    RingSendRecv,
    Schedule,
    ScheduleBuilder,
    build_flows,
    ideal_arrivals_ns,
    ideal_cct_ns,
    largest_frame_wire_bytes,
    wire_bytes,
)

RATE = 400 * 10**9
MTU = 4096


def ns(wire: float, rate: float = RATE) -> float:
    return wire * 8e9 / rate


def no_latency(src: int, dst: int) -> float:
    return 0.0


def packets(nbytes: int, mtu: int) -> list[int]:
    """Wire bytes of each packet of a message, straight from the definition of the frame."""
    sizes = []
    for begin in range(0, max(nbytes, 1), mtu):
        payload = min(mtu, nbytes - begin)
        padded = payload + (-payload) % 4
        frame = 14 + 20 + 8 + 12 + (16 if begin == 0 else 0) + padded + 4
        sizes.append(frame + 4 + 20)
    return sizes


def packet_simulation(
    schedule: Schedule, rates: list[float], propagation: list[list[float]], hops: int, mtu: int
) -> list[float]:
    """Arrival of each transfer, simulated packet by packet and hop by hop.

    A NIC sends packets, round robin over its connections that have any to send; the core's hops store and forward each
    packet on a link of its own per pair of ranks (nothing blocks); the last hop is the receiving NIC's, first come first
    served.
    """
    left = [len(schedule.dependencies(i)) for i in range(len(schedule))]
    waiting = defaultdict(list)
    for i in range(len(schedule)):
        for dep in schedule.dependencies(i).tolist():
            waiting[dep].append(i)
    todo: dict[int, list[tuple[int, int]]] = defaultdict(list)  # connection -> (transfer, wire bytes) of each packet
    for i in range(len(schedule)):
        todo[int(schedule.connection[i])] += [(i, size) for size in packets(int(schedule.nbytes[i]), mtu)]
    for stream in todo.values():
        stream.reverse()
    turn: dict[int, deque[int]] = defaultdict(deque)  # rank -> connections with a packet to send
    queued: set[int] = set()
    busy: set[int] = set()
    free: dict[tuple[int, ...], float] = defaultdict(float)  # link -> time
    undelivered = [len(packets(int(n), mtu)) for n in schedule.nbytes]
    arrival = [0.0] * len(schedule)
    events: list[tuple[float, int, str, tuple[int, ...]]] = []
    serial = 0

    def at(when: float, what: str, *args: int) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (when, serial, what, args))

    def offer(connection: int, now: float) -> None:
        if connection not in queued and todo[connection] and left[todo[connection][-1][0]] == 0:
            queued.add(connection)
            turn[schedule.connections[connection][0]].append(connection)
            serve(schedule.connections[connection][0], now)

    def serve(rank: int, now: float) -> None:
        if rank in busy or not turn[rank]:
            return
        connection = turn[rank].popleft()
        queued.discard(connection)
        transfer, size = todo[connection].pop()
        now += ns(size, rates[rank])
        busy.add(rank)
        at(now, "free", rank, connection)
        at(now, "sent", transfer, size, 1)

    for connection in list(todo):
        offer(connection, 0.0)
    while events:
        now, _, what, args = heapq.heappop(events)
        if what == "free":
            rank, connection = args
            busy.discard(rank)
            offer(connection, now)
            serve(rank, now)
            continue
        transfer = args[0]
        src, dst = int(schedule.src[transfer]), int(schedule.dst[transfer])
        if what == "sent":  # over hop number ``hop``
            _, size, hop = args
            what = "delivered" if hop == hops else "queued"
            at(now + propagation[src][dst] / hops, what, transfer, size, hop)
        elif what == "queued":
            _, size, hop = args
            link = (dst,) if hop + 1 == hops else (src, dst, hop)
            free[link] = max(free[link], now) + ns(size, rates[dst])
            at(free[link], "sent", transfer, size, hop + 1)
        else:
            undelivered[transfer] -= 1
            if undelivered[transfer] == 0:
                arrival[transfer] = now
                for follower in waiting[transfer]:
                    left[follower] -= 1
                    offer(int(schedule.connection[follower]), now)
    assert not any(todo.values())
    return arrival


@given(nbytes=st.integers(1, 60_000), mtu=st.sampled_from([256, 1024, 4096]))
def test_wire_bytes_are_the_sum_of_the_packets(nbytes: int, mtu: int) -> None:
    assert wire_bytes(nbytes, mtu) == sum(packets(nbytes, mtu))
    assert largest_frame_wire_bytes(nbytes, mtu) == max(packets(nbytes, mtu))


def test_wire_bytes_are_vectorised() -> None:
    sizes = np.array([[1, 4], [4096, 4097]])
    assert wire_bytes(sizes, MTU).tolist() == [[102, 102], [4194, 4280]]
    for mtu in (0, 1022, -4):
        with pytest.raises(ValueError, match="multiple of 4"):
            wire_bytes(100, mtu)


def test_send_recv_takes_its_wire_time_plus_latency() -> None:
    schedule = RingSendRecv().build_schedule(range(5), 1 << 20, 1)
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=np.full((5, 5), 2650), mtu=MTU)
    assert cct == pytest.approx(ns(256 * (4096 + 82) + 16) + 2650, rel=1e-12)


@pytest.mark.parametrize("nranks", [2, 3, 16])
def test_ring_without_latency_is_chunks_back_to_back(nranks: int) -> None:
    schedule = RingAllReduce().build_schedule(range(nranks), nranks * 8 * 65536)
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=no_latency, mtu=MTU)
    chunk_ns = 8 * ns(int(wire_bytes(65536, MTU)))
    assert cct == pytest.approx(2 * (nranks - 1) * chunk_ns, rel=1e-9)


def test_ring_hides_a_latency_below_seven_eighths_of_a_chunk() -> None:
    schedule = RingAllReduce().build_schedule(range(4), 4 * 8 * 65536)
    slice_ns = ns(int(wire_bytes(65536, MTU)))
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=np.full((4, 4), 6.9 * slice_ns), mtu=MTU)
    assert cct == pytest.approx(6 * 8 * slice_ns + 6.9 * slice_ns, rel=1e-9)


def test_ring_with_large_latency_pays_it_at_every_step() -> None:
    schedule = RingAllReduce().build_schedule(range(6), 6 * 8 * 4096)
    slice_ns = ns(4096 + 98)
    latency = 50_000
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=np.full((6, 6), latency), mtu=MTU)
    assert cct == pytest.approx(7 * slice_ns + 10 * (slice_ns + latency), rel=1e-9)


def test_slowest_nic_sets_the_pace_in_either_direction() -> None:
    rates = np.full(4, RATE)
    rates[2] //= 4
    schedule = RingAllReduce().build_schedule(range(4), 4 * 8 * 65536)
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=rates, latency_ns=no_latency, mtu=MTU)
    slow_chunk_ns = 8 * ns(int(wire_bytes(65536, MTU)), RATE / 4)
    assert cct == pytest.approx(6 * slow_chunk_ns, rel=1e-9)


def test_incast_is_limited_by_the_receiving_nic() -> None:
    builder = ScheduleBuilder(6, 1 << 20)
    for src in range(1, 6):
        builder.add(src, 0, offset_bytes=0, nbytes=1 << 20)
    arrivals = ideal_arrivals_ns(builder.build(), nic_rate_bits_per_s=RATE, latency_ns=np.full((6, 6), 900), mtu=MTU)
    one_ns = ns(int(wire_bytes(1 << 20, MTU)))
    np.testing.assert_allclose(arrivals, np.full(5, 900 + 5 * one_ns), rtol=1e-9)  # interleaved: all end together


def test_late_sender_queues_behind_what_came_before() -> None:
    # Two senders fill the receiver's queue at twice its rate; a third comes from afar when they have sent all.
    builder = ScheduleBuilder(4, 1 << 20)
    for src in (1, 2, 3):
        builder.add(src, 0, offset_bytes=0, nbytes=1 << 20)
    one_ns = ns(int(wire_bytes(1 << 20, MTU)))
    latency = np.zeros((4, 4))
    latency[3, 0] = 1.5 * one_ns
    arrivals = ideal_arrivals_ns(builder.build(), nic_rate_bits_per_s=RATE, latency_ns=latency, mtu=MTU)
    np.testing.assert_allclose(arrivals / one_ns, [2, 2, 3], rtol=1e-9)
    latency[3, 0] = 3.5 * one_ns  # when the queue has long drained
    arrivals = ideal_arrivals_ns(builder.build(), nic_rate_bits_per_s=RATE, latency_ns=latency, mtu=MTU)
    np.testing.assert_allclose(arrivals / one_ns, [2, 2, 4.5], rtol=1e-9)


def test_nic_shares_its_rate_among_its_connections() -> None:
    builder = ScheduleBuilder(3, 1 << 20)
    for _ in range(3):
        builder.add(0, 1, offset_bytes=0, nbytes=1 << 20)
    for _ in range(2):
        builder.add(0, 2, offset_bytes=0, nbytes=1 << 20)
    arrivals = ideal_arrivals_ns(builder.build(), nic_rate_bits_per_s=RATE, latency_ns=no_latency, mtu=MTU)
    np.testing.assert_allclose(arrivals / ns(int(wire_bytes(1 << 20, MTU))), [2, 4, 5, 2, 4], rtol=1e-9)


@pytest.mark.parametrize("slow", ["sender", "receiver"])
def test_slow_nic_is_slow_among_several_too(slow: str) -> None:
    rates = np.full(4, RATE)
    rates[0] //= 4
    builder = ScheduleBuilder(4, 1 << 20)
    for peer in (1, 2, 3):
        src, dst = (0, peer) if slow == "sender" else (peer, 0)
        builder.add(src, dst, offset_bytes=0, nbytes=1 << 20)
    cct = ideal_cct_ns(builder.build(), nic_rate_bits_per_s=rates, latency_ns=no_latency, mtu=MTU)
    assert cct == pytest.approx(3 * 4 * ns(int(wire_bytes(1 << 20, MTU))), rel=1e-9)


def test_latency_may_be_given_by_connection() -> None:
    builder = ScheduleBuilder(2, 4096)
    for channel in (0, 1):
        builder.add(0, 1, offset_bytes=0, nbytes=4096, channel=channel)
    schedule = builder.build()
    arrivals = ideal_arrivals_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=[100, 5000], mtu=MTU)
    np.testing.assert_allclose(arrivals, 2 * ns(4096 + 98) + np.array([100, 5000]), rtol=1e-9)


def simulate(schedule: Schedule, propagation: int = 2400, hops: int = 4) -> tuple[float, float, float]:
    """Return the completion time by the model and by the simulation, and the time of the largest frame."""
    nranks = schedule.nranks
    frame_ns = ns(largest_frame_wire_bytes(schedule.nbytes, MTU))
    latency = np.full((nranks, nranks), propagation + (hops - 1) * frame_ns)
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=latency, mtu=MTU)
    delays = [[float(propagation)] * nranks] * nranks
    return cct, max(packet_simulation(schedule, [RATE] * nranks, delays, hops, MTU)), frame_ns


EVERY_ALGORITHM = [(a, n) for named in ALGORITHMS.values() for a in named.values() for n in (4, 7, 8)]


@pytest.mark.parametrize("packets_per_slice", [1, 2, 8])
@pytest.mark.parametrize(
    ("algorithm", "nranks"),
    [(a, n) for a, n in EVERY_ALGORITHM if a.name != "halving_doubling" or n.bit_count() == 1],
    ids=lambda one: str(one) if isinstance(one, int) else f"{one.collective}-{one.name}",
)
def test_every_collective_agrees_with_a_packet_level_simulation(
    algorithm: CollectiveAlgorithm, nranks: int, packets_per_slice: int
) -> None:
    slices = algorithm.slices_per_chunk(nranks)
    size = slices * packets_per_slice * MTU
    size *= 2 if algorithm.name == "double_binary_tree" else nranks if algorithm.chunk_bytes(size, nranks) < size else 1
    cct, simulated, _ = simulate(algorithm.build_schedule(range(nranks), size, slices))
    # Trees share NICs among slices that wait for one another: for n = 2 to 16 and 1 to 32 packets per slice the largest
    # difference was 1.5 %. All others are the same but for whose turn it is when the last RETH goes out.
    tolerance = 0.015 if algorithm.name.endswith("tree") else 5e-4
    assert cct == pytest.approx(simulated, rel=tolerance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_flows_agree_with_a_packet_level_simulation(data: st.DataObject) -> None:
    nranks = data.draw(st.integers(2, 6))
    pair = st.tuples(st.integers(0, nranks - 1), st.integers(1, nranks - 1), st.integers(1, 30))
    drawn = data.draw(st.lists(pair, min_size=1, max_size=8))
    schedule = build_flows(nranks, [Flow(a, (a + b) % nranks, n * MTU) for a, b, n in drawn], 4, MTU)
    cct, simulated, frame_ns = simulate(schedule)
    # Whose turn it is at the end: 800 random sets of flows differed by at most one frame.
    assert cct == pytest.approx(simulated, abs=1.5 * frame_ns)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    nranks=st.integers(2, 5),
    size=st.integers(1, 120_000),
    slices=st.integers(1, 8),
    propagation=st.integers(0, 5000),
    hops=st.sampled_from([2, 4]),
    mtu=st.sampled_from([1024, 4096]),
)
def test_ring_agrees_with_a_packet_level_simulation(
    nranks: int, size: int, slices: int, propagation: int, hops: int, mtu: int
) -> None:
    schedule = RingAllReduce().build_schedule(range(nranks), size, slices)
    frame_ns = ns(largest_frame_wire_bytes(schedule.nbytes, mtu))
    cct = ideal_cct_ns(
        schedule,
        nic_rate_bits_per_s=RATE,
        latency_ns=np.full((nranks, nranks), propagation + (hops - 1) * frame_ns),
        mtu=mtu,
    )
    simulated = max(packet_simulation(schedule, [RATE] * nranks, [[propagation] * nranks] * nranks, hops, mtu))
    # Slices of a chunk differ by a byte, so by a padded word and at worst by a packet; each step's latency
    # is charged with the largest frame of all.
    steps = 2 * (nranks - 1)
    sizes = [packets(int(n), mtu) for n in np.unique(schedule.nbytes)]
    spread = max(map(max, sizes)) - min(map(max, sizes))
    assert simulated <= cct + 1e-6
    assert cct - simulated <= steps * (hops - 1) * ns(spread + 16) + 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_schedules_agree_with_a_packet_level_simulation(data: st.DataObject) -> None:
    nranks = data.draw(st.integers(2, 5))
    builder = ScheduleBuilder(nranks, 4096 * 8)
    arriving: dict[int, list[int]] = defaultdict(list)
    for _ in range(data.draw(st.integers(1, 25))):
        src = data.draw(st.integers(0, nranks - 1))
        dst = (src + data.draw(st.integers(1, nranks - 1))) % nranks
        after = [data.draw(st.sampled_from(arriving[src]))] if arriving[src] and data.draw(st.booleans()) else []
        frames = data.draw(st.sampled_from([1, 2, 8]))
        arriving[dst].append(builder.add(src, dst, offset_bytes=0, nbytes=4096 * frames, after=after))
    schedule = builder.build()
    frame_ns = ns(4096 + 98)
    latency = 1000 + frame_ns
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=np.full((nranks, nranks), latency), mtu=MTU)
    simulated = max(packet_simulation(schedule, [RATE] * nranks, [[1000] * nranks] * nranks, 2, MTU))
    # Where a NIC serves several connections the model ends short messages later than real turns do, and what waits for
    # them begins later. 1500 random schedules of messages this short were -2 % to +10 % off (99 of 100: within 5.5 %),
    # at most 6 frames.
    shared = any(max(Counter(ranks).values()) > 1 for ranks in zip(*schedule.connections, strict=True))
    tolerance = (8 if len(schedule.deps) else 1.5) * frame_ns if shared else 1e-6
    assert cct == pytest.approx(simulated, abs=tolerance)
    bound = max(
        np.bincount(schedule.src, wire_bytes(schedule.nbytes, MTU)).max(),
        np.bincount(schedule.dst, wire_bytes(schedule.nbytes, MTU)).max(),
    )
    assert cct >= ns(bound) + latency - 1e-6


def test_64_ranks_are_modelled_quickly() -> None:
    schedule = RingAllReduce().build_schedule(range(64), 64 << 20)
    begin = time.process_time()
    cct = ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=no_latency, mtu=MTU)
    assert time.process_time() - begin < 1.0
    assert cct == pytest.approx(126 * 8 * ns(int(wire_bytes(1 << 17, MTU))), rel=1e-9)


def test_wrong_rates_and_latencies_are_refused() -> None:
    schedule = RingSendRecv().build_schedule(range(2), 100)
    with pytest.raises(ValueError, match="rate must be above 0"):
        ideal_cct_ns(schedule, nic_rate_bits_per_s=[RATE, 0], latency_ns=no_latency, mtu=MTU)
    with pytest.raises(ValueError, match="must not be negative"):
        ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=np.full((2, 2), -1), mtu=MTU)
    with pytest.raises(ValueError, match="shape"):
        ideal_cct_ns(schedule, nic_rate_bits_per_s=RATE, latency_ns=np.zeros(3), mtu=MTU)


def test_flows_that_start_later_arrive_later() -> None:
    flows = [Flow(0, 2, 4096 * 100), Flow(1, 2, 4096 * 100, start_ns=1_000_000), Flow(0, 1, 4096, start_ns=5_000_000)]
    arrivals = ideal_arrivals_ns(
        build_flows(3, flows, slices=1), nic_rate_bits_per_s=8e9, latency_ns=np.zeros(3), mtu=4096
    )
    wire = wire_bytes([4096 * 100, 4096], 4096)
    # 1 byte per ns: the second flow finds the receiver free, the third its sender.
    assert arrivals[0] == pytest.approx(wire[0])
    assert arrivals[1] == pytest.approx(1_000_000 + wire[0])
    assert arrivals[2] == pytest.approx(5_000_000 + wire[1])
