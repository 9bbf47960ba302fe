"""What the switches do with every packet, beside their Python twin and beside the links' rates."""

from __future__ import annotations

import itertools
import random
import re
import selectors
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from testbed.fabric import Fabric
from testbed.kernel import bpf, layout
from testbed.kernel.packet_socket import open_packet_socket
from testbed.routing import ForwardingTables
from testbed.routing.hashing import select_members
from testbed.topology import HOST_NETWORK, NodeKind, Topology
from tests.conftest import skip_or_fail
from tests.netns.labs import (
    PATIENCE_S,
    address_of,
    assert_drained,
    in_node,
    ip_checksum,
    ip_frame,
    listening_socket,
    run_in,
    small_fabric,
    wait_until,
)

pytestmark = pytest.mark.root

UNEVEN = "fabric.hosts_per_leaf=[3, 1]"  # leaf1 has three empty slots, leaf0 one


@pytest.fixture(scope="module", params=["fabric.hosts_per_leaf=2", UNEVEN], ids=["2x2x2", "uneven"])
def fabric(request: pytest.FixtureRequest) -> Iterator[Fabric]:
    with small_fabric(request.param, name="plane") as built:
        yield built


# --- the kernel's own packets ------------------------------------------------------------------------------------------


def test_every_host_reaches_every_other(fabric: Fabric) -> None:
    ranks = range(len(fabric.plan.topology.hosts))
    before = fabric.arrays.queues["deq_packets"].sum(axis=1).astype(np.int64)
    for source in ranks:
        for destination in ranks:
            if source != destination:
                done = run_in(fabric, f"host{source}", "ping", "-n", "-c1", "-W5", address_of(fabric, destination))
                assert done.returncode == 0, (source, destination, done.stdout)
                hops = 2 if same_leaf(fabric, source, destination) else 4
                assert f"ttl={64 - hops + 1} " in done.stdout
    assert_drained(fabric)
    # Counted, not left to the kernel's routes: each host sent a request and an answer for every other.
    sent = fabric.arrays.queues["deq_packets"].sum(axis=1).astype(np.int64) - before
    for rank in ranks:
        port = fabric.plan.topology.host_port(rank)
        assert sent[port.id] == sent[port.peer] == 2 * (len(ranks) - 1)


@pytest.mark.parametrize(("ttl", "kind"), [(1, NodeKind.LEAF), (2, NodeKind.SPINE), (3, NodeKind.LEAF)])
def test_packet_whose_ttl_ends_is_reported_by_the_switch_it_ends_at(fabric: Fabric, ttl: int, kind: NodeKind) -> None:
    topology = fabric.plan.topology
    last = len(topology.hosts) - 1
    done = run_in(fabric, "host0", "ping", "-n", "-c1", "-W5", "-t", str(ttl), address_of(fabric, last))
    assert done.returncode == 1
    assert "Time to live exceeded" in done.stdout
    reporter = done.stdout.split("From ")[1].split()[0]
    (address,) = struct.unpack("!I", socket.inet_aton(reporter))
    (port,) = (port for port in topology.ports if port.address == address)
    node = topology.nodes[port.node]
    assert node.kind is kind
    assert node.name == {1: "leaf0", 3: "leaf1"}.get(ttl, node.name)
    assert run_in(fabric, "host0", "ping", "-n", "-c1", "-t4", address_of(fabric, last)).returncode == 0
    assert_drained(fabric)


def test_packet_for_an_empty_slot_does_not_travel_in_circles() -> None:
    with small_fabric(UNEVEN, name="empty") as fabric:
        topology = fabric.plan.topology
        empty = [slot for slot in range(topology.slots) if topology.slot_port(slot) is None]
        assert {topology.slot_leaf(slot).name for slot in empty} == {"leaf0", "leaf1"}
        unreachable = socket.inet_ntoa(struct.pack("!I", HOST_NETWORK + 2 * empty[-1] + 1))
        assert "Destination Host Unreachable" in run_in(fabric, "host0", "ping", "-n", "-c1", "-W5", unreachable).stdout
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            for address in [HOST_NETWORK + 2 * slot + end for slot in empty for end in (0, 1)]:
                before = count_kernel_forwards(fabric)
                sending.send(ip_frame(fabric, 0, address, bytes(16)))
                # Both travel on one CPU, a hop each in turn: a frame in a circle would have made many.
                assert run_in(fabric, "host0", "ping", "-n", "-c1", "-W5", address_of(fabric, 3)).returncode == 0
                assert count_kernel_forwards(fabric) - before <= 2, socket.inet_ntoa(struct.pack("!I", address))
        assert_drained(fabric)


