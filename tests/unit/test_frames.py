"""Every frame that the engine writes ahead is the frame that scapy would have built, wherever the ring stands."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from scapy.contrib.roce import BTH
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from testbed.collectives import Schedule, find_algorithm
from testbed.collectives.schedule import ScheduleBuilder
from testbed.engine import frames
from testbed.engine.frames import ACK_EVERY_PACKETS, RKEY, FrameWriter
from testbed.engine.stream import PacketStreams, build_streams
from testbed.roce.bth import RETH
from testbed.roce.icrc import carried_icrc, compute_icrc
from testbed.roce.queue_pairs import Connection, Endpoint, build_connections
from testbed.roce.wire import DATA_TOS, PSN_MASK, Opcode

MTU = 256
MARGIN = 96


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest rings: a few hundred frames then go round them several times."""
    monkeypatch.setattr(frames, "_MAX_BLOCK", frames._MIN_BLOCK)


def endpoint(rank: int) -> Endpoint:
    return Endpoint(
        rank, 0x0A000001 + 2 * rank, f"02:00:00:{rank + 1:02x}:00:00", f"02:00:00:{rank + 65:02x}:ff:ff", rank, rank
    )


def connect(schedule: Schedule) -> list[Connection]:
    ranks = [endpoint(rank) for rank in range(schedule.nranks)]
    rng = np.random.default_rng(1)
    return build_connections(list(schedule.connections), ranks, source_port_per_qp=True, rng=rng)


def odd_schedule() -> Schedule:
    """Two connections, lengths of every residue, whole packets, single bytes, far receive offsets; several rings long."""
    builder = ScheduleBuilder(2, 2**38)
    offset = 0x123456789
    for number in range(120):
        for src in (0, 1):
            nbytes = (1, 2, 3, 4, MTU, MTU + 1, 2 * MTU, 7 * MTU + 5, 40 * MTU, MTU - 1)[(number + src) % 10]
            builder.add(src, 1 - src, offset_bytes=number, nbytes=nbytes, dst_offset_bytes=offset)
            offset += 2**28 + nbytes
    return builder.build()


class Sender:
    """A frame writer used as the tick loop uses it."""

    def __init__(self, schedule: Schedule, initial_psns: list[int]) -> None:
        self.schedule = schedule
        self.streams: PacketStreams = build_streams(schedule, MTU)
        self.connections = connect(schedule)
        self.initial_psns = np.array(initial_psns, np.int64)
        self.writer = FrameWriter([one.requester for one in self.connections], self.initial_psns, MTU)
        self.offsets = np.zeros(len(initial_psns), np.int64)
        self.sent = np.zeros(len(initial_psns), np.int64)
        self.writer.restart(schedule, self.streams, self.offsets)

    def restart(self) -> None:
        self.offsets = self.offsets + self.streams.packets
        self.sent[:] = 0
        self.writer.restart(self.schedule, self.streams, self.offsets)

    def rewind(self, connection: int, packet: int) -> None:
        self.sent[connection] = packet
        self.writer.rewind(np.array([connection]), self.sent)

    def frame(self, connection: int, packet: int) -> bytes:
        slot = int(self.writer.slots_of(np.array([connection]), np.array([packet]))[0])
        ring = self.writer.ring
        header = ring.headers[slot, : int(ring.header_lengths[slot])].tobytes()
        payload = ring.payload[: int(ring.payload_lengths[slot])].tobytes()
        return header + payload + int(ring.icrcs[slot]).to_bytes(4, "little")

    def send(self, per_tick: int = MARGIN) -> Iterator[tuple[int, int, bytes]]:
        """Send all that is left; yields connection, packet, frame."""
        for _ in range(100_000):
            if (self.sent == self.streams.packets).all():
                return
            ready = np.minimum(self.writer.ready_until, self.sent + per_tick)
            for connection, (begin, end) in enumerate(zip(self.sent.tolist(), ready.tolist(), strict=True)):
                for packet in range(begin, end):
                    yield connection, packet, self.frame(connection, packet)
            self.sent = np.array(ready)
            self.writer.prepare(self.sent, MARGIN)
        raise AssertionError("the rings are not refilled")

    def check(self, connection: int, packet: int, frame: bytes) -> None:
        """Compare a frame with what the schedule says, read by scapy."""
        flat = int(self.streams.first_packet[connection]) + packet
        opcode = Opcode(int(self.streams.opcode[flat]))
        transfer = int(self.streams.message[flat])
        payload = int(self.streams.payload_bytes[flat])
        qp = self.connections[connection].requester
        read = Ether(frame)
        bth = read[BTH]
        assert (read.src, read.dst) == (qp.local.mac, qp.local.next_hop_mac)
        addresses = tuple(int.from_bytes(bytes(map(int, one.split(".")))) for one in (read[IP].src, read[IP].dst))
        assert addresses == (qp.local.address, qp.remote.address)
        assert (read[UDP].sport, read[UDP].dport) == (qp.udp_source_port, 4791)
        assert (read[IP].tos, read[IP].ttl, read[IP].len) == (DATA_TOS, 64, len(frame) - 14)
        assert read[UDP].len == len(frame) - 34
        assert (bth.opcode, bth.dqpn) == (opcode, qp.peer_qpn)
        assert bth.psn == (int(self.initial_psns[connection] + self.offsets[connection]) + packet) & PSN_MASK
        asks = packet % ACK_EVERY_PACKETS == ACK_EVERY_PACKETS - 1 or opcode in (Opcode.WRITE_LAST, Opcode.WRITE_ONLY)
        assert bth.ackreq == asks
        assert bth.padcount == -payload % 4
        has_reth = opcode in (Opcode.WRITE_FIRST, Opcode.WRITE_ONLY)
        assert len(frame) == 58 + 16 * has_reth + payload + -payload % 4
        if has_reth:
            reth = read[RETH]
            expected = (int(self.schedule.dst_offset_bytes[transfer]), RKEY, int(self.schedule.nbytes[transfer]))
            assert (reth.va, reth.rkey, reth.dmalen) == expected
        else:
            assert RETH not in read
        assert carried_icrc(frame) == compute_icrc(frame)
        assert ipv4_sum(frame[14:34]) == 0xFFFF


