"""RoCEv2 frames built with scapy: the layers that scapy.contrib.roce lacks, and one function per kind of frame.

Slow (about a millisecond per frame) and exact: it makes the templates that the engine patches, and it is the
tests' oracle. Importing this module imports scapy.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)  # it warns of machines without a default route

from scapy.contrib.mac_control import MACControlClassBasedFlowControl  # noqa: E402
from scapy.contrib.roce import AETH, BTH, CNPPadding  # noqa: E402
from scapy.fields import IntField, XIntField, XLongField  # noqa: E402
from scapy.layers.inet import IP, UDP  # noqa: E402
from scapy.layers.l2 import Ether  # noqa: E402
from scapy.packet import Packet, bind_layers  # noqa: E402

from testbed.roce.queue_pairs import QueuePair  # noqa: E402
from testbed.roce.wire import (  # noqa: E402
    ACK_SYNDROME,
    CONTROL_TOS,
    DATA_TOS,
    DEFAULT_TTL,
    NAK_SEQUENCE_ERROR_SYNDROME,
    OPCODES_WITH_AETH,
    OPCODES_WITH_IMMEDIATE,
    OPCODES_WITH_RETH,
    PSN_MASK,
    ROCE_UDP_PORT,
    Opcode,
)

PFC_DESTINATION_MAC = "01:80:c2:00:00:01"
PFC_FRAME_BYTES = 60
"""Least length of an Ethernet frame without FCS."""
MAX_PAUSE_QUANTA = 0xFFFF

WRITE_OPCODES = frozenset(
    {
        Opcode.WRITE_FIRST,
        Opcode.WRITE_MIDDLE,
        Opcode.WRITE_LAST,
        Opcode.WRITE_LAST_WITH_IMMEDIATE,
        Opcode.WRITE_ONLY,
        Opcode.WRITE_ONLY_WITH_IMMEDIATE,
    }
)


class RETH(Packet):
    """RDMA extended transport header: where a WRITE or READ goes, and how many bytes it has."""

    name = "RETH"
    fields_desc = [XLongField("va", 0), XIntField("rkey", 0), IntField("dmalen", 0)]  # noqa: RUF012

    def guess_payload_class(self, payload: bytes) -> type[Packet]:
        """Return the layer that follows: a WRITE ONLY with immediate has both headers, this one first."""
        bth = self.underlayer
        if isinstance(bth, BTH) and bth.opcode == Opcode.WRITE_ONLY_WITH_IMMEDIATE:
            return ImmDt
        return super().guess_payload_class(payload)


class ImmDt(Packet):
    """Immediate data: 32 bits handed to the receiver with a completion."""

    name = "ImmDt"
    fields_desc = [XIntField("data", 0)]  # noqa: RUF012


for _opcode in OPCODES_WITH_RETH:
    bind_layers(BTH, RETH, opcode=int(_opcode))
for _opcode in OPCODES_WITH_IMMEDIATE - OPCODES_WITH_RETH:
    bind_layers(BTH, ImmDt, opcode=int(_opcode))
for _opcode in OPCODES_WITH_AETH - {Opcode.ACKNOWLEDGE}:  # scapy binds that one
    bind_layers(BTH, AETH, opcode=int(_opcode))


@dataclass(frozen=True, slots=True)
class FramePath:
    """The addresses of a frame.

    Attributes:
        src_mac: Source MAC, such as ``02:00:00:01:00:00``.
        dst_mac: Destination MAC.
        src_address: Source IPv4 address as an integer.
        dst_address: Destination IPv4 address as an integer.
        src_port: UDP source port; see `testbed.roce.wire.source_port`.
    """

    src_mac: str
    dst_mac: str
    src_address: int
    dst_address: int
    src_port: int

    @classmethod
    def of(cls, end: QueuePair) -> Self:
        """Return the addresses of what an end of a connection sends."""
        local, remote = end.local, end.remote
        return cls(local.mac, local.next_hop_mac, local.address, remote.address, end.udp_source_port)

    def reversed(self) -> FramePath:
        """Return the way back, with the same source port: what answers a frame."""
        return FramePath(self.dst_mac, self.src_mac, self.dst_address, self.src_address, self.src_port)


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """What a RETH says of a WRITE message.

    Attributes:
        virtual_address: Where the message goes in the receiver's memory.
        rkey: The receiver's key for it.
        dma_bytes: Length of the whole message, bytes.
    """

    virtual_address: int
    rkey: int
    dma_bytes: int


def build_write(
    path: FramePath,
    *,
    opcode: Opcode,
    dest_qp: int,
    psn: int,
    payload: bytes,
    ack_request: bool = False,
    target: WriteTarget | None = None,
    immediate: int | None = None,
    tos: int = DATA_TOS,
    ttl: int = DEFAULT_TTL,
) -> bytes:
    """Return a WRITE frame with its ICRC, without FCS.

    Args:
        path: Addresses.
        opcode: One of the WRITE opcodes.
        dest_qp: QP number of the receiver.
        psn: Packet sequence number.
        payload: Payload of this packet; padded here to a multiple of 4 bytes.
        ack_request: Whether the receiver shall acknowledge at once.
        target: The RETH's values; needed for FIRST and ONLY, and only there.
        immediate: Immediate data; needed for the opcodes that carry it, and only there.
        tos: TOS byte.
        ttl: Time to live.

    Raises:
        ValueError: If the opcode is not WRITE, or ``target`` or ``immediate`` do not fit it.
    """
    if opcode not in WRITE_OPCODES:
        raise ValueError(f"{opcode.name} is no WRITE opcode")
    if (target is not None) != (opcode in OPCODES_WITH_RETH):
        raise ValueError(f"{opcode.name} {'needs a' if target is None else 'has no'} RETH")
    if (immediate is not None) != (opcode in OPCODES_WITH_IMMEDIATE):
        raise ValueError(f"{opcode.name} {'needs' if immediate is None else 'has no'} immediate data")
    padding = -len(payload) % 4
    bth = BTH(
        opcode=int(opcode),
        migreq=1,
        padcount=padding,
        dqpn=dest_qp & PSN_MASK,
        ackreq=int(ack_request),
        psn=psn & PSN_MASK,
    )
    if target is not None:
        bth /= RETH(va=target.virtual_address, rkey=target.rkey, dmalen=target.dma_bytes)
    if immediate is not None:
        bth /= ImmDt(data=immediate)
    if payload:
        bth /= payload + bytes(padding)
    return _build(path, bth, tos, ttl)


def build_ack(
    path: FramePath,
    *,
    dest_qp: int,
    psn: int,
    msn: int,
    syndrome: int = ACK_SYNDROME,
    tos: int = CONTROL_TOS,
    ttl: int = DEFAULT_TTL,
) -> bytes:
    """Return an ACK frame with its ICRC, without FCS.

    Args:
        path: Addresses, from the responder to the requester.
        dest_qp: QP number of the requester.
        psn: The last PSN that is acknowledged.
        msn: Number of messages completed, modulo 2^24.
        syndrome: The AETH's syndrome.
        tos: TOS byte.
        ttl: Time to live.
    """
    bth = BTH(opcode=int(Opcode.ACKNOWLEDGE), migreq=1, dqpn=dest_qp & PSN_MASK, psn=psn & PSN_MASK)
    return _build(path, bth / AETH(syndrome=syndrome, msn=msn & PSN_MASK), tos, ttl)


def build_nak(path: FramePath, *, dest_qp: int, expected_psn: int, msn: int) -> bytes:
    """Return a NAK for a sequence error: the responder expects ``expected_psn`` and got a later packet."""
    return build_ack(path, dest_qp=dest_qp, psn=expected_psn, msn=msn, syndrome=NAK_SEQUENCE_ERROR_SYNDROME)


def build_cnp(path: FramePath, *, dest_qp: int, tos: int = CONTROL_TOS, ttl: int = DEFAULT_TTL) -> bytes:
    """Return a congestion notification to the QP whose packet was marked, with its ICRC, without FCS."""
    bth = BTH(opcode=int(Opcode.CNP), becn=1, dqpn=dest_qp & PSN_MASK)
    return _build(path, bth / CNPPadding(), tos, ttl)


def build_pfc(src_mac: str, quanta: Mapping[int, int]) -> bytes:
    """Return an 802.1Qbb frame that pauses or resumes priorities; 60 bytes, without FCS.

    Args:
        src_mac: MAC of the port that sends it.
        quanta: Pause time by priority (0 to 7) in quanta of 512 bit-times; 0 resumes. Priorities that are not
            named stay as they are.

    Raises:
        ValueError: If a priority or a pause time is out of range.
    """
    fields: dict[str, Any] = {}
    for priority, pause in sorted(quanta.items()):
        if not 0 <= priority <= 7:
            raise ValueError(f"a priority is 0 to 7, got {priority}")
        if not 0 <= pause <= MAX_PAUSE_QUANTA:
            raise ValueError(f"a pause time is 0 to {MAX_PAUSE_QUANTA} quanta, got {pause}")
        fields[f"c{priority}_enabled"] = 1
        fields[f"c{priority}_pause_time"] = pause
    frame = Ether(src=src_mac, dst=PFC_DESTINATION_MAC, type=0x8808) / MACControlClassBasedFlowControl(**fields)
    return bytes(frame).ljust(PFC_FRAME_BYTES, b"\0")


def _build(path: FramePath, bth: Packet, tos: int, ttl: int) -> bytes:
    return bytes(
        Ether(src=path.src_mac, dst=path.dst_mac)
        / IP(
            src=_dotted(path.src_address),
            dst=_dotted(path.dst_address),
            tos=tos,
            ttl=ttl,
            id=0,
            flags="DF",
        )
        / UDP(sport=path.src_port, dport=ROCE_UDP_PORT, chksum=0)
        / bth
    )


def _dotted(address: int) -> str:
    return str(ipaddress.IPv4Address(address))
