"""PFC on the real kernel: frames on the wire, gates that obey them, pauses that spread, nothing lost, nothing left closed."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from testbed.api import run
from testbed.carriers.capacity import wall_tick_ns
from testbed.carriers.flow_control import flow_control
from testbed.engine.flow_control import FlowControl
from testbed.fabric import Fabric
from testbed.kernel.gate import PauseSender, open_bypass_socket
from testbed.kernel.links import mac_bytes
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.probe import probe_qdisc
from testbed.plan.dilation import WALL_TICK_NS
from testbed.scenario import load_scenario
from tests.netns.labs import (
    Quiet,
    assert_drained,
    in_node,
    ip_frame,
    listening_socket,
    plain_carrier,
    small_fabric,
    wait_until,
)

pytestmark = pytest.mark.root

PRIORITY = 3
# Two hosts of leaf1 and one of leaf0 send to host0: leaf0 pauses the spines, they pause leaf1, it pauses its hosts.
INCAST = (
    "qos.pfc.enabled=true",
    "qos.pfc.xoff=200 KB",
    "workload=[{pattern: incast, fan_in: 3, size: 2 MiB, iters: 1, warmup_iters: 0}]",
    "transport.retransmit_timeout=10 ms",
)


@pytest.fixture(params=["tbf", "plug"])
def gate(request: pytest.FixtureRequest) -> str:
    """Name a gate that this kernel has, as a setting; skip for one that it lacks."""
    if request.param == "plug" and not probe_qdisc("plug"):
        pytest.skip('this kernel has no qdisc "plug" (modprobe sch_plug)')
    return f"qos.pfc.gate={request.param}"


def test_pauses_spread_hop_by_hop_to_the_nics_and_nothing_is_lost(gate: str) -> None:
    # A tick sends pauses and obeys them. This headroom holds what arrives in 0.4 s here, for a machine that is busy otherwise;
    # that what is computed holds what arrives in time is judged in tests/fidelity/test_flow_control.py.
    patient = "qos.pfc.headroom=1 MB"
    with small_fabric(*INCAST, patient, "fabric.spines=1", gate, name="spread") as fabric:
        with plain_carrier(fabric) as carrier:
            samples = carrier.run(0, Quiet())
        topology, queues = fabric.plan.topology, fabric.arrays.queues[:, PRIORITY]
        heard = {topology.port_name(port.id): int(queues["xoff_frames"][port.id]) for port in topology.ports}
        assert heard["host1/eth0"] > 0  # by leaf0, which the incast meets first
        assert heard["spine0/down0"] > 0
        assert heard["leaf1/up0"] > 0  # by the spine, which leaf0 has paused
        assert heard["host2/eth0"] > 0
        assert heard["host0/eth0"] == heard["leaf0/down0"] == 0
        paused = samples.wall_paused_ns
        assert paused[topology.host_port(1).id] > 0
        assert paused[topology.host_port(0).id] == 0
        assert not queues["drop_packets"].any()
        assert not fabric.arrays.ingress["headroom_drops_packets"].any()
        assert samples.retransmitted_packets == 0
        assert_drained(fabric)
        assert not fabric.arrays.ingress["used_bytes"].any()
        assert not fabric.arrays.ingress["xoff"].any()
        # Every gate is open again, also for what follows: a frame at the lossless priority crosses the fabric.
        before = int(queues["deq_packets"][topology.host_port(2).peer])
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            sending.send(ip_frame(fabric, 0, topology.host_port(2).address, bytes(64), tos=PRIORITY << 5))
        wait_until(lambda: int(queues["deq_packets"][topology.host_port(2).peer]) > before, "the frame at host2")


def test_without_pfc_the_same_incast_sends_no_pause() -> None:
    with small_fabric(*INCAST[2:], "qos.pfc.enabled=false", name="unpaused") as fabric:
        with plain_carrier(fabric) as carrier:
            carrier.run(0, Quiet())
        topology, queues = fabric.plan.topology, fabric.arrays.queues
        # Precondition: the incast was one. Its queue grew beyond what makes ports ask for pauses in the test above.
        assert int(queues["peak_bytes"][topology.host_port(0).peer, PRIORITY]) > 2 * 200_000
        assert not queues["pause_frames"].any()
        assert not fabric.arrays.ingress["used_bytes"].any()


def test_a_port_resumes_when_nothing_of_it_is_left_however_small_the_threshold() -> None:
    small = (
        "fabric.spines=1",
        "fabric.switch.buffer=500 KiB",
        "workload.0.size=512 KiB",
        "transport.retransmit_timeout=30 us",
    )
    with small_fabric(INCAST[0], INCAST[2], *small, name="resume") as fabric:
        leaf = next(node.index for node in fabric.plan.topology.nodes if node.name == "leaf0")
        port = fabric.plan.topology.port(fabric.plan.topology.host_port(1).peer).id
        pause = fabric.plan.pausing[port]
        # Precondition: the dynamic threshold of an empty switch is less than how far below it a port resumes.
        assert int(fabric.arrays.nodes["shared_bytes"][leaf]) * pause.alpha < pause.hysteresis_bytes
        with plain_carrier(fabric) as carrier:
            carrier.run(0, Quiet())
        assert int(fabric.arrays.ingress["xoffs"][port, PRIORITY]) > 1
        assert not fabric.arrays.ingress["xoff"].any()


def test_acks_pass_while_lossless_data_fills_the_shared_memory() -> None:
    with small_fabric(*INCAST[:2], name="acks") as fabric:
        fabric.arrays.nodes["shared_bytes"] = 0  # as if headrooms held the rest
        with plain_carrier(fabric) as carrier:
            samples = carrier.run(0, Quiet())
        assert samples.retransmitted_packets == samples.timeouts == 0
        assert not fabric.arrays.queues["drop_packets"].any()


def test_headroom_below_what_is_under_way_drops_and_fails_the_run() -> None:
    settings = (*INCAST, "qos.pfc.headroom=5 KB", "workload.0.size=512 KiB", "time_dilation=2000")
    result = run(load_scenario(Path("tests/netns/pfc.yaml").read_text(), settings))
    assert result.fabric.headroom_drops_packets is not None
    assert result.fabric.headroom_drops_packets > 0
    (check,) = (check for check in result.checks if check.metric == "headroom_drops_packets")
    assert check.verdict in ("fail", "not_judged")
    assert any("headroom" in warning for warning in result.warnings)


# --- frames --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pauser(fabric: Fabric, node: str, ifname: str, port_id: int) -> Iterator[PauseSender]:
    with in_node(fabric, node):
        opened = open_bypass_socket(ifname)
    with opened:
        yield PauseSender({port_id: opened}, {port_id: mac_bytes(fabric.plan.topology.port(port_id).mac)})


def next_pause(listening: socket.socket) -> bytes:
    while True:
        data = listening.recv(2048)
        if data[12:14] == b"\x88\x08":
            return data


def test_pfc_frame_is_that_of_the_standard() -> None:
    with small_fabric("qos.pfc.enabled=true", name="frame") as fabric:
        topology = fabric.plan.topology
        leaf = topology.port(topology.host_port(0).peer)
        with (
            listening_socket(fabric, "host0", "eth0") as listening,
            pauser(fabric, "leaf0", leaf.ifname, leaf.id) as sender,
        ):
            sender.send(leaf.id, PRIORITY, 0xFFFF)
            data = next_pause(listening)
            mac = leaf.mac.replace(":", "")
            quanta = "0000" * PRIORITY + "ffff" + "0000" * (7 - PRIORITY)
            assert data.hex() == f"0180c2000001{mac}880801010008{quanta}".ljust(120, "0")  # 60 bytes
            row = fabric.arrays.queues[topology.host_port(0).id, PRIORITY]
            wait_until(lambda: int(row["pause_frames"]) == 1, "the pause noted")
            assert (int(row["pause_quanta"]), int(row["xoff_frames"])) == (0xFFFF, 1)
            sender.send(leaf.id, PRIORITY, 0)
            wait_until(lambda: int(row["pause_frames"]) == 2, "the resume noted")
            assert (int(row["pause_quanta"]), int(row["xoff_frames"])) == (0, 1)
            others = np.delete(fabric.arrays.queues["pause_frames"][topology.host_port(0).id], PRIORITY)
            assert not others.any()


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
def test_tshark_decodes_the_pauses_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "pauses.pcapng"
    # Six frames a tick whatever the tick is. At 24, as 2000 is in virtual time, buckets and bursts of 100 KB let host1's whole
    # message through before its port has 200 KB: that run pauses others, and nothing is there to decode.
    dilation = 2000 * wall_tick_ns() // WALL_TICK_NS
    settings = (*INCAST, "workload.0.size=512 KiB", f"time_dilation={dilation}")
    result = run(
        load_scenario(Path("tests/netns/pfc.yaml").read_text(), settings),
        pcap=file,
        pcap_ports=["host1/eth0"],
    )
    (heard,) = (one.pause_frames for link in result.fabric.links for one in link.directions if one.src == "host1/eth0")
    fields = ("macc.opcode", "macc.cbfc.enbv", "macc.cbfc.pause_time.c3")
    command = ["tshark", "-r", str(file), "-Y", "macc", "-T", "fields", *(x for name in fields for x in ("-e", name))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    rows = [line.split("\t") for line in lines if line]
    assert heard
    assert len(rows) == heard
    assert all(int(opcode, 0) == 0x0101 and int(enabled, 0) == 1 << PRIORITY for opcode, enabled, _ in rows)
    assert {int(quanta, 0) for _, _, quanta in rows} == {0, 0xFFFF}


# --- gates ---------------------------------------------------------------------------------------------------------------


def spin(flow: FlowControl, condition: Callable[[], bool]) -> None:
    """Run the tick of the flow control alone until something holds."""

    def look() -> bool:
        flow.tick(time.monotonic_ns())
        return condition()

    wait_until(look, "what the tick should bring about")


def test_pause_of_someone_else_holds_until_its_quanta_expire(gate: str) -> None:
    """A pause frame that we did not send stops the port; without refresh it starts again by itself."""
    with small_fabric("qos.pfc.enabled=true", "fabric.host_link.delay=1 us", gate, name="expiry") as fabric:
        topology = fabric.plan.topology
        nic, leaf = topology.host_port(0), topology.port(topology.host_port(0).peer)
        queue = fabric.arrays.queues[nic.id, PRIORITY]
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        frame = ip_frame(fabric, 0, topology.host_port(1).address, bytes(1000), tos=PRIORITY << 5)
        with (
            sending,
            pauser(fabric, "leaf0", leaf.ifname, leaf.id) as sender,
            flow_control(fabric, time.monotonic_ns()) as flow,
        ):
            assert isinstance(flow, FlowControl)
            quanta = 10_000  # 0.256 s of wall time at this dilation
            sender.send(leaf.id, PRIORITY, quanta)
            spin(flow, lambda: flow.closed[nic.id, PRIORITY])
            closed_ns = time.monotonic_ns()
            for _ in range(20):
                sending.send(frame)
            wait_until(lambda: int(queue["enq_packets"]) >= 20, "frames in the queue")
            gone = int(queue["deq_packets"])
            assert gone < 6  # the crawl lets one full frame's worth go
            spin(flow, lambda: not flow.closed[nic.id, PRIORITY])
            assert time.monotonic_ns() - closed_ns > 0.5 * quanta * 512 / 400e9 * fabric.plan.dilation.value * 1e9
            assert flow.expired_pauses == 1
            wait_until(lambda: int(queue["deq_packets"]) == int(queue["enq_packets"]), "all frames sent")
        assert_drained(fabric)


@pytest.mark.parametrize("action", ["drop", "forward"])
def test_watchdog_releases_a_queue_that_stays_paused(action: str, gate: str) -> None:
    watchdog = f"qos.pfc.watchdog={{enabled: true, detect: 5 us, restore: 20 us, action: {action}}}"
    with small_fabric("qos.pfc.enabled=true", watchdog, gate, name="watchdog") as fabric:
        topology = fabric.plan.topology
        nic, leaf = topology.host_port(0), topology.port(topology.host_port(0).peer)
        queue = fabric.arrays.queues[nic.id, PRIORITY]
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        frame = ip_frame(fabric, 0, topology.host_port(1).address, bytes(1000), tos=PRIORITY << 5)
        with (
            sending,
            pauser(fabric, "leaf0", leaf.ifname, leaf.id) as sender,
            flow_control(fabric, time.monotonic_ns()) as flow,
        ):
            assert isinstance(flow, FlowControl)
            sender.send(leaf.id, PRIORITY, 0xFFFF)
            spin(flow, lambda: flow.closed[nic.id, PRIORITY])
            for _ in range(20):
                sending.send(frame)
            spin(flow, lambda: flow.watchdog_releases == 1)
            assert not flow.closed[nic.id, PRIORITY]
            wait_until(lambda: int(queue["deq_packets"]) == 20, "the queue emptied")
            lost = int(queue["lost_packets"])
            assert lost > 10 if action == "drop" else lost == 0
            # While the storm lasts further pauses are not obeyed; once it is over they are.
            sender.send(leaf.id, PRIORITY, 0xFFFF)
            wait_until(lambda: int(queue["pause_frames"]) == 2, "the second pause")
            flow.tick(time.monotonic_ns())
            assert not flow.closed[nic.id, PRIORITY]
            spin(flow, lambda: not int(queue["discard"]) and not any(flow._storm))
            sender.send(leaf.id, PRIORITY, 0xFFFF)
            spin(flow, lambda: flow.closed[nic.id, PRIORITY])
        assert_drained(fabric)