def ipv4_sum(header: bytes) -> int:
    total = sum(struct.unpack("!10H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_every_frame_is_right_through_several_rings() -> None:
    sender = Sender(odd_schedule(), [0xFFFFFF - 100, 7])  # the first wraps its PSN
    assert sender.streams.packets.min() > 2 * sender.writer.depth
    seen = [0, 0]
    for connection, packet, frame in sender.send():
        assert packet == seen[connection]
        seen[connection] += 1
        assert carried_icrc(frame) == compute_icrc(frame)
        if connection == 0 or packet % 11 == 0:
            sender.check(connection, packet, frame)
    assert seen == sender.streams.packets.tolist()


def test_a_second_iteration_continues_the_psns() -> None:
    sender = Sender(odd_schedule(), [0, 0x7FFFFF])
    for _ in sender.send():
        pass
    sender.restart()
    for connection, packet, frame in sender.send():
        if packet % 41 == 0:
            sender.check(connection, packet, frame)


@pytest.mark.parametrize("back_to", [0, 1, 37, 128, 255, 300])
def test_frames_after_a_rewind_are_the_same_again(back_to: int) -> None:
    sender = Sender(odd_schedule(), [5, 99])
    first_pass = {(connection, packet): frame for connection, packet, frame in sender.send()}
    sender.rewind(1, back_to)
    again = {(connection, packet): frame for connection, packet, frame in sender.send()}
    assert {packet for _, packet in again} == set(range(back_to, int(sender.streams.packets[1])))
    assert again == {key: first_pass[key] for key in again}


def test_a_rewind_in_the_middle_loses_no_other_connection() -> None:
    sender = Sender(odd_schedule(), [1, 2])
    expected = {(connection, packet): frame for connection, packet, frame in Sender(odd_schedule(), [1, 2]).send()}
    first_part = sender.send(per_tick=50)
    for connection, packet, frame in itertools.islice(first_part, 600):
        assert frame == expected[connection, packet]
    first_part.close()
    for connection, packet in ((0, 3), (1, 200)):  # behind the ring, and within it
        sender.rewind(connection, min(packet, int(sender.sent[connection])))
    for connection, packet, frame in sender.send(per_tick=50):
        assert frame == expected[connection, packet]


def test_many_connections_have_rings_of_their_own() -> None:
    ring = find_algorithm("all_reduce", "ring").build_schedule([0, 2, 1, 3], 61_003, 3).sorted_by_sender()
    sender = Sender(ring, [10, 20, 30, 40])
    for connection, packet, frame in sender.send():
        assert carried_icrc(frame) == compute_icrc(frame)
        if packet % 5 == 0:
            sender.check(connection, packet, frame)


def test_no_ring_runs_dry_when_all_are_low_at_once() -> None:
    ring = find_algorithm("all_reduce", "ring").build_schedule([0, 1, 2, 3, 4, 5], 300_000, 3).sorted_by_sender()
    sender = Sender(ring, [0] * 6)
    limit = sender.streams.packets
    while (sender.sent < limit).any():
        ready = sender.writer.ready_until - sender.sent
        assert (ready >= np.minimum(MARGIN, limit - sender.sent)).all()
        sender.sent = np.minimum(sender.sent + MARGIN, limit)
        sender.writer.prepare(sender.sent, MARGIN)
