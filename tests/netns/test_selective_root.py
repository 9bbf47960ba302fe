"""Selective retransmission on the wire: the eBPF responder against a scalar reference, the frames, the engine."""

from __future__ import annotations

import functools
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from testbed.fabric import Fabric
from testbed.kernel.packet_socket import open_packet_socket
from testbed.roce.bth import FramePath, WriteTarget, build_write
from testbed.roce.icrc import carried_icrc, compute_icrc, with_icrc
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, Connection, qp_index
from testbed.roce.sack import SACK_BYTES, build_sack, parse_sack
from testbed.roce.wire import PSN_MASK, Opcode
from tests.conftest import skip_or_fail
from tests.netns.captures import read_tshark
from tests.netns.labs import (
    LINE,
    Quiet,
    activate_qps,
    assert_drained,
    in_node,
    listening_socket,
    plain_carrier,
    small_fabric,
)
from tests.netns.test_retransmission_root import expect_whole, lost_data
from tests.support.selective import WINDOW, Answer, Requester, Responder

pytestmark = pytest.mark.root

SELECTIVE = "transport.loss_recovery=selective"
PAYLOAD = 64
_PSN_OFFSET = 51
_AETH_OFFSET = 54
_SACK_OFFSET = 58


class Sender:
    """Sends the packets of a connection by number, in messages of some packets each."""

    def __init__(self, connection: Connection, packets_per_message: int) -> None:
        self.connection = connection
        self._per_message = packets_per_message
        requester = connection.requester
        self._path = FramePath.of(requester)
        self._template = functools.cache(self._build_template)

    def ends(self, packets: int) -> frozenset[int]:
        return frozenset(range(self._per_message - 1, packets, self._per_message))

    def frame(self, number: int, ask: bool) -> bytes:
        """Return a packet's frame: the template of its place in a message, with its PSN."""
        frame = bytearray(self._template(number % self._per_message, ask))
        frame[_PSN_OFFSET : _PSN_OFFSET + 3] = ((self.connection.initial_psn + number) & PSN_MASK).to_bytes(3, "big")
        return with_icrc(frame)

    def _build_template(self, place: int, ask: bool) -> bytes:
        opcode = (
            Opcode.WRITE_FIRST
            if place == 0
            else Opcode.WRITE_LAST
            if place == self._per_message - 1
            else Opcode.WRITE_MIDDLE
        )
        return build_write(
            self._path,
            opcode=opcode,
            dest_qp=self.connection.requester.peer_qpn,
            psn=0,
            payload=bytes(PAYLOAD),
            ack_request=ask,
            target=WriteTarget(0, 0, self._per_message * PAYLOAD) if place == 0 else None,
        )


def activate(fabric: Fabric, initial_psn: int) -> Connection:
    connection = activate_qps(fabric)[0]
    connection = Connection(connection.requester, connection.responder, initial_psn)
    fabric.arrays.qps["initial_rx_psn"][:2] = fabric.arrays.qps["initial_tx_psn"][:2] = initial_psn
    fabric.arrays.qps["selective"][:2] = 1
    return connection


def answers_heard(opened: socket.socket, count: int) -> list[bytes]:
    heard: list[bytes] = []
    while len(heard) < count:
        frame = opened.recv(16384)
        if frame[36:38] == b"\x12\xb7" and frame[42] == Opcode.ACKNOWLEDGE:
            heard.append(frame)
    return heard


def as_told(frame: bytes, initial_psn: int) -> Answer:
    """Return what an ACK on the wire says, in packet numbers below 2^23."""

    def number(psn: int) -> int:
        ahead = (psn - initial_psn) & PSN_MASK
        return ahead if ahead < 1 << 23 else ahead - (1 << 24)

    assert frame[_AETH_OFFSET] == 0x1F
    msn = int.from_bytes(frame[_AETH_OFFSET + 1 : _SACK_OFFSET], "big")
    in_order = number(int.from_bytes(frame[_PSN_OFFSET:_AETH_OFFSET], "big")) + 1
    if len(frame) == _SACK_OFFSET + 4:
        return Answer(in_order, msn)
    sack = parse_sack(frame[_SACK_OFFSET:-4])
    assert sack is not None
    assert len(frame) == _SACK_OFFSET + SACK_BYTES + 4
    first = number(sack.first_psn)
    return Answer(in_order, msn, first, frozenset(map(number, sack.named_psns)))


