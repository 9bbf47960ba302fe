"""Attachments: RoCE between a NIC and the namespace that soft-RoCE of older kernels is in; here plain UDP in its place."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from testbed.errors import MachineError
from testbed.fabric import Fabric, rxe_devices
from testbed.kernel import attachment
from testbed.kernel.attachment import create_attachment
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.registry import collect_garbage, read_state
from testbed.roce.wire import data_tos
from testbed.topology import Port, format_address
from tests.netns.labs import (
    PATIENCE_S,
    Quiet,
    assert_drained,
    lab_name,
    listening_socket,
    plain_carrier,
    run_in,
    small_fabric,
    small_plan,
)

pytestmark = pytest.mark.root

ROCE_PORT = 4791
MARK = "testbed-test:attachment"


def attached_interfaces() -> dict[str, str]:
    """Return the alias of each attachment in this namespace."""
    found = {}
    for entry in Path("/sys/class/net").glob("tbx*"):
        with suppress(FileNotFoundError):
            found[entry.name] = (entry / "ifalias").read_text().strip()
    return found


@pytest.fixture(autouse=True)
def without_rxe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a kernel whose rxe does not know namespaces, and devices that are nothing: this one has no rxe at all."""
    monkeypatch.setattr(rxe_devices, "create_rxe", lambda name, ifname, netns_fd: False)
    monkeypatch.setattr(rxe_devices, "create_rxe_here", lambda name, ifname: None)


@contextmanager
def attached(fabric: Fabric) -> Iterator[dict[int, str]]:
    """Attach all NICs for the block; yield the interface of each by the port's id."""
    created: dict[int, str] = {}
    keep = rxe_devices.create_rxe_here
    try:
        made: list[str] = []
        rxe_devices.create_rxe_here = lambda name, ifname: made.append(ifname)  # type: ignore[assignment]
        with fabric.run_devices(fabric.plan.topology.nics) as names:
            created.update(zip(names, made, strict=True))
            yield created
    finally:
        rxe_devices.create_rxe_here = keep


def open_sockets(port: Port, ifname: str, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Return one that sends by an interface, and one that gets what comes by it; rxe may have RoCE's port here."""
    sending = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    receiving = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))
    for one in (sending, receiving):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, ifname.encode())
    sending.bind((format_address(port.address), 0))
    receiving.settimeout(PATIENCE_S)
    return sending, receiving


def test_roce_crosses_the_fabric_and_other_sockets_stay_on_their_hosts() -> None:
    with small_fabric() as fabric, ExitStack() as stack:
        with attached(fabric) as ifnames:
            assert set(attached_interfaces().values()) == {fabric.state.mark}
            nics = fabric.plan.topology.nics
            sockets = [open_sockets(nic, ifnames[nic.id], stack) for nic in nics]
            for (sender, _), source in zip(sockets, nics, strict=True):
                for (_, receiver), target in zip(sockets, nics, strict=True):
                    if source is not target:
                        sender.sendto(bytes(200), (format_address(target.address), ROCE_PORT))
                        packet, (address, _) = receiver.recvfrom(300)
                        assert (packet[28:], address) == (bytes(200), format_address(source.address))
            # Twelve datagrams, each counted once by its NIC; the four between the leaves' hosts of one rack do not see a spine.
            assert sum(int(fabric.arrays.queues["enq_packets"][nic.id].sum()) for nic in nics) == 12
            spines = [node for node in fabric.plan.topology.nodes if node.name.startswith("spine")]
            crossed = sum(int(fabric.arrays.queues["enq_packets"][port].sum()) for one in spines for port in one.ports)
            assert crossed == 8
            ping = run_in(fabric, "host0", "ping", "-c1", "-W5", format_address(nics[3].address))
            assert ping.returncode == 0, "the hosts' own kernels have their NICs as ever"
            assert_drained(fabric)
        assert not attached_interfaces()
        assert not fabric.state.attachments
        assert not any(fabric.arrays.ports["flags"][nic.id] & 512 for nic in nics)


def test_every_flow_of_data_leaves_by_the_shaped_queue() -> None:
    # The kernel keeps for a connected socket the transmit queue of the first device of its way that has several, for all others.
    flows, datagrams = 16, 2
    with small_fabric() as fabric, ExitStack() as stack:
        with attached(fabric) as ifnames:
            nics = fabric.plan.topology.nics
            source, target = nics[0], nics[3]
            _, receiver = open_sockets(target, ifnames[target.id], stack)
            for _ in range(flows):
                sender, _ = open_sockets(source, ifnames[source.id], stack)
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, data_tos(3))
                sender.connect((format_address(target.address), ROCE_PORT))
                for _ in range(datagrams):
                    sender.send(bytes(200))
                    receiver.recv(300)
            ports = [("host0", "eth0"), ("leaf1", "down0"), ("leaf1", "down1")]
            sent = [sent_by_queues(fabric, *port) for port in ports]
        assert sum(data for data, _ in sent) == 2 * flows * datagrams  # once by the NIC, once by the last switch
        assert all(control == 0 for _, control in sent)


