"""RoCEv2 on the wire: opcodes, lengths, ports and code points.

Source: InfiniBand Architecture Specification, volume 1, release 1.4: chapter 9 (BTH, RETH, AETH), annex A17
(RoCEv2).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import overload

import numpy as np
import numpy.typing as npt


class Opcode(IntEnum):
    """BTH opcodes of the reliable connected transport, and the CNP."""

    SEND_FIRST = 0x00
    SEND_MIDDLE = 0x01
    SEND_LAST = 0x02
    SEND_LAST_WITH_IMMEDIATE = 0x03
    SEND_ONLY = 0x04
    SEND_ONLY_WITH_IMMEDIATE = 0x05
    WRITE_FIRST = 0x06
    WRITE_MIDDLE = 0x07
    WRITE_LAST = 0x08
    WRITE_LAST_WITH_IMMEDIATE = 0x09
    WRITE_ONLY = 0x0A
    WRITE_ONLY_WITH_IMMEDIATE = 0x0B
    READ_REQUEST = 0x0C
    READ_RESPONSE_FIRST = 0x0D
    READ_RESPONSE_MIDDLE = 0x0E
    READ_RESPONSE_LAST = 0x0F
    READ_RESPONSE_ONLY = 0x10
    ACKNOWLEDGE = 0x11
    CNP = 0x81
    """Congestion notification. Linux's ``IB_OPCODE_CNP`` 0x80 is only the class."""


OPCODES_WITH_RETH = frozenset(
    {Opcode.WRITE_FIRST, Opcode.WRITE_ONLY, Opcode.WRITE_ONLY_WITH_IMMEDIATE, Opcode.READ_REQUEST}
)
OPCODES_WITH_IMMEDIATE = frozenset(
    {
        Opcode.SEND_LAST_WITH_IMMEDIATE,
        Opcode.SEND_ONLY_WITH_IMMEDIATE,
        Opcode.WRITE_LAST_WITH_IMMEDIATE,
        Opcode.WRITE_ONLY_WITH_IMMEDIATE,
    }
)
OPCODES_WITH_AETH = frozenset(
    {
        Opcode.READ_RESPONSE_FIRST,
        Opcode.READ_RESPONSE_LAST,
        Opcode.READ_RESPONSE_ONLY,
        Opcode.ACKNOWLEDGE,
    }
)

ETHERTYPE_IPV4 = 0x0800
IP_PROTOCOL_TCP = 6
IP_PROTOCOL_UDP = 17
ROCE_UDP_PORT = 4791
"""UDP destination port of RoCEv2; the source port carries entropy."""
DEFAULT_PKEY = 0xFFFF
DEFAULT_TTL = 64

ETHERNET_BYTES = 14
IPV4_BYTES = 20
UDP_BYTES = 8
BTH_BYTES = 12
RETH_BYTES = 16
AETH_BYTES = 4
IMMEDIATE_BYTES = 4
CNP_PADDING_BYTES = 16
ICRC_BYTES = 4
PADDING_BYTES = 4
"""Payloads are padded to a multiple of this."""
FCS_BYTES = 4
PREAMBLE_AND_GAP_BYTES = 20
"""8 bytes of preamble and start delimiter, 12 of gap between frames."""

LINK_OVERHEAD_BYTES = FCS_BYTES + PREAMBLE_AND_GAP_BYTES
"""Wire bytes beyond the frame that a socket sees; a shaper must charge them too."""
FRAME_OVERHEAD_BYTES = ETHERNET_BYTES + IPV4_BYTES + UDP_BYTES + BTH_BYTES + ICRC_BYTES
"""Frame bytes of a MIDDLE or LAST packet beside its padded payload."""
BTH_OFFSET = ETHERNET_BYTES + IPV4_BYTES + UDP_BYTES
"""Where the BTH begins in an untagged IPv4 frame without options."""
RETH_OFFSET = BTH_OFFSET + BTH_BYTES

DEST_QP_OFFSET = BTH_OFFSET + 5
"""First of the three bytes of the destination QP."""
ACK_REQUEST_OFFSET = BTH_OFFSET + 8
ACK_REQUEST_BIT = 0x80
PSN_OFFSET = BTH_OFFSET + 9
"""First of the three bytes of the PSN."""

PSN_MASK = 0xFFFFFF
"""PSNs, MSNs and QP numbers have 24 bits."""

