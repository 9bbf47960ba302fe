from __future__ import annotations

import itertools
import time
from collections import Counter
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
    Flow,
    RingAllReduce,
    RingSendRecv,
    Schedule,
    ScheduleBuilder,
    TransferOp,
    build_flows,
    busiest_nic_bytes,
    find_algorithm,
    incast_flows,
    permutation_flows,
    ring_order,
)
from testbed.collectives.proof import execute, find_counterexample
from testbed.collectives.trees import Tree, binary_tree, double_binary_tree

EVERY_ALGORITHM = [algorithm for named in ALGORITHMS.values() for algorithm in named.values()]
POWER_OF_TWO_ONLY = {"halving_doubling"}
# Below, at and above the number of ranks, odd and even; 63 without slices.
SIZES = [1, 7, 16, 63, 250]


def name_of(algorithm: CollectiveAlgorithm) -> str:
    return f"{algorithm.collective}-{algorithm.name}"


every_algorithm = pytest.mark.parametrize("algorithm", EVERY_ALGORITHM, ids=name_of)


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


def drop_dependencies(schedule: Schedule, dropped: list[int]) -> Schedule:
    kept = np.ones(len(schedule.deps), np.bool_)
    kept[dropped] = False
    offsets = np.concatenate(([0], np.cumsum(kept)))[schedule.dep_offsets]
    return replace(schedule, dep_offsets=offsets, deps=schedule.deps[kept])


@every_algorithm
@pytest.mark.parametrize("nranks", range(2, 18))
def test_schedule_achieves_its_collective(algorithm: CollectiveAlgorithm, nranks: int) -> None:
    if algorithm.name in POWER_OF_TWO_ONLY and nranks.bit_count() > 1:
        with pytest.raises(
            ValueError, match=f"needs a power of two of ranks, got {nranks}: every rank needs a partner"
        ):
            algorithm.build_schedule(range(nranks), 64)
        return
    rng = np.random.default_rng(nranks)
    for size in SIZES:
        order = rng.permutation(nranks).tolist()
        slices = 1 if size == 63 else SLICES_PER_CHUNK
        schedule = algorithm.build_schedule(order, size, slices)
        found = find_counterexample(schedule, algorithm.collective, order, rng, executions=1)
        assert found is None, f"size {size}, order {order}: {found}"


# Flow control, which no order of arrivals can show.
WAITS_FOR_NO_DATA = {"all_to_all-pairwise"}
# A transfer names all that it needs, though some of it follows from the rest: they are dropped together.
NAMES_MORE_THAN_NEEDED = {"all_reduce-halving_doubling"}


@every_algorithm
def test_proof_catches_each_dropped_dependency_of(algorithm: CollectiveAlgorithm) -> None:
    rng = np.random.default_rng(1)
    order = [2, 0, 3, 1]
    schedule = algorithm.build_schedule(order, 23, 2)
    dropped = [[dep] for dep in range(len(schedule.deps))]
    if name_of(algorithm) in NAMES_MORE_THAN_NEEDED:
        bounds = schedule.dep_offsets.tolist()
        dropped = [list(range(first, last)) for first, last in itertools.pairwise(bounds) if first < last]
    for deps in dropped if name_of(algorithm) not in WAITS_FOR_NO_DATA else []:
        broken = drop_dependencies(schedule, deps)
        assert find_counterexample(broken, algorithm.collective, order, rng, executions=600), deps


@every_algorithm
def test_proof_catches_each_wrong_op_of(algorithm: CollectiveAlgorithm) -> None:
    rng = np.random.default_rng(2)
    order = [2, 0, 3, 1]
    schedule = algorithm.build_schedule(order, 31, 2)
    for transfer in range(len(schedule)):
        op = schedule.op.copy()
        op[transfer] ^= 1
        assert find_counterexample(replace(schedule, op=op), algorithm.collective, order, rng), transfer


@every_algorithm
def test_proof_catches_each_byte_that_goes_to_the_wrong_place_of(algorithm: CollectiveAlgorithm) -> None:
    rng = np.random.default_rng(3)
    order = [2, 0, 3, 1]
    schedule = algorithm.build_schedule(order, 31, 2)
    for transfer in range(len(schedule)):
        shifted = schedule.dst_offset_bytes.copy()
        shifted[transfer] += 1 if shifted[transfer] == 0 else -1
        broken = replace(schedule, dst_offset_bytes=shifted)
        assert find_counterexample(broken, algorithm.collective, order, rng), transfer


