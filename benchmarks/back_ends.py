"""The data plane's back ends beside each other: CPU per packet, what leaves after a pause, the curve of marks; needs root.

::

    sudo .venv/bin/testbed vm run --virtual-time -- .venv/bin/python -m benchmarks.back_ends

In virtual time a guest's CPU executes one instruction a nanosecond, so that its figures are counts of instructions and repeat;
elsewhere they are this machine's times, and noisy. A back end that the kernel lacks has a row that says so.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from testbed.carriers.flow_control import gated_queues
from testbed.errors import KernelError
from testbed.fabric import Fabric, egress_of
from testbed.host import in_virtual_time
from testbed.kernel.gate import GateBackEnd, GatedQueue, QueueGates, bypass_sockets
from testbed.kernel.namespaces import entered, open_namespace
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.queues import GATES
from testbed.plan.compile import compile_plan
from testbed.plan.operations import ShapePort
from testbed.scenario import load_scenario

SCENARIO = """
name: back-ends
fabric:
  kind: star
  hosts_per_leaf: 2
  host_link: {rate: 400 Gbit/s, delay: 600 ns}
workload: [{pattern: flows, flows: [{src: 0, dst: 1, size: 1 MiB}]}]
"""
PRIORITY = 3
TOS = PRIORITY << 5 | 2  # ECT(0)
FRAME_BYTES = 1020
# Links so fast that the CPU alone limits, and so slow that a queue stands where it is put.
FAST, SLOW = "time_dilation=50", "time_dilation=2000"
PACKETS, ROUNDS = 3000, 3
WAITING_FRAMES = 60
KMIN_BYTES, KMAX_BYTES, PMAX = 100_000, 1_100_000, 0.5
CURVE_FILLS, CURVE_PARTS = 6, 4
_PATIENCE_S, _LOOK_S, _SETTLE_S = 20.0, 0.001, 0.1

PFC = ("qos.pfc.enabled=true", "qos.pfc.xoff=400 KB")
ECN = (f"qos.ecn={{enabled: true, kmin: {KMIN_BYTES} B, kmax: {KMAX_BYTES} B, pmax: {PMAX}}}",)
TWO = ("qos.priorities=[{priority: 4, lossless: false}]",)
STRICT_TWO = ("qos.priorities=[{priority: 3, weight: strict}, {priority: 4, weight: strict}]",)
LOSSLESS_TWO = ("qos.priorities=[{priority: 4}]",)
CASES: tuple[tuple[str, Sequence[str]], ...] = (
    ("one priority", ()),
    ("one priority, gate tbf", (*PFC, "qos.pfc.gate=tbf")),
    ("one priority, gate plug", (*PFC, "qos.pfc.gate=plug")),
    ("one priority, marker bpf", (*ECN, "qos.ecn.marker=bpf")),
    ("one priority, marker red", (*ECN, "qos.ecn.marker=red")),
    ("one priority, link delay netem", ("transport.carrier=tcp", "transport.link_delay=netem")),
    ("two priorities, htb", (*TWO, "qos.scheduler=htb")),
    ("two priorities, ets", (*TWO, "qos.scheduler=ets")),
    ("two strict priorities, htb", (*STRICT_TWO, "qos.scheduler=htb")),
    ("two strict priorities, ets", (*STRICT_TWO, "qos.scheduler=ets")),
    ("two strict priorities, prio", (*STRICT_TWO, "qos.scheduler=prio")),
    ("two priorities, htb, gate tbf", (*LOSSLESS_TWO, *PFC, "qos.pfc.gate=tbf")),
    ("two priorities, htb, gate plug", (*LOSSLESS_TWO, *PFC, "qos.pfc.gate=plug")),
)


@dataclass(frozen=True)
class Row:
    """What one case came to.

    Attributes:
        case: Its name.
        cpu_ns: CPU time per packet from host to leaf to host, the sending program's too.
        leaked_bytes: Of small frames that left after the sender's gate was closed; None without a gate.
        marked: Share of frames marked on each part of the slope, from below Kmin to above Kmax; empty without a marker.
    """

    case: str
    cpu_ns: float
    leaked_bytes: int | None
    marked: tuple[float, ...]


@contextlib.contextmanager
def fabric_of(*settings: str) -> Iterator[Fabric]:
    """Build the fabric for the block."""
    plan = compile_plan(load_scenario(SCENARIO, settings), capacity_packets_per_s=None)
    with Fabric.build(plan, f"back-ends-{os.getpid()}", any_workload=True) as fabric:
        yield fabric


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look until it holds.

    Raises:
        RuntimeError: It never does.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"never: {what}")
        time.sleep(_LOOK_S)


def frame_of(fabric: Fabric) -> bytes:
    """Return a UDP frame from host0 to host1, ECT."""
    topology = fabric.plan.topology
    sender, receiver = topology.host_port(0), topology.host_port(1)
    ethernet = bytes.fromhex((topology.port(sender.peer).mac + sender.mac).replace(":", "")) + b"\x08\0"
    addresses = sender.address.to_bytes(4, "big") + receiver.address.to_bytes(4, "big")
    length = FRAME_BYTES - len(ethernet)
    header = bytes((0x45, TOS)) + length.to_bytes(2, "big") + bytes(4) + b"\x40\x11\0\0" + addresses
    total = sum(int.from_bytes(header[at : at + 2], "big") for at in range(0, len(header), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + (~total & 0xFFFF).to_bytes(2, "big") + header[12:]
    return ethernet + header + bytes(length - len(header))


@contextlib.contextmanager
def sending(fabric: Fabric) -> Iterator[Callable[[], None]]:
    """Yield a function that sends one frame from host0 to host1."""
    descriptor = open_namespace(fabric.namespace_of("host0"))
    try:
        with entered(descriptor):
            opened = open_packet_socket(fabric.plan.topology.host_port(0).ifname)
    finally:
        os.close(descriptor)
    frame = frame_of(fabric)
    with opened:
        yield lambda: opened.send(frame) and None


def measure_cpu_ns(settings: Sequence[str]) -> float:
    """Return the CPU time per packet: the time that the one CPU needs, when nothing else limits, for many."""
    with fabric_of(FAST, *settings) as fabric, sending(fabric) as send:
        leaf = fabric.plan.topology.host_port(1).peer
        arrived = fabric.arrays.queues[leaf, PRIORITY]
        times = []
        for _ in range(ROUNDS):
            before = int(arrived["deq_packets"])
            begin = time.monotonic_ns()
            for _ in range(PACKETS):
                send()
            wait_until(lambda b=before: int(arrived["deq_packets"]) >= b + PACKETS, "all packets through the fabric")
            times.append((time.monotonic_ns() - begin) / PACKETS)
        return statistics.median(times)


@contextlib.contextmanager
def gate_of(fabric: Fabric, port_id: int, gate: GateBackEnd) -> Iterator[QueueGates]:
    """Yield the gate of a port's queue, open."""
    topology = fabric.plan.topology
    netns = {node.index: open_namespace(fabric.namespace_of(node.name)) for node in topology.nodes}
    port = topology.port(port_id)
    peer = topology.port(port.peer)
    gated = [one for one in gated_queues(fabric, netns) if (one.port, one.queue.priority) == (port_id, PRIORITY)]
    if not gated:  # nothing is paused here: its shaper is a gate all the same
        (shaper,) = (
            one
            for one in fabric.plan.operations([""] * len(topology.nodes), any_workload=True, back_ends=fabric.back_ends)
            if isinstance(one, ShapePort) and one.port == port_id
        )
        gated = [GatedQueue(port_id, peer.id, netns[port.node], egress_of(shaper).queue(PRIORITY))]
    try:
        with bypass_sockets([(peer.id, peer.ifname, netns[peer.node])]) as sockets:
            gates = QueueGates(gated, sockets, gate)
            try:
                yield gates
            finally:
                gates.close()
    finally:
        for descriptor in netns.values():
            os.close(descriptor)


