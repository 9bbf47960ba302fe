"""The blocks of a pcapng file as bytes: a section, its interfaces, the frames, what was lost.

Written here rather than with scapy's ``PcapNgWriter``, which costs tens of microseconds a frame and knows no directions and
no statistics.

Source:
    IETF draft-ietf-opsawg-pcapng, sections 4.1 to 4.4 and 4.6; all integers little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np
import numpy.typing as npt

_SECTION, _INTERFACE, _FRAME, _STATISTICS = 0x0A0D0D0A, 1, 6, 5
_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_LINKTYPE_ETHERNET = 1
_OPT_COMMENT, _SHB_USERAPPL = 1, 4
_IF_NAME, _IF_DESCRIPTION, _IF_SPEED, _IF_TSRESOL = 2, 3, 8, 9
_ISB_IFRECV, _ISB_IFDROP = 4, 5
_NANOSECONDS = b"\x09"  # 10^-9 s
_EPB_FLAGS = 2 | 4 << 16  # code and length of the option, as one word
_INBOUND, _OUTBOUND = 1, 2
_FRAME_HEAD_BYTES, _FRAME_TAIL_BYTES = 28, 16
_LENGTH = struct.Struct("<I")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of any interfaces, as arrays of the same length, int64 but for `outbound`.

    Attributes:
        raw: Bytes, in which all frames lie somewhere; uint8.
        start: Where each begins in them.
        kept_bytes: How many bytes of it are there.
        original_bytes: Its length on the link, without FCS.
        interface: Number of its interface.
        time_ns: When, since the epoch.
        outbound: Whether the interface sent it; bool.
    """

    raw: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]
    kept_bytes: npt.NDArray[np.int64]
    original_bytes: npt.NDArray[np.int64]
    interface: npt.NDArray[np.int64]
    time_ns: npt.NDArray[np.int64]
    outbound: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.start)

    def chosen(self, which: npt.NDArray[Any]) -> Frames:
        """Return some of the frames, by index or mask, over the same bytes."""
        fields = {item.name: getattr(self, item.name) for item in dataclass_fields(self) if item.name != "raw"}
        return Frames(self.raw, **{name: values[which] for name, values in fields.items()})


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + _PADDING[len(value) % 4]


def _block(kind: int, body: bytes) -> bytes:
    length = 12 + len(body)
    return struct.pack("<II", kind, length) + body + _LENGTH.pack(length)


def render_section(application: str, comment: str) -> bytes:
    """Return the block that a file begins with."""
    options = _option(_OPT_COMMENT, comment.encode()) + _option(_SHB_USERAPPL, application.encode()) + bytes(4)
    return _block(_SECTION, struct.pack("<IHHq", _BYTE_ORDER_MAGIC, 1, 0, -1) + options)


def render_interface(name: str, description: str, *, snap_bytes: int, rate_bits_per_s: int) -> bytes:
    """Return the block of an interface with nanosecond timestamps; interfaces count from 0 in the order of their blocks.

    Args:
        name: Such as ``leaf0/up1``.
        description: Such as ``to spine1/down0``.
        snap_bytes: Bytes kept of each frame; 0 for all.
        rate_bits_per_s: Its speed.
    """
    options = (
        _option(_IF_NAME, name.encode())
        + _option(_IF_DESCRIPTION, description.encode())
        + _option(_IF_SPEED, struct.pack("<Q", rate_bits_per_s))
        + _option(_IF_TSRESOL, _NANOSECONDS)
        + bytes(4)
    )
    return _block(_INTERFACE, struct.pack("<HHI", _LINKTYPE_ETHERNET, 0, snap_bytes) + options)


def render_frames(frames: Frames) -> npt.NDArray[np.uint8]:
    """Return the blocks of frames, one after the other.

    Fields are written for all frames at once, only the frames' bytes are copied one by one: a microsecond a frame.
    """
    padded = (frames.kept_bytes + 3) & ~3
    lengths = _FRAME_HEAD_BYTES + padded + _FRAME_TAIL_BYTES
    ends = np.cumsum(lengths)
    begins = ends - lengths
    blocks = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    words = blocks.view("<u4")
    head, tail = begins // 4, (ends - _FRAME_TAIL_BYTES) // 4
    fields = (
        _FRAME,
        lengths,
        frames.interface,
        frames.time_ns >> 32,
        frames.time_ns & 0xFFFFFFFF,
        frames.kept_bytes,
        frames.original_bytes,
    )
    for place, values in enumerate(fields):
        words[head + place] = values
    words[tail] = _EPB_FLAGS
    words[tail + 1] = np.where(frames.outbound, _OUTBOUND, _INBOUND)
    words[tail + 3] = lengths  # behind the end of the options, a word of zeros
    target, source = blocks.data, frames.raw.data
    places = zip((begins + _FRAME_HEAD_BYTES).tolist(), frames.start.tolist(), frames.kept_bytes.tolist(), strict=True)
    for to, start, count in places:
        target[to : to + count] = source[start : start + count]
    return blocks


def render_statistics(interface: int, time_ns: int, *, received_packets: int, lost_packets: int) -> bytes:
    """Return the block that says how many frames an interface saw and how many the capture lost."""
    options = (
        _option(_ISB_IFRECV, struct.pack("<Q", received_packets))
        + _option(_ISB_IFDROP, struct.pack("<Q", lost_packets))
        + bytes(4)
    )
    return _block(_STATISTICS, struct.pack("<III", interface, time_ns >> 32, time_ns & 0xFFFFFFFF) + options)
