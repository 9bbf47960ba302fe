"""AF_PACKET sockets that see every frame of a port, through memory shared with the kernel: no system call a frame.

A frame that arrives is seen before the port's eBPF program may consume it; one that leaves, as it leaves the queue.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from testbed.errors import KernelError

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION, _TPACKET_V3 = 263, 5, 6, 10, 2
_SO_ATTACH_FILTER = 26
_SIOCGIFMTU = 0x8921
_BPF_RETURN = 0x06
_PACKET_OUTGOING = 4
_TP_STATUS_KERNEL, _TP_STATUS_USER, _TP_STATUS_VLAN_VALID = 0, 1, 0x10

# A block is handed over when it is full, or after this long: how late a quiet port's frames are seen.
RETIRE_MS = 20
_BLOCK_BYTES = 1 << 17
# Only a unit of account in version 3, where a frame takes what it needs.
_FRAME_BYTES = 2048
_BLOCK_HEAD = struct.Struct("=III")  # at 8: block_status, num_pkts, offset_to_first_pkt
_FRAME_HEAD = struct.Struct("=IIIIIIHHIIHH")  # struct tpacket3_hdr
_PKTTYPE_OFFSET = 48 + 10  # sll_pkttype of the struct sockaddr_ll behind the header


class SeenFrame(NamedTuple):
    """A frame that passed a port.

    Attributes:
        wall_time_ns: When, CLOCK_REALTIME.
        outbound: Whether the port sent it.
        original_bytes: Its length without FCS.
        data: What was kept of it, from the Ethernet header on.
    """

    wall_time_ns: int
    outbound: bool
    original_bytes: int
    data: bytes


@dataclass(frozen=True, slots=True)
class RingShape:
    """The size of a ring; both ends of a socket handed to another process must use the same."""

    blocks: int

    @classmethod
    def for_ports(cls, ports: int, *, total_bytes: int = 64 << 20) -> RingShape:
        """Return a shape such that the rings of all ports together take about ``total_bytes``, none less than 4 blocks."""
        return cls(min(64, max(4, total_bytes // _BLOCK_BYTES // max(1, ports))))

    @property
    def nbytes(self) -> int:
        """Return the length of the shared memory."""
        return self.blocks * _BLOCK_BYTES


def open_ring_socket(ifname: str, shape: RingShape, *, snap_bytes: int = 0) -> socket.socket:
    """Return a socket that fills its ring with the frames of an interface of the calling thread's namespace.

    Args:
        ifname: The interface.
        shape: Size of the ring.
        snap_bytes: Bytes kept of each frame; 0 for all.

    Raises:
        KernelError: No permission, no such interface, or no memory.
    """
    opened = None
    try:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        opened.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V3)
        if snap_bytes:
            _attach_snap_filter(opened, snap_bytes)
        frames = shape.nbytes // _FRAME_BYTES
        request = struct.pack("=7I", _BLOCK_BYTES, shape.blocks, _FRAME_BYTES, frames, RETIRE_MS, 0, 0)
        opened.setsockopt(_SOL_PACKET, _PACKET_RX_RING, request)
        opened.bind((ifname, _ETH_P_ALL))
    except OSError as error:
        if opened is not None:
            opened.close()
        raise KernelError(f"open a receiving packet socket on {ifname}", error.errno or 0) from error
    return opened


def read_mtu(ifname: str) -> int:
    """Return the MTU of an interface of the calling thread's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        answer = fcntl.ioctl(control, _SIOCGIFMTU, struct.pack("16si20x", ifname.encode(), 0))
    return int(struct.unpack_from("i", answer, 16)[0])


def _attach_snap_filter(opened: socket.socket, snap_bytes: int) -> None:
    """Keep so many bytes of each frame: a filter of one instruction, ``ret #snap_bytes``."""
    instruction = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RETURN, 0, 0, snap_bytes), 8)
    program = struct.pack("@HP", 1, ctypes.addressof(instruction))
    opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


class PacketRing:
    """Reads what a ring socket collects.

    Args:
        opened: The socket; the ring owns it.
        shape: As it was opened with.
    """

    def __init__(self, opened: socket.socket, shape: RingShape) -> None:
        self._socket = opened
        self._memory = mmap.mmap(opened.fileno(), shape.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._blocks = shape.blocks
        self._next = 0
        self._received_packets = 0
        self._lost_packets = 0

    def fileno(self) -> int:
        """Return the descriptor; it polls readable when a block is ready."""
        return self._socket.fileno()

    def close(self) -> None:
        """Let go of memory and socket."""
        self._memory.close()
        self._socket.close()

    def read_frames(self) -> Iterator[SeenFrame]:
        """Yield the frames of every block that is ready, oldest first; to be read to its end."""
        memory = self._memory
        for _ in range(self._blocks):
            base = self._next * _BLOCK_BYTES
            status, count, offset = _BLOCK_HEAD.unpack_from(memory, base + 8)
            if not status & _TP_STATUS_USER:
                return
            position = base + offset
            for _ in range(count):
                ahead, seconds, nanoseconds, kept, original, flags, mac, _net, _, tci, tpid, _ = (
                    _FRAME_HEAD.unpack_from(memory, position)
                )
                start = position + mac
                data = memory[start : start + kept]
                if flags & _TP_STATUS_VLAN_VALID:  # the kernel took the tag out
                    data = data[:12] + struct.pack("!HH", tpid, tci) + data[12:]
                    original += 4
                outbound = memory[position + _PKTTYPE_OFFSET] == _PACKET_OUTGOING
                yield SeenFrame(seconds * 1_000_000_000 + nanoseconds, outbound, original, data)
                position += ahead
            struct.pack_into("=I", memory, base + 8, _TP_STATUS_KERNEL)
            self._next = (self._next + 1) % self._blocks

    def read_statistics(self) -> tuple[int, int]:
        """Return how many frames the port had since the ring was opened, and how many of them the full ring lost."""
        packets, drops, _ = struct.unpack("=III", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12))
        self._received_packets += packets  # reading clears them; tp_packets counts the dropped ones too
        self._lost_packets += drops
        return self._received_packets, self._lost_packets