CTS_RKEY = 0xC7500001
"""Key of a sender's FIFO of grants: tells a CTS frame, an RDMA WRITE ONLY of one entry, from data. As TB_CTS_RKEY in fabric.h."""
CTS_ENTRY_BYTES = 64
CTS_FRAME_BYTES = FRAME_OVERHEAD_BYTES + RETH_BYTES + CTS_ENTRY_BYTES

ACK_SYNDROME = 0x1F
"""An ACK whose low five bits grant unlimited credit."""
NAK_SEQUENCE_ERROR_SYNDROME = 0x60

ECN_ECT0 = 0b10
ECN_CE = 0b11
DATA_DSCP = 26
DATA_PRIORITY = DATA_DSCP >> 3
"""The customary priority of RoCE data."""
CONTROL_DSCP = 48
DATA_TOS = DATA_DSCP << 2 | ECN_ECT0
"""TOS byte of data, 0x6a: priority 3, ECN-capable."""
CONTROL_TOS = CONTROL_DSCP << 2
"""TOS byte of ACK, NAK and CNP, 0xc0: priority 6, never marked."""

CONTROL_PRIORITIES = 0b1100_0000
"""A bit for each priority that has the control queue: a queue of its own, which nothing shapes or pauses."""

MIN_SOURCE_PORT = 0xC000


def data_tos(priority: int) -> int:
    """Return the TOS byte of data of a priority: assured forwarding's low drop precedence, ECN-capable.

    Priority 3 gives the customary DSCP 26.
    """
    return (8 * priority + 2) << 2 | ECN_ECT0


def grant_tos(priority: int) -> int:
    """Return the TOS byte of a CTS frame of a priority: as data's, but not ECN-capable, for nothing slows its sender down."""
    return (8 * priority + 2) << 2


@overload
def padded_bytes(payload_bytes: int) -> int: ...
@overload
def padded_bytes(payload_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...
def padded_bytes(payload_bytes: int | npt.NDArray[np.int64]) -> int | npt.NDArray[np.int64]:
    """Return the bytes of a payload with its padding, for one or for an array."""
    return -(-payload_bytes // PADDING_BYTES) * PADDING_BYTES


def ipv4_checksum(header: bytes | bytearray) -> int:
    """Return the checksum of a 20-byte IPv4 header, whatever its checksum field holds."""
    words = struct.unpack("!10H", header)
    total: int = sum(words) - words[5]
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def header_bytes(opcode: Opcode) -> int:
    """Return the bytes of a frame before its payload: Ethernet, IPv4, UDP, BTH and what the opcode adds."""
    extension = RETH_BYTES * (opcode in OPCODES_WITH_RETH)
    extension += IMMEDIATE_BYTES * (opcode in OPCODES_WITH_IMMEDIATE)
    extension += AETH_BYTES * (opcode in OPCODES_WITH_AETH)
    return BTH_OFFSET + BTH_BYTES + extension


def frame_bytes(opcode: Opcode, payload_bytes: int = 0) -> int:
    """Return the length of a frame without FCS.

    Args:
        opcode: Says which extension headers there are.
        payload_bytes: Payload before padding, bytes; 0 for ACK, and for CNP, whose padding is added here.
    """
    padding = CNP_PADDING_BYTES if opcode == Opcode.CNP else 0
    return header_bytes(opcode) + padded_bytes(payload_bytes) + padding + ICRC_BYTES


def source_port(local_qpn: npt.ArrayLike, remote_qpn: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Return the UDP source port that Linux gives a connection.

    Args:
        local_qpn: QP number of the sender, below 2^24; a number or an array.
        remote_qpn: QP number of the receiver, likewise.

    Returns:
        Ports from 49152 up, shape of the arguments, uint16.

    Source:
        Linux, include/rdma/ib_verbs.h, rdma_calc_flow_label() and rdma_flow_label_to_udp_sport().
    """
    product = np.asarray(local_qpn, np.uint64) * np.asarray(remote_qpn, np.uint64)
    product ^= product >> np.uint64(20)
    product ^= product >> np.uint64(40)
    label = product & np.uint64(0xFFFFF)
    low = (label & np.uint64(0x3FFF)) ^ (label >> np.uint64(14))
    return np.asarray(low | np.uint64(MIN_SOURCE_PORT)).astype(np.uint16)
