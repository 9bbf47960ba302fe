"""Sends a user's frames from a host of a lab, and tells what came back and which counters moved."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scapy.contrib.roce import AETH, BTH
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from testbed.errors import KernelError, LabError, TestbedError
from testbed.fabric.fabric import open_arrays
from testbed.fabric.frame_file import Nic, read_frames
from testbed.fabric.recorded import read_recorded
from testbed.kernel.layout import PRIORITIES, MappedArrays
from testbed.kernel.namespaces import entered, open_namespace
from testbed.kernel.packet_ring import RETIRE_MS, PacketRing, RingShape, open_ring_socket, read_mtu
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.registry import namespace_of
from testbed.roce.bth import RETH
from testbed.roce.queue_pairs import QPN_BASE
from testbed.roce.wire import ECN_CE, NAK_SEQUENCE_ERROR_SYNDROME, Opcode
from testbed.topology import NodeKind, Port, Topology, format_address

DEFAULT_FRAMES_PER_S = 1000.0
DEFAULT_TIMEOUT_S = 2.0
MAX_KEPT_FRAMES = 10_000
"""Frames that are kept of what came back; more are counted."""

# So many bytes may wait behind the NIC's shaper; a frame more waits to be sent.
_SEND_BUFFER_BYTES = 1 << 18
_SEND_TIMEOUT_S = 30.0
# An answer's last block is handed over so much later.
_BLOCK_S = 2 * RETIRE_MS / 1000
_AETH_NAMES = {0x1F: "ACK", NAK_SEQUENCE_ERROR_SYNDROME: "NAK PSN sequence error"}
_QUEUE_COUNTERS = {"sent_packets": "deq_packets", "sent_bytes": "deq_bytes", "drops_packets": "drop_packets"}
_QP_COUNTERS = (
    "rx_packets",
    "rx_payload_bytes",
    "rx_messages",
    "out_of_order_packets",
    "duplicate_packets",
    "sent_acks_packets",
    "sent_naks_packets",
    "acked_packets",
    "naks_packets",
)


@dataclass(frozen=True, slots=True)
class RefusedFrame:
    """A frame that the kernel would not send.

    Attributes:
        number: Which of the file's, from 1.
        length_bytes: Its length.
        reason: Why.
    """

    number: int
    length_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReceivedFrame:
    """A frame that reached the host.

    Attributes:
        time_ns: Since the first frame was sent, emulated.
        wall_time_ns: The same on this machine's clock.
        length_bytes: Without FCS.
        text: What it is, on one line.
        hex: All of it.
    """

    time_ns: int
    wall_time_ns: int
    length_bytes: int
    text: str
    hex: str


@dataclass(frozen=True, slots=True)
class MovedCounter:
    """A counter that moved meanwhile, be it by these frames or by others.

    Attributes:
        where: Such as ``leaf0/up1 priority 3`` or ``qp 0x101 at host1/eth0``.
        counter: Its name, unit included.
        moved: By how much.
    """

    where: str
    counter: str
    moved: int


@dataclass(frozen=True, slots=True)
class Injection:
    """What became of a user's frames.

    Attributes:
        lab: The lab.
        port: The NIC they left by.
        sent_packets: Frames sent.
        sent_bytes: Their bytes, without FCS.
        refused: Frames that could not be sent.
        received_packets: Frames that reached the host until the time was over.
        lost_packets: Frames that reached it and found no room in our memory.
        received: The first of them.
        counters: Counters of the fabric that moved.
    """

    lab: str
    port: str
    sent_packets: int
    sent_bytes: int
    refused: tuple[RefusedFrame, ...]
    received_packets: int
    lost_packets: int
    received: tuple[ReceivedFrame, ...]
    counters: tuple[MovedCounter, ...]


def inject_frames(
    lab: str,
    host: str,
    file: Path,
    *,
    frames_per_s: float | None = None,
    rate_bits_per_s: int | None = None,
    count: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Injection:
    """Send the frames of a file from a host of a lab, paced, and return what came back.

    Nothing is locked: a run may go on in the lab meanwhile.

    Args:
        lab: The lab.
        host: Such as ``host0``, or ``host0/eth1`` for a NIC other than the first.
        file: Python code that defines ``frames()``.
        frames_per_s: Pace on this machine's clock; by default `DEFAULT_FRAMES_PER_S`.
        rate_bits_per_s: Pace as an emulated rate of frame bytes instead.
        count: Frames to send at most; all by default.
        timeout_s: How long to listen after the last, on this machine's clock.

    Raises:
        LabError: There is no such lab or host.
        TestbedError: The file is wrong.
        KernelError: The kernel refused something else than a single frame.
    """
    state, topology = read_recorded(lab)
    port = _nic_of(topology, lab, host)
    name = topology.port_name(port.id)
    dilation = float(state.details["time_dilation"])
    arrays = open_arrays(state)
    with _opened_nic(namespace_of(state, topology.nodes[port.node].name), port.ifname) as (sender, ring, mtu):
        frames = read_frames(file, _describe_nic(topology, port, mtu))
        before = _Counters.read(arrays)
        sending = _Sending(sender, ring)
        sending.send(
            islice(frames, count),
            gap_ns=_gap_per_frame_or_byte(frames_per_s, rate_bits_per_s, dilation),
            mtu=mtu,
        )
        sending.listen(timeout_s)
        lost = ring.read_statistics()[1]
        after = _Counters.read(arrays)
    return Injection(
        lab=lab,
        port=name,
        sent_packets=sending.sent_packets,
        sent_bytes=sending.sent_bytes,
        refused=tuple(sending.refused),
        received_packets=sending.received_packets,
        lost_packets=lost,
        received=tuple(
            ReceivedFrame(round(wall_ns / dilation), wall_ns, len(data), describe_frame(data), data.hex())
            for wall_ns, data in sending.kept()
        ),
        counters=tuple(_moved(topology, before, after)),
    )


def describe_frame(data: bytes) -> str:
    """Return what a frame is on one line; whatever it holds, this does not fail.

    Example:
        ``10.0.0.3 > 10.0.0.1 ACKNOWLEDGE qp 0x100 psn 7, AETH ACK msn 1``
    """
    try:
        return _describe(Ether(data))
    except Exception as error:  # scapy's dissectors raise what they please on broken frames
        return f"undecodable ({type(error).__name__}): {data[:32].hex()}"


def _describe(packet: Packet) -> str:
    summary = str(packet.summary())
    bth = packet.getlayer(BTH)
    ip = packet.getlayer("IP")
    if bth is None or ip is None or "ICMP" in packet:
        return summary.removeprefix("Ether / ")
    try:
        opcode = Opcode(bth.opcode).name
    except ValueError:
        opcode = f"opcode {bth.opcode:#04x}"
    text = f"{ip.src} > {ip.dst} {opcode} qp {bth.dqpn:#x} psn {bth.psn}"
    if bth.ackreq:
        text += ", asks for an ACK"
    if ip.tos & 3 == ECN_CE:
        text += ", CE"
    reth, aeth = packet.getlayer(RETH), packet.getlayer(AETH)
    if reth is not None:
        text += f", RETH address {reth.va:#x} rkey {reth.rkey:#x} length {reth.dmalen}"
    if aeth is not None:
        text += f", AETH {_AETH_NAMES.get(aeth.syndrome, f'syndrome {aeth.syndrome:#04x}')} msn {aeth.msn}"
    payload = packet.getlayer("Raw")
    return text if payload is None else f"{text}, {len(payload.load)} bytes"


class _Sending:
    """Sends and listens at one NIC."""

    def __init__(self, sender: socket.socket, ring: PacketRing) -> None:
        self._sender = sender
        self._ring = ring
        self._poller = select.poll()
        self._poller.register(ring, select.POLLIN)
        self._begin_ns = time.time_ns()
        self._received: list[tuple[int, bytes]] = []
        self.sent_packets = 0
        self.sent_bytes = 0
        self.received_packets = 0
        self.refused: list[RefusedFrame] = []

    def send(self, frames: Iterator[bytes], *, gap_ns: tuple[float, float], mtu: int) -> None:
        """Send frames, each ``gap_ns[0]`` and ``gap_ns[1]`` per byte after the one before."""
        due_ns = float(time.monotonic_ns())
        for number, frame in enumerate(frames, 1):
            while (left_ns := due_ns - time.monotonic_ns()) > 0:
                self._collect(left_ns / 1e9)
            if number == 1:
                self._begin_ns = time.time_ns()
            due_ns = max(due_ns, float(time.monotonic_ns()) - 1e7)  # a slow generator is not made good by a burst
            due_ns += gap_ns[0] + gap_ns[1] * len(frame)
            try:
                self._sender.send(frame)
            except OSError as error:
                reason = _explain(error, frame, mtu)
                if reason is None:
                    raise KernelError(f"send frame {number}", error.errno or 0) from error
                self.refused.append(RefusedFrame(number, len(frame), reason))
                continue
            self.sent_packets += 1
            self.sent_bytes += len(frame)
            self._collect(0)

    def listen(self, timeout_s: float) -> None:
        """Collect what reaches the NIC until the time is over."""
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            self._collect(left)
        end_ns = time.time_ns()
        last = time.monotonic() + _BLOCK_S
        while (left := last - time.monotonic()) > 0:  # blocks not handed over yet
            self._collect(left, end_ns)

    def kept(self) -> list[tuple[int, bytes]]:
        """Return time since the first frame was sent, ns, and bytes of the frames received."""
        return [(max(0, when - self._begin_ns), data) for when, data in self._received]

    def _collect(self, timeout_s: float, end_ns: int | None = None) -> None:
        self._poller.poll(max(0, timeout_s * 1000))
        for frame in self._ring.read_frames():
            if frame.outbound or (end_ns is not None and frame.wall_time_ns > end_ns):
                continue
            self.received_packets += 1
            if len(self._received) < MAX_KEPT_FRAMES:
                self._received.append((frame.wall_time_ns, frame.data))


def _explain(error: OSError, frame: bytes, mtu: int) -> str | None:
    """Return why the kernel would not send a frame; None when it is not about this frame."""
    if isinstance(error, TimeoutError):
        return f"the NIC's queue stayed full for {_SEND_TIMEOUT_S:g} s"
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    if error.errno == errno.EMSGSIZE:
        return f"{name}: longer than the MTU of {mtu} and its Ethernet header"
    if error.errno == errno.EINVAL and len(frame) < 14:
        return f"{name}: shorter than an Ethernet header"
    return f"{name}: {error.strerror}" if error.errno in (errno.EINVAL, errno.ENOBUFS, errno.ENXIO) else None


def _gap_per_frame_or_byte(
    frames_per_s: float | None, rate_bits_per_s: int | None, dilation: float
) -> tuple[float, float]:
    """Return wall ns per frame and per byte."""
    if frames_per_s is not None and rate_bits_per_s is not None:
        raise TestbedError("a pace is given twice", hint="give either --pps or --rate")
    if rate_bits_per_s is not None:
        return 0.0, 8e9 * dilation / rate_bits_per_s
    return 1e9 / (frames_per_s or DEFAULT_FRAMES_PER_S), 0.0


def _nic_of(topology: Topology, lab: str, host: str) -> Port:
    name, slash, ifname = host.partition("/")
    hosts = {node.name: node for node in topology.nodes if node.kind is NodeKind.HOST}
    if name not in hosts:
        raise LabError(
            f"lab {lab!r} has no host {name!r} (hosts: {', '.join(hosts)})",
            hint="frames are injected at hosts; a switch's queues count what its ports received",
        )
    ports = [topology.port(port) for port in hosts[name].ports]
    for port in ports:
        if not slash or port.ifname == ifname:
            return port
    raise LabError(f"{name} has no NIC {ifname!r} (NICs: {', '.join(port.ifname for port in ports)})")


def _describe_nic(topology: Topology, port: Port, mtu: int) -> Nic:
    addresses: dict[str, str] = {}
    for node in topology.nodes:
        if node.kind is NodeKind.HOST:
            for nic in map(topology.port, node.ports):
                addresses.setdefault(node.name, format_address(nic.address))
                addresses[topology.port_name(nic.id)] = format_address(nic.address)
    return Nic(
        host=topology.nodes[port.node].name,
        ifname=port.ifname,
        mac=port.mac,
        address=format_address(port.address),
        next_hop_mac=topology.port(port.peer).mac,
        mtu=mtu,
        addresses=addresses,
    )


@contextlib.contextmanager
def _opened_nic(namespace: str, ifname: str) -> Iterator[tuple[socket.socket, PacketRing, int]]:
    """Open a sending socket and a ring at a NIC; yield them with its MTU."""
    shape = RingShape.for_ports(1)
    with contextlib.ExitStack() as stack:
        descriptor = open_namespace(namespace)
        try:
            with entered(descriptor):
                sender = stack.enter_context(open_packet_socket(ifname))
                listener = stack.enter_context(open_ring_socket(ifname, shape))
                mtu = read_mtu(ifname)
        finally:
            os.close(descriptor)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        sender.settimeout(_SEND_TIMEOUT_S)
        ring = stack.enter_context(contextlib.closing(PacketRing(listener, shape)))
        yield sender, ring, mtu


@dataclass(frozen=True)
class _Counters:
    """Copies of the fabric's counters at one time."""

    queues: npt.NDArray[Any]
    nodes: npt.NDArray[Any]
    qps: npt.NDArray[Any] = field(repr=False)

    @classmethod
    def read(cls, arrays: MappedArrays) -> _Counters:
        return cls(arrays.queues.copy(), arrays.nodes.copy(), arrays.qps.copy())