def measure_leak_bytes(settings: Sequence[str]) -> int:
    """Return what leaves a NIC's queue after its gate was closed."""
    with fabric_of(SLOW, *settings) as fabric, sending(fabric) as send:
        port = fabric.plan.topology.host_port(0).id
        queue = fabric.arrays.queues[port, PRIORITY]
        with gate_of(fabric, port, GATES[fabric.back_ends.gate]) as gates:
            gates.move([(port, PRIORITY)], [])
            for _ in range(WAITING_FRAMES):
                send()
            wait_until(lambda: int(queue["enq_packets"]) == WAITING_FRAMES, "all frames in the queue")
            time.sleep(_SETTLE_S)
            leaked = int(queue["deq_bytes"])
            gates.move([], [(port, PRIORITY)])
            wait_until(lambda: int(queue["deq_packets"]) == WAITING_FRAMES, "an empty queue")
        return leaked


def measure_marks(settings: Sequence[str]) -> tuple[float, ...]:
    """Return the share of marked frames below Kmin, on each part of the slope, and above Kmax."""
    with fabric_of(SLOW, *settings) as fabric, sending(fabric) as send:
        port = fabric.plan.topology.host_port(1).peer
        queue = fabric.arrays.queues[port, PRIORITY]
        part = (KMAX_BYTES - KMIN_BYTES) // CURVE_PARTS
        ends = [KMIN_BYTES + part * number for number in range(CURVE_PARTS + 1)] + [KMAX_BYTES + KMIN_BYTES]
        marked, counted = [0] * len(ends), [0] * len(ends)
        with gate_of(fabric, port, GATES["tbf"]) as gates:
            for _ in range(CURVE_FILLS):
                gates.move([(port, PRIORITY)], [])
                for index, end in enumerate(ends):
                    fabric.read_kernel_marks()
                    before = int(queue["marked_packets"])
                    while int(queue["enq_bytes"]) - int(queue["deq_bytes"]) + FRAME_BYTES <= end:
                        sent = int(queue["enq_packets"])
                        send()
                        wait_until(lambda s=sent: int(queue["enq_packets"]) > s, "the frame in the queue")
                        counted[index] += 1
                    fabric.read_kernel_marks()
                    marked[index] += int(queue["marked_packets"]) - before
                gates.move([], [(port, PRIORITY)])
                wait_until(lambda: int(queue["enq_packets"]) == int(queue["deq_packets"]), "an empty queue")
        return tuple(marks / frames for marks, frames in zip(marked, counted, strict=True))