def arrivals(rng: np.random.Generator, packets: int, skew: float, loss: float) -> list[tuple[int, bool]]:
    """Return packets in an order of arrival, those lost coming later again or twice, and which ask for an ACK."""
    due = np.arange(packets) + rng.exponential(skew, packets)
    lost = rng.random(packets) < loss
    due[lost] += rng.integers(50, 600, int(lost.sum()))
    again = np.flatnonzero(rng.random(packets) < 0.05)  # comes twice
    numbers = np.concatenate((np.arange(packets), again))
    times = np.concatenate((due, due[again] + rng.integers(1, 300, len(again))))
    order = numbers[np.argsort(times, kind="stable")]
    return [(int(number), bool(rng.random() < 0.1)) for number in order]


@pytest.mark.parametrize(
    ("seed", "initial_psn", "skew", "loss"),
    [(1, 5, 0.1, 0.02), (2, PSN_MASK - 100, 8.0, 0.1), (3, 1 << 23, 200.0, 0.3), (4, PSN_MASK - 700, 40.0, 0.0)],
    ids=["nearly in order", "wrapping", "wild", "reordered only"],
)
def test_responder_and_requester_equal_the_reference(seed: int, initial_psn: int, skew: float, loss: float) -> None:
    rng = np.random.default_rng(seed)
    packets = 1000
    with (
        small_fabric(*LINE, SELECTIVE, "time_dilation=100", name=f"sel{seed}") as fabric,
        listening_socket(fabric, "host0", "eth0") as hearing,
    ):
        connection = activate(fabric, initial_psn)
        sender = Sender(connection, 7)
        coming = arrivals(rng, packets, skew, loss)
        responder, requester = Responder(sender.ends(packets)), Requester()
        expected = [answer for number, ask in coming if (answer := responder.receive(number, ask)) is not None]
        for answer in expected:
            requester.hear(answer)
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        frames = [sender.frame(number, ask) for number, ask in coming]
        with sending:
            for frame in frames:
                sending.send(frame)
        heard = answers_heard(hearing, len(expected))
        assert [as_told(frame, initial_psn) for frame in heard] == expected
        assert any(answer.named for answer in expected)  # precondition
        for frame in heard:
            assert carried_icrc(frame) == compute_icrc(frame)
        assert_drained(fabric)
        row = fabric.arrays.qps[qp_index(0, RESPONDER)]
        assert (row["rx_packets"], row["rx_messages"]) == (responder.in_order, responder.messages)
        assert row["rx_payload_bytes"] == len(responder.received) * PAYLOAD
        assert (row["out_of_order_packets"], row["duplicate_packets"]) == (responder.out_of_order, responder.duplicates)
        assert row["sent_naks_packets"] == 0
        windows = fabric.arrays.windows
        assert not windows["received"][qp_index(0, RESPONDER)].any()  # all has come
        assert not windows["ends"][qp_index(0, RESPONDER)].any()
        row = fabric.arrays.qps[qp_index(0, REQUESTER)]
        assert (row["acked_packets"], row["naks_packets"]) == (requester.acked, 0)
        assert row["sacked_until"] == requester.sacked_until
        assert bits_of(windows["received"][qp_index(0, REQUESTER)]) == {one % WINDOW for one in requester.named}


def bits_of(words: Sequence[int]) -> set[int]:
    return {64 * index + bit for index, word in enumerate(words) for bit in range(64) if int(word) >> bit & 1}


def test_window_has_an_end_and_its_last_place_works() -> None:
    with (
        small_fabric(*LINE, SELECTIVE, "time_dilation=100", name="window") as fabric,
        listening_socket(fabric, "host0", "eth0") as hearing,
    ):
        connection = activate(fabric, PSN_MASK - 3)
        sender = Sender(connection, 7)
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            for number in (0, 1, 2, WINDOW + 2, WINDOW + 3, WINDOW + 4):  # 3 is missing; the last two lie beyond
                sending.send(sender.frame(number, ask=number >= 2))
            told = [as_told(frame, PSN_MASK - 3) for frame in answers_heard(hearing, 2)]
            assert told == [
                Answer(3, 0),
                Answer(3, 0, WINDOW + 3 - 128, frozenset({WINDOW + 2})),
            ]
            row = fabric.arrays.qps[qp_index(0, RESPONDER)]
            assert_drained(fabric)
            assert (row["out_of_order_packets"], row["rx_highest"]) == (1, WINDOW + 3)
            for number in range(3, WINDOW + 5):
                sending.send(sender.frame(number, ask=number == WINDOW + 4))
            # What comes so late is answered unasked.
            late = WINDOW + 3 - 64 - 3
            told = [as_told(frame, PSN_MASK - 3) for frame in answers_heard(hearing, late + 1)]
        assert [answer.in_order for answer in told] == [*range(4, late + 4), WINDOW + 5]
        assert {answer.named for answer in told[:-1]} == {frozenset({WINDOW + 2})}
        assert told[-1] == Answer(WINDOW + 5, len(sender.ends(WINDOW + 5)))
        assert_drained(fabric)
        assert int(row["duplicate_packets"]) == 1
        assert int(fabric.arrays.qps["acked_packets"][qp_index(0, REQUESTER)]) == WINDOW + 5
        assert not fabric.arrays.windows["received"][:2].any()


