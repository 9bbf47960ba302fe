"""Workload items as planned: their schedules, ideals, predictions and warnings."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from testbed.collectives import ScheduleBuilder, largest_frame_wire_bytes, wire_bytes
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan, PlannedWorkload
from testbed.plan.operations import BackEnds
from testbed.plan.predict import predict_cct_ratio
from testbed.plan.report import describe_plan
from testbed.routing import single_route
from testbed.scenario import load_scenario

SCENARIO = """
name: traffic
fabric: {kind: clos, leaves: 4, spines: 4, hosts_per_leaf: 4, host_link: {rate: 400 Gbit/s, delay: 600 ns}}
routing: {scheme: pinning}
workload: [{collective: all_reduce, size: 1 MiB}]
time_dilation: 20000
"""
EVERY_ITEM = [
    "collective: all_reduce, algorithm: ring, size: 1 MiB",
    "collective: all_reduce, algorithm: halving_doubling, size: 1 MiB",
    "collective: all_reduce, algorithm: double_binary_tree, size: 1 MiB",
    "collective: reduce_scatter, size: 1 MiB",
    "collective: all_gather, size: 1 MiB",
    "collective: all_to_all, algorithm: direct, size: 1 MiB",
    "collective: all_to_all, algorithm: pairwise, size: 1 MiB",
    "collective: broadcast, algorithm: ring, size: 1 MiB",
    "collective: broadcast, algorithm: binary_tree, size: 1 MiB",
    "collective: reduce, algorithm: ring, size: 1 MiB",
    "collective: reduce, algorithm: binary_tree, size: 1 MiB",
    "collective: gather, size: 1 MiB",
    "collective: scatter, size: 1 MiB",
    "collective: send_recv, size: 1 MiB",
    "pattern: incast, fan_in: 15, size: 64 KiB",
    "pattern: permutation, size: 1 MiB",
    "pattern: flows, flows: [{src: 0, dst: 5, size: 1 MiB}, {src: 0, dst: 5, size: 8 KiB}, {src: 3, dst: 2, size: 1 B}]",
]


def plan_of(*items: str, overrides: tuple[str, ...] = ()) -> Plan:
    changes = [f"workload[{index}]={{{item}}}" for index, item in enumerate(items)]
    return compile_plan(load_scenario(SCENARIO, [*changes, *overrides]), capacity_packets_per_s=None)


def planned_of(item: str, *overrides: str) -> PlannedWorkload:
    return plan_of(item, overrides=overrides).workloads[0]


@pytest.mark.parametrize("item", EVERY_ITEM)
def test_every_item_can_be_planned(item: str) -> None:
    plan = plan_of(item)
    (planned,) = plan.workloads
    assert planned.ideal_cct_ns > 0
    assert planned.predicted_cct_ratio >= 1 - 1e-9
    assert planned.resolution_error_fraction >= 0
    senders = [connection.requester.local.rank for connection in planned.connections]
    assert senders == sorted(senders)
    assert (planned.schedule.nbytes >= min(4096, planned.schedule.nbytes.max())).sum() >= 0.9 * len(planned.schedule)
    row = describe_plan(plan)["workloads"][0]
    assert json.dumps(row)
    assert (row["collective"], row["algorithm"]) == (planned.collective_name, planned.algorithm_name)


@pytest.mark.parametrize(
    ("item", "name", "algorithm", "size_bytes", "nranks", "traffic_factor"),
    [
        ("collective: all_gather, size: 1 MiB", "all_gather", "ring", 1 << 20, 16, 15 / 16),
        ("collective: broadcast, algorithm: binary_tree, size: 1 B", "broadcast", "binary_tree", 1, 16, 1),
        # algbw is what a sender gets, busbw what the receiver's NIC takes in.
        ("pattern: incast, fan_in: 3, size: 1 KiB", "incast", "direct", 1024, 4, 3),
        ("pattern: permutation, size: 1 KiB", "permutation", "direct", 1024, 16, 1),
        # Of 6 bytes in all, host 1 takes in 5.
        (
            "pattern: flows, flows: [{src: 0, dst: 1, size: 2 B}, {src: 5, dst: 1, size: 3 B}, {src: 0, dst: 5, size: 1 B}]",
            *("flows", "direct", 6, 3, 5 / 6),
        ),
    ],
)
def test_names_sizes_and_factors(
    item: str, name: str, algorithm: str, size_bytes: int, nranks: int, traffic_factor: float
) -> None:
    planned = planned_of(item)
    assert (planned.collective_name, planned.algorithm_name) == (name, algorithm)
    assert (planned.size_bytes, planned.nranks) == (size_bytes, nranks)
    assert planned.traffic_factor == pytest.approx(traffic_factor)


def test_chance_follows_the_seed() -> None:
    items = ("collective: all_reduce, order: random, size: 1 MiB", "pattern: permutation, size: 1 MiB")
    plans = [plan_of(*items, overrides=(f"seed={seed}",)) for seed in (1, 1, 2)]
    orders = [plan.workloads[0].order for plan in plans]
    targets = [plan.workloads[1].schedule.connections for plan in plans]
    assert orders[0] == orders[1] != orders[2]
    assert targets[0] == targets[1] != targets[2]
    twice = plan_of(items[0], items[0].replace("1 MiB", "2 MiB"))
    assert twice.workloads[0].order == twice.workloads[1].order


def test_ideal_of_an_incast_is_what_the_receivers_nic_takes() -> None:
    planned = planned_of("pattern: incast, fan_in: 15, size: 1 MiB")
    wire = 15 * 8 * int(wire_bytes(1 << 17, 4096))
    frame_ns = 8e9 * largest_frame_wire_bytes(4096, 4096) / 400e9
    # From the first frame of the nearest senders on, under the same leaf, the NIC is never idle.
    assert planned.ideal_cct_ns == pytest.approx(8e9 * wire / 400e9 + 2 * 600 + frame_ns, abs=1)
    assert planned.predicted_cct_ratio == pytest.approx(1.0)


def test_flows_between_the_same_hosts_take_paths_of_their_own() -> None:
    flows = ", ".join(["{src: 0, dst: 5, size: 1 MiB}"] * 16)
    planned = planned_of(f"pattern: flows, flows: [{flows}]", "routing.scheme=ecmp")
    assert len(planned.connections) == 16
    assert len({path.ports for path in planned.paths}) == 4


def test_pairwise_collisions_add_up_step_by_step() -> None:
    direct, pairwise = (
        planned_of(f"collective: all_to_all, algorithm: {name}, size: 16 MiB", "routing.scheme=ecmp")
        for name in ("direct", "pairwise")
    )
    # All at once the hash evens out; one partner at a time each step waits for its own worst link.
    assert 1.0 < direct.predicted_cct_ratio < 1.4
    assert 1.7 < pairwise.predicted_cct_ratio < 3.0


def test_shared_receiver_is_no_slowdown_and_a_narrow_core_is() -> None:
    flows = "pattern: flows, flows: [{src: 0, dst: 4, size: 1 MiB}, {src: 1, dst: 4, size: 1 MiB}]"
    wide, narrow = planned_of(flows), planned_of(flows, "fabric.uplink.rate=200 Gbit/s")
    assert wide.paths[0].ports[1] == wide.paths[1].ports[1]  # the same uplink: pinned by the destination
    assert wide.predicted_cct_ratio == pytest.approx(1.0)
    assert narrow.predicted_cct_ratio == pytest.approx(2.0)


@pytest.mark.parametrize(("takes_turns", "ratio"), [(False, 2.0), (True, 1.0)])
def test_connections_that_take_turns_do_not_collide(takes_turns: bool, ratio: float) -> None:
    # Two leaves, one uplink: 0 to 2 and 1 to 3, at once or, by way of 2 to 1, one after the other.
    flows = ", ".join(f"{{src: {src}, dst: {dst}, size: 1 MiB}}" for src, dst in ((0, 2), (1, 3), (2, 1)))
    overrides = ("fabric.leaves=2", "fabric.spines=1", "fabric.hosts_per_leaf=2")
    plan = plan_of(f"pattern: flows, flows: [{flows}]", overrides=overrides)
    builder = ScheduleBuilder(4, 100)
    first = builder.add(0, 2, offset_bytes=0, nbytes=100)
    after = [builder.add(2, 1, offset_bytes=0, nbytes=100, after=[first])] if takes_turns else []
    builder.add(1, 3, offset_bytes=0, nbytes=100, after=after)
    schedule = builder.build()
    path_of = dict(zip(plan.workloads[0].schedule.connections, plan.workloads[0].paths, strict=True))
    paths = [path_of[pair] for pair in schedule.connections]
    # The uplink carries twice what a NIC does either way; only at once does that take longer.
    assert predict_cct_ratio(plan.topology, schedule, [single_route(path) for path in paths]) == pytest.approx(ratio)


def test_incast_that_overflows_the_buffer_is_warned_of() -> None:
    item = "pattern: incast, fan_in: 15, size: 1 MiB"
    (warning,) = plan_of(item, overrides=("fabric.switch.buffer=8 MiB",)).warnings
    # 15 MiB arrive while 1 MiB leaves.
    assert warning == (
        f"incast: senders wait for nothing and can pile up {14 << 20} bytes in leaf0, which buffers {8 << 20}: "
        "without PFC this drops"
    )
    assert plan_of(item, overrides=("fabric.switch.buffer=16 MiB",)).warnings == ()


@pytest.mark.parametrize(
    "item",
    [
        "collective: all_to_all, size: 64 MiB",
        "collective: scatter, size: 64 MiB",
        "collective: all_gather, size: 1 MiB",
    ],
)
def test_what_does_not_pile_up_is_not_warned_of(item: str) -> None:
    assert plan_of(item).warnings == ()


def test_ring_that_collides_is_warned_of_where_not_all_that_circulates_fits() -> None:
    item = "collective: all_reduce, size: 64 MiB"
    warnings = plan_of(item, overrides=("routing.scheme=ecmp", "fabric.switch.buffer=63 MiB")).warnings
    assert any(f"less than the {64 << 20} that can pile up" in warning for warning in warnings)
    assert plan_of(item, overrides=("routing.scheme=ecmp", "fabric.switch.buffer=64 MiB")).warnings == ()
    assert plan_of(item, overrides=("fabric.switch.buffer=11 MiB",)).warnings == ()


def test_tree_of_large_buffers_is_warned_of() -> None:
    item = "collective: all_reduce, algorithm: double_binary_tree, size: 64 MiB"
    assert any("all_reduce: senders wait for nothing" in warning for warning in plan_of(item).warnings)


def test_large_all_to_all_is_planned_in_seconds() -> None:
    begin = time.process_time()
    plan = plan_of(
        "collective: all_to_all, size: 64 MiB",
        overrides=("fabric.leaves=8", "fabric.spines=8", "fabric.hosts_per_leaf=8"),
    )
    assert time.process_time() - begin < 6
    assert len(plan.workloads[0].connections) == 64 * 63
    assert np.isfinite(plan.workloads[0].ideal_cct_ns)


@pytest.mark.parametrize(
    ("carrier", "control", "ecn", "warns"),
    [
        ("rxe", "none", True, True),
        ("rxe", "none", False, False),
        ("rxe", "dcqcn", True, False),
        ("engine", "none", True, False),
        ("tcp", "none", True, False),
    ],
)
def test_marks_that_nobody_heeds_are_warned_of(carrier: str, control: str, ecn: bool, warns: bool) -> None:
    settings = (
        f"transport.carrier={carrier}",
        f"transport.congestion_control={control}",
        f"qos.ecn.enabled={str(ecn).lower()}",
    )
    warnings = plan_of("collective: all_reduce, size: 1 MiB", overrides=settings).warnings
    assert any("rxe itself ignores CE and sends no CNP" in one for one in warnings) is warns


@pytest.mark.parametrize(("carrier", "shown"), [("engine", None), ("rxe", "netem"), ("tcp", "netem")])
def test_plan_tells_what_it_would_be_made_with(carrier: str, shown: str | None) -> None:
    plan = plan_of("collective: all_reduce, size: 1 MiB", overrides=(f"transport.carrier={carrier}",))
    assert describe_plan(plan)["back_ends"] is None
    link_delay = "carrier" if shown is None else shown
    report = describe_plan(plan, operations=True, back_ends=BackEnds(link_delay=link_delay))
    assert report["back_ends"] == {"scheduler": "tbf", "gate": None, "marker": None, "link_delay": shown, "rxe": None}
    delay_ns = round(600 * plan.dilation.value)
    shaped = [one["command"] for one in report["operations"] if "mq" in one["command"]]
    assert shaped
    # Below the shaper, and what has the control queue.
    assert all(command.count(f"netem delay {delay_ns}ns") == (2 if shown else 0) for command in shaped)


@pytest.mark.parametrize("carrier", ["rxe", "tcp"])
def test_nothing_is_said_to_delay_where_no_link_has_a_delay(carrier: str) -> None:
    """Not even what was asked for by name: no port gets a netem."""
    overrides = (
        f"transport.carrier={carrier}",
        "transport.link_delay=netem",
        "fabric.host_link.delay=0 ns",
        "fabric.uplink.delay=0 ns",
    )
    plan = plan_of("collective: all_reduce, size: 1 MiB", overrides=overrides)
    report = describe_plan(plan, operations=True, back_ends=BackEnds(link_delay="netem"))
    assert report["back_ends"]["link_delay"] is None
    assert not any("netem" in one["command"] for one in report["operations"])