def measure(case: str, settings: Sequence[str]) -> Row:
    """Return the figures of a case."""
    has_gate, has_marker = PFC[0] in settings, ECN[0] in settings
    return Row(
        case,
        measure_cpu_ns(settings),
        measure_leak_bytes(settings) if has_gate else None,
        measure_marks(settings) if has_marker else (),
    )


def expected_marks() -> tuple[float, ...]:
    """Return the shares of a straight line."""
    between = tuple(PMAX * (number + 0.5) / CURVE_PARTS for number in range(CURVE_PARTS))
    return (0.0, *between, 1.0)


def main() -> None:
    """Print the table."""
    if not in_virtual_time():
        print("note: not in virtual time: CPU figures are this machine's, and noisy", file=sys.stderr)
    print("| back ends | CPU per packet (us) | beside one priority alone (us) | left after a pause (bytes) | marked |")
    print("| --- | ---: | ---: | ---: | --- |")
    alone: float | None = None
    for case, settings in CASES:
        try:
            row = measure(case, settings)
        except KernelError as error:
            print(f"| {case} | not here: {error} | | | |", flush=True)
            continue
        alone = row.cpu_ns if alone is None else alone
        leaked = "" if row.leaked_bytes is None else str(row.leaked_bytes)
        marks = " ".join(f"{share:.3f}" for share in row.marked)
        more = f"{(row.cpu_ns - alone) / 1e3:+.2f}"
        print(f"| {case} | {row.cpu_ns / 1e3:.2f} | {more} | {leaked} | {marks} |", flush=True)
    line = " ".join(f"{share:.3f}" for share in expected_marks())
    print(f"\nMarked below Kmin, in each quarter of the slope, above Kmax; a straight line has {line}.")


if __name__ == "__main__":
    main()
