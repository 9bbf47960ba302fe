"""The data plane's back ends on a kernel that has them all: each gate holds a queue, each marker marks where it should."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from testbed import api
from testbed.carriers.flow_control import gated_queues
from testbed.kernel.gate import QueueGates, bypass_sockets
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.queues import GATES
from testbed.scenario import load_scenario
from tests.netns.labs import in_node, ip_frame, small_fabric, wait_until

pytestmark = pytest.mark.root

INCAST = """
name: back-ends
fabric:
  kind: star
  hosts_per_leaf: 5
  host_link: {rate: 400 Gbit/s, delay: 600 ns}
qos:
  pfc: {enabled: true, xoff: 400 KB}
workload:
  - {pattern: incast, fan_in: 4, size: 2 MiB, iters: 1, warmup_iters: 0}
"""
PRIORITY = 3
# A token bucket turned down to a crawl is full at that moment: a full frame at least. A plug lets go what was asked for.
MAX_LEAK_BYTES = {"tbf": 4178, "plug": 1020}
FRAMES = 60
# Long enough for what a closed gate lets go to have gone: a full frame takes 0.4 ms at this dilation.
LOOKS, LOOK_S = 50, 0.002


@pytest.mark.parametrize("gate", ["tbf", "plug"])
def test_incast_is_lossless_with_each_gate(gate: str) -> None:
    result = api.run(load_scenario(INCAST, [f"qos.pfc.gate={gate}"]))
    row = result.results[0]
    assert row.fabric.pause_frames
    assert row.fabric.drops_packets == row.fabric.headroom_drops_packets == 0
    assert row.cct_ratio is not None
    assert row.cct_ratio <= 1.05
    print(f"gate {gate}: {row.fabric.pause_frames} pause frames, {row.cct_ratio:.4f} of the ideal")


@pytest.mark.parametrize("gate", ["tbf", "plug"])
def test_closed_gate_lets_at_most_a_full_frame_go_and_opens_again(gate: str) -> None:
    settings = ("qos.pfc.enabled=true", "qos.pfc.xoff=400 KB", f"qos.pfc.gate={gate}", "time_dilation=4000")
    with small_fabric(*settings, name="gate") as fabric, contextlib.ExitStack() as stack:
        topology = fabric.plan.topology
        netns = {node.index: open_namespace(fabric.namespace_of(node.name)) for node in topology.nodes}
        for descriptor in netns.values():
            stack.callback(os.close, descriptor)
        assert fabric.back_ends.gate == gate
        port = topology.host_port(0)
        peer = topology.port(port.peer)
        queue = fabric.arrays.queues[port.id, PRIORITY]
        with in_node(fabric, "host0"):
            sending = stack.enter_context(open_packet_socket(port.ifname))
        sockets = stack.enter_context(bypass_sockets([(peer.id, peer.ifname, netns[peer.node])]))
        gated = [one for one in gated_queues(fabric, netns) if one.port == port.id]
        gates = QueueGates(gated, sockets, GATES[gate])
        stack.callback(gates.close)
        frame = ip_frame(fabric, 0, topology.host_port(1).address, bytes(986), tos=PRIORITY << 5)
        gates.move([(port.id, PRIORITY)], [])
        try:
            before = int(queue["deq_packets"])
            for _ in range(FRAMES):
                sending.send(frame)
            wait_until(lambda: int(queue["enq_packets"]) >= before + FRAMES, "all frames in the queue")
            for _ in range(LOOKS):
                time.sleep(LOOK_S)
            leaked = int(queue["deq_packets"]) - before
        finally:
            gates.move([], [(port.id, PRIORITY)])
        print(f"gate {gate}: {leaked} frames left after it was closed")
        assert leaked * len(frame) <= MAX_LEAK_BYTES[gate]
        wait_until(lambda: int(queue["deq_packets"]) == before + FRAMES, "an empty queue")


@pytest.mark.parametrize("marker", ["bpf", "red"])
def test_each_marker_has_the_senders_notified(marker: str) -> None:
    settings = [
        "qos.ecn={enabled: true, kmin: 100 KB, kmax: 400 KB, pmax: 0.2}",
        f"qos.ecn.marker={marker}",
        "qos.pfc.enabled=false",
        "transport.congestion_control=dcqcn",
    ]
    row = api.run(load_scenario(INCAST, settings)).results[0]
    assert row.fabric.cnp_packets
    print(f"marker {marker}: {row.fabric.ecn_marked_packets} marked, {row.fabric.cnp_packets} CNPs")
