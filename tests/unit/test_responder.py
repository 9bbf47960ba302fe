"""The responder that keeps what it gets: against scapy's frames, the engine's frames, and a network that does what it likes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.contrib.roce import AETH, BTH
from scapy.layers.l2 import Ether

from testbed.collectives.schedule import ScheduleBuilder
from testbed.engine.frames import ForeignMemory, FrameWriter
from testbed.engine.stream import build_streams
from testbed.roce.bth import FramePath, WriteTarget, build_ack, build_cnp, build_write
from testbed.roce.icrc import with_icrc
from testbed.roce.packet import FrameError, RocePacket, parse_packet, render_answer
from testbed.roce.queue_pairs import Connection, Endpoint, build_connections
from testbed.roce.responder import Answer, Arrival, StoreQueuePair, StoreResponder, Syndrome
from testbed.roce.wire import ACK_SYNDROME, BTH_OFFSET, ETHERNET_BYTES, PSN_MASK, Opcode, ipv4_checksum

MTU = 256
ADDRESS, RKEY = 0x7FFF_1234_5678_9ABC, 0xDEADBEEF
FIRST_PSN = 0xFFFFFE


def endpoint(rank: int) -> Endpoint:
    return Endpoint(
        rank, 0x0A000001 + 2 * rank, f"02:00:00:{rank + 1:02x}:00:00", f"02:00:00:{rank + 65:02x}:ff:ff", rank, rank
    )


def connection() -> Connection:
    rng = np.random.default_rng(1)
    made = build_connections([(0, 1)], [endpoint(0), endpoint(1)], source_port_per_qp=True, rng=rng)[0]
    return replace(made, initial_psn=FIRST_PSN)


PAIR = connection()
REQUESTER, RESPONDER = PAIR.requester, PAIR.responder
PATH = FramePath.of(REQUESTER)


def responder(nbytes: int = 8 * MTU) -> StoreResponder:
    return StoreResponder(
        mtu=MTU, first_psn=FIRST_PSN, memory=bytearray(nbytes), virtual_address=ADDRESS, rkey=RKEY, rnr_timer=5
    )


def packet(opcode: Opcode, number: int = 0, payload: bytes = b"", **more: object) -> RocePacket:
    made = RocePacket(
        src_address=REQUESTER.local.address,
        dst_address=RESPONDER.local.address,
        opcode=opcode,
        pkey=0xFFFF,
        dest_qp=RESPONDER.qpn,
        psn=(FIRST_PSN + number) & PSN_MASK,
        ack_request=True,
        payload=payload,
        virtual_address=ADDRESS,
        rkey=RKEY,
        dma_bytes=len(payload),
    )
    return replace(made, **more)  # type: ignore[arg-type]


def psn(number: int) -> int:
    return (FIRST_PSN + number) & PSN_MASK


FULL = bytes(range(256))


@pytest.mark.parametrize("syndrome", [ACK_SYNDROME, *Syndrome])
def test_answer_is_the_frame_that_scapy_builds(syndrome: int) -> None:
    back = FramePath.of(RESPONDER)
    ours = render_answer(RESPONDER, psn=0x123456, msn=0xABCDEF, syndrome=syndrome)
    assert ours == build_ack(back, dest_qp=REQUESTER.qpn, psn=0x123456, msn=0xABCDEF, syndrome=syndrome)


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(97)), FULL])
@pytest.mark.parametrize("opcode", [Opcode.WRITE_ONLY, Opcode.WRITE_MIDDLE, Opcode.WRITE_ONLY_WITH_IMMEDIATE])
def test_parsed_frame_says_what_scapy_put_into_it(opcode: Opcode, payload: bytes) -> None:
    target = None if opcode is Opcode.WRITE_MIDDLE else WriteTarget(ADDRESS, RKEY, 1234)
    immediate = 0x01020304 if opcode is Opcode.WRITE_ONLY_WITH_IMMEDIATE else None
    frame = build_write(
        PATH, opcode=opcode, dest_qp=0xABCDE, psn=77, payload=payload, ack_request=True, target=target,
        immediate=immediate,
    )  # fmt: skip
    read = parse_packet(frame + b"\0\0\0")  # Ethernet pads short frames
    assert (read.src_address, read.dst_address) == (PATH.src_address, PATH.dst_address)
    assert (read.opcode, read.dest_qp, read.psn, read.ack_request, read.pkey) == (opcode, 0xABCDE, 77, True, 0xFFFF)
    assert read.payload == payload
    assert read.immediate == immediate
    reth = (read.virtual_address, read.rkey, read.dma_bytes)
    assert reth == ((0, 0, 0) if target is None else (ADDRESS, RKEY, 1234))


def test_parsed_ack_has_its_syndrome() -> None:
    read = parse_packet(build_ack(PATH, dest_qp=1, psn=2, msn=3, syndrome=0x60))
    assert (read.opcode, read.syndrome, read.msn) == (Opcode.ACKNOWLEDGE, 0x60, 3)


def test_every_flipped_bit_that_the_icrc_covers_is_noticed() -> None:
    frame = build_write(PATH, opcode=Opcode.WRITE_MIDDLE, dest_qp=5, psn=6, payload=bytes(12))
    variant = {ETHERNET_BYTES + 1, ETHERNET_BYTES + 8, ETHERNET_BYTES + 10, ETHERNET_BYTES + 11}
    variant |= {ETHERNET_BYTES + 26, ETHERNET_BYTES + 27, BTH_OFFSET + 4}
    parse_packet(frame)
    for place in sorted(set(range(ETHERNET_BYTES, len(frame))) - variant):
        for bit in range(8):
            with pytest.raises(FrameError):
                parse_packet(frame[:place] + bytes([frame[place] ^ 1 << bit]) + frame[place + 1 :])


@given(st.binary(max_size=120))
def test_rubbish_raises_nothing_but_a_frame_error(rubbish: bytes) -> None:
    frame = build_ack(PATH, dest_qp=1, psn=2, msn=3)
    for data in (rubbish, frame[:BTH_OFFSET] + rubbish, frame[:ETHERNET_BYTES] + rubbish):
        with pytest.raises(FrameError):
            parse_packet(data)


def test_headers_that_are_cut_short_behind_a_right_icrc_are_no_packet() -> None:
    frame = bytearray(build_ack(PATH, dest_qp=1, psn=2, msn=3))
    frame[BTH_OFFSET] = Opcode.WRITE_ONLY  # whose RETH has no room
    with pytest.raises(FrameError, match="cut short"):
        parse_packet(with_icrc(frame))
    assert ipv4_checksum(frame[14:34]) == int.from_bytes(frame[24:26], "big")


def test_write_of_three_packets_is_stored_and_acknowledged_once() -> None:
    one = responder()
    first = packet(Opcode.WRITE_FIRST, 0, FULL, virtual_address=ADDRESS + 3, dma_bytes=2 * MTU + 5, ack_request=False)
    assert one.receive(first) is None
    assert one.receive(packet(Opcode.WRITE_MIDDLE, 1, FULL[::-1], ack_request=False)) is None
    assert one.arrivals == []
    assert one.receive(packet(Opcode.WRITE_LAST, 2, b"tails")) == Answer(psn(2), 1, Syndrome.ACK)
    assert bytes(one._memory) == bytes(3) + FULL + FULL[::-1] + b"tails" + bytes(6 * MTU - 8)
    assert one.arrivals == [Arrival(False, 2 * MTU + 5, None)]


def test_gap_has_one_nak_and_another_when_it_comes_again_with_the_gap() -> None:
    one = responder()
    assert one.receive(packet(Opcode.WRITE_MIDDLE, 2, FULL)) == Answer(psn(0), 0, Syndrome.SEQUENCE_ERROR)
    assert one.receive(packet(Opcode.WRITE_MIDDLE, 3, FULL)) is None
    assert one.receive(packet(Opcode.WRITE_MIDDLE, 1, FULL)) == Answer(psn(0), 0, Syndrome.SEQUENCE_ERROR)
    assert one.receive(packet(Opcode.WRITE_MIDDLE, 2, FULL)) is None
    assert one.receive(packet(Opcode.WRITE_ONLY, 0, b"x")) == Answer(psn(0), 1, Syndrome.ACK)
    assert one.counts["naks"] == 2
    assert one.counts["out_of_order"] == 4


def test_duplicate_is_told_the_latest_and_not_executed_again() -> None:
    one = responder()
    one.receive(packet(Opcode.WRITE_ONLY, 0, b"first"))
    one.receive(packet(Opcode.WRITE_ONLY, 1, b"second"))
    assert one.receive(packet(Opcode.WRITE_ONLY, 0, b"again")) == Answer(psn(1), 2, Syndrome.ACK)
    assert one.receive(packet(Opcode.WRITE_ONLY, 0, b"again", ack_request=False)) is None
    assert bytes(one._memory[:6]) == b"second"
    assert len(one.arrivals) == 2


INVALID = {
    "middle without first": [packet(Opcode.WRITE_MIDDLE, 0, FULL)],
    "last without first": [packet(Opcode.WRITE_LAST, 0, b"x")],
    "first within a message": [
        packet(Opcode.WRITE_FIRST, 0, FULL, dma_bytes=1024),
        packet(Opcode.WRITE_FIRST, 1, FULL),
    ],
    "only within a message": [packet(Opcode.WRITE_FIRST, 0, FULL, dma_bytes=1024), packet(Opcode.WRITE_ONLY, 1, b"")],
    "send within a write": [packet(Opcode.WRITE_FIRST, 0, FULL, dma_bytes=1024), packet(Opcode.SEND_LAST, 1, b"x")],
    "short first": [packet(Opcode.WRITE_FIRST, 0, b"x", dma_bytes=1024)],
    "long only": [packet(Opcode.WRITE_ONLY, 0, FULL + b"xxxx")],
    "empty last": [packet(Opcode.WRITE_FIRST, 0, FULL, dma_bytes=MTU), packet(Opcode.WRITE_LAST, 1, b"")],
    "more than announced": [packet(Opcode.WRITE_ONLY, 0, b"four", dma_bytes=3)],
    "less than announced": [packet(Opcode.WRITE_ONLY, 0, b"four", dma_bytes=5)],
    "last too long": [packet(Opcode.WRITE_FIRST, 0, FULL, dma_bytes=MTU + 1), packet(Opcode.WRITE_LAST, 1, b"xx")],
    "huge": [packet(Opcode.WRITE_FIRST, 0, FULL, dma_bytes=(1 << 31) + 1)],
    "read": [packet(Opcode.READ_REQUEST, 0)],
    "atomic": [replace(packet(Opcode.SEND_ONLY, 0), opcode=0x13)],
}


@pytest.mark.parametrize("packets", INVALID.values(), ids=INVALID)
def test_invalid_request_ends_the_connection(packets: list[RocePacket]) -> None:
    one = responder()
    for good in packets[:-1]:
        answer = one.receive(good)
        assert answer is None or answer.syndrome == Syndrome.ACK
    before = bytes(one._memory)
    bad = len(packets) - 1
    assert one.receive(packets[-1]) == Answer(psn(bad), 0, Syndrome.INVALID_REQUEST)
    assert bytes(one._memory) == before
    assert one.failed == Syndrome.INVALID_REQUEST
    assert one.receive(packet(Opcode.WRITE_ONLY, bad, b"x")) is None


@pytest.mark.parametrize(
    "more",
    [
        {"rkey": RKEY ^ 1},
        {"virtual_address": ADDRESS - 1},
        {"virtual_address": ADDRESS + 8 * MTU - 3},
    ],
)
def test_access_beyond_the_memory_is_refused(more: dict[str, int]) -> None:
    one = responder()
    assert one.receive(packet(Opcode.WRITE_ONLY, 0, b"four", **more)) == Answer(psn(0), 0, Syndrome.REMOTE_ACCESS_ERROR)
    assert not any(one._memory)


def test_write_without_bytes_needs_no_key() -> None:
    one = responder()
    assert one.receive(packet(Opcode.WRITE_ONLY, 0, b"", rkey=0)) == Answer(psn(0), 1, Syndrome.ACK)


def test_send_waits_for_a_place_and_what_is_behind_it_is_not_answered() -> None:
    one, place = responder(), bytearray(300)
    assert one.receive(packet(Opcode.SEND_FIRST, 0, FULL)) == Answer(psn(0), 0, Syndrome.RNR | 5)
    assert one.receive(packet(Opcode.SEND_LAST, 1, b"x")) is None
    one.post_receive(place)
    one.receive(packet(Opcode.SEND_FIRST, 0, FULL))
    last = packet(Opcode.SEND_LAST_WITH_IMMEDIATE, 1, b"x", immediate=9)
    assert one.receive(last) == Answer(psn(1), 1, Syndrome.ACK)
    assert place == FULL + b"x" + bytes(43)
    assert one.arrivals == [Arrival(True, 257, 9)]
    assert one.failed is None


def test_write_with_immediate_takes_a_place_and_leaves_it_empty() -> None:
    one, place = responder(), bytearray(4)
    write = packet(Opcode.WRITE_ONLY_WITH_IMMEDIATE, 0, b"four", immediate=7)
    assert one.receive(write) == Answer(psn(0), 0, Syndrome.RNR | 5)
    assert not any(one._memory)
    assert one.arrivals == []
    one.post_receive(place)
    assert one.receive(write) == Answer(psn(0), 1, Syndrome.ACK)
    assert bytes(one._memory[:5]) == b"four\0"
    assert not any(place)
    assert one.arrivals == [Arrival(False, 4, 7)]
    # It is used up: neither a SEND nor the next immediate data finds one.
    assert one.receive(packet(Opcode.SEND_ONLY, 1, b"x")) == Answer(psn(1), 1, Syndrome.RNR | 5)
    assert one.counts["rnr_naks"] == 2


def test_long_write_with_immediate_waits_for_a_place_at_its_last_packet_alone() -> None:
    one = responder()
    first = packet(Opcode.WRITE_FIRST, 0, FULL, dma_bytes=MTU + 1)
    last = packet(Opcode.WRITE_LAST_WITH_IMMEDIATE, 1, b"x", immediate=9)
    assert one.receive(first) == Answer(psn(0), 0, Syndrome.ACK)
    assert one.receive(last) == Answer(psn(1), 0, Syndrome.RNR | 5)
    assert one.receive(packet(Opcode.WRITE_ONLY, 2, b"y")) is None
    one.post_receive(bytearray(4))
    # A requester may begin the message again: what was there already is not executed twice.
    assert one.receive(first) == Answer(psn(0), 0, Syndrome.ACK)
    assert one.receive(last) == Answer(psn(1), 1, Syndrome.ACK)
    assert bytes(one._memory[: MTU + 2]) == FULL + b"x\0"
    assert one.arrivals == [Arrival(False, MTU + 1, 9)]
    assert one.failed is None


def test_send_longer_than_its_place_is_refused() -> None:
    one = responder()
    one.post_receive(bytearray(3))
    assert one.receive(packet(Opcode.SEND_ONLY, 0, b"four")) == Answer(psn(0), 0, Syndrome.INVALID_REQUEST)


@pytest.mark.parametrize("dropped", [replace(packet(Opcode.WRITE_ONLY), pkey=0x1234), packet(Opcode.CNP)])
def test_what_is_not_for_it_is_dropped_without_an_answer(dropped: RocePacket) -> None:
    one = responder()
    assert one.receive(dropped) is None
    assert one.counts["dropped"] == 1
    assert one.failed is None


def test_frames_of_others_and_answers_are_let_go() -> None:
    store = StoreQueuePair(RESPONDER, responder())
    for frame in (
        build_write(PATH, opcode=Opcode.WRITE_ONLY, dest_qp=RESPONDER.qpn + 1, psn=FIRST_PSN, payload=b"",
                    target=WriteTarget(0, 0, 0)),
        build_write(PATH.reversed(), opcode=Opcode.WRITE_ONLY, dest_qp=RESPONDER.qpn, psn=FIRST_PSN, payload=b"",
                    target=WriteTarget(0, 0, 0)),
        build_ack(PATH, dest_qp=RESPONDER.qpn, psn=FIRST_PSN, msn=0),
    ):  # fmt: skip
        assert store.receive(frame) is None
    assert store.receive(build_cnp(PATH, dest_qp=RESPONDER.qpn)) is None
    assert (store.foreign_frames, store.bad_frames, store.responder.counts["dropped"]) == (3, 0, 1)


def engine_frames(contents: np.ndarray, sizes: list[int]) -> list[bytes]:
    """Return the engine's own frames of WRITEs of these sizes, one behind the other in the peer's memory."""
    builder = ScheduleBuilder(2, ADDRESS + len(contents))
    offset = 0
    for size in sizes:
        builder.add(0, 1, offset_bytes=offset, nbytes=size, dst_offset_bytes=ADDRESS + offset)
        offset += size
    schedule = builder.build()
    streams = build_streams(schedule, MTU)
    writer = FrameWriter([REQUESTER], np.array([FIRST_PSN]), MTU, foreign=[ForeignMemory(RKEY, contents)])
    writer.restart(schedule, streams, np.zeros(1, np.int64))
    return list(_take_all(writer, int(streams.packets[0])))


def _take_all(writer: FrameWriter, packets: int) -> Iterator[bytes]:
    ring = writer.ring
    for number in range(packets):
        writer.prepare(np.array([number]), 1)
        slot = number % writer.depth
        header = ring.headers[slot, : int(ring.header_lengths[slot])].tobytes()
        payload = ring.payload[slot, : int(ring.payload_lengths[slot])].tobytes()
        yield header + payload + int(ring.icrcs[slot]).to_bytes(4, "little")


def test_engine_frames_with_contents_are_those_of_scapy() -> None:
    sizes = [1, 2 * MTU, 3 * MTU + 2, MTU, 7, 200 * MTU + 3]
    contents = np.random.default_rng(3).integers(0, 256, sum(sizes), np.uint8)
    number = offset = 0
    frames = engine_frames(contents, sizes)
    for size in sizes:
        count = -(-size // MTU)
        for index in range(count):
            opcode = (
                Opcode.WRITE_ONLY if count == 1
                else Opcode.WRITE_FIRST if not index
                else Opcode.WRITE_LAST if index == count - 1
                else Opcode.WRITE_MIDDLE
            )  # fmt: skip
            begin = offset + index * MTU
            payload = contents[begin : min(begin + MTU, offset + size)].tobytes()
            target = WriteTarget(ADDRESS + offset, RKEY, size) if not index else None
            asks = Ether(frames[number])[BTH].ackreq
            assert frames[number] == build_write(
                PATH, opcode=opcode, dest_qp=RESPONDER.qpn, psn=psn(number), payload=payload, target=target,
                ack_request=bool(asks),
            )  # fmt: skip
            number += 1
        offset += size
    assert number == len(frames)


class Network:
    """A requester that goes back, and a network that loses, doubles and overtakes as a seed has it."""

    def __init__(self, store: StoreQueuePair, frames: list[bytes], seed: int, trouble: float) -> None:
        self.store, self.frames, self.trouble = store, frames, trouble
        self.random = random.Random(seed)

    def run(self) -> int:
        """Send until all is acknowledged; return the packets sent."""
        acked = position = sent = 0
        while acked < len(self.frames):
            burst = list(range(position, min(position + 16, len(self.frames))))
            sent += len(burst)
            assert sent < 1000 * len(self.frames) + 1000
            position = burst[-1] + 1 if burst else acked
            arriving = [
                one for one in burst for _ in range(self.random.choices((1, 0, 2), (1, *2 * [self.trouble]))[0])
            ]
            for place in range(len(arriving) - 1):
                if self.random.random() < self.trouble:
                    arriving[place : place + 2] = reversed(arriving[place : place + 2])
            for number in arriving:
                answer = self.store.receive(self.frames[number])
                if answer is None or self.random.random() < self.trouble:
                    continue
                read = Ether(answer)
                there = (read[BTH].psn - FIRST_PSN) & PSN_MASK
                if read[AETH].syndrome == Syndrome.SEQUENCE_ERROR:
                    acked = max(acked, there)
                    position = acked
                else:
                    assert read[AETH].syndrome == Syndrome.ACK
                    acked = max(acked, (there + 1) & PSN_MASK)
            if position == len(self.frames):
                position = acked  # a timer
        return sent


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 3 * MTU + 7), min_size=1, max_size=12),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_whatever_the_network_does_the_bytes_arrive_once_and_in_order(
    sizes: list[int], seed: int, trouble: float
) -> None:
    contents = np.random.default_rng(seed).integers(0, 256, sum(sizes), np.uint8)
    memory = bytearray(len(contents))
    one = StoreResponder(mtu=MTU, first_psn=FIRST_PSN, memory=memory, virtual_address=ADDRESS, rkey=RKEY)
    frames = engine_frames(contents, sizes)
    sent = Network(StoreQueuePair(RESPONDER, one), frames, seed, trouble).run()
    assert memory == contents.tobytes()
    assert one.arrivals == [Arrival(False, size, None) for size in sizes]
    assert one.counts["in_order"] == len(frames)
    if not trouble:
        assert sent == len(frames)
        assert one.counts["naks"] == one.counts["duplicate"] == 0


def test_a_flipped_bit_is_neither_stored_nor_answered() -> None:
    contents = np.random.default_rng(1).integers(0, 256, 2 * MTU, np.uint8)
    store = StoreQueuePair(RESPONDER, responder())
    frame = engine_frames(contents, [2 * MTU])[0]
    assert store.receive(frame[:100] + bytes([frame[100] ^ 4]) + frame[101:]) is None
    assert store.bad_frames == 1
    assert store.responder.counts["in_order"] == 0
    store.receive(frame)
    assert store.responder.counts["in_order"] == 1