def sent_by_queues(fabric: Fabric, node: str, ifname: str) -> tuple[int, int]:
    """Return how many packets a port sent by its shaped queue and by the other."""
    listed = json.loads(run_in(fabric, node, "tc", "-s", "-j", "qdisc", "show", "dev", ifname).stdout)
    packets = {one["parent"]: one["packets"] for one in listed if "parent" in one}
    return packets["1:1"], packets["1:2"]


def test_nothing_but_roce_leaves_by_an_attachment() -> None:
    with small_fabric() as fabric, ExitStack() as stack, attached(fabric) as ifnames:
        nic, target = fabric.plan.topology.nics[0], format_address(fabric.plan.topology.nics[3].address)
        heard = stack.enter_context(listening_socket(fabric, "host0", nic.ifname))
        opened = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, ifnames[nic.id].encode())
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        # As machines announce themselves; RoCE's port does not make it RoCE. The last is behind the others.
        places = [
            (target, 5353),
            (target, 4790),
            ("224.0.0.251", 5353),
            ("224.0.0.251", ROCE_PORT),
            ("255.255.255.255", 67),
        ]
        for place in (*places, (target, ROCE_PORT)):
            opened.sendto(bytes(100), place)
        frame = heard.recv(2000)
        assert frame[30:34] == socket.inet_aton(target)
        assert frame[36:38] == ROCE_PORT.to_bytes(2, "big")


def test_the_engines_queue_pairs_are_answered_at_the_nic() -> None:
    with small_fabric() as fabric, attached(fabric):
        with plain_carrier(fabric) as carrier:
            carrier.run(0, Quiet())
        assert_drained(fabric)


def test_what_a_killed_run_left_goes_and_no_other() -> None:
    name = lab_name("attached")
    with Fabric.deploy(small_plan(), name) as fabric:
        nics = fabric.plan.topology.nics
        rxe_devices.create_devices(fabric.plan, fabric.state, fabric.arrays, {"a": nics[0], "b": nics[1]})
    try:
        assert len(attached_interfaces()) == 2
        removed, foreign = collect_garbage()
        assert name not in removed
        assert not foreign
        assert not attached_interfaces()
        assert not read_state(name).attachments
        with Fabric.attach(small_plan(), name) as fabric:
            assert not any(fabric.arrays.ports["flags"][nic.id] & 512 for nic in nics)
            rxe_devices.create_devices(fabric.plan, fabric.state, fabric.arrays, {"a": nics[0]})
            assert len(attached_interfaces()) == 1
            fabric.destroy()
        assert not attached_interfaces()
    finally:
        with suppress(Exception):
            Fabric.attach(small_plan(), name).destroy()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ip addr add 10.0.0.6/30 dev tbt-used", r"a route to 10\.0\.0\.4/30, .* needs 10\.0\.0\.5"),
        ("ip route add blackhole 10.0.0.4/30", r"a route to 10\.0\.0\.4/30"),
        ("ip addr add 10.0.0.7/32 dev tbt-used", r"that address, .* needs 10\.0\.0\.7"),
    ],
)
def test_addresses_in_use_here_are_refused(command: str, words: str) -> None:
    def shell(text: str) -> None:
        done = subprocess.run(text, shell=True, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    shell("ip link add tbt-used type veth peer tbt-used2 && ip link set tbt-used up && ip link set tbt-used2 up")
    try:
        shell(command)
        with small_fabric() as fabric, pytest.raises(MachineError, match=words), attached(fabric):
            pass
    finally:
        undo = "ip link del tbt-used; ip route del blackhole 10.0.0.4/30"
        subprocess.run(undo, shell=True, check=False, capture_output=True)
    assert not attached_interfaces()


def test_this_machines_way_to_other_addresses_is_as_it_was() -> None:
    def way() -> str:
        return subprocess.run(["ip", "route", "get", "10.0.0.2"], capture_output=True, text=True, check=False).stdout

    before = way()
    with small_fabric() as fabric, attached(fabric):
        assert way() == before


def test_machine_that_drops_its_own_addresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attachment, "_STRICT_RP_FILTER", Path("/proc/sys/net/ipv4/conf/all/rp_filter").read_text().strip()
    )
    with small_fabric() as fabric:
        nic = fabric.plan.topology.nics[0]
        netns = open_namespace(fabric.namespace_of("host0"))
        try:
            with pytest.raises(MachineError, match="rp_filter"):
                create_attachment(rxe_devices._attached_nic(fabric.plan, nic), netns, MARK, cpu=0)
        finally:
            os.close(netns)
    assert not attached_interfaces()
