"""Pieces handed to queue pairs as these have credit: all of them once, in order at the receiver, and more to the faster."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.collectives import Schedule, cut_into_pieces, find_algorithm
from testbed.collectives.schedule import ScheduleBuilder
from testbed.engine.dispatch import CREDIT_PIECES, QpDispatcher
from testbed.engine.stream import build_streams

MTU = 256


def one_way(nbytes: int) -> Schedule:
    builder = ScheduleBuilder(2, nbytes)
    builder.add(0, 1, offset_bytes=0, nbytes=nbytes)
    return builder.build()


def packets_of(dispatcher: QpDispatcher, row: int) -> list[tuple[int, int, int]]:
    first = int(dispatcher.first_packet[row])
    rows = slice(first, first + int(dispatcher.packets[row]))
    columns = (dispatcher.opcode[rows], dispatcher.payload_bytes[rows], dispatcher.message[rows])
    return [(int(opcode), int(payload), int(message)) for opcode, payload, message in zip(*columns, strict=True)]


def run(schedule: Schedule, qps: int, rng: random.Random, dispatcher: QpDispatcher) -> list[int]:
    """Play a network that takes messages of each queue pair in order and at any pace; return the arrivals."""
    rows = len(schedule.connections) * qps
    streams = build_streams(schedule, MTU)
    done = [0] * rows
    acked = np.zeros(rows, np.int64)
    arrived: list[int] = []
    arrived_set: set[int] = set()
    now = 1.0
    while dispatcher.pending_transfers:
        assert (dispatcher.packets - acked).max() <= CREDIT_PIECES * -(-int(schedule.nbytes.max()) // MTU)
        ready = [row for row in range(rows) if done[row] < len(dispatcher.transfers_of[row])]
        assert ready, "nothing under way and not done"
        moving = rng.sample(ready, rng.randint(1, len(ready)))
        for row in moving:
            transfer = dispatcher.transfers_of[row][done[row]]
            # Nothing leaves before what it waits for, and all before that on its connection, has arrived.
            for dep in schedule.dependencies(transfer).tolist():
                earlier = streams.transfers_of[schedule.connection[dep]].tolist()
                assert set(earlier[: earlier.index(dep) + 1]) <= arrived_set
            done[row] += 1
            arrived.append(transfer)
        arrived_set.update(arrived)
        now += 1
        dispatcher.record_arrivals(moving, [done[row] for row in moving], lambda row, transfer, at=now: at)
        for row in range(rows):
            acked[row] = sum(-(-int(schedule.nbytes[t]) // MTU) for t in dispatcher.transfers_of[row][: done[row]])
        dispatcher.dispatch(acked, now)
    return arrived


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["ring", "halving_doubling", "double_binary_tree"]),
    size=st.integers(4, 20_000),
    qps=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_every_piece_is_sent_once_and_not_before_its_time(name: str, size: int, qps: int, seed: int) -> None:
    messages = find_algorithm("all_reduce", name).build_schedule(range(4), size, 2)
    schedule = cut_into_pieces(messages, 3 * MTU)
    assert schedule.nbytes.max() <= 3 * MTU
    assert schedule.nbytes.sum() == messages.nbytes.sum()
    dispatcher = QpDispatcher(schedule, qps, MTU)
    streams = build_streams(schedule, MTU)
    for iteration in range(2):  # the second begins like the first
        dispatcher.restart()
        arrived = run(schedule, qps, random.Random(seed + iteration), dispatcher)
        assert sorted(arrived) == list(range(len(schedule)))
        for row in range(len(schedule.connections) * qps):
            # What a queue pair sends is the packets of its pieces, one after the other.
            expected, wire = [], [0]
            for transfer in dispatcher.transfers_of[row]:
                assert schedule.connection[transfer] == row // qps
                end = int(streams.first_packet[row // qps] + streams.message_end_packet[transfer])
                for packet in range(end - -(-int(schedule.nbytes[transfer]) // MTU), end):
                    payload = int(streams.payload_bytes[packet])
                    expected.append((int(streams.opcode[packet]), payload, transfer))
                    wire.append(
                        wire[-1] + int(streams.wire_bytes_before[packet + 1] - streams.wire_bytes_before[packet])
                    )
                assert dispatcher.wire_bytes_at_end[transfer] == wire[-1]
            assert packets_of(dispatcher, row) == expected
            first = int(dispatcher.first_packet[row])
            if expected:
                assert dispatcher.wire_bytes_before[first : first + len(wire)].tolist() == wire


@pytest.mark.parametrize("speeds", [(1, 1, 1, 1), (4, 1, 1, 2)])
def test_queue_pairs_get_what_they_can_carry(speeds: tuple[int, ...]) -> None:
    schedule = cut_into_pieces(one_way(800 * 4 * MTU), 4 * MTU)
    dispatcher = QpDispatcher(schedule, len(speeds), MTU)
    dispatcher.restart()
    acked = np.zeros(len(speeds), np.int64)
    done = [0] * len(speeds)
    for tick in range(100_000):
        if not dispatcher.pending_transfers:
            break
        acked = np.minimum(acked + np.array(speeds), dispatcher.packets)
        done = [int(count) // 4 for count in acked]
        dispatcher.record_arrivals(range(len(speeds)), done, lambda row, transfer: 1.0)
        dispatcher.dispatch(acked, float(tick))
    shares = dispatcher.packets / dispatcher.packets.sum()
    np.testing.assert_allclose(shares, np.array(speeds) / sum(speeds), atol=0.02)


def test_what_overtakes_waits_for_what_is_before_it() -> None:
    builder = ScheduleBuilder(3, 300)
    first = builder.add(0, 1, offset_bytes=0, nbytes=100)
    second = builder.add(0, 1, offset_bytes=100, nbytes=100)
    builder.add(1, 2, offset_bytes=100, nbytes=100, after=[second])
    dispatcher = QpDispatcher(builder.build(), 2, MTU)
    dispatcher.restart()
    assert (first, second) == (0, 1)
    assert dispatcher.transfers_of == [[0], [1], [], []]
    dispatcher.record_arrivals([1], [1], lambda row, transfer: 5.0)
    assert dispatcher.dispatch(np.zeros(4, np.int64), 6.0) == []
    dispatcher.record_arrivals([0], [1], lambda row, transfer: 9.0)
    assert dispatcher.dispatch(np.zeros(4, np.int64), 10.0) == [2]
    assert dispatcher.released_at_ns[2] == 9.0


def test_piece_needs_a_byte() -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        cut_into_pieces(one_way(10), 0)
