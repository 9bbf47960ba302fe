"""Several data priorities at a time: a queue for each at every port, pauses that stop one of them alone, lossy ones that drop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import pytest

from testbed.carriers.flow_control import flow_control
from testbed.engine.flow_control import FlowControl
from testbed.fabric import Fabric, ifindex_of
from testbed.kernel import tc
from testbed.kernel.gate import PauseSender, open_bypass_socket
from testbed.kernel.links import mac_bytes
from testbed.kernel.netlink import RouteSocket
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.probe import probe_qdisc
from tests.netns.labs import (
    Quiet,
    assert_drained,
    in_node,
    ip_frame,
    lab_name,
    plain_carrier,
    run_in,
    small_fabric,
    small_plan,
    wait_until,
)

pytestmark = pytest.mark.root

TWO = ("qos.priorities=[{priority: 4}, {priority: 0, lossless: false}]", "qos.pfc.enabled=true")
TWO_STRICT = "qos.priorities=[{priority: 4, weight: strict}, {priority: 0, lossless: false}]"


@contextlib.contextmanager
def deployed_fabric(*settings: str, name: str) -> Iterator[Fabric]:
    """Deploy a lab, let go of it, and take it again as `testbed run --name` does."""
    plan = small_plan(*settings)
    with Fabric.deploy(plan, lab_name(name)) as deployed:
        pass
    fabric = Fabric.attach(plan, deployed.name)
    try:
        yield fabric
    finally:
        fabric.destroy()


def require_qdisc(kind: str) -> None:
    if kind in ("plug", "ets", "prio") and not probe_qdisc(kind):
        pytest.skip(f'this kernel has no qdisc "{kind}" (modprobe sch_{kind})')


@pytest.mark.parametrize("gate", ["tbf", "plug"])
@pytest.mark.parametrize("priorities", [TWO[0], TWO_STRICT], ids=["weights", "strict"])
@pytest.mark.parametrize("paused", [3, 4])
def test_pause_frame_stops_its_priority_alone_on_a_deployed_lab(paused: int, priorities: str, gate: str) -> None:
    require_qdisc(gate)
    other = 7 - paused
    settings = (priorities, TWO[1], f"qos.pfc.gate={gate}", "fabric.host_link.delay=1 us")
    with deployed_fabric(*settings, name=f"alone{paused}") as fabric:
        topology = fabric.plan.topology
        nic, leaf = topology.host_port(0), topology.port(topology.host_port(0).peer)
        with in_node(fabric, "leaf0"):
            wire = open_bypass_socket(leaf.ifname)
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        sender = PauseSender({leaf.id: wire}, {leaf.id: mac_bytes(leaf.mac)})
        queues = fabric.arrays.queues[nic.id]
        with wire, sending, flow_control(fabric, time.monotonic_ns()) as flow:
            assert isinstance(flow, FlowControl)

            def look(closed: bool) -> bool:
                flow.tick(time.monotonic_ns())
                return bool(flow.closed[nic.id, paused]) is closed

            sender.send(leaf.id, paused, 0xFFFF)
            wait_until(lambda: look(closed=True), "the pause obeyed")
            assert not flow.closed[nic.id, other]
            for priority in (paused, other):
                frame = ip_frame(fabric, 0, topology.host_port(1).address, bytes(1000), tos=priority << 5)
                for _ in range(20):
                    sending.send(frame)
            # All of the other priority leaves, though it came behind; of the paused one what a port would finish.
            wait_until(lambda: int(queues["deq_packets"][other]) == 20, "the other priority sent")
            assert int(queues["deq_packets"][paused]) < 6
            sender.send(leaf.id, paused, 0)
            wait_until(lambda: look(closed=False), "the resume obeyed")
            wait_until(lambda: int(queues["deq_packets"][paused]) == 20, "the paused priority sent")
        assert_drained(fabric)


def test_every_port_has_a_class_per_priority_and_unknown_ones_go_with_the_lossy() -> None:
    with small_fabric(*TWO, name="classes") as fabric:
        classes = run_in(fabric, "leaf0", "tc", "-s", "class", "show", "dev", "down0").stdout
        assert all(f"class htb 10:{minor} parent 10:10" in classes for minor in ("1", "2", "3"))
        topology = fabric.plan.topology
        with in_node(fabric, "host1"):
            sending = open_packet_socket("eth0")
        with sending:
            for priority, frames in ((3, 3), (4, 4), (0, 1), (2, 5)):
                frame = ip_frame(fabric, 1, topology.host_port(0).address, bytes(1000), tos=priority << 5)
                for _ in range(frames):
                    sending.send(frame)
        assert_drained(fabric)
        shown = run_in(fabric, "leaf0", "tc", "-s", "class", "show", "dev", "down0").stdout.split("class htb 10:")
        sent = {part.split()[0]: int(part.split("Sent ")[1].split()[2]) for part in shown[1:]}
        assert (sent["1"], sent["2"], sent["3"]) == (4, 3, 6)


# A port of 0.25 MB/s, where a frame takes 4.3 ms: more wait than its buckets let go at once (32), and few leave while they come.
SLOW = "time_dilation=200000"
FRAMES, PAYLOAD_BYTES, FEW_FRAMES = 80, 1000, 10


def progress(scheduler: str, weights: dict[int, str]) -> list[list[int]]:
    """Let frames of each priority come in that order; return what each has sent since the last came, whenever one has sent all.

    The last is waited for first, then the one before it.
    """
    listed = ", ".join(f"{{priority: {priority}, weight: {weight}}}" for priority, weight in weights.items())
    settings = (f"qos.priorities=[{listed}]", f"qos.lossless_priority={next(iter(weights))}", SLOW)
    with small_fabric(*settings, f"qos.scheduler={scheduler}", name="overtake") as fabric:
        assert fabric.back_ends.scheduler == scheduler
        topology = fabric.plan.topology
        queues = fabric.arrays.queues[topology.host_port(0).id]
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            for priority in weights:
                address = topology.host_port(1).address
                frame = ip_frame(fabric, 0, address, bytes(PAYLOAD_BYTES), tos=priority << 5)
                for _ in range(FRAMES):
                    sending.send(frame)
                arrived = f"frames of priority {priority} at the port"
                wait_until(lambda one=priority: int(queues["enq_packets"][one]) == FRAMES, arrived)
            before = queues["deq_packets"].copy()  # what a late sender or CPU let go before is not the scheduler's
            before[priority] = 0
        seen = []
        for priority in [*weights][:0:-1]:
            wait_until(lambda one=priority: int(queues["deq_packets"][one]) == FRAMES, f"priority {priority} sent")
            left = queues["deq_packets"] - before
            seen.append([int(left[one]) for one in weights])
        return seen


@pytest.mark.parametrize("scheduler", ["htb", "ets", "prio"])
def test_strict_priorities_overtake_what_came_before_them_the_higher_number_first(scheduler: str) -> None:
    require_qdisc(scheduler)
    # A strict priority goes before one with a weight, whatever their numbers.
    weights = {2: "strict", 3: "strict", 5: "strict"} if scheduler == "prio" else {4: "3", 2: "strict", 5: "strict"}
    highest, both = progress(scheduler, weights)
    print(
        f"{scheduler}: {highest} frames of {list(weights)} had left with the last of 5, {both} with the last of the second"
    )
    assert highest[2] == both[2] == FRAMES
    assert max(highest[:2]) <= FEW_FRAMES
    assert both[0] <= FEW_FRAMES


@pytest.mark.parametrize("scheduler", ["htb", "ets"])
def test_with_weights_nobody_overtakes_all_others(scheduler: str) -> None:
    """Negative control: of the test above."""
    require_qdisc(scheduler)
    highest, _ = progress(scheduler, {4: "1", 2: "1", 5: "1"})
    assert min(highest[:2]) > 3 * FEW_FRAMES


def test_qdiscs_of_a_node_are_read_with_their_kinds() -> None:
    """How marks of the kernel are counted: each qdisc's own statistics, by interface and handle."""
    with small_fabric(*TWO, name="read") as fabric:
        with in_node(fabric, "leaf0"), RouteSocket() as route:
            found = tc.read_qdiscs(route)
        (port,) = (
            port for port in fabric.plan.topology.ports if fabric.plan.topology.port_name(port.id) == "leaf0/up0"
        )
        kinds = {handle >> 16: kind for index, handle, kind, _ in found if index == ifindex_of(port.id)}
        assert kinds[0x1] == "mq"
        assert kinds[0x10] == "htb"
        assert kinds[0x20] == "pfifo"
        if fabric.back_ends.gate == "tbf":
            assert [kinds[0x30 + priority] for priority in (3, 4)] == ["tbf", "tbf"]


