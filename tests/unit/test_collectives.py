from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.collectives import (
    ALGORITHMS,
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    RingAllReduce,
    RingSendRecv,
    Schedule,
    ScheduleBuilder,
    TransferOp,
    find_algorithm,
    ring_order,
)
from testbed.collectives.proof import find_counterexample

EVERY_ALGORITHM = [algorithm for named in ALGORITHMS.values() for algorithm in named.values()]
ODD_SIZES = [1, 2, 7, 16, 17, 63, 251, 1031, 2048]


def ring_by_hand(order: tuple[int, ...], size: int, slices: int) -> Schedule:
    """The ring all-reduce written out transfer by transfer, as its textbook says."""
    n = len(order)
    builder = ScheduleBuilder(n, size)
    handles: dict[tuple[int, int, int], int] = {}
    for step in range(2 * (n - 1)):
        for position in range(n):
            chunk = (position - step) % n
            begin, end = chunk * size // n, (chunk + 1) * size // n
            for part in range(slices):
                first = begin + part * (end - begin) // slices
                last = begin + (part + 1) * (end - begin) // slices
                handles[step, position, part] = builder.add(
                    order[position],
                    order[(position + 1) % n],
                    offset_bytes=first,
                    nbytes=last - first,
                    op=TransferOp.REDUCE if step < n - 1 else TransferOp.COPY,
                    after=[handles[step - 1, (position - 1) % n, part]] if step else [],
                )
    return builder.build()


def drop_dependency(schedule: Schedule, dep: int) -> Schedule:
    owner = int(np.searchsorted(schedule.dep_offsets, dep, side="right")) - 1
    offsets = schedule.dep_offsets.copy()
    offsets[owner + 1 :] -= 1
    return replace(schedule, dep_offsets=offsets, deps=np.delete(schedule.deps, dep))


@pytest.mark.parametrize("algorithm", EVERY_ALGORITHM, ids=lambda a: f"{a.collective}-{a.name}")
@pytest.mark.parametrize("nranks", range(2, 18))
def test_schedule_achieves_its_collective(algorithm: CollectiveAlgorithm, nranks: int) -> None:
    rng = np.random.default_rng(nranks)
    for size in ODD_SIZES:
        order = rng.permutation(nranks).tolist()
        slices = 1 if size == 63 else SLICES_PER_CHUNK
        schedule = algorithm.build_schedule(order, size, slices)
        found = find_counterexample(schedule, algorithm.collective, order, rng, executions=1)
        assert found is None, f"size {size}, order {order}: {found}"


def test_proof_catches_each_dropped_dependency() -> None:
    rng = np.random.default_rng(1)
    order = [2, 0, 3, 1]
    schedule = RingAllReduce().build_schedule(order, 37, 2)
    for dep in range(len(schedule.deps)):
        broken = drop_dependency(schedule, dep)
        assert find_counterexample(broken, Collective.ALL_REDUCE, order, rng, executions=400), dep


def test_proof_catches_each_wrong_op() -> None:
    rng = np.random.default_rng(2)
    order = [0, 2, 1]
    schedule = RingAllReduce().build_schedule(order, 31)
    for transfer in range(len(schedule)):
        op = schedule.op.copy()
        op[transfer] ^= 1
        assert find_counterexample(replace(schedule, op=op), Collective.ALL_REDUCE, order, rng), transfer


def test_proof_catches_a_send_recv_that_is_one_byte_short() -> None:
    schedule = RingSendRecv().build_schedule([0, 1, 2], 64)
    nbytes = schedule.nbytes.copy()
    nbytes[5] -= 1
    rng = np.random.default_rng(3)
    assert find_counterexample(replace(schedule, nbytes=nbytes), Collective.SEND_RECV, [0, 1, 2], rng)


def test_send_recv_would_fail_in_place() -> None:
    schedule = replace(RingSendRecv().build_schedule([0, 1, 2], 64), in_place=True)
    rng = np.random.default_rng(4)
    assert find_counterexample(schedule, Collective.SEND_RECV, [0, 1, 2], rng, executions=20)


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(2, 9).flatmap(lambda n: st.permutations(range(n))),
    size=st.integers(1, 400),
    slices=st.integers(1, 11),
)
def test_vectorised_ring_equals_the_one_written_out(order: list[int], size: int, slices: int) -> None:
    fast = RingAllReduce().build_schedule(order, size, slices)
    slow = ring_by_hand(tuple(order), size, slices)
    for field in ("src", "dst", "nbytes", "offset_bytes", "op", "dep_offsets", "deps"):
        left, right = getattr(fast, field), getattr(slow, field)
        assert left.dtype == right.dtype, field
        np.testing.assert_array_equal(left, right, err_msg=field)
    ends = [fast.connections[connection] for connection in fast.connection]
    assert ends == [slow.connections[connection] for connection in slow.connection]


def test_ring_sends_the_bytes_that_busbw_assumes() -> None:
    algorithm = RingAllReduce()
    schedule = algorithm.build_schedule(range(16), 1 << 20)
    assert (schedule.sent_bytes() == round(algorithm.traffic_factor(16) * (1 << 20))).all()
    assert len(schedule) == 2 * 15 * 16 * SLICES_PER_CHUNK


