"""CTS frames: what a receiver writes into the FIFO of grants of its sender.

A frame is an RC RDMA WRITE ONLY from the responder's queue pair to the requester's, the other way of the very connection whose
data it admits. Its 64 bytes of payload are one entry: address, length and key of the buffer piece, then a number that
counts the connection's grants for ever. The address in the RETH is the entry's place in the FIFO. Nothing acknowledges it:
AckReq is not set, the PSN counts the frames that were sent.

The entry, little-endian as the hosts that write it: address u64, bytes u64, four keys u32, entries u32, tag u32, index u64, 16
zeros.

Source:
    NCCL, src/transport/net_ib.cc (``ncclIbSendFifo``, ``ncclIbPostFifo``): the members and their order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from testbed.engine.frames import QP_COLUMNS, RKEY, address_rows
from testbed.kernel.packet_socket import FrameRing
from testbed.roce.icrc import IcrcPatcher
from testbed.roce.queue_pairs import Connection
from testbed.roce.wire import (
    CTS_ENTRY_BYTES,
    CTS_RKEY,
    PSN_MASK,
    PSN_OFFSET,
    RETH_BYTES,
    RETH_OFFSET,
    Opcode,
    grant_tos,
)

FIFO_ENTRIES = 256
"""NCCL's NET_IB_MAX_REQUESTS: places that entries go to in turn."""

_ENTRY = struct.Struct("<QQ4IIIQ16x")
_ENTRY_OFFSET = RETH_OFFSET + RETH_BYTES
_VA_LOW = RETH_OFFSET + 6  # FIFO_ENTRIES places of 64 bytes fit into two bytes
_ADDRESS, _LENGTH, _INDEX = _ENTRY_OFFSET, _ENTRY_OFFSET + 8, _ENTRY_OFFSET + 40
_HEADER_BYTES = _INDEX + 8  # what of a frame varies; zeros follow
_COLUMNS = (
    *QP_COLUMNS,
    *range(PSN_OFFSET, PSN_OFFSET + 3),
    _VA_LOW,
    _VA_LOW + 1,
    *range(_ADDRESS, _ADDRESS + 8),
    *range(_LENGTH, _LENGTH + 4),
    *range(_INDEX, _INDEX + 8),
)


class GrantWriter:
    """Builds the CTS frames of a tick and sends them.

    Args:
        connections: The queue pairs that carry grants, one for each connection.
        priority: Priority of the frames.
    """

    def __init__(self, connections: Sequence[Connection], priority: int) -> None:
        from testbed.roce.bth import FramePath, WriteTarget, build_write  # scapy takes most of a second to import

        senders = [connection.responder for connection in connections]
        first = senders[0]
        frame = build_write(
            FramePath.of(first),
            opcode=Opcode.WRITE_ONLY,
            dest_qp=first.peer_qpn,
            psn=0,
            payload=_ENTRY.pack(0, 0, RKEY, 0, 0, 0, 1, 0, 0),
            target=WriteTarget(0, CTS_RKEY, CTS_ENTRY_BYTES),
            tos=grant_tos(priority),
        )
        self._templates = address_rows(frame[:_HEADER_BYTES], senders)
        self._patcher = IcrcPatcher(frame, _COLUMNS)
        self._initial_psns = np.array([connection.initial_psn for connection in connections], np.int64)
        self._sent = np.zeros(len(senders), np.int64)
        self._resize(64)

    def _resize(self, slots: int) -> None:
        self._ring = FrameRing(slots, np.zeros(CTS_ENTRY_BYTES, np.uint8))
        self._ring.header_lengths[:] = _HEADER_BYTES
        self._ring.payload_lengths[:] = _ENTRY_OFFSET + CTS_ENTRY_BYTES - _HEADER_BYTES

    def write(
        self,
        connections: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        """Write the frames of some grants, to be sent next.

        Args:
            connections: Connection of each, shape ``(frames,)``.
            places: How many frames of the same connection stand before each, the same shape.
            indices: Number of each grant on its connection, the same shape.
            addresses: Where the piece begins in the receiver's buffer.
            lengths: Its bytes.
        """
        count = len(connections)
        if count > len(self._ring.headers):
            self._resize(2 * count)
        rows = self._ring.headers[:count, :_HEADER_BYTES]
        rows[:] = self._templates[connections]
        psn = self._initial_psns[connections] + self._sent[connections] + places
        rows[:, PSN_OFFSET : PSN_OFFSET + 3] = _bytes_of(psn & PSN_MASK, ">u4")[:, 1:]
        slot = (indices - 1) % FIFO_ENTRIES * CTS_ENTRY_BYTES
        rows[:, _VA_LOW : _VA_LOW + 2] = _bytes_of(slot, ">u2")
        rows[:, _ADDRESS : _ADDRESS + 8] = _bytes_of(addresses, "<u8")
        rows[:, _LENGTH : _LENGTH + 4] = _bytes_of(lengths, "<u4")
        rows[:, _INDEX : _INDEX + 8] = _bytes_of(indices, "<u8")
        self._ring.icrcs[:count] = self._patcher.icrcs(rows)

    def send(self, socket: int, first: int, connections: npt.NDArray[np.int64]) -> int:
        """Send the frames from the ``first`` on that are of ``connections``; return how many the kernel took."""
        taken = self._ring.send_slots(socket, first, len(connections))
        np.add.at(self._sent, connections[:taken], 1)
        return taken


def _bytes_of(values: npt.NDArray[np.int64], kind: str) -> npt.NDArray[np.uint8]:
    """Return numbers as rows of bytes."""
    return np.ascontiguousarray(values.astype(kind)).view(np.uint8).reshape(len(values), -1)