def count_kernel_forwards(fabric: Fabric) -> int:
    """Return how many packets the switches' kernels, not the eBPF program, have forwarded."""
    total = 0
    for node in fabric.plan.topology.nodes:
        if node.kind is not NodeKind.HOST:
            with in_node(fabric, node.name):
                names, values = Path("/proc/thread-self/net/snmp").read_text().splitlines()[:2]
            total += int(dict(zip(names.split(), values.split(), strict=True))["ForwDatagrams"])
    return total


# --- forwarding equals the twin ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", ["fabric.hosts_per_leaf=2", UNEVEN], ids=["2x2x2", "uneven"])
@pytest.mark.parametrize("scheme", ["ecmp", "e-ecmp", "pinning"])
def test_random_packets_take_the_ports_that_the_twin_names(scheme: str, hosts: str) -> None:
    frames = 12_000
    rng = np.random.default_rng(7)
    with small_fabric(
        hosts, "fabric.spines=3", f"routing.scheme={scheme}", "routing.hash_seed=99", name="twin"
    ) as fabric:
        topology, tables = fabric.plan.topology, fabric.plan.tables
        ranks = len(topology.hosts)
        source = rng.integers(0, ranks, frames)
        destination = (source + rng.integers(1, ranks, frames)) % ranks
        ports = rng.integers(0, 1 << 16, (frames, 2))
        tos = rng.integers(0, 64, frames) << 2
        addresses = np.array([topology.host_port(rank).address for rank in range(ranks)], np.int64)
        flows = np.zeros((frames, 6), np.uint32)
        flows[:, 0], flows[:, 1] = addresses[source], addresses[destination]
        flows[:, 2:4], flows[:, 4] = ports, socket.IPPROTO_UDP
        # Some are fragments, the first or a later one: their ports, if any, must not be read.
        fragment = rng.choice([0, 0x2000, 0x0010], frames, p=[0.8, 0.1, 0.1])
        send_udp(fabric, source, flows, tos, fragment)
        flows[fragment > 0, 2:4] = 0
        assert_drained(fabric)
        counted = fabric.arrays.queues["enq_packets"].astype(np.int64)
        assert not fabric.arrays.queues["drop_packets"].any()
        assert not fabric.arrays.nodes["no_route_packets"].any()
        expected = count_by_twin(topology, tables, source, flows, tos >> 5)
        np.testing.assert_array_equal(counted, expected)
        uplinks = [port.id for leaf in topology.leaves for port in topology.uplinks(leaf)]
        assert expected[uplinks].sum() > frames / 4  # precondition: the spines were crossed
        # Negative control: another seed, or another scheme, would have been noticed.
        changed = flows.copy()
        changed[:, 2] ^= 1
        same_counts = np.array_equal(count_by_twin(topology, tables, source, changed, tos >> 5), expected)
        assert same_counts == (scheme == "pinning")


def send_udp(
    fabric: Fabric,
    source: npt.NDArray[np.int64],
    flows: npt.NDArray[np.uint32],
    tos: npt.NDArray[np.int64],
    fragment: npt.NDArray[np.int64],
) -> None:
    """Send a small datagram per flow, never more at once than the kernel's backlog holds."""
    at_once = 100
    queues = fabric.arrays.queues
    sockets = []
    for rank in range(len(fabric.plan.topology.hosts)):
        with in_node(fabric, f"host{rank}"):
            sockets.append(open_packet_socket("eth0"))
    try:
        for first in range(0, len(source), at_once):
            for index in range(first, min(first + at_once, len(source))):
                # A checksum that is wrong: the receiving kernel drops it without an ICMP error.
                datagram = struct.pack("!HHHH8x", int(flows[index, 2]), int(flows[index, 3]), 16, 0xDEAD)
                frame = ip_frame(
                    fabric,
                    int(source[index]),
                    int(flows[index, 1]),
                    datagram,
                    tos=int(tos[index]),
                    fragment=int(fragment[index]),
                )
                sockets[int(source[index])].send(frame)
            wait_until(
                lambda: int(queues["enq_packets"].sum()) - int(queues["deq_packets"].sum()) <= at_once, "room again"
            )
    finally:
        for one in sockets:
            one.close()


