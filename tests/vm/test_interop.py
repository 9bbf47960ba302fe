"""Our RoCEv2 judged by one that we did not write: the kernel's rxe takes what the engine sends, and is answered by us."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from scapy.utils import wrpcap

from testbed import api
from testbed.carriers.buffers import Bytes
from testbed.carriers.capacity import wall_tick_ns
from testbed.carriers.interop import (
    RxeEnd,
    aim,
    connect_rxe,
    rxe_end,
    store_endpoint,
    store_responder,
    write_to_foreign,
)
from testbed.carriers.interop_check import DIRECTIONS, InteropRow
from testbed.collectives.schedule import ScheduleBuilder
from testbed.engine.frames import ForeignMemory, FrameWriter
from testbed.engine.stream import build_streams
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.roce_socket import roce_listener
from testbed.plan.compile import compile_plan
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, QueuePair
from testbed.roce.responder import Syndrome
from testbed.roce.wire import data_tos
from testbed.scenario import load_scenario
from tests.conftest import skip_or_fail
from tests.netns.labs import PATIENCE_S, SCENARIO, address_of, in_node, lab_name, listening_socket

pytestmark = pytest.mark.root

GOLDEN = Path(__file__).parent / "interop"
MTU = 4096
MESSAGE = 1 << 20
# 50 Mbit/s on the guest's clock: rxe, the fabric and Python share one CPU of 10^9 instructions a second.
SETTINGS = ("time_dilation=8000", "transport.retransmit_timeout=40 us")
# What a requester is told of our memory: numbers of our own choosing.
ADDRESS, RKEY = 0x7E57_0000_1000, 0x1BADCAFE
SHORT_PACKETS = 8
AETH = ("infiniband.bth.opcode", "infiniband.bth.psn", "infiniband.aeth.syndrome", "infiniband.aeth.msn")


@contextlib.contextmanager
def interop_fabric(*overrides: str) -> Iterator[Fabric]:
    plan = compile_plan(
        load_scenario(SCENARIO, [*SETTINGS, *overrides]), capacity_packets_per_s=None, wall_tick_ns=wall_tick_ns()
    )
    with Fabric.build(plan, lab_name("interop"), any_workload=True) as fabric:
        yield fabric


def first_psn(fabric: Fabric) -> int:
    return fabric.plan.workloads[0].connections[0].initial_psn


def nic_of(fabric: Fabric, role: int) -> int:
    connection = fabric.plan.workloads[0].connections[0]
    return (connection.requester if role == REQUESTER else connection.responder).local.nic


def contents(seed: int, nbytes: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@contextlib.contextmanager
def connected_rxe(fabric: Fabric, role: int, buffer: Bytes) -> Iterator[RxeEnd]:
    with rxe_end(fabric, nic_of(fabric, role), buffer) as end:
        connect_rxe(fabric, end, role)
        yield end


def finish(end: RxeEnd, requests: int, work: Callable[[], object]) -> None:
    """Work until so many requests of rxe are complete, each with success."""
    statuses: list[int] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(statuses) < requests:
        assert time.monotonic() < deadline, f"{len(statuses)} of {requests} requests complete"
        work()
        statuses += end.poll()
    assert statuses == [0] * requests


def test_all_bytes_arrive_each_way_as_the_command_says() -> None:
    command = [sys.executable, "-m", "testbed", "interop", "--size", "10MiB", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr)
    assert done.returncode == 0
    rows = [InteropRow(**row) for row in json.loads(done.stdout)]
    print(*rows, sep="\n")
    assert [row.direction for row in rows] == list(DIRECTIONS)
    assert all(row.is_whole for row in rows)
    assert not any(row.lost_packets or row.nak_packets or row.error for row in rows)
    assert not rows[0].retransmitted_packets  # rxe's timer is its own: it may run out where a busy machine lets it wait


def test_all_bytes_arrive_each_way_where_one_percent_is_lost() -> None:
    for row in api.check_interop(10 << 20, ["fabric.uplink.loss=0.01"]):
        print(row)
        assert row.is_whole
        assert row.lost_packets > 0
        assert row.nak_packets > 0
        assert row.retransmitted_packets > 0


def test_rxe_sends_once_there_is_a_place_and_hands_over_immediate_data() -> None:
    """A SEND fills its place; immediate data of a WRITE takes one, at the WRITE's last packet, and leaves it empty."""
    sent, memory = contents(4, MESSAGE), bytearray(3 * MTU)
    places = [bytearray(MESSAGE), bytearray(64), bytearray(64)]
    with interop_fabric() as fabric, connected_rxe(fabric, REQUESTER, sent) as end:
        store = store_responder(fabric, end.qpn, memory, virtual_address=ADDRESS, rkey=RKEY)
        responder = store.responder
        with store_endpoint(fabric, store) as endpoint:

            def serve() -> None:
                endpoint.serve(0.01)
                # Two refusals for each message before it gets its place.
                if len(posted) < len(places) and responder.counts["rnr_naks"] == 2 * len(posted) + 2:
                    assert len(responder.arrivals) == len(posted)
                    posted.append(places[len(posted)])
                    responder.post_receive(posted[-1])

            posted: list[bytearray] = []
            end.send(0, MESSAGE - 3)  # of a length that needs padding
            end.write(0, 61, virtual_address=ADDRESS + 1, rkey=RKEY, immediate=77)
            end.write(0, MTU + 5, virtual_address=ADDRESS + MTU, rkey=RKEY, immediate=78)
            finish(end, 3, serve)
        print(f"rxe to store, with refusals: {dict(responder.counts)}")
    assert responder.counts["rnr_naks"] == 6
    assert places == [sent[: MESSAGE - 3].tobytes() + bytes(3), bytes(64), bytes(64)]
    written = bytes(1) + sent[:61].tobytes() + bytes(MTU - 62) + sent[: MTU + 5].tobytes()
    assert memory == written.ljust(3 * MTU, b"\0")
    sizes = [(True, MESSAGE - 3), (False, 61), (False, MTU + 5)]
    assert [(one.is_send, one.nbytes) for one in responder.arrivals] == sizes
    numbers = [one.immediate.to_bytes(4, "big") for one in responder.arrivals if one.immediate is not None]
    assert [int.from_bytes(one, "little") for one in numbers] == [77, 78]  # in rxe's byte order


