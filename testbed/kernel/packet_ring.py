"""AF_PACKET sockets that see every frame of a port, through memory shared with the kernel: no system call a frame.

A frame that arrives is seen before the port's eBPF program may consume it; one that leaves, as it leaves the queue.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.errors import KernelError
from testbed.kernel.pcapng import Frames

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
_BLOCK_HEAD = struct.Struct("=IIII")  # at 8: block_status, num_pkts, offset_to_first_pkt, blk_len
_NEXT_OFFSET = struct.Struct("=I")  # tp_next_offset, the first word of a struct tpacket3_hdr
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

    def read_blocks(self) -> Iterator[tuple[bytes, list[int]]]:
        """Yield a copy of every block that is ready, a multiple of 8 bytes, and where in it frame headers begin."""
        unpack_next = _NEXT_OFFSET.unpack_from
        for _ in range(self._blocks):
            base = self._next * _BLOCK_BYTES
            status, count, offset, length = _BLOCK_HEAD.unpack_from(self._memory, base + 8)
            if not status & _TP_STATUS_USER:
                return
            block = self._memory[base : base + (length + 7) // 8 * 8]
            struct.pack_into("=I", self._memory, base + 8, _TP_STATUS_KERNEL)
            self._next = (self._next + 1) % self._blocks
            headers = []
            for _ in range(count):
                headers.append(offset)
                offset += unpack_next(block, offset)[0]
            yield block, headers

    def read_frames(self) -> Iterator[SeenFrame]:
        """Yield the frames of every block that is ready, oldest first."""
        for block, headers in self.read_blocks():
            frames = parse_headers(np.frombuffer(block, np.uint8), np.array(headers, np.int64), interface=0)
            rows = zip(
                frames.time_ns.tolist(),
                frames.outbound.tolist(),
                frames.original_bytes.tolist(),
                frames.start.tolist(),
                frames.kept_bytes.tolist(),
                strict=True,
            )
            raw = frames.raw.tobytes()
            for time_ns, outbound, original_bytes, start, kept in rows:
                yield SeenFrame(time_ns, outbound, original_bytes, raw[start : start + kept])

    def read_statistics(self) -> tuple[int, int]:
        """Return how many frames the port had since the ring was opened, and how many of them the full ring lost."""
        packets, drops, _ = struct.unpack("=III", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12))
        self._received_packets += packets  # reading clears them; tp_packets counts the dropped ones too
        self._lost_packets += drops
        return self._received_packets, self._lost_packets


def parse_headers(raw: npt.NDArray[np.uint8], headers: npt.NDArray[np.int64], *, interface: int) -> Frames:
    """Return the frames whose headers begin at ``headers`` in ``raw``.

    Source:
        Linux, include/uapi/linux/if_packet.h (``struct tpacket3_hdr``, which a ``struct sockaddr_ll`` follows).
    """
    words, halves = raw.view("=u4"), raw.view("=u2")
    word, half = headers // 4, headers // 2

    def field(place: int) -> npt.NDArray[np.int64]:
        return words[word + place].astype(np.int64)

    kept, original, flags = field(3), field(4), field(5)
    start = headers + halves[half + 12]
    tagged = np.flatnonzero(flags & _TP_STATUS_VLAN_VALID)
    if len(tagged):  # the kernel took the tag out: put it back, in a copy behind the others
        parts, end = [raw], len(raw)
        for index in tagged.tolist():
            begin, count = int(start[index]), int(kept[index])
            tag = struct.pack("!HH", int(halves[half[index] + 18]), int(words[word[index] + 8]))
            data = raw[begin : begin + count].tobytes()
            parts.append(np.frombuffer(data[:12] + tag + data[12:], np.uint8))
            start[index] = end
            end += count + 4
        kept[tagged] += 4
        original[tagged] += 4
        raw = np.concatenate(parts)
    return Frames(
        raw=raw,
        start=start,
        kept_bytes=kept,
        original_bytes=original,
        interface=np.full(len(headers), interface, np.int64),
        time_ns=field(1) * 1_000_000_000 + field(2),
        outbound=raw[headers + _PKTTYPE_OFFSET] == _PACKET_OUTGOING,
    )


def join_frames(parts: Sequence[Frames]) -> Frames:
    """Return frames of several blocks as one, in order of time; of equal times, in the order given."""
    if not parts:
        empty = np.zeros(0, np.int64)
        return Frames(np.zeros(0, np.uint8), empty, empty, empty, empty, empty, np.zeros(0, np.bool_))
    offsets = np.cumsum([0, *(len(part.raw) for part in parts[:-1])])

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    whole = Frames(
        raw=joined("raw"),
        start=np.concatenate([part.start + offset for part, offset in zip(parts, offsets.tolist(), strict=True)]),
        kept_bytes=joined("kept_bytes"),
        original_bytes=joined("original_bytes"),
        interface=joined("interface"),
        time_ns=joined("time_ns"),
        outbound=joined("outbound"),
    )
    return whole.chosen(np.argsort(whole.time_ns, kind="stable"))