def count_by_twin(
    topology: Topology,
    tables: ForwardingTables,
    source: npt.NDArray[np.int64],
    flows: npt.NDArray[np.uint32],
    priority: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return the packets of every port and priority, shape ``(ports + 1, 8)``, as the tables and the hash have it."""
    counts = np.zeros((len(topology.ports) + 1, 8), np.int64)
    peer_node = np.array([0] + [topology.peer_node(port.id).index for port in topology.ports])
    slots = (flows[:, 1].astype(np.int64) - HOST_NETWORK) >> 1
    port = np.array([topology.host_port(rank).id for rank in range(len(topology.hosts))])[source]
    travelling = np.arange(len(flows))
    while len(travelling):
        np.add.at(counts, (port[travelling], priority[travelling]), 1)
        node = peer_node[port]
        travelling = travelling[node[travelling] >= len(topology.hosts)]
        for switch, slot in {(int(node[index]), int(slots[index])) for index in travelling}:
            here = travelling[(node[travelling] == switch) & (slots[travelling] == slot)]
            group = tables.group_at(switch, slot)
            assert group is not None
            port[here] = select_members(group, flows[here])
    return counts


def test_forwarding_lowers_the_ttl_and_keeps_the_checksum_right() -> None:
    with small_fabric(name="ttl") as fabric, listening_socket(fabric, "host3", "eth0") as arriving:
        target = fabric.plan.topology.host_port(3).address
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            # Among all identifiers those whose checksum, merely added up, is 0xffff behind one of the three switches.
            plain = bytearray(ip_frame(fabric, 0, target, bytes(16), protocol=253))
            idents = []
            for ident in range(1 << 16):
                plain[18:20] = struct.pack("!H", ident)
                if ip_checksum(bytes(plain[14:34])) in (0xFEFF, 0xFDFF, 0xFCFF):
                    idents.append(ident)
            assert len(idents) == 3
            for ident in [*idents, *random.Random(1).sample(range(1, 0xFFFF), 50)]:
                sending.send(ip_frame(fabric, 0, target, bytes(16), protocol=253, ident=ident))
                frame = arriving.recv(4096)
                while frame[23] != 253 or frame[26:30] != plain[26:30]:
                    frame = arriving.recv(4096)
                assert frame[22] == 61
                assert struct.unpack("!H", frame[18:20]) == (ident,)
                assert struct.unpack("!H", frame[24:26]) == (ip_checksum(frame[14:34]),), hex(ident)
        assert_drained(fabric)


# --- what does not belong ----------------------------------------------------------------------------------------------


def test_kernel_segmentation_is_counted_as_the_frames_that_leave() -> None:
    with small_fabric("time_dilation=4000", name="gso") as fabric:
        frames = udp_segments(fabric, segments=20, segment_bytes=1000)
        assert_drained(fabric)
        for port in (
            fabric.plan.topology.host_port(0),
            fabric.plan.topology.port(fabric.plan.topology.host_port(2).peer),
        ):
            queue = fabric.arrays.queues[port.id]
            assert queue["enq_packets"].sum() == frames
            assert queue["enq_bytes"].sum() == frames * (1000 + 42)


def udp_segments(fabric: Fabric, *, segments: int, segment_bytes: int) -> int:
    """Let a host's kernel cut one large datagram into many; return how many."""
    with in_node(fabric, "host2"):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((address_of(fabric, 2), 9999))
        receiver.settimeout(PATIENCE_S)
    with in_node(fabric, "host0"):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        try:
            sender.setsockopt(socket.IPPROTO_UDP, 103, segment_bytes)  # UDP_SEGMENT
            sender.sendto(bytes(segments * segment_bytes), (address_of(fabric, 2), 9999))
        except OSError:
            # Linux kernel commit 10154dbded6d "udp: Allow GSO transmit from devices with no checksum offload" (in v6.11)
            pytest.skip("this kernel does not cut datagrams for a device without checksum offload")
        for _ in range(segments):
            assert len(receiver.recv(4096)) == segment_bytes
    return segments


# --- shaping, counting, dropping ---------------------------------------------------------------------------------------

# Far more than TCP keeps in a queue; and less than two senders' windows.
LARGE_BUFFER, SMALL_BUFFER = "fabric.switch.buffer=64 MiB", "fabric.switch.buffer=48 KiB"
_IP_TCP_BYTES = 52  # with timestamps


def test_two_tcp_flows_share_the_rate_of_the_receivers_port() -> None:
    with small_fabric(LARGE_BUFFER, name="tcp") as fabric:
        expected = tcp_goodput_bytes_per_s(fabric)
        goodput, flows = run_tcp(fabric, [0, 2], 1, nbytes=2_000_000)
        port = fabric.plan.topology.port(fabric.plan.topology.host_port(1).peer)
        queue = fabric.arrays.queues[port.id, 0]
        # Precondition: both sent for good, and the receiver's port was the bottleneck.
        assert min(flows) > sum(flows) / 10
        assert int(queue["peak_bytes"]) > 10 * fabric.plan.frame_wire_bytes
        assert not fabric.arrays.queues["drop_packets"].any()
        # Tolerance: shapers are 0.5 % faster than their links, a bucket of 8 frames is 1.7 % of what is measured, and a
        # sender's retransmission after a spurious timeout costs goodput.
        assert goodput == pytest.approx(expected, rel=0.05)
        assert_drained(fabric)

    # Negative control: the same flows without that bottleneck carry more.
    with small_fabric(LARGE_BUFFER, "fabric.host_link.rate=1600 Gbit/s", name="tcp-wide") as fabric:
        goodput, _ = run_tcp(fabric, [0, 2], 1, nbytes=2_000_000)
        assert goodput > 2 * expected


def test_small_buffer_drops_tcp_and_counts_it() -> None:
    with small_fabric(SMALL_BUFFER, name="drop") as fabric:
        topology, queues = fabric.plan.topology, fabric.arrays.queues
        run_tcp(fabric, [0, 2], 1, nbytes=1_000_000)
        for rank in (0, 2):  # precondition: both sent
            assert int(queues["enq_packets"][topology.host_port(rank).id].sum()) > 20
        drops = queues["drop_packets"].sum(axis=1).astype(int)
        port = topology.port(topology.host_port(1).peer)
        assert drops[port.id] > 0
        # The memory is the switch's: once it is full, an ACK for another port finds no room either; and a NIC's burst may be
        # more than a leaf's uplink takes.
        assert drops[port.id] > drops.sum() / 2
        assert int(queues["peak_bytes"][port.id].max()) <= 48 * 1024
        assert_drained(fabric)


def tcp_goodput_bytes_per_s(fabric: Fabric) -> float:
    """Return what TCP carries over a port of the hosts' rate when every segment is full."""
    plan = fabric.plan
    mss = plan.scenario.transport.mtu_bytes + 104 - _IP_TCP_BYTES
    rate = plan.wall_rate_bytes_per_s(plan.topology.host_port(0).rate_bits_per_s)
    return rate * mss / (mss + _IP_TCP_BYTES + 14 + 24)


def run_tcp(fabric: Fabric, sources: list[int], destination: int, *, nbytes: int) -> tuple[float, list[int]]:
    """Send from several hosts to one by TCP until ``nbytes`` arrived.

    Returns:
        Goodput over the second half, bytes per wall second (the median over its tenths, so that no stall of the machine
        decides), and the bytes of each flow in that half.
    """
    selector = selectors.DefaultSelector()
    arrived = [0] * len(sources)
    marks: list[tuple[float, int]] = []
    half: list[int] | None = None
    chunk = bytes(65536)
    opened: list[socket.socket] = []
    try:
        for index, rank in enumerate(sources):
            with in_node(fabric, f"host{destination}"):
                listener = socket.create_server((address_of(fabric, destination), 7000 + index))
            opened.append(listener)
            with in_node(fabric, f"host{rank}"):
                client = socket.create_connection((address_of(fabric, destination), 7000 + index), PATIENCE_S)
            server, _ = listener.accept()
            opened += [client, server]
            client.setblocking(False)
            server.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE, None)
            selector.register(server, selectors.EVENT_READ, index)
        deadline = time.monotonic() + 3 * PATIENCE_S
        while sum(arrived) < nbytes:
            assert time.monotonic() < deadline, arrived
            for key, _ in selector.select(timeout=1):
                assert isinstance(key.fileobj, socket.socket)
                if key.data is None:
                    key.fileobj.send(chunk)
                else:
                    arrived[key.data] += len(key.fileobj.recv(1 << 20))
                    if sum(arrived) > nbytes / 2:
                        half = half or list(arrived)
                        marks.append((time.monotonic(), sum(arrived)))
    finally:
        selector.close()
        for one in opened:
            # Not what is still in the sender's buffer.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
    assert half is not None
    parts = min(10, len(marks) - 1)
    edges = [marks[part * (len(marks) - 1) // parts] for part in range(parts + 1)] if parts else []
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(edges)]
    return statistics.median(rates or [0.0]), [now - then for now, then in zip(arrived, half, strict=True)]


def same_leaf(fabric: Fabric, source: int, destination: int) -> bool:
    topology = fabric.plan.topology
    return topology.peer_node(topology.host_port(source).id) == topology.peer_node(topology.host_port(destination).id)


def test_the_verifier_is_soon_done_with_every_program(monkeypatch: pytest.MonkeyPatch) -> None:
    # Building a fabric waits for it, at about 4 us an instruction; beyond a million it refuses a program.
    visited: dict[str, int] = {}
    close = bpf.LoadedObject.close

    def look(loaded: bpf.LoadedObject) -> None:
        for name, descriptor in loaded.programs.items() if loaded._open else ():
            found = re.search(r"^verified_insns:\s+(\d+)", Path(f"/proc/self/fdinfo/{descriptor}").read_text(), re.M)
            if found is None:
                skip_or_fail("this kernel does not tell how long the verifier took")
            else:
                visited[name] = int(found[1])
        close(loaded)

    monkeypatch.setattr(bpf.LoadedObject, "close", look)
    with small_fabric(name="verifier"):
        pass
    assert set(visited) == set(layout.FABRIC_PROGRAMS)
    assert max(visited.values()) < 100_000, visited