def test_empty_slices_are_left_out_and_the_chain_stays() -> None:
    schedule = RingAllReduce().build_schedule(range(5), 3)
    assert (schedule.nbytes == 1).all()
    assert len(schedule) == 3 * 8  # three chunks of one byte, each sent in eight steps
    assert (np.diff(schedule.dep_offsets) == 1).sum() == 3 * 7


def test_64_ranks_are_scheduled_quickly() -> None:
    begin = time.process_time()
    schedule = RingAllReduce().build_schedule(range(64), 64 << 20)
    assert time.process_time() - begin < 0.5
    assert len(schedule) == 64 * 126 * SLICES_PER_CHUNK


@pytest.mark.parametrize("algorithm", EVERY_ALGORITHM, ids=lambda a: f"{a.collective}-{a.name}")
@pytest.mark.parametrize(
    ("order", "size", "slices", "message"),
    [
        ([0], 8, 8, "at least 2 ranks"),
        ([0, 1], 0, 8, "at least 1 byte"),
        ([0, 1], -4, 8, "at least 1 byte"),
        ([0, 2], 8, 8, "each rank from 0 to 1 once"),
        ([1, 1], 8, 8, "each rank from 0 to 1 once"),
        ([0, 1], 8, 0, "at least 1 slice"),
    ],
)
def test_wrong_arguments_are_refused(
    algorithm: CollectiveAlgorithm, order: list[int], size: int, slices: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm.build_schedule(order, size, slices)


def test_builder_passes_dependencies_through_an_empty_transfer() -> None:
    builder = ScheduleBuilder(3, 10)
    first = builder.add(0, 1, offset_bytes=0, nbytes=10)
    empty = builder.add(1, 2, offset_bytes=10, nbytes=0, after=[first])
    builder.add(2, 0, offset_bytes=0, nbytes=10, after=[empty])
    schedule = builder.build()
    assert len(schedule) == 2
    assert schedule.dependencies(1).tolist() == [0]
    assert schedule.connections == ((0, 1), (2, 0))


def test_builder_refuses_what_a_rank_cannot_know() -> None:
    builder = ScheduleBuilder(3, 10)
    first = builder.add(0, 1, offset_bytes=0, nbytes=10)
    with pytest.raises(ValueError, match="rank 2 cannot wait for a transfer that arrives at rank 1"):
        builder.add(2, 0, offset_bytes=0, nbytes=10, after=[first])
    with pytest.raises(ValueError, match="not that of an earlier transfer"):
        builder.add(1, 0, offset_bytes=0, nbytes=10, after=[7])


def test_schedule_is_read_only() -> None:
    schedule = RingAllReduce().build_schedule(range(3), 100)
    with pytest.raises(ValueError, match="read-only"):
        schedule.nbytes[0] = 5


def test_impossible_schedules_are_refused() -> None:
    good = RingAllReduce().build_schedule(range(3), 100)
    for field, index, value, message in [
        ("deps", 0, len(good) - 1, "does not come before it"),
        ("deps", 0, -1, "does not come before it"),
        ("nbytes", 0, 0, "at least 1 byte"),
        ("nbytes", 0, 101, "leaves the buffer"),
        ("offset_bytes", 3, -1, "leaves the buffer"),
        ("op", 3, 2, "unknown op"),
        ("connection", 3, 9, "does not exist"),
        ("src", 3, 2, "differ from its connection"),
    ]:
        array = getattr(good, field).copy()
        array[index] = value
        with pytest.raises(ValueError, match=message):
            replace(good, **{field: array})


def test_registry_finds_by_name_and_lists_what_there_is() -> None:
    assert find_algorithm("all_reduce", "ring") is find_algorithm("all_reduce")
    assert find_algorithm("send_recv").collective == "send_recv"
    with pytest.raises(ValueError, match="must be one of all_reduce, send_recv, got 'alltoall'"):
        find_algorithm("alltoall")
    with pytest.raises(ValueError, match="algorithm of all_reduce must be one of ring, got 'tree'"):
        find_algorithm("all_reduce", "tree")
    for collective, named in ALGORITHMS.items():
        for name, algorithm in named.items():
            assert (algorithm.collective, algorithm.name) == (collective, name)


def test_rails_cross_the_spine_on_every_hop_when_racks_are_equal() -> None:
    order = ring_order("rails", [4, 4, 4, 4])
    assert order[:5] == (0, 4, 8, 12, 1)
    racks = [rank // 4 for rank in order]
    assert all(here != racks[(i + 1) % 16] for i, here in enumerate(racks))


@given(hosts=st.lists(st.integers(0, 5), min_size=1, max_size=6), kind=st.sampled_from(["packed", "rails"]))
def test_order_holds_each_rank_once(hosts: list[int], kind: str) -> None:
    assert sorted(ring_order(kind, hosts)) == list(range(sum(hosts)))


def test_order_of_uneven_racks_explicit_and_wrong() -> None:
    assert ring_order("packed", [2, 1]) == (0, 1, 2)
    assert ring_order("rails", [1, 3, 2]) == (0, 1, 4, 2, 5, 3)
    assert ring_order([2, 0, 1], [2, 1]) == (2, 0, 1)
    with pytest.raises(ValueError, match="each rank from 0 to 2 once"):
        ring_order([0, 1], [2, 1])
    with pytest.raises(ValueError, match="packed, rails or a list of ranks, got 'rail'"):
        ring_order("rail", [2, 1])
