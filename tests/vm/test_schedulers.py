"""What shares a port among priorities: each scheduler by weight, with each marker, and strict ones; whom a held one stops."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from testbed import api
from testbed.fabric import Fabric, egress_of
from testbed.kernel.gate import DataQueue
from testbed.kernel.gate_tbf import create_shaper
from testbed.kernel.namespaces import entered, open_namespace
from testbed.kernel.netlink import RouteSocket
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.queues import GATES
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
FRAMES, PAYLOAD_BYTES = 160, 1000
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


OFFERED_BITS_PER_S = 250 * 10**9
# Three flows meet in leaf0's one uplink. That of priority 5 asks for 250 Gbit/s of its 400, the others for all.
OVERLOADED = f"""
name: strict
fabric:
  kind: clos
  leaves: 2
  spines: 1
  hosts_per_leaf: 3
  host_link: {{rate: 400 Gbit/s, delay: 600 ns}}
  switch: {{buffer: 64 MiB}}
faults:
  - {{at: 0, rate: {{link: "host2:leaf0", rate: {OFFERED_BITS_PER_S} bit/s}}}}
workload:
  - pattern: flows
    iters: 1
    warmup_iters: 0
    flows:
      - {{src: 0, dst: 3, size: 4 MiB}}
      - {{src: 1, dst: 4, size: 8 MiB, priority: 4}}
      - {{src: 2, dst: 5, size: 8 MiB, priority: 5}}
"""
PAYLOAD_SHARE = 4096 / (4096 + 58 + 24)


def rates_beside_each_other(scheduler: str, *weights: str) -> list[float]:
    """Return what the flows of priority 3, 4 and 5 got until the first of them had ended, over the uplink's rate."""
    listed = ", ".join(f"{{priority: {3 + place}, weight: {weight}}}" for place, weight in enumerate(weights))
    settings = [f"qos.priorities=[{listed}]", f"qos.scheduler={scheduler}", "transport.congestion_control=none"]
    result = api.run(load_scenario(OVERLOADED, settings))
    assert result.back_ends["scheduler"] == scheduler
    assert result.fabric.drops_packets == 0
    (row,) = result.results
    assert row.retransmitted_bytes == 0  # what waits for strict ones is not taken for lost
    shares = [flow.together_bytes_per_s * 8 / PAYLOAD_SHARE / 400e9 for flow in row.flows]
    print(f"{scheduler}, {', '.join(weights)}: {', '.join(f'{share:.4f}' for share in shares)} of the uplink")
    return shares


@pytest.mark.parametrize("scheduler", ["htb", "ets", "prio"])
def test_strict_priorities_get_what_they_offer_and_the_others_the_rest(scheduler: str) -> None:
    shares = rates_beside_each_other(scheduler, "strict" if scheduler == "prio" else "64", "strict", "strict")
    offered = OFFERED_BITS_PER_S / 400e9
    assert shares == pytest.approx([0.0, 1 - offered, offered], abs=0.02)


@pytest.mark.parametrize("scheduler", ["htb", "ets"])
def test_with_weights_the_same_flows_share_evenly(scheduler: str) -> None:
    """Negative control: of the test above."""
    assert rates_beside_each_other(scheduler, "1", "1", "1") == pytest.approx([1 / 3] * 3, abs=0.02)


def data_queue(fabric: Fabric, port_id: int, priority: int) -> DataQueue:
    (shaper,) = (
        one
        for one in fabric.plan.operations([""] * 99, any_workload=True, back_ends=fabric.back_ends)
        if isinstance(one, ShapePort) and one.port == port_id
    )
    return egress_of(shaper).queue(priority)


WEIGHTED, STRICT, BOTH_STRICT = {3: "1", 4: "1"}, {3: "1", 4: "strict"}, {3: "strict", 4: "strict"}


@pytest.mark.parametrize(
    ("scheduler", "weights", "gate_name"),
    [
        ("htb", WEIGHTED, "plug"),
        ("htb", STRICT, "tbf"),
        ("ets", WEIGHTED, "plug"),
        ("ets", STRICT, "plug"),
        ("ets", BOTH_STRICT, "tbf"),
        ("prio", BOTH_STRICT, "plug"),
        ("prio", BOTH_STRICT, "tbf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value.values()),
)
def test_a_held_queue_stops_the_others_with_a_weight_of_an_ets_alone(
    scheduler: str, weights: dict[int, str], gate_name: str
) -> None:
    listed = ", ".join(f"{{priority: {priority}, weight: {weight}}}" for priority, weight in weights.items())
    settings = (f"qos.priorities=[{listed}]", f"qos.scheduler={scheduler}", "time_dilation=20000")
    with small_fabric(*settings, name="held") as fabric, contextlib.ExitStack() as stack:
        topology = fabric.plan.topology
        port, gate = topology.host_port(0), GATES[gate_name]
        netns = open_namespace(fabric.namespace_of("host0"))
        stack.callback(os.close, netns)
        with entered(netns):
            route = stack.enter_context(RouteSocket())
        with in_node(fabric, "host0"):
            sending = stack.enter_context(open_packet_socket(port.ifname))
        queues = {priority: data_queue(fabric, port.id, priority) for priority in weights}
        for queue in queues.values():
            route.request([create_shaper(queue)] if gate.is_shaper else gate.create(queue, queue.parent))
        counters = fabric.arrays.queues[port.id]

        def send(priority: int, payload_bytes: int, frames: int) -> None:
            address = topology.host_port(1).address
            frame = ip_frame(fabric, 0, address, bytes(payload_bytes), tos=priority << 5)
            for _ in range(frames):
                sending.send(frame)

        def standing(priority: int) -> int:
            left = int(counters["deq_packets"][priority])
            return int(counters["enq_packets"][priority]) - left

        for held, opened in ((3, 4), (4, 3)):
            route.request([gate.close(queues[held])])
            # Of a closed token bucket a full frame's worth leaves, that of a port that finishes its frame.
            send(held, PAYLOAD_BYTES, 8 if gate.is_shaper else 1)
            send(held, 20, 1)
            wait_until(lambda one=held: 0 < standing(one) < 6, "frames held")
            waiting = standing(held)
            begun, begun_ns = int(counters["deq_packets"][opened]), time.monotonic_ns()
            send(opened, PAYLOAD_BYTES, FRAMES)
            if scheduler == "ets" and weights is WEIGHTED:
                for _ in range(LOOKS):
                    time.sleep(LOOK_S)
                # The very thing that a pause of one priority must not do, and why PFC with such an ETS is refused.
                assert int(counters["deq_packets"][opened]) == begun
            else:
                wait_until(lambda one=opened: not standing(one), "the open queue sent")
                # Nobody charged the port's shaper for the small frame that is held instead of those that leave.
                took_ns = time.monotonic_ns() - begun_ns
                queue = queues[opened]
                sent_bytes = FRAMES * (PAYLOAD_BYTES + 20 + 14 + queue.overhead_bytes) - 2 * queue.burst_bytes
                assert took_ns >= 0.95 * sent_bytes * 1e9 / queue.wall_rate_bytes_per_s
            assert standing(held) == waiting
            print(f"{scheduler}, {gate_name}: {int(counters['deq_packets'][opened]) - begun} of {FRAMES} frames left")
            route.request([gate.open(queues[held])])
            send(held, PAYLOAD_BYTES, 1)  # the kick that some gates need
            assert_drained(fabric)