@every_algorithm
def test_proof_catches_each_missing_byte_of(algorithm: CollectiveAlgorithm) -> None:
    rng = np.random.default_rng(4)
    order = [2, 0, 3, 1]
    schedule = algorithm.build_schedule(order, 31, 2)
    for transfer in np.flatnonzero(schedule.nbytes > 1).tolist():
        nbytes = schedule.nbytes.copy()
        nbytes[transfer] -= 1
        assert find_counterexample(replace(schedule, nbytes=nbytes), algorithm.collective, order, rng), transfer


@pytest.mark.parametrize("collective", Collective)
def test_proof_tells_collectives_apart(collective: Collective) -> None:
    rng = np.random.default_rng(5)
    order = [2, 0, 3, 1]
    schedule = find_algorithm(collective).build_schedule(order, 32)
    # What a stronger collective leaves behind satisfies a weaker one in the same buffer.
    implied = {Collective.ALL_REDUCE: {Collective.REDUCE_SCATTER, Collective.REDUCE}}
    for other in set(Collective) - {collective} - implied.get(collective, set()):
        assert find_counterexample(schedule, other, order, rng), other


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


@every_algorithm
def test_64_ranks_are_scheduled_quickly(algorithm: CollectiveAlgorithm) -> None:
    begin = time.process_time()
    schedule = algorithm.build_schedule(range(64), 64 << 20, algorithm.slices_per_chunk(64))
    assert time.process_time() - begin < 1.0
    assert len(schedule) >= 63 * SLICES_PER_CHUNK


@every_algorithm
@pytest.mark.parametrize("nranks", [4, 16])
def test_no_nic_carries_less_than_busbw_assumes(algorithm: CollectiveAlgorithm, nranks: int) -> None:
    size = 1 << 16
    schedule = algorithm.build_schedule(range(nranks), size)
    received = np.zeros(nranks, np.int64)
    np.add.at(received, schedule.dst, schedule.nbytes)
    busiest = max(schedule.sent_bytes().max(), received.max())
    # What trees pay: a rank with two children carries the buffer twice; of two trees one has a rank that is inner in both.
    twice = {"binary_tree": 2.0, "double_binary_tree": nranks / (nranks - 1)}
    assert busiest >= algorithm.traffic_factor(nranks) * size
    assert busiest <= algorithm.traffic_factor(nranks) * size * twice.get(algorithm.name, 1.0)


@every_algorithm
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
        ("dst_offset_bytes", 3, 100, "leaves the buffer"),
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
    with pytest.raises(ValueError, match=r"must be one of all_reduce, reduce_scatter, .*, send_recv, got 'alltoall'"):
        find_algorithm("alltoall")
    with pytest.raises(
        ValueError, match=r"algorithm of all_reduce must be one of ring, halving_doubling, .*, got 'tree'"
    ):
        find_algorithm("all_reduce", "tree")
    for collective, named in ALGORITHMS.items():
        for name, algorithm in named.items():
            assert (algorithm.collective, algorithm.name) == (collective, name)


