"""Routing schemes under the engine's own traffic: which ports carry it, and whether it stays in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from testbed.carriers.protocol import WorkloadSamples
from testbed.engine.stream import build_streams
from testbed.fabric import Fabric
from testbed.kernel import layout
from testbed.roce.queue_pairs import RESPONDER, qp_index
from tests.netns.labs import Quiet, assert_drained, plain_carrier, small_fabric

pytestmark = pytest.mark.root

FOUR_SPINES = ("fabric.spines=4", "fabric.hosts_per_leaf=2")
RING = "workload[0]={collective: all_reduce, size: 1 MiB, iters: 1, warmup_iters: 0}"


@contextmanager
def ran(*overrides: str) -> Iterator[tuple[Fabric, WorkloadSamples]]:
    with small_fabric(*FOUR_SPINES, RING, *overrides, name="scheme") as fabric, plain_carrier(fabric) as carrier:
        yield fabric, carrier.run(0, Quiet())


def data_packets(fabric: Fabric) -> npt.NDArray[np.int64]:
    """Return the data packets that every port has sent, shape ``(ports + 1,)``."""
    priority = fabric.plan.scenario.qos.lossless_priority
    return fabric.arrays.queues["enq_packets"][:, priority].astype(np.int64)


def out_of_order(fabric: Fabric) -> int:
    count = len(fabric.plan.workloads[0].connections)
    return int(fabric.arrays.qps["out_of_order_packets"][qp_index(0, RESPONDER) : 2 * count : 2].sum())


@pytest.mark.parametrize(
    "overrides",
    [
        ("routing.scheme=te",),
        ("routing.scheme=te", "transport.qps_per_connection=3"),
        ("routing.scheme=e-ecmp", "transport.qps_per_connection=7"),
        ("routing.scheme=e-ecmp", "transport.qps_per_connection=7", "transport.udp_source_port=per_pair"),
        ("routing.scheme=ecmp", "transport.qps_per_connection=7", "transport.udp_source_port=per_pair"),
        ("routing.scheme=e-ecmp", "transport.qps_per_connection=4", "transport.qp_strategy=round_robin"),
        ("routing.scheme=flowlet", "routing.flowlet_gap=10 s"),
    ],
    ids=lambda overrides: " ".join(one.split(".")[1] for one in overrides),
)
def test_every_queue_pairs_packets_take_the_planned_path(overrides: tuple[str, ...]) -> None:
    with ran(*overrides) as (fabric, samples):
        (planned,) = fabric.plan.workloads
        packets = build_streams(planned.schedule, fabric.plan.scenario.transport.mtu_bytes).packets
        expected = np.zeros(len(fabric.plan.topology.ports) + 1, np.int64)
        for path, count in zip(planned.paths, packets.tolist(), strict=True):
            expected[list(path.ports)] += count
        assert samples.retransmitted_packets == 0  # precondition: nothing was sent twice
        np.testing.assert_array_equal(data_packets(fabric), expected)
        assert out_of_order(fabric) == 0
        assert_drained(fabric)


@pytest.mark.parametrize(("order", "shares_alike"), [("round_robin", True), ("random", False)])
def test_spray_uses_every_uplink_for_every_flow(order: str, shares_alike: bool) -> None:
    with ran("routing.scheme=spray", f"routing.spray_order={order}") as (fabric, _):
        sent = fabric.arrays.queues["enq_packets"].sum(axis=1).astype(np.int64)  # ACKs take turns too
        for leaf in fabric.plan.topology.leaves:
            counts = sent[[port.id for port in fabric.plan.topology.uplinks(leaf)]]
            if shares_alike:
                assert np.ptp(counts) <= 1
            else:  # five deviations of a binomial share
                assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())
        assert_drained(fabric)


def test_random_spray_overtakes_and_go_back_n_sends_again() -> None:
    # Uplinks that just carry it: chance fills some of their queues, and what is behind in another goes first.
    narrow = ("fabric.uplink.rate=200 Gbit/s", "transport.retransmit_timeout=200 us")
    with ran("routing.scheme=spray", "routing.spray_order=random", *narrow) as (fabric, samples):
        assert out_of_order(fabric) > 0
        assert samples.retransmitted_packets > 0
        assert not fabric.arrays.queues["drop_packets"].any()
    with ran("routing.scheme=e-ecmp", *narrow) as (fabric, samples):  # negative control
        assert out_of_order(fabric) == 0
        assert samples.retransmitted_packets == 0


def test_adaptive_loads_the_uplinks_alike_and_leaves_out_what_is_down() -> None:
    with small_fabric(*FOUR_SPINES, RING, "routing.scheme=adaptive", name="scheme") as fabric:
        uplinks = [[port.id for port in fabric.plan.topology.uplinks(leaf)] for leaf in fabric.plan.topology.leaves]
        with plain_carrier(fabric) as carrier:
            carrier.run(0, Quiet())
            first = data_packets(fabric)
            for ports in uplinks:
                assert first[ports].min() > 0.5 * first[ports].mean()
            for ports in uplinks:  # what comes over a dead link is lost: no leaf may send to the others' dead ports
                fabric.arrays.ports["flags"][ports[2]] |= layout.PORT_DOWN
            carrier.run(0, Quiet())
            more = data_packets(fabric) - first
        for ports in uplinks:
            assert more[ports[2]] == 0
            assert (more[[ports[0], ports[1], ports[3]]] > 0).all()
        assert_drained(fabric)


def test_flowlets_change_paths_after_short_pauses_only() -> None:
    changes = {}
    for gap in ("10 ns", "10 s"):  # below and above anything between two packets
        with ran("routing.scheme=flowlet", f"routing.flowlet_gap={gap}") as (fabric, _):
            changes[gap] = int(fabric.arrays.flowlets["number"].sum())
            assert (fabric.arrays.flowlets["last_ns"] > 0).sum() > 0
    assert changes["10 s"] == 0
    assert changes["10 ns"] > 0


def test_flowlets_reorder_below_the_skew_of_paths_and_not_above() -> None:
    # Uplinks that just carry it, so that their queues differ; what a path may be late is far below a second.
    narrow = ("fabric.uplink.rate=200 Gbit/s", "transport.retransmit_timeout=200 us")
    with ran("routing.scheme=flowlet", "routing.flowlet_gap=10 ns", *narrow) as (fabric, _):
        assert out_of_order(fabric) > 0
    with ran("routing.scheme=flowlet", "routing.flowlet_gap=1 ms", *narrow) as (fabric, _):
        assert out_of_order(fabric) == 0
