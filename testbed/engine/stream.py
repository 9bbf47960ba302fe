"""A schedule as packets: what each connection sends, packet by packet, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.roce.wire import FRAME_OVERHEAD_BYTES, LINK_OVERHEAD_BYTES, PADDING_BYTES, RETH_BYTES, Opcode


@dataclass(frozen=True, eq=False)
class PacketStreams:
    """The packets of every connection that the network carries, one connection after the other.

    A schedule's connections inside hosts come behind those of the network and have no packets.

    Attributes:
        first_packet: Index of each connection's first packet in the flat arrays, shape ``(networked + 1,)``.
        opcode: BTH opcode of each packet, shape ``(packets,)``, uint8.
        payload_bytes: Payload of each packet without padding, shape ``(packets,)``, uint16.
        message: The transfer each packet belongs to, shape ``(packets,)``, int32.
        wire_bytes_before: Wire bytes of all packets before each one, shape ``(packets + 1,)``.
        message_end_packet: Packets of its connection up to and including each transfer, shape ``(transfers,)``; 0 inside hosts.
        transfers_of: Transfers of each connection in sending order, those inside hosts included.
    """

    first_packet: npt.NDArray[np.int64]
    opcode: npt.NDArray[np.uint8]
    payload_bytes: npt.NDArray[np.uint16]
    message: npt.NDArray[np.int32]
    wire_bytes_before: npt.NDArray[np.int64]
    message_end_packet: npt.NDArray[np.int64]
    transfers_of: tuple[npt.NDArray[np.int64], ...]

    @cached_property
    def wire_bytes_at_end(self) -> list[int]:
        """Return the wire bytes before the end of each transfer, in the count of ``wire_bytes_before``."""
        # What stays inside hosts has no packets: it is given the place behind all.
        connection_of = np.full(len(self.message_end_packet), len(self.packets), np.int64)
        for connection, transfers in enumerate(self.transfers_of[: len(self.packets)]):
            connection_of[transfers] = connection
        ends: list[int] = self.wire_bytes_before[self.message_end_packet + self.first_packet[connection_of]].tolist()
        return ends

    @property
    def packets(self) -> npt.NDArray[np.int64]:
        """Return the number of packets of each connection."""
        return np.diff(self.first_packet)

    @property
    def messages(self) -> npt.NDArray[np.int64]:
        """Return the number of messages of each connection."""
        return np.array([len(transfers) for transfers in self.transfers_of[: len(self.packets)]], np.int64)


def build_streams(schedule: Schedule, mtu: int, networked: int | None = None) -> PacketStreams:
    """Cut the transfers of a schedule into WRITE packets.

    Args:
        schedule: What is sent; each transfer is one RDMA WRITE message.
        mtu: Payload of a full packet, bytes.
        networked: Number of connections, the first ones, that the network carries; by default all.
    """
    connections = len(schedule.connections)
    networked = connections if networked is None else networked
    by_connection = np.argsort(schedule.connection, kind="stable")
    order = by_connection[: np.count_nonzero(schedule.connection < networked)]
    sizes = schedule.nbytes[order]
    counts = np.maximum(1, -(-sizes // mtu))
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - counts

    opcode = np.full(total, int(Opcode.WRITE_MIDDLE), np.uint8)
    opcode[starts] = int(Opcode.WRITE_FIRST)
    opcode[ends - 1] = int(Opcode.WRITE_LAST)
    opcode[starts[counts == 1]] = int(Opcode.WRITE_ONLY)
    payload = np.full(total, mtu, np.uint16)
    payload[ends - 1] = sizes - (counts - 1) * mtu
    message = np.repeat(order.astype(np.int32), counts)
    wire = -(-payload.astype(np.int64) // PADDING_BYTES) * PADDING_BYTES + FRAME_OVERHEAD_BYTES + LINK_OVERHEAD_BYTES
    wire[starts] += RETH_BYTES

    wire_before = np.concatenate(([0], np.cumsum(wire)))
    per_connection = np.bincount(schedule.connection, minlength=connections)
    bounds = np.concatenate(([0], np.cumsum(per_connection)))
    packet_bounds = np.concatenate(([0], ends))[bounds[: networked + 1]]
    message_end = np.zeros(len(schedule), np.int64)
    message_end[order] = ends - np.repeat(packet_bounds[:-1], per_connection[:networked])
    transfers = tuple(by_connection[bounds[c] : bounds[c + 1]] for c in range(connections))
    return PacketStreams(packet_bounds.astype(np.int64), opcode, payload, message, wire_before, message_end, transfers)
