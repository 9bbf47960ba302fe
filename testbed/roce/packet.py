"""RoCEv2 frames read and answered as values: what a reliable connection's end in user space needs, without scapy."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from testbed.roce.icrc import carried_icrc, compute_icrc, with_icrc
from testbed.roce.queue_pairs import QueuePair
from testbed.roce.wire import (
    ACK_REQUEST_BIT,
    AETH_BYTES,
    BTH_BYTES,
    BTH_OFFSET,
    CONTROL_TOS,
    DEFAULT_PKEY,
    DEFAULT_TTL,
    ETHERNET_BYTES,
    ETHERTYPE_IPV4,
    ICRC_BYTES,
    IMMEDIATE_BYTES,
    IP_PROTOCOL_UDP,
    IPV4_BYTES,
    OPCODES_WITH_AETH,
    OPCODES_WITH_IMMEDIATE,
    OPCODES_WITH_RETH,
    PADDING_BYTES,
    PSN_MASK,
    RETH_BYTES,
    ROCE_UDP_PORT,
    UDP_BYTES,
    Opcode,
    ipv4_checksum,
)

_IP = struct.Struct("!BBHHHBBHII")
_UDP = struct.Struct("!HHHH")
_BTH = struct.Struct("!BBHII")
_RETH = struct.Struct("!QII")
_MIN_BYTES = BTH_OFFSET + BTH_BYTES + ICRC_BYTES
_DONT_FRAGMENT = 0x4000
_MIGRATED = 0x40


class FrameError(ValueError):
    """A frame that the end of a connection must drop without an answer."""


@dataclass(frozen=True, slots=True)
class RocePacket:
    """What a frame says.

    Attributes:
        src_address: IPv4 address of the sender.
        dst_address: IPv4 address of the receiver.
        opcode: BTH opcode.
        pkey: Partition key.
        dest_qp: Destination QP.
        psn: Packet sequence number.
        ack_request: Whether it asks for an ACK.
        payload: Without padding.
        virtual_address: Of the RETH, 0 without.
        rkey: Likewise.
        dma_bytes: Likewise: length of the message.
        immediate: Immediate data; None without.
        syndrome: Of the AETH; None without.
        msn: Of the AETH, 0 without.
    """

    src_address: int
    dst_address: int
    opcode: int
    pkey: int
    dest_qp: int
    psn: int
    ack_request: bool
    payload: bytes
    virtual_address: int = 0
    rkey: int = 0
    dma_bytes: int = 0
    immediate: int | None = None
    syndrome: int | None = None
    msn: int = 0


def parse_packet(frame: bytes) -> RocePacket:
    """Return what a frame says, once its lengths, version and ICRC are right.

    Args:
        frame: From the destination MAC to the ICRC, or to the padding of Ethernet behind it; without FCS.

    Raises:
        FrameError: It is no RoCEv2 frame, is cut short, or its ICRC is wrong.

    Source:
        InfiniBand Architecture Specification, volume 1, 9.6 (packet header validation) and annex A17.
    """
    if len(frame) < _MIN_BYTES:
        raise FrameError(f"{len(frame)} bytes are no RoCEv2 frame")
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    version, _, ip_bytes, _, fragment, _, protocol, _, source, destination = _IP.unpack_from(frame, ETHERNET_BYTES)
    if ethertype != ETHERTYPE_IPV4 or version != 0x45 or protocol != IP_PROTOCOL_UDP or fragment & 0x3FFF:
        raise FrameError("not a whole UDP datagram in IPv4 without options")
    if not _MIN_BYTES <= ETHERNET_BYTES + ip_bytes <= len(frame):
        raise FrameError(f"cut short: {ip_bytes} bytes announced, {len(frame) - ETHERNET_BYTES} there")
    frame = frame[: ETHERNET_BYTES + ip_bytes]
    _, port, udp_bytes, _ = _UDP.unpack_from(frame, ETHERNET_BYTES + IPV4_BYTES)
    if port != ROCE_UDP_PORT or udp_bytes != ip_bytes - IPV4_BYTES:
        raise FrameError(f"UDP port {port}, {udp_bytes} bytes in {ip_bytes} of IPv4")
    opcode, flags, pkey, dest_qp, psn_word = _BTH.unpack_from(frame, BTH_OFFSET)
    if flags & 0xF:
        raise FrameError(f"transport header version {flags & 0xF}")
    if carried_icrc(frame) != compute_icrc(frame):
        raise FrameError(f"ICRC {carried_icrc(frame):#010x} where {compute_icrc(frame):#010x} is right")
    at = BTH_OFFSET + BTH_BYTES
    more: dict[str, int] = {}
    needed = RETH_BYTES * (opcode in OPCODES_WITH_RETH) + IMMEDIATE_BYTES * (opcode in OPCODES_WITH_IMMEDIATE)
    needed += AETH_BYTES * (opcode in OPCODES_WITH_AETH)
    padding = flags >> 4 & (PADDING_BYTES - 1)
    if len(frame) < at + needed + padding + ICRC_BYTES:
        raise FrameError(f"opcode {opcode:#04x} with headers cut short")
    if opcode in OPCODES_WITH_RETH:
        more["virtual_address"], more["rkey"], more["dma_bytes"] = _RETH.unpack_from(frame, at)
        at += RETH_BYTES
    if opcode in OPCODES_WITH_AETH:
        (aeth,) = struct.unpack_from("!I", frame, at)
        more["syndrome"], more["msn"] = aeth >> 24, aeth & PSN_MASK
        at += AETH_BYTES
    if opcode in OPCODES_WITH_IMMEDIATE:
        (more["immediate"],) = struct.unpack_from("!I", frame, at)
        at += IMMEDIATE_BYTES
    return RocePacket(
        src_address=source,
        dst_address=destination,
        opcode=opcode,
        pkey=pkey,
        dest_qp=dest_qp & PSN_MASK,
        psn=psn_word & PSN_MASK,
        ack_request=bool(psn_word >> 24 & ACK_REQUEST_BIT),
        payload=frame[at : len(frame) - ICRC_BYTES - padding],
        **more,
    )


def render_answer(qp: QueuePair, *, psn: int, msn: int, syndrome: int) -> bytes:
    """Return an ACK or NAK frame with its ICRC, without FCS.

    Args:
        qp: The queue pair that answers.
        psn: The PSN acknowledged, or that at which the requester shall go on.
        msn: Messages completed.
        syndrome: The AETH's.
    """
    udp_bytes = UDP_BYTES + BTH_BYTES + AETH_BYTES + ICRC_BYTES
    ip = bytearray(
        _IP.pack(
            0x45,
            CONTROL_TOS,
            IPV4_BYTES + udp_bytes,
            0,
            _DONT_FRAGMENT,
            DEFAULT_TTL,
            IP_PROTOCOL_UDP,
            0,
            qp.local.address,
            qp.remote.address,
        )
    )
    struct.pack_into("!H", ip, 10, ipv4_checksum(ip))
    ethernet = bytes.fromhex((qp.local.next_hop_mac + qp.local.mac).replace(":", "")) + struct.pack(
        "!H", ETHERTYPE_IPV4
    )
    udp = _UDP.pack(qp.udp_source_port, ROCE_UDP_PORT, udp_bytes, 0)
    bth = _BTH.pack(Opcode.ACKNOWLEDGE, _MIGRATED, DEFAULT_PKEY, qp.peer_qpn & PSN_MASK, psn & PSN_MASK)
    aeth = struct.pack("!I", syndrome << 24 | msn & PSN_MASK)
    return with_icrc(ethernet + ip + udp + bth + aeth + bytes(ICRC_BYTES))