def test_rails_cross_the_spine_on_every_hop_when_racks_are_equal() -> None:
    order = ring_order("rails", [4, 4, 4, 4])
    assert order[:5] == (0, 4, 8, 12, 1)
    racks = [rank // 4 for rank in order]
    assert all(here != racks[(i + 1) % 16] for i, here in enumerate(racks))


@given(hosts=st.lists(st.integers(0, 5), min_size=1, max_size=6), kind=st.sampled_from(["packed", "rails", "random"]))
def test_order_holds_each_rank_once(hosts: list[int], kind: str) -> None:
    assert sorted(ring_order(kind, hosts, np.random.default_rng(1))) == list(range(sum(hosts)))


def test_order_of_uneven_racks_explicit_and_wrong() -> None:
    assert ring_order("packed", [2, 1]) == (0, 1, 2)
    assert ring_order("rails", [1, 3, 2]) == (0, 1, 4, 2, 5, 3)
    assert ring_order([2, 0, 1], [2, 1]) == (2, 0, 1)
    with pytest.raises(ValueError, match="each rank from 0 to 2 once"):
        ring_order([0, 1], [2, 1])
    with pytest.raises(ValueError, match="packed, rails, min_cut, random or a list of ranks, got 'rail'"):
        ring_order("rail", [2, 1])


def test_random_order_follows_its_seed() -> None:
    orders = [ring_order("random", [4, 4, 4, 4], np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(ValueError, match="needs a source of random numbers"):
        ring_order("random", [2, 2])


def test_receiver_has_an_offset_of_its_own() -> None:
    builder = ScheduleBuilder(2, 10, in_place=False)
    builder.add(0, 1, offset_bytes=2, nbytes=3, dst_offset_bytes=7)
    builder.add(1, 0, offset_bytes=4, nbytes=2)
    schedule = builder.build()
    assert (schedule.offset_bytes.tolist(), schedule.dst_offset_bytes.tolist()) == ([2, 4], [7, 4])
    inputs = np.arange(20).reshape(2, 10)
    outputs = execute(schedule, inputs, np.random.default_rng(1))
    assert outputs[1].tolist() == [-1] * 7 + [2, 3, 4]
    assert outputs[0].tolist() == [-1] * 4 + [14, 15] + [-1] * 4
    ring = RingAllReduce().build_schedule(range(3), 30)
    assert ring.dst_offset_bytes is ring.offset_bytes


def test_channels_are_connections_of_their_own() -> None:
    builder = ScheduleBuilder(2, 10)
    for channel in (0, 1, 0):
        builder.add(0, 1, offset_bytes=0, nbytes=1, channel=channel)
    schedule = builder.build()
    assert schedule.connections == ((0, 1), (0, 1))
    assert schedule.connection.tolist() == [0, 1, 0]


def test_unbidden_bytes_end_at_the_first_transfer_that_waits() -> None:
    builder = ScheduleBuilder(2, 10)
    first = builder.add(0, 1, offset_bytes=0, nbytes=4)
    builder.add(1, 0, offset_bytes=0, nbytes=1)
    builder.add(1, 0, offset_bytes=0, nbytes=2, after=[first])
    builder.add(1, 0, offset_bytes=0, nbytes=3)  # needs nothing, but comes after one that does
    assert builder.build().unbidden_bytes().tolist() == [4, 1]


def test_pairwise_waits_for_the_last_slice_of_the_step_before() -> None:
    schedule = find_algorithm("all_to_all", "pairwise").build_schedule(range(4), 4 * 16, 2)
    waits = [
        (int(schedule.src[i]), int(schedule.dst[i]), [(int(schedule.src[d]), int(schedule.dst[d]))])
        for i in range(len(schedule))
        for d in schedule.dependencies(i).tolist()
    ]
    assert waits == [(p, (p + k) % 4, [((p - k + 1) % 4, p)]) for k in (2, 3) for p in range(4)]
    last_slices = [d for i in range(len(schedule)) for d in schedule.dependencies(i).tolist()]
    assert all(int(d) % 2 == 1 for d in last_slices)  # of two slices, the second


def test_direct_all_to_all_waits_for_nothing() -> None:
    schedule = find_algorithm("all_to_all", "direct").build_schedule(range(5), 103)
    assert len(schedule.deps) == 0
    sent = np.zeros((5, 5), np.int64)
    np.add.at(sent, (schedule.src, schedule.dst), schedule.nbytes)
    # 103 = 5 * 20 + 3: a byte more to each of the next three, so all send and receive alike.
    assert (sent.sum(axis=0) == 83).all()
    assert (sent.sum(axis=1) == 83).all()


def parents_of(tree: Tree) -> list[int]:
    parents = [-1] * len(tree.children)
    for rank, below in enumerate(tree.children):
        for child in below:
            parents[child] = rank
    return parents


def test_binary_tree_is_the_one_drawn_in_nccl() -> None:
    # NVIDIA/nccl, src/graph/trees.cc: the drawing of 14 ranks above ncclGetBtree().
    tree = binary_tree(14)
    assert tree.children == ((8,), (), (1, 3), (), (2, 6), (), (5, 7), (), (4, 12), (), (9, 11), (), (10, 13), ())
    assert (tree.root, tree.depth) == (0, 4)


@pytest.mark.parametrize(
    "parents", [[1, 3, 1, 11, 5, 7, 5, 3, 9, 7, 9, -1], [9, -1, 3, 5, 3, 9, 7, 5, 7, 1, 11, 0, 11]]
)
def test_second_tree_is_mirrored_or_shifted_as_drawn_in_nccl(parents: list[int]) -> None:
    # The drawings above ncclGetDtree(): 12 ranks mirrored, 13 shifted by one.
    second = double_binary_tree(len(parents))[1]
    assert parents_of(second) == parents
    assert second.root == parents.index(-1)


@pytest.mark.parametrize("nranks", range(2, 40))
def test_trees_reach_every_rank_once_and_are_shallow(nranks: int) -> None:
    for tree in (binary_tree(nranks), *double_binary_tree(nranks)):
        reached = [rank for level in tree.levels() for rank in level]
        assert sorted(reached) == list(range(nranks))
        assert max(map(len, tree.children)) <= 2
        assert tree.depth <= nranks.bit_length()
    inner = [
        {rank for rank, below in enumerate(tree.children) if len(below) == 2} for tree in double_binary_tree(nranks)
    ]
    assert not inner[0] & inner[1]


def check_flows(nranks: int, flows: list[Flow], slices: int, min_slice_bytes: int) -> Schedule:
    """Build flows, execute them and compare with what a reader of the list expects."""
    schedule = build_flows(nranks, flows, slices, min_slice_bytes)
    rng = np.random.default_rng(1)
    inputs = rng.integers(0, 2**40, (nranks, schedule.size_bytes), np.int64)
    outputs = execute(schedule, inputs, rng)
    sent: dict[int, int] = {}
    received: dict[int, list[np.ndarray]] = {rank: [] for rank in range(nranks)}  # type: ignore[type-arg]
    for src, dst, nbytes, _ in flows:
        begin = sent.get(src, 0)
        received[dst].append(inputs[src, begin : begin + nbytes])
        sent[src] = begin + nbytes
    for rank, parts in received.items():
        expected = np.concatenate([*parts, np.zeros(0, np.int64)])
        np.testing.assert_array_equal(outputs[rank, : len(expected)], expected)
        assert (outputs[rank, len(expected) :] == -1).all()
    assert len(schedule.connections) == len(flows)
    assert len(schedule.deps) == 0
    return schedule


@settings(max_examples=40, deadline=None)
@given(data=st.data(), slices=st.integers(1, 9), min_slice_bytes=st.integers(1, 50))
def test_flows_carry_what_they_say(data: st.DataObject, slices: int, min_slice_bytes: int) -> None:
    nranks = data.draw(st.integers(2, 6))
    pair = st.tuples(st.integers(0, nranks - 1), st.integers(1, nranks - 1), st.integers(1, 90))
    drawn = data.draw(st.lists(pair, min_size=1, max_size=8))
    schedule = check_flows(nranks, [Flow(a, (a + b) % nranks, n) for a, b, n in drawn], slices, min_slice_bytes)
    for connection, (_, _, nbytes) in enumerate(drawn):
        messages = int((schedule.connection == connection).sum())
        assert messages == max(1, min(slices, nbytes // min_slice_bytes, nbytes))


def test_incast_goes_to_rank_0() -> None:
    flows = incast_flows(3, 100)
    assert flows == [Flow(1, 0, 100), Flow(2, 0, 100), Flow(3, 0, 100)]
    schedule = check_flows(6, flows, 8, 1)
    assert schedule.size_bytes == 300
    assert busiest_nic_bytes(flows) == 300


@given(nranks=st.integers(2, 40), seed=st.integers(0, 1000))
def test_permutation_has_no_fixed_point(nranks: int, seed: int) -> None:
    flows = permutation_flows(nranks, 5, np.random.default_rng(seed))
    assert [flow.src for flow in flows] == list(range(nranks))
    assert sorted(flow.dst for flow in flows) == list(range(nranks))
    assert all(flow.src != flow.dst for flow in flows)
    assert busiest_nic_bytes(flows) == 5


def test_permutations_are_equally_likely() -> None:
    rng = np.random.default_rng(1)
    drawn = Counter(tuple(flow.dst for flow in permutation_flows(4, 1, rng)) for _ in range(1800))
    assert len(drawn) == 9  # the derangements of four
    assert all(count == pytest.approx(200, abs=60) for count in drawn.values())  # four standard deviations


@pytest.mark.parametrize(
    ("flows", "message"),
    [
        ([], "at least one flow"),
        ([Flow(0, 0, 5)], "must join two of the ranks 0 to 2, got 0 to 0"),
        ([Flow(0, 3, 5)], "must join two of the ranks 0 to 2, got 0 to 3"),
        ([Flow(-1, 1, 5)], "must join two"),
        ([Flow(0, 1, 0)], "at least 1 byte"),
    ],
)
def test_wrong_flows_are_refused(flows: list[Flow], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_flows(3, flows)
    with pytest.raises(ValueError, match="at least 1 slice"):
        build_flows(3, [Flow(0, 1, 5)], slices=0)