def test_frame_with_a_wrong_bit_is_dropped_by_both() -> None:
    """The negative control: without it a judge that looks at nothing would do."""
    flipped: list[int] = []

    def flip_one(frame: bytes) -> bytes:
        if len(frame) < MTU or flipped:
            return frame
        flipped.append(len(frame))
        return frame[:500] + bytes([frame[500] ^ 1]) + frame[501:]

    sent, memory = contents(5, SHORT_PACKETS * MTU), bytearray(SHORT_PACKETS * MTU)
    with interop_fabric() as fabric:
        with connected_rxe(fabric, REQUESTER, sent) as end:
            store = store_responder(fabric, end.qpn, memory, virtual_address=ADDRESS, rkey=RKEY)
            with store_endpoint(fabric, store, flip_one) as endpoint:
                end.write(0, len(memory), virtual_address=ADDRESS, rkey=RKEY)
                finish(end, 1, lambda: endpoint.serve(0.01))
        assert flipped
        assert store.bad_frames == 1
        assert store.responder.counts["naks"] == 1
        assert memory == sent.tobytes()

        taken = np.zeros(SHORT_PACKETS * MTU, np.uint8)
        with connected_rxe(fabric, RESPONDER, taken) as end, Frames(fabric, end, sent) as frames:
            frames.send(0, flip_bit=500)
            assert frames.answers(wait_s=0.2) == []
            assert not taken.any()
            frames.send(*range(SHORT_PACKETS))
            assert frames.answers() == [("0x11", "0x1f")]
            assert (taken == sent).all()


def test_wrong_key_is_refused_and_not_taken_for_an_ack() -> None:
    memory = np.zeros(MTU, np.uint8)
    with interop_fabric("transport.retransmit_timeout=5 us") as fabric, connected_rxe(fabric, RESPONDER, memory) as end:
        foreign = ForeignMemory(end.rkey ^ 1, contents(6, MTU))
        name = fabric.plan.topology.nodes[nic_node(fabric, REQUESTER)].name
        with listening_socket(fabric, name, "eth0") as tap:
            with pytest.raises(RunError, match="no ACK after 7 retries"):
                write_to_foreign(fabric, end.qpn, foreign, end.virtual_address, message_bytes=MTU)
            answers = [frame[54] for inbound, frame in drain(tap) if inbound]
    assert answers == [Syndrome.REMOTE_ACCESS_ERROR]  # once: a queue pair that refused is dead
    assert not memory.any()


def test_naks_both_ways_are_what_tshark_reads(update_golden: bool, tmp_path: Path) -> None:
    """Of eight packets the third is lost, once towards rxe and once towards us."""
    sent = contents(7, SHORT_PACKETS * MTU)
    with interop_fabric() as fabric:
        taken = np.zeros(SHORT_PACKETS * MTU, np.uint8)
        with connected_rxe(fabric, RESPONDER, taken) as end, Frames(fabric, end, sent) as frames:
            frames.send(0, 1, *range(3, SHORT_PACKETS))
            assert frames.answers() == [("0x11", "0x60")]
            frames.send(*range(2, SHORT_PACKETS))
            assert frames.answers() == [("0x11", "0x1f")]
            to_rxe = describe(decode(frames.seen, tmp_path), first_psn(fabric))
        assert (taken == sent).all()

        memory, psn = bytearray(SHORT_PACKETS * MTU), first_psn(fabric)
        losses: list[int] = []

        def lose_third(frame: bytes) -> bytes | None:
            if int.from_bytes(frame[51:54], "big") != (psn + 2) & 0xFFFFFF or losses:
                return frame
            losses.append(1)
            return None

        name = fabric.plan.topology.nodes[nic_node(fabric, REQUESTER)].name
        with connected_rxe(fabric, REQUESTER, sent) as end, listening_socket(fabric, name, "eth0") as tap:
            store = store_responder(fabric, end.qpn, memory, virtual_address=ADDRESS, rkey=RKEY)
            with store_endpoint(fabric, store, lose_third) as endpoint:
                end.write(0, len(memory), virtual_address=ADDRESS, rkey=RKEY)
                finish(end, 1, lambda: endpoint.serve(0.01))
            from_rxe = describe(decode(drain(tap), tmp_path), psn)
        assert memory == sent.tobytes()
    compare("engine-to-rxe", to_rxe, update_golden)
    compare("rxe-to-store", from_rxe, update_golden)


