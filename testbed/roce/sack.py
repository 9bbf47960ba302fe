"""The SACK that a selective responder puts behind an ACK's AETH: this project's own, no standard.

RoCEv2 has no selective acknowledgement; NICs that take packets out of order use encodings of their own, which are not published.
Ours is an RC ACKNOWLEDGE (opcode 0x11) whose BTH and AETH are as ever: PSN of the last packet in order, syndrome 0x1F, MSN.
Twenty bytes stand between the AETH and the ICRC, which covers them, wherever packets came out of order::

    byte 0       0x01
    bytes 1-3    PSN of the first of 128 packets, big-endian
    bytes 4-11   packets 0 to 63 of these, a 64-bit big-endian integer: bit i (value 2^i) is packet i
    bytes 12-19  packets 64 to 127, likewise

A set bit says that the packet has arrived and lies beyond the acknowledged ones. The last of the 128 is always set. To other
dissectors it is an ACK with a payload that they do not know.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from testbed.roce.wire import PSN_MASK

SACK_TYPE = 0x01
SACK_BYTES = 20
SACK_PACKETS = 128
_LAYOUT = struct.Struct("!IQQ")


class Sack(NamedTuple):
    """What one SACK names.

    Attributes:
        first_psn: PSN of the first of its 128 packets.
        named_psns: PSNs of the packets it names, ascending from the first.
    """

    first_psn: int
    named_psns: tuple[int, ...]


def build_sack(first_psn: int, received: Iterable[int]) -> bytes:
    """Return the twenty bytes.

    Args:
        first_psn: PSN of the first of the 128 packets.
        received: Which of them arrived, from 0 to 127.
    """
    bits = sum(1 << place for place in set(received))
    return _LAYOUT.pack(SACK_TYPE << 24 | first_psn & PSN_MASK, bits & (1 << 64) - 1, bits >> 64)


def parse_sack(extension: bytes) -> Sack | None:
    """Return what twenty bytes behind an AETH name; None where they are no SACK."""
    if len(extension) != SACK_BYTES or extension[0] != SACK_TYPE:
        return None
    word, low, high = _LAYOUT.unpack(extension)
    first, bits = word & PSN_MASK, low | high << 64
    return Sack(first, tuple((first + place) & PSN_MASK for place in range(SACK_PACKETS) if bits >> place & 1))
