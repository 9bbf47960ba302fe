"""What shares a port among priorities: each scheduler by weight, with each marker; why ETS is for ports that nothing pauses."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from testbed import api
from testbed.fabric import Fabric, egress_of
from testbed.kernel import tc
from testbed.kernel.gate import DataQueue
from testbed.kernel.gate_plug import PlugGate
from testbed.kernel.namespaces import entered, open_namespace
from testbed.kernel.netlink import RouteSocket
from testbed.kernel.packet_socket import open_packet_socket
from testbed.plan.operations import ShapePort
from testbed.scenario import load_scenario
from tests.netns.labs import assert_drained, in_node, ip_frame, small_fabric, wait_until

pytestmark = pytest.mark.root

SHARED = """
name: schedulers
fabric:
  kind: clos
  leaves: 2
  spines: 1
  hosts_per_leaf: 2
  host_link: {rate: 400 Gbit/s, delay: 600 ns}
  switch: {buffer: 64 MiB}
qos:
  priorities: [{priority: 3, weight: 3}, {priority: 4}]
workload:
  - pattern: flows
    iters: 1
    warmup_iters: 0
    flows: [{src: 0, dst: 2, size: 16 MiB}, {src: 1, dst: 3, size: 16 MiB, priority: 4}]
"""
FRAMES = 20
LOOKS, LOOK_S = 50, 0.002


FLOW_BYTES = 16 << 20
KMIN_BYTES, KMAX_BYTES, PMAX = 100_000, 400_000, 0.2


def marked_share(kmin_bytes: int, kmax_bytes: int) -> float:
    """Return the share of both flows' frames that ECN marks, each arriving at the link's rate and leaving at its weight's.

    A queue is then as deep as what has arrived times the share that does not leave; on the slope half of pmax is marked.
    """
    shares = []
    for leaving in (0.75, 0.25):
        below, above = kmin_bytes / (1 - leaving), kmax_bytes / (1 - leaving)
        shares.append((FLOW_BYTES - above + PMAX / 2 * (above - below)) / FLOW_BYTES)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("marker", ["bpf", "red"])
@pytest.mark.parametrize("scheduler", ["htb", "ets"])
def test_two_saturated_priorities_share_a_link_by_weight(scheduler: str, marker: str) -> None:
    ecn = f"qos.ecn={{enabled: true, kmin: {KMIN_BYTES} B, kmax: {KMAX_BYTES} B, pmax: {PMAX}, marker: {marker}}}"
    result = api.run(load_scenario(SHARED, [f"qos.scheduler={scheduler}", ecn, "transport.congestion_control=none"]))
    row = result.results[0]
    assert (result.back_ends["scheduler"], result.back_ends["marker"]) == (scheduler, marker)
    assert result.fabric.drops_packets == 0
    first, second = (flow.together_bytes_per_s for flow in row.flows)
    assert row.fabric is not None
    assert row.fabric.ecn_marked_packets is not None
    marked = row.fabric.ecn_marked_packets / (2 * FLOW_BYTES / 4096)
    expected = marked_share(KMIN_BYTES, KMAX_BYTES)
    print(
        f"{scheduler}, {marker}: {first / (first + second):.4f} of the link, {row.cct_ratio:.4f} of the ideal", end=", "
    )
    print(f"{marked:.4f} marked of {expected:.4f}")
    assert first / (first + second) == pytest.approx(0.75, abs=0.02)
    assert marked == pytest.approx(expected, abs=0.02)
    # Negative control: thresholds of twice the depth would be noticed.
    assert marked != pytest.approx(marked_share(2 * KMIN_BYTES, 2 * KMAX_BYTES), abs=0.02)


def data_queue(fabric: Fabric, port_id: int, priority: int) -> DataQueue:
    (shaper,) = (
        one
        for one in fabric.plan.operations([""] * 99, any_workload=True, back_ends=fabric.back_ends)
        if isinstance(one, ShapePort) and one.port == port_id
    )
    return egress_of(shaper).queue(priority)


@pytest.mark.parametrize("scheduler", ["htb", "ets"])
def test_a_paused_queue_stops_the_others_of_an_ets_alone(scheduler: str) -> None:
    settings = ("qos.priorities=[{priority: 4}]", f"qos.scheduler={scheduler}", "time_dilation=4000")
    with small_fabric(*settings, name="paused") as fabric, contextlib.ExitStack() as stack:
        topology = fabric.plan.topology
        port, plug = topology.host_port(0), PlugGate()
        netns = open_namespace(fabric.namespace_of("host0"))
        stack.callback(os.close, netns)
        with entered(netns):
            route = stack.enter_context(RouteSocket())
        with in_node(fabric, "host0"):
            sending = stack.enter_context(open_packet_socket(port.ifname))
        gated = {priority: data_queue(fabric, port.id, priority) for priority in (3, 4)}
        for priority, queue in gated.items():
            route.request(plug.create(queue, tc.class_of(priority)))
        queues = fabric.arrays.queues[port.id]
        route.request([plug.close(gated[3])])
        for priority in (3, 4):
            frame = ip_frame(fabric, 0, topology.host_port(1).address, bytes(986), tos=priority << 5)
            for _ in range(FRAMES):
                sending.send(frame)
        wait_until(lambda: int(queues["enq_packets"][4]) == FRAMES, "all frames in the queues")
        if scheduler == "htb":
            wait_until(lambda: int(queues["deq_packets"][4]) == FRAMES, "the open queue sent")
        else:
            for _ in range(LOOKS):
                time.sleep(LOOK_S)
            # The very thing that a pause of one priority must not do, and why PFC with ETS is refused.
            assert int(queues["deq_packets"][4]) == 0
        assert int(queues["deq_packets"][3]) < FRAMES
        print(f"{scheduler}: {int(queues['deq_packets'][4])} of {FRAMES} frames of the open queue left")
        route.request([plug.open(gated[3])])
        wait_until(lambda: int(queues["deq_packets"][3]) == FRAMES, "the paused queue sent")
        assert_drained(fabric)
