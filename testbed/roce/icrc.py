"""The invariant CRC of RoCEv2 frames: one frame from scratch, or thousands by patching a template.

The ICRC is CRC-32 as zlib computes it, over eight bytes of ones and the frame from the IP header on, with the
fields that switches may change replaced by ones; it is stored least significant byte first.

A CRC is linear over GF(2): XOR-ing ``v`` into a byte changes the CRC by a value that depends on ``v`` and on
how many bytes follow, not on the frame. A frame that differs from a template in a few header bytes therefore
has the template's ICRC XOR one table entry for each of them, whatever the payload.

Source: InfiniBand Architecture Specification, volume 1, annex A17.3.3 (ICRC of RoCEv2).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from testbed.roce.wire import (
    BTH_OFFSET,
    ETHERNET_BYTES,
    ETHERTYPE_IPV4,
    ICRC_BYTES,
    IP_PROTOCOL_UDP,
    IPV4_BYTES,
)

_LINK_HEADER = b"\xff" * 8
"""Stands for the link header (LRH) that InfiniBand has and Ethernet has not."""

_UDP_OFFSET = ETHERNET_BYTES + IPV4_BYTES
VARIANT_COLUMNS = frozenset(
    {
        ETHERNET_BYTES + 1,  # IP TOS
        ETHERNET_BYTES + 8,  # IP TTL
        ETHERNET_BYTES + 10,  # IP checksum
        ETHERNET_BYTES + 11,
        _UDP_OFFSET + 6,  # UDP checksum
        _UDP_OFFSET + 7,
        BTH_OFFSET + 4,  # FECN, BECN and reserved bits
    }
)
"""Offsets of frame bytes at or after the IP header that the ICRC does not protect."""


def compute_icrc(frame: bytes | bytearray | memoryview) -> int:
    """Return the ICRC that a frame must carry.

    Args:
        frame: An untagged IPv4 RoCEv2 frame without options, from the destination MAC to its ICRC, whose four
            bytes may hold anything; no FCS.

    Returns:
        The ICRC; the frame carries it as ``icrc.to_bytes(4, "little")``.

    Raises:
        ValueError: If the frame is not of that kind.
    """
    _check_frame(frame)
    covered = bytearray(_LINK_HEADER + frame[ETHERNET_BYTES:-ICRC_BYTES])
    for column in VARIANT_COLUMNS:
        covered[len(_LINK_HEADER) + column - ETHERNET_BYTES] = 0xFF
    return zlib.crc32(covered)


def carried_icrc(frame: bytes | bytearray | memoryview) -> int:
    """Return the ICRC that a frame carries in its last four bytes."""
    return int.from_bytes(frame[-ICRC_BYTES:], "little")


def with_icrc(frame: bytes | bytearray | memoryview) -> bytes:
    """Return the frame with its last four bytes replaced by the ICRC that it must carry."""
    return bytes(frame[:-ICRC_BYTES]) + compute_icrc(frame).to_bytes(ICRC_BYTES, "little")


@lru_cache(maxsize=1024)
def delta_table(distance_bytes: int) -> npt.NDArray[np.uint32]:
    """Return how the CRC changes when one byte of the covered data changes.

    Args:
        distance_bytes: How far before the end the byte is; 1 is the last byte that the CRC covers.

    Returns:
        Shape ``(256,)``, uint32, read-only: entry ``v`` is the change of the final CRC when ``v`` is XOR-ed
        into the byte.

    Raises:
        ValueError: If ``distance_bytes`` is below 1.
    """
    if distance_bytes < 1:
        raise ValueError(f"distance_bytes must be at least 1, got {distance_bytes}")
    zeros = bytes(distance_bytes - 1)
    unchanged = zlib.crc32(b"\0" + zeros)
    table = np.zeros(256, np.uint32)
    for bit in range(8):  # the change is linear in v too: eight bits span all values
        change = zlib.crc32(bytes([1 << bit]) + zeros) ^ unchanged
        table[1 << bit : 2 << bit] = table[: 1 << bit] ^ np.uint32(change)
    table.setflags(write=False)
    return table


class IcrcPatcher:
    """Computes the ICRCs of many frames that differ from a template in known header bytes.

    Frames must have the template's length, payload and other header bytes. Bytes that the ICRC does not cover
    (Ethernet header, TOS, TTL, checksums) may differ whether they are named or not.

    Args:
        template: A complete frame, from the destination MAC to its ICRC (whose value does not matter), no FCS.
        columns: Offsets within the frame of the bytes that vary.

    Raises:
        ValueError: If the template is no RoCEv2 frame, or a column is not before its ICRC.

    Example:
        >>> patcher = IcrcPatcher(template, range(PSN_OFFSET, PSN_OFFSET + 3))  # doctest: +SKIP
        >>> frames[:, -4:] = patcher.icrcs(frames).astype("<u4")[:, None].view(np.uint8)  # doctest: +SKIP
    """

    def __init__(self, template: bytes, columns: Iterable[int]) -> None:
        end = len(template) - ICRC_BYTES
        named = sorted(set(columns))
        if named and not 0 <= named[0] <= named[-1] < end:
            raise ValueError(f"columns must be in 0 to {end - 1}, got {named}")
        self.template_icrc = np.uint32(compute_icrc(template))
        covered = [column for column in named if column >= ETHERNET_BYTES and column not in VARIANT_COLUMNS]
        self.columns: npt.NDArray[np.intp] = np.array(covered, np.intp)
        """The varying bytes that the ICRC covers."""
        # Indexed by the byte itself instead of by its difference from the template's.
        values = np.arange(256)
        tables = [delta_table(end - column)[values ^ template[column]] for column in covered]
        self._tables: npt.NDArray[np.uint32] = np.array(tables, np.uint32).reshape(-1)
        self._table_offsets = 256 * np.arange(len(covered), dtype=np.intp)[:, None]

    def icrcs(self, header_rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
        """Return the ICRC of each frame.

        Args:
            header_rows: The beginnings of the frames, up to the last varying column at least, shape
                ``(frames, bytes)``, uint8.

        Returns:
            Shape ``(frames,)``, uint32; ``.astype("<u4")`` has the bytes in the order of the wire.
        """
        if not len(self.columns):
            return np.full(len(header_rows), self.template_icrc, np.uint32)
        entries = header_rows[:, self.columns].T + self._table_offsets
        changes = np.bitwise_xor.reduce(self._tables[entries], axis=0)
        return np.asarray(changes ^ self.template_icrc, np.uint32)


def _check_frame(frame: bytes | bytearray | memoryview) -> None:
    if len(frame) < BTH_OFFSET + 12 + ICRC_BYTES:
        raise ValueError(f"a RoCEv2 frame has at least {BTH_OFFSET + 12 + ICRC_BYTES} bytes, got {len(frame)}")
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    version_and_length, protocol = frame[ETHERNET_BYTES], frame[ETHERNET_BYTES + 9]
    if ethertype != ETHERTYPE_IPV4 or version_and_length != 0x45 or protocol != IP_PROTOCOL_UDP:
        raise ValueError("only untagged IPv4 UDP frames without options have an ICRC here")