def nic_node(fabric: Fabric, role: int) -> int:
    return fabric.plan.topology.nics[nic_of(fabric, role)].node


Seen = list[tuple[bool, bytes]]
"""Frames of an interface: whether each came in, and its bytes."""


def drain(tap: socket.socket) -> Seen:
    tap.setblocking(False)
    seen: Seen = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, address = tap.recvfrom(1 << 16)
            if frame[23:24] == b"\x11" and frame[36:38] == (4791).to_bytes(2, "big"):
                seen.append((address[2] == 0, frame))
    return seen


class Frames:
    """The frames that the engine would write into rxe's memory, sent by hand, and what comes back."""

    def __init__(self, fabric: Fabric, end: RxeEnd, sent: Bytes) -> None:
        connection = fabric.plan.workloads[0].connections[0]
        requester: QueuePair = aim(connection.requester, end.qpn)
        source, target = requester.local.rank, requester.remote.rank
        builder = ScheduleBuilder(max(source, target) + 1, end.virtual_address + len(sent))
        builder.add(source, target, offset_bytes=0, nbytes=len(sent), dst_offset_bytes=end.virtual_address)
        schedule = builder.build()
        psns = np.array([connection.initial_psn], np.int64)
        tos = data_tos(connection.priority)
        self._writer = FrameWriter([requester], psns, MTU, tos=tos, foreign=[ForeignMemory(end.rkey, sent)])
        self._writer.restart(schedule, build_streams(schedule, MTU), np.zeros(1, np.int64))
        self._rank = source
        self._fabric, self._node = fabric, fabric.plan.topology.nodes[nic_node(fabric, REQUESTER)].name
        self._stack = contextlib.ExitStack()
        self.seen: Seen = []

    def __enter__(self) -> Frames:
        with in_node(self._fabric, self._node):
            self._socket = self._stack.enter_context(open_packet_socket("eth0"))
            self._stack.enter_context(roce_listener(address_of(self._fabric, self._rank)))
        self._tap = self._stack.enter_context(listening_socket(self._fabric, self._node, "eth0"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(self, *packets: int, flip_bit: int | None = None) -> None:
        ring = self._writer.ring
        for packet in packets:
            frame = ring.headers[packet, : int(ring.header_lengths[packet])].tobytes() + ring.payload[packet].tobytes()
            frame += int(ring.icrcs[packet]).to_bytes(4, "little")
            if flip_bit is not None:
                frame = frame[:flip_bit] + bytes([frame[flip_bit] ^ 1]) + frame[flip_bit + 1 :]
            self._socket.send(frame)

    def answers(self, wait_s: float = PATIENCE_S) -> list[tuple[str, str]]:
        """Return opcode and syndrome of what came back: the first within the time."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            fresh = drain(self._tap)
            self.seen += fresh
            if found := [(hex(frame[42]), hex(frame[54])) for inbound, frame in fresh if inbound]:
                return found
            time.sleep(0.01)
        return []


def decode(seen: Seen, folder: Path) -> list[tuple[bool, list[str]]]:
    """Return the fields of every frame as tshark reads them."""
    if shutil.which("tshark") is None:
        skip_or_fail("tshark is not installed (apt install tshark)")
    file = folder / "seen.pcap"
    wrpcap(str(file), [frame for _, frame in seen], linktype=1)
    fields = [part for field in (*AETH, "_ws.malformed") for part in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-r", str(file), "-T", "fields", *fields], capture_output=True, text=True, check=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == len(seen)
    return [(inbound, row) for (inbound, _), row in zip(seen, rows, strict=True)]


def describe(rows: list[tuple[bool, list[str]]], psn: int) -> str:
    """Return the frames each way in their order, PSNs counted from the first; when those of the two ways met is chance."""
    lines = []
    for title, way in (("requests", False), ("answers", True)):
        lines.append(title)
        for inbound, (opcode, number, syndrome, msn, malformed) in rows:
            if inbound == way:
                text = f"  opcode {int(opcode):#04x} psn +{(int(number, 0) - psn) & 0xFFFFFF}"
                if syndrome:
                    text += f" syndrome {int(syndrome, 0):#04x} msn {int(msn, 0)}"
                lines.append(text + (" malformed" if malformed else ""))
    return "\n".join(lines) + "\n"


def compare(name: str, text: str, update_golden: bool) -> None:
    file = GOLDEN / f"{name}.txt"
    if update_golden:
        file.write_text(text)
    print(text)
    assert text == file.read_text()
