"""The frames of every connection, written ahead of the tick that sends them.

Each connection has a ring of header rows, filled a block at a time: gather the QP's template, patch what varies, correct the
ICRC. CRC is linear over GF(2): with a constant payload a frame's ICRC is its template's XOR one table entry per byte that
differs (``roce/icrc.py``). Frames of another length (the odd end of a message) have a template per connection and length.
Contents, where a peer that is not ours shall keep them, change a frame's ICRC by that of its payload, whatever stands before it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.engine.dispatch import QpDispatcher
from testbed.engine.stream import PacketStreams
from testbed.kernel.packet_socket import FrameRing
from testbed.roce.icrc import IcrcPatcher, compute_icrc, delta_table
from testbed.roce.queue_pairs import QueuePair
from testbed.roce.wire import (
    ACK_REQUEST_BIT,
    ACK_REQUEST_OFFSET,
    BTH_OFFSET,
    DATA_TOS,
    DEST_QP_OFFSET,
    ETHERNET_BYTES,
    ICRC_BYTES,
    PADDING_BYTES,
    PSN_MASK,
    PSN_OFFSET,
    RETH_BYTES,
    RETH_OFFSET,
    Opcode,
    ipv4_checksum,
)

_TOS = ETHERNET_BYTES + 1
_IP_CHECKSUM = ETHERNET_BYTES + 10
_IP_ADDRESSES = ETHERNET_BYTES + 12
_UDP_SOURCE = ETHERNET_BYTES + 20
_RKEY = RETH_OFFSET + 8
_DMA_LENGTH = RETH_OFFSET + 12
_PSN_COLUMNS = (PSN_OFFSET, PSN_OFFSET + 1, PSN_OFFSET + 2)
_RETH_COLUMNS = (*range(RETH_OFFSET, RETH_OFFSET + 8), *range(_DMA_LENGTH, _DMA_LENGTH + 4))
QP_COLUMNS = (*range(_IP_ADDRESSES, _UDP_SOURCE + 2), *range(DEST_QP_OFFSET, DEST_QP_OFFSET + 3))
"""Bytes in which frames of several QPs differ and that the ICRC covers."""

# For use with arrays, where an enum's member would be asked for attributes it lacks: a signal whose handler raises just then, in
# EnumType.__getattr__, is lost, for numpy takes any exception there for "no such attribute".
_FIRST, _MIDDLE, _LAST, _ONLY = (
    np.uint8(int(opcode)) for opcode in (Opcode.WRITE_FIRST, Opcode.WRITE_MIDDLE, Opcode.WRITE_LAST, Opcode.WRITE_ONLY)
)

# An ACK is asked for at the end of each message, and at least this often: often enough for go-back-N to know where it is,
# rarely enough that ACKs stay a few percent of the packets.
ACK_EVERY_PACKETS = 32

# The engine's buffers have one key; nobody checks it, Wireshark shows it.
RKEY = 0x7E57BED0

# Frames that can be written again at once, whatever the rings hold.
AGAIN_PACKETS = 64

# Header rows of all rings together: a few megabytes, so that they stay in the last-level cache.
_RING_ROWS = 65536
_MIN_BLOCK, _MAX_BLOCK = 128, 1024
# Rings refilled at once beside those that are nearly empty: spreads the work over ticks.
_REFILLS_AT_ONCE = 1


@dataclass(frozen=True, eq=False)
class ForeignMemory:
    """What a connection writes into a peer that is not ours; a transfer's ``dst_offset_bytes`` is then a virtual address there.

    Attributes:
        rkey: The peer's key.
        contents: The sender's buffer, into which a transfer's ``offset_bytes`` points, uint8.
    """

    rkey: int
    contents: npt.NDArray[np.uint8]


class FrameWriter:
    """Keeps every connection's next frames ready to send.

    Args:
        requesters: The sending QPs, one per connection.
        initial_psns: PSN of each connection's packet 0, shape ``(connections,)``.
        mtu: Payload of a full packet, a multiple of four bytes.
        tos: TOS byte of each connection's frames, or of all.
        foreign: What each connection writes into a peer that is not ours; by default all carry zeros, which ours lets go.
    """

    def __init__(
        self,
        requesters: list[QueuePair],
        initial_psns: npt.NDArray[np.int64],
        mtu: int,
        *,
        tos: int | Sequence[int] = DATA_TOS,
        foreign: Sequence[ForeignMemory] | None = None,
    ) -> None:
        count = len(requesters)
        self._foreign = foreign
        self._rkeys = [RKEY] * count if foreign is None else [memory.rkey for memory in foreign]
        tos = [tos] * count if isinstance(tos, int) else tos
        self._mtu = mtu
        self._initial_psns = initial_psns
        self.block = max(_MIN_BLOCK, min(_MAX_BLOCK, _RING_ROWS // (2 * count)))
        self._depth = 2 * self.block
        # Behind the rings: frames that are sent again, written when they are.
        self._again = count * self._depth
        slots = self._again + AGAIN_PACKETS
        self.ring = FrameRing(slots, np.zeros(mtu if foreign is None else (slots, mtu), np.uint8))
        payload = bytes(mtu)
        self._short, self._short_icrc = _templates(requesters, Opcode.WRITE_MIDDLE, payload, tos, self._rkeys)
        self._long, self._long_icrc = _templates(requesters, Opcode.WRITE_FIRST, payload, tos, self._rkeys)
        varying = (BTH_OFFSET, ACK_REQUEST_OFFSET, *_PSN_COLUMNS)
        self._short_tables = [delta_table(RETH_OFFSET + mtu - column) for column in varying]
        end = RETH_OFFSET + RETH_BYTES + mtu
        self._long_tables = [delta_table(end - column) for column in (*varying, *_RETH_COLUMNS)]
        # Header, ICRC and tables of frames of other lengths, by connection, whether there is a RETH, and payload.
        self._odd: dict[tuple[int, bool, int], tuple[npt.NDArray[np.uint8], int, list[npt.NDArray[np.uint32]]]] = {}
        # Packets [begin, end) of a connection are in its ring.
        self._begin = np.zeros(count, np.int64)
        self._end = np.zeros(count, np.int64)
        self._limit = np.zeros(count, np.int64)

    def restart(
        self, schedule: Schedule, streams: PacketStreams | QpDispatcher, psn_offsets: npt.NDArray[np.int64]
    ) -> None:
        """Begin an iteration and write the first frames of every connection.

        Args:
            schedule: What is sent.
            streams: The same as packets.
            psn_offsets: Packets each connection sent in earlier iterations, shape ``(connections,)``.

        Raises:
            ValueError: Contents are to be sent, and which packet carries what is decided as the run goes.
        """
        if self._foreign is not None and isinstance(streams, QpDispatcher):
            raise ValueError("contents need streams that are known beforehand")
        self._streams = streams
        self._va, self._lengths = schedule.dst_offset_bytes, schedule.nbytes
        self._offsets = schedule.offset_bytes
        self._psn_base = self._initial_psns + psn_offsets
        self._limit = streams.packets
        self._begin[:] = 0
        self._end[:] = 0
        for connection in range(len(self._end)):
            self._fill(connection, 0)
            self._fill(connection, self.block)

    def prepare(self, sent: npt.NDArray[np.int64], margin: int) -> None:
        """Refill rings: those that could run out within ``margin`` packets, and a few others.

        Args:
            sent: Next packet of each connection, shape ``(connections,)``.
            margin: More than any connection sends in a tick.
        """
        left = self._end - sent
        low = np.flatnonzero((left <= self.block) & (self._end < self._limit))
        if len(low):
            if len(low) > _REFILLS_AT_ONCE:
                low = low[np.argsort(left[low], kind="stable")]
            for position, connection in enumerate(low.tolist()):
                if position < _REFILLS_AT_ONCE or left[connection] <= margin:
                    self._fill(connection, int(self._end[connection]))

    def extend(self, connections: Iterable[int], sent: npt.NDArray[np.int64]) -> None:
        """Write the frames of connections that were given more packets, as far as their rings have room.

        Args:
            connections: Those whose ``packets`` have grown.
            sent: Next packet of every connection, shape ``(connections,)``.
        """
        for connection in connections:
            while (end := int(self._end[connection])) < self._limit[connection]:
                if end - end % self.block + self.block > sent[connection] + self._depth:
                    break
                self._fill(connection, end)

    def rewind(self, connections: npt.NDArray[np.int64], sent: npt.NDArray[np.int64]) -> None:
        """Write again what has left the ring, after ``sent`` of these connections went back."""
        for connection in connections.tolist():
            if sent[connection] < self._begin[connection]:
                start = int(sent[connection]) // self.block * self.block
                self._begin[connection] = self._end[connection] = start
                self._fill(connection, start)
                self._fill(connection, start + self.block)

    def write_again(self, connection: int, packets: npt.NDArray[np.int64]) -> int:
        """Write frames of any packets of a connection anew, each asking for an ACK, at most ``AGAIN_PACKETS``.

        Returns:
            The slot of the first; they stand one behind the other until the next call.
        """
        self._write(connection, packets, self._streams.first_packet[connection] + packets, self._again, ask=True)
        return self._again

    def wire_bytes(self, connection: int, packets: npt.NDArray[np.int64]) -> int:
        """Return what packets of a connection take on the wire, together."""
        before, flat = self._streams.wire_bytes_before, self._streams.first_packet[connection] + packets
        return int((before[flat + 1] - before[flat]).sum())

    def slots_of(self, connection: npt.NDArray[np.int64], packet: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the ring slots of packets that are ready."""
        return connection * self._depth + packet % self._depth

    @property
    def ready_until(self) -> npt.NDArray[np.int64]:
        """Return the first packet of each connection that is not ready, shape ``(connections,)``."""
        return self._end

    @property
    def depth(self) -> int:
        """Return the slots of a connection's ring: packet ``p`` of connection ``c`` is in ``c * depth + p % depth``."""
        return self._depth

    def _fill(self, connection: int, start: int) -> None:
        """Write a block of frames of a connection into its ring."""
        # A block ends where blocks of the ring do: what was written last may have ended before, at the limit of that time.
        stop = min(start - start % self.block + self.block, int(self._limit[connection]))
        if stop <= start:
            return
        flat = int(self._streams.first_packet[connection])
        where = slice(flat + start, flat + stop)
        self._write(connection, np.arange(start, stop), where, connection * self._depth + start % self._depth)
        self._end[connection] = stop
        self._begin[connection] = max(self._begin[connection], start - self.block)

    def _write(
        self,
        connection: int,
        packet: npt.NDArray[np.int64],
        where: slice | npt.NDArray[np.int64],
        first: int,
        *,
        ask: bool = False,
    ) -> None:
        """Write frames of a connection into slots from ``first`` on.

        Args:
            connection: The connection.
            packet: The packets.
            where: The same in the streams' flat arrays.
            first: Slot of the first.
            ask: Whether each asks for an ACK.
        """
        streams, ring = self._streams, self.ring
        opcode, message = streams.opcode[where], streams.message[where]
        psn = (self._psn_base[connection] + packet) & PSN_MASK
        asks = packet % ACK_EVERY_PACKETS == ACK_EVERY_PACKETS - 1
        asks |= (opcode == _LAST) | (opcode == _ONLY)
        asks |= ask
        ack = asks.astype(np.uint8) * np.uint8(ACK_REQUEST_BIT)
        columns = (opcode, ack, psn >> 16, (psn >> 8) & 0xFF, psn & 0xFF)

        rows = slice(first, first + len(packet))
        headers = ring.headers[rows]
        headers[:, :RETH_OFFSET] = self._short[connection]
        for place, values in zip((BTH_OFFSET, ACK_REQUEST_OFFSET, *_PSN_COLUMNS), columns, strict=True):
            headers[:, place] = values
        icrc = self._short_tables[0][opcode ^ _MIDDLE]
        for values, table in zip(columns[1:], self._short_tables[1:], strict=True):
            icrc ^= table[values]
        ring.icrcs[rows] = icrc ^ self._short_icrc[connection]
        ring.header_lengths[rows] = RETH_OFFSET
        ring.payload_lengths[rows] = self._mtu

        begins = (opcode == _FIRST) | (opcode == _ONLY)
        payload = streams.payload_bytes[where]
        odd = payload != self._mtu
        long = np.flatnonzero(begins & ~odd)
        if len(long):
            of = message[long]
            self._write_long(
                first + long,
                connection,
                [column[long] for column in columns],
                self._va[of],
                self._lengths[of],
            )
        for has_reth in (False, True):
            rows_of_kind = np.flatnonzero(odd & (begins == has_reth))
            sizes = payload[rows_of_kind]
            for size in np.unique(sizes).tolist():
                which = rows_of_kind[sizes == size]
                of = message[which]
                values = [column[which] for column in columns[2:]]
                if has_reth:
                    values += _reth_columns(self._va[of], self._lengths[of])
                self._write_odd(first + which, connection, size, values)
        if self._foreign is not None:
            self._fill_in(connection, packet, message, payload, first)

    def _fill_in(
        self,
        connection: int,
        packet: npt.NDArray[np.int64],
        message: npt.NDArray[np.int32],
        payload: npt.NDArray[np.uint16],
        first: int,
    ) -> None:
        """Put contents into slots from ``first`` on, whose frames are as if they carried zeros."""
        assert self._foreign is not None
        assert isinstance(self._streams, PacketStreams)
        contents, mtu, ring = self._foreign[connection].contents, self._mtu, self.ring
        packets = np.maximum(1, -(-self._lengths[message] // mtu))
        within = packet - (self._streams.message_end_packet[message] - packets)
        begins = (self._offsets[message] + within * mtu).tolist()
        for slot, (begin, size) in enumerate(zip(begins, payload.tolist(), strict=True), first):
            padded = int(size + -size % PADDING_BYTES)
            row = ring.payload[slot]
            row[:size] = contents[begin : begin + size]
            row[size:padded] = 0
            # A CRC is linear, and zeros before the payload change nothing but what both terms have.
            ring.icrcs[slot] ^= np.uint32(zlib.crc32(row[:padded]) ^ zlib.crc32(bytes(padded)))

    def _write_long(
        self,
        slots: npt.NDArray[np.intp],
        connection: int,
        columns: Sequence[npt.NDArray[Any]],
        va: npt.NDArray[np.int64],
        length: npt.NDArray[np.int64],
    ) -> None:
        """Fill slots of full-size frames that carry a RETH."""
        block = np.repeat(self._long[connection][None, :], len(slots), axis=0)
        columns = [*columns, *_reth_columns(va, length)]
        icrc = np.full(len(slots), self._long_icrc[connection], np.uint32)
        icrc ^= self._long_tables[0][columns[0] ^ _FIRST]
        for values, table in zip(columns[1:], self._long_tables[1:], strict=True):
            icrc ^= table[values]
        places = (BTH_OFFSET, ACK_REQUEST_OFFSET, *_PSN_COLUMNS, *_RETH_COLUMNS)
        for place, values in zip(places, columns, strict=True):
            block[:, place] = values
        self.ring.headers[slots, : RETH_OFFSET + RETH_BYTES] = block
        self.ring.icrcs[slots] = icrc
        self.ring.header_lengths[slots] = RETH_OFFSET + RETH_BYTES

    def _write_odd(
        self, slots: npt.NDArray[np.intp], connection: int, payload: int, columns: Sequence[npt.NDArray[Any]]
    ) -> None:
        """Fill slots of frames of another payload length, all the same: ends of messages, which always ask for an ACK.

        Args:
            slots: The slots, shape ``(n,)``.
            connection: Their connection.
            payload: Payload bytes of each.
            columns: Values of ``_PSN_COLUMNS``; in a frame with a RETH those of ``_RETH_COLUMNS`` too; each of shape ``(n,)``.
        """
        has_reth = len(columns) > len(_PSN_COLUMNS)
        key = connection, has_reth, payload
        if key not in self._odd:
            self._odd[key] = self._odd_template(connection, has_reth, payload)
        header, icrc, tables = self._odd[key]
        places = (*_PSN_COLUMNS, *_RETH_COLUMNS) if has_reth else _PSN_COLUMNS
        block = np.repeat(header[None, :], len(slots), axis=0)
        icrcs = np.full(len(slots), icrc, np.uint32)
        for place, values, table in zip(places, columns, tables, strict=True):
            block[:, place] = values
            icrcs ^= table[values]
        ring = self.ring
        ring.headers[slots, : len(header)] = block
        ring.icrcs[slots] = icrcs
        ring.header_lengths[slots] = len(header)
        ring.payload_lengths[slots] = payload + -payload % PADDING_BYTES

    def _odd_template(
        self, connection: int, has_reth: bool, payload: int
    ) -> tuple[npt.NDArray[np.uint8], int, list[npt.NDArray[np.uint32]]]:
        """Return the header of a connection's frames of a payload length, with PSN 0 and an empty RETH, ICRC and tables."""
        pad = -payload % PADDING_BYTES
        header = bytearray((self._long if has_reth else self._short)[connection].tobytes())
        ip_length = len(header) - ETHERNET_BYTES + payload + pad + ICRC_BYTES
        struct.pack_into("!H", header, ETHERNET_BYTES + 2, ip_length)
        struct.pack_into("!H", header, _IP_CHECKSUM, ipv4_checksum(header[ETHERNET_BYTES : ETHERNET_BYTES + 20]))
        struct.pack_into("!H", header, _UDP_SOURCE + 4, ip_length - 20)
        header[BTH_OFFSET] = _ONLY if has_reth else _LAST
        header[BTH_OFFSET + 1] = (header[BTH_OFFSET + 1] & 0xCF) | pad << 4
        struct.pack_into("!I", header, ACK_REQUEST_OFFSET, ACK_REQUEST_BIT << 24)
        if has_reth:
            struct.pack_into("!QII", header, RETH_OFFSET, 0, self._rkeys[connection], 0)
        body = bytes(payload + pad)
        end = len(header) + len(body)
        places = (*_PSN_COLUMNS, *_RETH_COLUMNS) if has_reth else _PSN_COLUMNS
        icrc = compute_icrc(bytes(header) + body + bytes(ICRC_BYTES))
        return np.frombuffer(bytes(header), np.uint8), icrc, [delta_table(end - place) for place in places]


def _reth_columns(va: npt.NDArray[np.int64], length: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return the values of ``_RETH_COLUMNS``."""
    columns = [(va >> shift) & 0xFF for shift in (56, 48, 40, 32, 24, 16, 8, 0)]
    return columns + [(length >> shift) & 0xFF for shift in (24, 16, 8, 0)]


def _templates(
    requesters: list[QueuePair], opcode: Opcode, payload: bytes, tos: Sequence[int], rkeys: Sequence[int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """Return the header of each QP's full-size frame with PSN 0 and an empty RETH, and its ICRC.

    scapy crafts the first; the others differ in addresses, source port, destination QP and key.

    Returns:
        Headers, shape ``(qps, header bytes)``, and ICRCs, shape ``(qps,)``.
    """
    from testbed.roce.bth import FramePath, WriteTarget, build_write  # scapy takes most of a second to import

    first = requesters[0]
    path = FramePath.of(first)
    target = WriteTarget(0, rkeys[0], 0) if opcode == Opcode.WRITE_FIRST else None
    frame = build_write(path, opcode=opcode, dest_qp=first.peer_qpn, psn=0, payload=payload, target=target, tos=tos[0])
    header = RETH_OFFSET + (RETH_BYTES if target else 0)
    rows = address_rows(frame[:header], requesters, tos)
    if target is None:
        return rows, IcrcPatcher(frame, QP_COLUMNS).icrcs(rows)
    rows[:, _RKEY : _RKEY + 4] = np.array(rkeys, ">u4").view(np.uint8).reshape(-1, 4)
    return rows, IcrcPatcher(frame, (*QP_COLUMNS, *range(_RKEY, _RKEY + 4))).icrcs(rows)


def address_rows(header: bytes, senders: list[QueuePair], tos: Sequence[int] | None = None) -> npt.NDArray[np.uint8]:
    """Return a frame's header once for each sending QP, with its addresses, source port, destination QP and TOS byte.

    Returns:
        Shape ``(qps, header bytes)``.
    """
    rows = np.repeat(np.frombuffer(header, np.uint8)[None, :], len(senders), axis=0)
    for index, (row, qp) in enumerate(zip(rows, senders, strict=True)):
        if tos is not None:
            row[_TOS] = tos[index]  # not covered by the ICRC
        row[:6] = np.frombuffer(bytes.fromhex(qp.local.next_hop_mac.replace(":", "")), np.uint8)
        row[6:12] = np.frombuffer(bytes.fromhex(qp.local.mac.replace(":", "")), np.uint8)
        addresses = struct.pack("!IIH", qp.local.address, qp.remote.address, qp.udp_source_port)
        row[_IP_ADDRESSES : _UDP_SOURCE + 2] = np.frombuffer(addresses, np.uint8)
        row[DEST_QP_OFFSET : DEST_QP_OFFSET + 3] = np.frombuffer(struct.pack("!I", qp.peer_qpn)[1:], np.uint8)
        ip = bytearray(row[ETHERNET_BYTES : ETHERNET_BYTES + 20].tobytes())
        row[_IP_CHECKSUM : _IP_CHECKSUM + 2] = np.frombuffer(struct.pack("!H", ipv4_checksum(ip)), np.uint8)
    return rows