def test_sack_dissects_as_an_ack_without_complaint(tmp_path: Path) -> None:
    if shutil.which("tshark") is None:
        skip_or_fail("needs tshark")
    with (
        small_fabric(*LINE, SELECTIVE, name="dissect") as fabric,
        listening_socket(fabric, "host0", "eth0") as hearing,
    ):
        connection = activate(fabric, 1000)
        sender = Sender(connection, 7)
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            for number in (0, 1, 3, 5, 6):
                sending.send(sender.frame(number, ask=number == 6))
        (frame,) = answers_heard(hearing, 1)
        assert frame[_SACK_OFFSET:-4] == build_sack(1000 + 6 - 127, (127, 126, 124))
        assert carried_icrc(frame) == compute_icrc(frame)
        file = tmp_path / "sack.pcap"
        wrpcap(str(file), [Ether(frame)])
        fields = ("infiniband.bth.opcode", "infiniband.bth.psn", "infiniband.aeth.syndrome", "infiniband.aeth.msn")
        (row,) = read_tshark(file, *fields, "_ws.malformed", "_ws.expert.severity")
        assert [int(row[field], 0) for field in fields] == [0x11, 1001, 0x1F, 0]
        assert (row["_ws.malformed"], row["_ws.expert.severity"]) == ("", "")


# --- the engine --------------------------------------------------------------------------------------------------------

STREAM = ("workload.0.size=1 MiB", "time_dilation=2000", "transport.retransmit_timeout=200 us")


def test_what_is_lost_is_sent_again_and_nothing_else() -> None:
    # Data alone is lost, and nothing overtakes: every packet that is sent again was lost.
    with small_fabric(
        *LINE,
        *STREAM,
        SELECTIVE,
        "fabric.uplink.loss=5 %",
        "fabric.lost_frames=data",
        "workload.0.iters=2",
        name="holes",
    ) as fabric:
        with plain_carrier(fabric) as carrier:
            samples = carrier.run(0, Quiet())
        qps = fabric.arrays.qps
        lost = int(fabric.arrays.queues["lost_packets"].sum())
        assert lost > 20  # precondition
        assert samples.retransmitted_packets == lost + int(qps["duplicate_packets"].sum())
        assert not qps["naks_packets"].any()
        expect_whole(fabric, iterations=2)


def test_lost_acks_hold_nobody_up() -> None:
    with small_fabric(
        *LINE, *STREAM, SELECTIVE, "fabric.host_link.loss=10 %", "transport.retransmit_timeout=30 us", name="both"
    ) as fabric:
        with plain_carrier(fabric) as carrier:
            carrier.run(0, Quiet())
        assert fabric.arrays.queues["lost_packets"][:, 6].any()  # precondition: ACKs among them
        assert lost_data(fabric) == 0
        expect_whole(fabric)


def test_spraying_sends_nothing_again() -> None:
    # Long enough for a busy machine, which also delays packets: what takes longer is a loss.
    patient = ("transport.retransmit_timeout=10 ms", "transport.reorder_time=100 us")
    spray = ("routing.scheme=spray", "routing.spray_order=random", *patient)
    settings = ("workload.0.size=1 MiB", "time_dilation=2000", *spray, "fabric.spines=3", "fabric.hosts_per_leaf=3")
    again: dict[str, int] = {}
    for recovery in ("selective", "go_back_n"):
        with small_fabric(*settings, f"transport.loss_recovery={recovery}", name=recovery[:2]) as fabric:
            with plain_carrier(fabric) as carrier:
                again[recovery] = carrier.run(0, Quiet()).retransmitted_packets
            assert fabric.arrays.qps["out_of_order_packets"].any()  # precondition
            assert not fabric.arrays.queues["drop_packets"].any()
            if recovery == "selective":
                assert not fabric.arrays.qps["duplicate_packets"].any()
            expect_whole(fabric)
    assert again["selective"] == 0
    assert again["go_back_n"] > 0  # negative control
