"""Three tiers on the kernel: two zones joined by superspines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from testbed.carriers.protocol import WorkloadSamples
from testbed.engine.stream import build_streams
from testbed.fabric import Fabric
from testbed.plan.compile import compile_plan
from testbed.scenario import load_scenario
from testbed.topology import NodeKind, format_address
from tests.netns.labs import Quiet, assert_drained, lab_name, plain_carrier, run_in

pytestmark = pytest.mark.root

SCENARIO = """
name: netns-zones
fabric:
  kind: zones
  zones: 2
  leaves: 2
  spines: 2
  superspines: 2
  hosts_per_leaf: 2
  host_link: {rate: 400 Gbit/s, delay: 0 ns}
  switch: {buffer: 8 MiB}
workload: [{collective: all_reduce, order: random, size: 512 KiB, iters: 1, warmup_iters: 0}]
time_dilation: 20000
"""


@contextmanager
def ran(*overrides: str) -> Iterator[tuple[Fabric, WorkloadSamples]]:
    plan = compile_plan(load_scenario(SCENARIO, overrides), capacity_packets_per_s=None)
    with Fabric.build(plan, lab_name("zones"), any_workload=True) as fabric, plain_carrier(fabric) as carrier:
        yield fabric, carrier.run(0, Quiet())


@pytest.mark.parametrize(
    "overrides",
    [
        ("routing.scheme=e-ecmp", "transport.qps_per_connection=5"),
        ("routing.scheme=ecmp", "routing.hash_seed_per_tier=false"),
        (
            "routing.hash_function=crc16",
            "routing.spine_hash_function=crc32",
            "routing.superspine_hash_function=murmur3",
        ),
        ("routing.scheme=te",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_queue_pairs_packets_take_the_planned_path_through_all_tiers(overrides: tuple[str, ...]) -> None:
    with ran(*overrides) as (fabric, samples):
        (planned,) = fabric.plan.workloads
        topology = fabric.plan.topology
        assert max(len(path.ports) for path in planned.paths) == 6  # precondition: some cross between the zones
        packets = build_streams(planned.schedule, fabric.plan.scenario.transport.mtu_bytes).packets
        expected = np.zeros(len(topology.ports) + 1, np.int64)
        for path, count in zip(planned.paths, packets.tolist(), strict=True):
            expected[list(path.ports)] += count
        assert samples.retransmitted_packets == 0
        priority = fabric.plan.scenario.qos.lossless_priority
        np.testing.assert_array_equal(fabric.arrays.queues["enq_packets"][:, priority].astype(np.int64), expected)
        assert_drained(fabric)


def test_any_packet_crosses_between_zones_and_sprayed_ones_use_every_superspine() -> None:
    with ran("routing.scheme=spray", "routing.spray_order=round_robin") as (fabric, _):
        topology = fabric.plan.topology
        last = topology.host_port(len(topology.hosts) - 1)
        reply = run_in(fabric, "host0", "ping", "-c", "2", "-i", "0.01", format_address(last.address)).stdout
        assert "2 received" in reply
        sent = fabric.arrays.queues["enq_packets"].sum(axis=1).astype(np.int64)
        for node in topology.nodes:
            if node.kind in (NodeKind.SPINE, NodeKind.SUPERSPINE):
                counts = sent[[port.id for port in topology.uplinks(node) or topology.down_ports(node)]]
                assert counts.min() > 0
