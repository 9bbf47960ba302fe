"""ECN marks by the depth of the queue: none below Kmin, the slope, all above Kmax; only ECT, checksums right."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest

from testbed.fabric import Fabric, egress_of
from testbed.kernel.gate import GatedQueue, QueueGates, bypass_sockets
from testbed.kernel.gate_tbf import TbfGate
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.probe import probe_qdisc
from testbed.plan.operations import ShapePort
from testbed.roce.wire import LINK_OVERHEAD_BYTES
from tests.netns.labs import (
    assert_drained,
    in_node,
    ip_checksum,
    ip_frame,
    listening_socket,
    small_fabric,
    wait_until,
)

pytestmark = pytest.mark.root

KMIN, KMAX, PMAX = 100_000, 1_100_000, 0.5
PAYLOAD = 986  # with headers: frames of 1020 bytes
FRAME = PAYLOAD + 34
ECT0, CE, NOT_ECT = 2, 3, 0
ROUNDS = 3  # of some 980 frames on the slope: seven tenths of pmax are then 11 standard deviations away
PRIORITY = 3
PRIORITY_TOS = PRIORITY << 5
SETTINGS = (
    "fabric.hosts_per_leaf=[2]",
    "fabric.leaves=1",
    "fabric.spines=0",
    "qos.ecn.enabled=true",
    f"qos.ecn.kmin={KMIN} B",
    f"qos.ecn.kmax={KMAX} B",
    "time_dilation=2000",
)


@contextlib.contextmanager
def closed_gate(fabric: Fabric, port_id: int) -> Iterator[QueueGates]:
    """Hold back the data queue of a port; the block may open it."""
    topology = fabric.plan.topology
    port = topology.port(port_id)
    peer = topology.port(port.peer)
    (shaper,) = (
        one
        for one in fabric.plan.operations([""] * len(topology.nodes), any_workload=True, back_ends=fabric.back_ends)
        if isinstance(one, ShapePort) and one.port == port_id
    )
    netns = {node.index: open_namespace(fabric.namespace_of(node.name)) for node in topology.nodes}
    gated = GatedQueue(port.id, peer.id, netns[port.node], egress_of(shaper).queue(PRIORITY))
    with bypass_sockets([(peer.id, peer.ifname, netns[peer.node])]) as sockets:
        gates = QueueGates([gated], sockets, TbfGate())
        gates.move([(port.id, PRIORITY)], [])
        try:
            yield gates
        finally:
            gates.move([], [(port.id, PRIORITY)])
            gates.close()


def marks_by_depth(fabric: Fabric, frames: int, tos: int) -> tuple[list[int], list[bool]]:
    """Fill the queue towards host1 with frames; return the depth each was added to, itself included, and its mark."""
    topology = fabric.plan.topology
    port = topology.port(topology.host_port(1).peer)
    queue = fabric.arrays.queues[port.id, 3]
    with in_node(fabric, "host0"):
        sending = open_packet_socket("eth0")
    frame = ip_frame(fabric, 0, topology.host_port(1).address, bytes(PAYLOAD), tos=tos)
    depths, marks = [], []
    entered, gone = int(queue["enq_packets"]), int(queue["deq_packets"])
    # The closed bucket lets a full frame's worth go at once, all others stand behind.
    left = fabric.plan.largest_frame_wire_bytes // (FRAME + LINK_OVERHEAD_BYTES)
    with listening_socket(fabric, "host1", "eth0") as listening, sending:
        with closed_gate(fabric, port.id):
            for number in range(frames):
                sending.send(frame)
                if number % 8 == 7 or number == frames - 1:  # not more at once than the backlog holds
                    wanted = entered + number + 1
                    wait_until(lambda w=wanted: int(queue["enq_packets"]) == w, "the frame in the queue")
                if number == 7:
                    wait_until(lambda: int(queue["deq_packets"]) - gone == left, "the bucket empty")
            assert int(queue["deq_packets"]) - gone == left
        wait_until(lambda: int(queue["deq_packets"]) == int(queue["enq_packets"]), "an empty queue")
        for number in range(frames):
            data = listening.recv(2048)
            while data[12:14] != b"\x08\0" or data[30:34] != topology.host_port(1).address.to_bytes(4, "big"):
                data = listening.recv(2048)
            header = data[14:34]
            assert int.from_bytes(header[10:12], "big") == ip_checksum(header)
            assert header[1] & ~3 == tos & ~3
            depths.append(FRAME * max(1, number - left + 1))
            marks.append(header[1] & 3 == CE)
    return depths, marks


def probability(depth: int) -> float:
    if depth <= KMIN:
        return 0.0
    return 1.0 if depth > KMAX else PMAX * (depth - KMIN) / (KMAX - KMIN)


def deviation(depths: list[int], marks: list[bool], chance: float = 1.0) -> float:
    """Return by how many standard deviations the marks between the thresholds miss their expected number."""
    between = [
        (probability(depth) * chance, mark) for depth, mark in zip(depths, marks, strict=True) if KMIN < depth <= KMAX
    ]
    expected = sum(p for p, _ in between)
    spread = math.sqrt(sum(p * (1 - p) for p, _ in between))
    return abs(sum(mark for _, mark in between) - expected) / spread


@pytest.mark.parametrize("marker", ["bpf", "red"])
def test_marks_follow_kmin_the_slope_and_kmax(marker: str) -> None:
    if marker == "red" and not probe_qdisc("red"):
        pytest.skip('this kernel has no qdisc "red" (modprobe sch_red)')
    with small_fabric(*SETTINGS, f"qos.ecn.pmax={PMAX}", f"qos.ecn.marker={marker}", name="marks") as fabric:
        depths, marks = [], []
        for _ in range(ROUNDS):
            more_depths, more_marks = marks_by_depth(fabric, KMAX // FRAME + 70, PRIORITY_TOS | ECT0)
            depths += more_depths
            marks += more_marks
        assert_drained(fabric)
        if marker == "red":
            # Linux, net/sched/sch_red.c, red_enqueue(): the depth is that of the child before the frame is added to it. The frame
            # whose addition exceeds Kmax is still on the slope: half of the time it is not marked.
            depths = [depth - FRAME for depth in depths]
        below = [mark for depth, mark in zip(depths, marks, strict=True) if depth <= KMIN]
        above = [mark for depth, mark in zip(depths, marks, strict=True) if depth > KMAX]
        assert len(below) > 50
        assert not any(below)
        assert len(above) > 50
        assert all(above), [n for n, (d, m) in enumerate(zip(depths, marks, strict=True)) if d > KMAX and not m]
        assert deviation(depths, marks) < 5
        # By thirds of the slope, too: a constant chance would fit the sum.
        third = (KMAX - KMIN) // 3
        for low in (KMIN, KMIN + third, KMIN + 2 * third):
            part = [(d, m) for d, m in zip(depths, marks, strict=True) if low < d <= low + third]
            assert deviation([d for d, _ in part], [m for _, m in part]) < 5
        # Negative control: the bound would not hold for seven tenths of pmax.
        assert deviation(depths, marks, chance=0.7) > 5
        port = fabric.plan.topology.port(fabric.plan.topology.host_port(1).peer)
        fabric.read_kernel_marks()
        assert int(fabric.arrays.queues["marked_packets"][port.id, 3]) == sum(marks)


@pytest.mark.parametrize(
    ("tos", "settings"), [(PRIORITY_TOS | NOT_ECT, ()), (PRIORITY_TOS | ECT0, ("qos.ecn.enabled=false",))]
)
def test_nothing_is_marked_without_ect_or_without_ecn(tos: int, settings: tuple[str, ...]) -> None:
    with small_fabric(*SETTINGS, *settings, name="unmarked") as fabric:
        _, marks = marks_by_depth(fabric, KMAX // FRAME + 60, tos)
        assert not any(marks)
        assert not np.any(fabric.arrays.queues["marked_packets"])