def test_lossless_priorities_lose_nothing_where_a_lossy_one_drops() -> None:
    flows = (
        "workload=[{pattern: flows, iters: 1, warmup_iters: 0, flows: [{src: 1, dst: 0, size: 1 MiB}, "
        "{src: 2, dst: 0, size: 1 MiB, priority: 4}, {src: 3, dst: 0, size: 1 MiB, priority: 0}]}]"
    )
    memory = ("fabric.switch.buffer=2 MiB", "qos.pfc.xoff=150 KB", "qos.pfc.headroom=290 KB", "fabric.spines=1")
    # What is left beside six headrooms, 357 KB, has no room for the lossy flow beside 2 x 150 KB.
    with small_fabric(*TWO, *memory, flows, "transport.retransmit_timeout=5 ms", name="mixed") as fabric:
        with plain_carrier(fabric) as carrier:
            carrier.run(0, Quiet())
        drops = fabric.arrays.queues["drop_packets"].sum(axis=0)
        assert drops[0] > 0
        assert drops[3] == drops[4] == 0
        assert not fabric.arrays.ingress["headroom_drops_packets"].any()
        heard = fabric.arrays.queues["xoff_frames"].sum(axis=0)
        assert heard[3] > 0
        assert heard[4] > 0
        assert not np.delete(heard, [3, 4]).any()
        assert_drained(fabric)
        assert not fabric.arrays.ingress["used_bytes"].any()