def _moved(topology: Topology, before: _Counters, after: _Counters) -> Iterator[MovedCounter]:
    """Yield the counters that moved: queues by port, nodes, QPs."""
    for port in topology.ports:
        for priority in range(PRIORITIES):
            where = f"{topology.port_name(port.id)} priority {priority}"
            for name, column in _QUEUE_COUNTERS.items():
                yield from _difference(where, name, before.queues, after.queues, (port.id, priority), column)
    for node in topology.nodes:
        yield from _difference(
            node.name, "no_route_packets", before.nodes, after.nodes, (node.index,), "no_route_packets"
        )
    changed = np.zeros(len(after.qps), bool)
    for column in _QP_COUNTERS:
        changed |= before.qps[column] != after.qps[column]
    for row in np.flatnonzero(changed).tolist():
        port_id = int(after.qps["port"][row])
        place = topology.port_name(port_id) if 1 <= port_id <= len(topology.ports) else "no port"
        for column in _QP_COUNTERS:
            where = f"qp {QPN_BASE + row:#x} at {place}"
            yield from _difference(where, column, before.qps, after.qps, (row,), column)


def _difference(
    where: str,
    name: str,
    before: npt.NDArray[Any],
    after: npt.NDArray[Any],
    index: tuple[int, ...],
    column: str,
) -> Iterator[MovedCounter]:
    moved = int(after[column][index]) - int(before[column][index])
    if moved:
        yield MovedCounter(where, name, moved)
