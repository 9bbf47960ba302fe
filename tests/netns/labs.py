"""What the tests of running fabrics share: small labs, commands in their nodes, raw frames, a tick loop that can be hooked."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.carriers.engine import EngineCarrier
from testbed.carriers.faults import fabric_faults
from testbed.carriers.flow_control import flow_control
from testbed.fabric import Fabric
from testbed.kernel.namespaces import entered, open_namespace
from testbed.kernel.probe_link import ProbeLink
from testbed.kernel.scheduling import MonotonicClock
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, Connection, qp_index
from testbed.scenario import load_scenario
from tests.conftest import TEST_LAB_PREFIX

# A wall rate of 20 Mbit/s: a full frame takes 1.7 ms, no queue is near what this machine carries.
SCENARIO = """
name: netns-test
fabric:
  kind: clos
  leaves: 2
  spines: 2
  hosts_per_leaf: 2
  host_link: {rate: 400 Gbit/s, delay: 0 ns}
  switch: {buffer: 8 MiB}
routing: {scheme: ecmp}
transport: {retransmit_timeout: 10 us}
workload:
  - {collective: send_recv, order: rails, size: 16 KiB, iters: 1, warmup_iters: 0}
time_dilation: 20000
"""
# Two hosts, one path: everything passes the same three ports.
LINE = ("fabric.hosts_per_leaf=1", "fabric.spines=1")
# Long enough for any machine: what is waited for comes, or the test fails.
PATIENCE_S = 20.0
_LOOK_S = 0.001


class Quiet:
    """Hears of iterations, says nothing."""

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """Ignore it."""


def small_plan(*overrides: str) -> Plan:
    return compile_plan(load_scenario(SCENARIO, overrides), capacity_packets_per_s=None)


def lab_name(suffix: str) -> str:
    return f"{TEST_LAB_PREFIX}{os.getpid()}-{suffix}"


@contextlib.contextmanager
def small_fabric(*overrides: str, name: str = "lab") -> Iterator[Fabric]:
    with Fabric.build(small_plan(*overrides), lab_name(name), any_workload=True) as fabric:
        yield fabric


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look until it holds, which no file descriptor tells; fail when it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(_LOOK_S)


def start_in(fabric: Fabric, node: str, *command: str, **options: Any) -> subprocess.Popen[str]:
    with in_node(fabric, node):  # a child begins in the namespace of the thread that makes it
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run_in(fabric: Fabric, node: str, *command: str) -> subprocess.CompletedProcess[str]:
    with start_in(fabric, node, *command) as child:
        out, err = child.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(command, child.returncode, out, err)


@contextlib.contextmanager
def in_node(fabric: Fabric, node: str) -> Iterator[None]:
    """Be in a node's namespace for the block; a socket opened there stays there."""
    descriptor = open_namespace(fabric.namespace_of(node))
    try:
        with entered(descriptor):
            yield
    finally:
        os.close(descriptor)


def address_of(fabric: Fabric, rank: int) -> str:
    return socket.inet_ntoa(struct.pack("!I", fabric.plan.topology.host_port(rank).address))


@contextlib.contextmanager
def listening_socket(fabric: Fabric, node: str, ifname: str) -> Iterator[socket.socket]:
    """Open a socket that sees every frame of an interface, in and out."""
    with in_node(fabric, node):
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        opened.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        opened.bind((ifname, 0))
    opened.settimeout(PATIENCE_S)
    with opened:
        yield opened


def is_drained(fabric: Fabric) -> bool:
    queues = fabric.arrays.queues
    left = queues["deq_bytes"].copy()  # before what entered
    return bool((left == queues["enq_bytes"]).all())


def assert_drained(fabric: Fabric) -> None:
    """Assert that what entered every queue has left it, byte and packet, and no switch memory is in use."""
    queues = fabric.arrays.queues
    # Twice: a frame between two queues is in none.
    wait_until(lambda: is_drained(fabric) and is_drained(fabric), f"drained {describe_standing(fabric)}")
    assert (queues["enq_packets"] == queues["deq_packets"]).all()
    assert (queues["enq_bytes"] == queues["deq_bytes"]).all()
    assert (fabric.arrays.nodes["used_bytes"] == 0).all()
    # A depth below zero, ever, would stand here as a huge one.
    assert int(queues["peak_bytes"].max()) <= int(queues["enq_bytes"].max())


def describe_standing(fabric: Fabric) -> dict[str, int]:
    depth = fabric.arrays.queues["enq_bytes"].astype(np.int64) - fabric.arrays.queues["deq_bytes"].astype(np.int64)
    return {
        f"{fabric.plan.topology.port_name(int(port))} priority {priority}": int(depth[port, priority])
        for port, priority in np.argwhere(depth)
    }


def ip_checksum(header: bytes) -> int:
    """Return the checksum of an IPv4 header whose checksum field is ignored."""
    words = list(struct.unpack(f"!{len(header) // 2}H", header))
    words[5] = 0
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_frame(
    fabric: Fabric,
    rank: int,
    dst_address: int,
    payload: bytes,
    *,
    tos: int = 0,
    ttl: int = 64,
    ident: int = 0,
    fragment: int = 0,
    protocol: int = 17,
) -> bytes:
    """Return an Ethernet frame as the NIC of a rank would send it."""
    port = fabric.plan.topology.host_port(rank)
    ethernet = bytes.fromhex((fabric.plan.topology.port(port.peer).mac + port.mac).replace(":", "")) + b"\x08\0"
    header = struct.pack(
        "!BBHHHBBHII", 0x45, tos, 20 + len(payload), ident, fragment, ttl, protocol, 0, port.address, dst_address
    )
    return ethernet + header[:10] + struct.pack("!H", ip_checksum(header)) + header[12:] + payload


def activate_qps(fabric: Fabric) -> Sequence[Connection]:
    """Make the QPs of the first workload ready to answer, as the engine does; return the connections."""
    connections = fabric.plan.workloads[0].connections
    rows: npt.NDArray[Any] = fabric.arrays.qps
    for index, connection in enumerate(connections):
        for role, end in ((REQUESTER, connection.requester), (RESPONDER, connection.responder)):
            row = rows[qp_index(index, role)]
            row["peer_qpn"], row["udp_source_port"] = end.peer_qpn, end.udp_source_port
            row["initial_rx_psn"] = row["initial_tx_psn"] = connection.initial_psn
            row["port"] = fabric.plan.topology.host_port(end.local.rank).id
            row["active"] = 1
    return connections


class HookedClock(MonotonicClock):
    """The engine's clock, with a function called once a tick: what breaks does so between two ticks."""

    def __init__(self, hook: Callable[[], None]) -> None:
        self._hook = hook

    def sleep_until_ns(self, when_ns: int) -> None:
        self._hook()
        super().sleep_until_ns(when_ns)


@contextlib.contextmanager
def plain_carrier(fabric: Fabric, hook: Callable[[], None] = lambda: None) -> Iterator[EngineCarrier]:
    """Open the engine without real-time priority: for tests of what it does, not when."""
    clock = HookedClock(hook)
    with (
        fabric.packet_sockets() as sockets,
        contextlib.closing(ProbeLink(fabric.probe_cpu, clock.now_ns)) as probe,
        flow_control(fabric, clock.now_ns()) as flow,
        fabric_faults(fabric, flow, clock.now_ns()) as faults,
    ):
        yield EngineCarrier(fabric, [one.fileno() for one in sockets], probe, clock, flow, faults=faults)
