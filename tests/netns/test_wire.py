"""The frames of a run as Wireshark, scapy and the standard see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scapy.contrib.roce import AETH, BTH
from scapy.layers.inet import IP, UDP

from testbed.engine.frames import ACK_EVERY_PACKETS, RKEY
from testbed.engine.stream import build_streams
from testbed.roce.bth import RETH
from testbed.roce.queue_pairs import Connection
from testbed.roce.wire import CONTROL_TOS, DATA_TOS, PSN_MASK, Opcode, source_port
from tests.netns.captures import Captured, captured, check_headers, number, read_roce, read_tshark
from tests.netns.labs import LINE, Quiet, assert_drained, plain_carrier, small_fabric

pytestmark = pytest.mark.root

WRITES = (Opcode.WRITE_FIRST, Opcode.WRITE_MIDDLE, Opcode.WRITE_LAST, Opcode.WRITE_ONLY)
BEGINS, ENDS = (Opcode.WRITE_FIRST, Opcode.WRITE_ONLY), (Opcode.WRITE_LAST, Opcode.WRITE_ONLY)


@dataclass(frozen=True)
class Recording:
    """A workload that ran while the path was recorded."""

    connections: Sequence[Connection]
    schedule: Any
    mtu: int
    files: dict[str, Path]
    frames: dict[str, list[Captured]]

    def data_of(self, place: str, connection: Connection, ttl: int) -> list[Captured]:
        """Return the data frames of a connection that pass a place with that TTL, in the order of the wire."""
        qpn = connection.requester.peer_qpn
        return [
            one for one in self.frames[place] if one.qpn == qpn and one.packet[IP].ttl == ttl and one.opcode in WRITES
        ]

    def acks_of(self, place: str, connection: Connection, ttl: int) -> list[Captured]:
        qpn = connection.requester.qpn
        return [
            one for one in self.frames[place] if one.qpn == qpn and one.packet[IP].ttl == ttl and one.opcode == 0x11
        ]


ITERATIONS = 2
# Slices of 37 packets, whose last has an odd length: FIRST, MIDDLE, an ACK in between, LAST with padding.
LONG = ("transport.mtu=256", "workload.0.collective=all_reduce", f"workload.0.size={2 * 8 * (36 * 256 + 83)}")
# One packet of an odd length: ONLY with a RETH and padding.
SHORT = ("transport.mtu=1024", "workload.0.collective=send_recv", "workload.0.size=777")
# Slices of two full packets and a byte: FIRST, MIDDLE, LAST, each another length.
THREE = ("transport.mtu=1024", "workload.0.collective=all_reduce", f"workload.0.size={2 * 8 * (2048 + 1)}")


@pytest.fixture(scope="module", params=[LONG, SHORT, THREE], ids=["long", "short", "three"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    iterations = f"workload.0.iters={ITERATIONS}"
    places = {"host0": "eth0", "spine0": "down0", "host1": "eth0"}
    with small_fabric(*LINE, *request.param, iterations, "time_dilation=10000", name="wire") as fabric:
        with captured(fabric, places, tmp_path_factory.mktemp("wire")) as files, plain_carrier(fabric) as carrier:
            samples = carrier.run(0, Quiet())
        assert samples.retransmitted_packets == 0
        assert_drained(fabric)
        planned = fabric.plan.workloads[0]
        frames = {node: read_roce(file) for node, file in files.items()}
        yield Recording(planned.connections, planned.schedule, fabric.plan.scenario.transport.mtu_bytes, files, frames)


def test_every_frame_is_whole_at_every_place(recording: Recording) -> None:
    # The TTL with which frames of either direction pass: out of host0, at the spine's port to leaf0, into host0.
    for place, ttls in (("host0", (64, 61)), ("spine0", (63, 62)), ("host1", (61, 64))):
        frames = recording.frames[place]
        assert frames
        for frame in frames:
            from_first_host = frame.packet[IP].src == "10.0.0.1"
            check_headers(frame, ttls[0] if from_first_host else ttls[1])
    counts = {place: len(frames) for place, frames in recording.frames.items()}
    assert len(set(counts.values())) == 1, counts


def test_forwarded_frames_name_the_ports_they_passed(recording: Recording) -> None:
    for frame in recording.frames["spine0"]:
        egress, ingress = (
            int(frame.packet.src[6:11].replace(":", ""), 16),
            int(frame.packet.src[12:].replace(":", ""), 16),
        )
        assert frame.packet.src.startswith("02:00:")
        assert egress
        assert ingress not in (0, 0xFFFF)  # not a host's own, not a kernel's


def test_data_is_what_the_schedule_says(recording: Recording) -> None:
    streams = build_streams(recording.schedule, recording.mtu)
    for index, connection in enumerate(recording.connections):
        first = connection.requester.local.rank == 0
        frames = recording.data_of("host0", connection, 64 if first else 61)
        begin, end = streams.first_packet[index : index + 2]
        packets = int(end - begin)
        assert len(frames) == ITERATIONS * packets
        for place, frame in enumerate(frames):
            packet = begin + place % packets
            bth = frame.packet[BTH]
            assert frame.psn == (connection.initial_psn + place) & PSN_MASK
            assert frame.opcode == streams.opcode[packet]
            payload = int(streams.payload_bytes[packet])
            assert bth.padcount == -payload % 4
            header = 54 + (16 if frame.opcode in BEGINS else 0)
            assert len(frame.raw) == header + payload + bth.padcount + 4
            asks = frame.opcode in ENDS or place % packets % ACK_EVERY_PACKETS == ACK_EVERY_PACKETS - 1
            assert bth.ackreq == asks
            assert (frame.packet[IP].tos, bth.fecn, bth.becn) == (DATA_TOS, 0, 0)
            assert frame.packet[UDP].sport == source_port(connection.requester.qpn, connection.responder.qpn)
            message = int(streams.message[packet])
            if frame.opcode in BEGINS:
                reth = frame.packet[RETH]
                assert (reth.va, reth.dmalen) == (
                    recording.schedule.offset_bytes[message],
                    recording.schedule.nbytes[message],
                )
                assert reth.rkey == RKEY
            else:
                assert RETH not in frame.packet


def test_the_cases_meant_do_occur(recording: Recording, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.id
    data = [frame for frame in recording.frames["host0"] if frame.opcode in WRITES]
    expected = {
        "short": {Opcode.WRITE_ONLY},
        "three": set(WRITES) - {Opcode.WRITE_ONLY},
        "long": set(WRITES) - {Opcode.WRITE_ONLY},
    }
    assert {frame.opcode for frame in data} == expected[kind]
    assert any(frame.packet[BTH].padcount for frame in data)
    if kind == "long":
        assert any(frame.packet[BTH].ackreq and frame.opcode == Opcode.WRITE_MIDDLE for frame in data)


def test_every_request_for_an_ack_is_answered_with_the_right_msn(recording: Recording) -> None:
    for connection in recording.connections:
        first = connection.requester.local.rank == 0
        data = recording.data_of("host0", connection, 64 if first else 61)
        acks = recording.acks_of("host0", connection, 61 if first else 64)
        messages, expected = 0, []
        for frame in data:
            messages += frame.opcode in ENDS
            if frame.packet[BTH].ackreq:
                expected.append((frame.psn, messages))
        assert [(ack.psn, ack.packet[AETH].msn) for ack in acks] == expected
        for ack in acks:
            assert len(ack.raw) == 62
            assert (ack.packet[AETH].syndrome, ack.packet[IP].tos) == (0x1F, CONTROL_TOS)
            assert ack.packet[UDP].sport == source_port(connection.responder.qpn, connection.requester.qpn)


def test_tshark_reads_the_same(recording: Recording) -> None:
    fields = ("opcode", "psn", "destqp", "a", "padcnt", "p_key", "m")
    extended = ("infiniband.reth.va", "infiniband.reth.r_key", "infiniband.reth.dmalen")
    answers = ("infiniband.aeth.syndrome", "infiniband.aeth.msn")
    other = ("udp.srcport", "ip.dsfield.dscp", "ip.dsfield.ecn", "infiniband.invariant.crc")
    for place, frames in recording.frames.items():
        rows = read_tshark(
            recording.files[place], *(f"infiniband.bth.{one}" for one in fields), *extended, *answers, *other
        )
        assert len(rows) == len(frames)
        for row, frame in zip(rows, frames, strict=True):
            bth = frame.packet[BTH]
            shown = [number(row[f"infiniband.bth.{one}"]) for one in fields]
            assert shown == [bth.opcode, bth.psn, bth.dqpn, bth.ackreq, bth.padcount, bth.pkey, bth.migreq]
            assert number(row["udp.srcport"]) == frame.packet[UDP].sport
            assert number(row["ip.dsfield.dscp"]) << 2 | number(row["ip.dsfield.ecn"]) == frame.packet[IP].tos
            assert number(row["infiniband.invariant.crc"]).to_bytes(4, "big") == frame.raw[-4:]
            if frame.opcode in BEGINS:
                reth = frame.packet[RETH]
                assert [number(row[name]) for name in extended] == [reth.va, reth.rkey, reth.dmalen]
            if frame.opcode == Opcode.ACKNOWLEDGE:
                assert number(row[answers[0]]) == frame.packet[AETH].syndrome
                assert number(row[answers[1]]) == frame.packet[AETH].msn
