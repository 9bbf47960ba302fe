"""What the responder answers to frames that are missing or come twice."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from scapy.contrib.roce import AETH
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from testbed.engine.frames import RKEY
from testbed.kernel.packet_socket import open_packet_socket
from testbed.roce.bth import FramePath, WriteTarget, build_write
from testbed.roce.icrc import carried_icrc, compute_icrc
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, Connection, qp_index
from testbed.roce.wire import PSN_MASK, Opcode
from tests.netns.captures import as_captured, check_headers, number, read_tshark
from tests.netns.labs import LINE, activate_qps, assert_drained, in_node, listening_socket, small_fabric

pytestmark = pytest.mark.root


def write_frame(connection: Connection, position: int, *, ack: bool = False, last: bool = False) -> bytes:
    """Return the frame of a connection's packet: the first begins a message, ``last`` ends it."""
    requester = connection.requester
    path = FramePath.of(requester)
    opcode = Opcode.WRITE_LAST if last else Opcode.WRITE_FIRST if position == 0 else Opcode.WRITE_MIDDLE
    return build_write(
        path,
        opcode=opcode,
        dest_qp=requester.peer_qpn,
        psn=connection.initial_psn + position,
        payload=bytes(256),
        ack_request=ack or last,
        target=WriteTarget(0, RKEY, 4096) if position == 0 else None,
    )


def receive_answers(opened: socket.socket, count: int) -> list[bytes]:
    answers: list[bytes] = []
    while len(answers) < count:
        frame = opened.recv(16384)
        if frame[36:38] == b"\x12\xb7" and frame[42] == Opcode.ACKNOWLEDGE:
            answers.append(frame)
    return answers


@pytest.mark.parametrize("initial_psn", [None, PSN_MASK - 2], ids=["anywhere", "wrapping"])
def test_gap_is_answered_with_one_nak(initial_psn: int | None, tmp_path: Path) -> None:
    with small_fabric(*LINE, name="nak") as fabric, listening_socket(fabric, "host0", "eth0") as hearing:
        connection = activate_qps(fabric)[0]
        if initial_psn is not None:
            connection = Connection(connection.requester, connection.responder, initial_psn)
            fabric.arrays.qps["initial_rx_psn"][:2] = fabric.arrays.qps["initial_tx_psn"][:2] = initial_psn
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            for position in (0, 1, 2, 4, 5, 6, 7):  # 3 is lost
                sending.send(write_frame(connection, position, ack=position == 1))
            for position in (3, 4, 5, 6, 7):
                sending.send(write_frame(connection, position))
            for position in (9, 10):  # 8 is lost: another gap, another NAK
                sending.send(write_frame(connection, position))
            for position in (8, 9, 10):
                sending.send(write_frame(connection, position, last=position == 10))
        # Answers come in order: a second NAK of the first gap would stand before the last.
        ack, first, second, last = answers = receive_answers(hearing, 4)
        told = [(frame.packet[AETH].syndrome, frame.psn, frame.packet[AETH].msn) for frame in map(as_captured, answers)]
        psn = connection.initial_psn
        assert told == [
            (0x1F, (psn + 1) & PSN_MASK, 0),
            (0x60, (psn + 3) & PSN_MASK, 0),
            (0x60, (psn + 8) & PSN_MASK, 0),
            (0x1F, (psn + 10) & PSN_MASK, 1),
        ]
        for frame in map(as_captured, answers):
            check_headers(frame, 61)
            assert frame.qpn == connection.requester.qpn
        assert_drained(fabric)
        responder, requester = (fabric.arrays.qps[qp_index(0, role)] for role in (RESPONDER, REQUESTER))
        assert (responder["rx_packets"], responder["rx_messages"], responder["rx_payload_bytes"]) == (11, 1, 11 * 256)
        assert (responder["out_of_order_packets"], responder["duplicate_packets"]) == (6, 0)
        assert (responder["sent_naks_packets"], responder["sent_acks_packets"]) == (2, 2)
        assert (requester["naks_packets"], requester["nak_position"], requester["acked_packets"]) == (2, 8, 11)

        file = tmp_path / "nak.pcap"
        wrpcap(str(file), [Ether(frame) for frame in (ack, first, second, last)])
        rows = read_tshark(
            file, "infiniband.aeth.syndrome", "infiniband.aeth.syndrome.error_code", "infiniband.bth.psn"
        )
        assert [number(row["infiniband.aeth.syndrome"]) for row in rows] == [0x1F, 0x60, 0x60, 0x1F]
        assert [row["infiniband.aeth.syndrome.error_code"] for row in rows] == ["", "0", "0", ""]  # PSN sequence error


def test_duplicate_that_asks_is_told_the_latest() -> None:
    with small_fabric(*LINE, name="dup") as fabric, listening_socket(fabric, "host0", "eth0") as hearing:
        connection = activate_qps(fabric)[0]
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            for position in (0, 1, 2, 3):
                sending.send(write_frame(connection, position))
            sending.send(write_frame(connection, 1))
            sending.send(write_frame(connection, 2, ack=True))
        (answer,) = map(as_captured, receive_answers(hearing, 1))
        assert (answer.packet[AETH].syndrome, answer.psn) == (0x1F, (connection.initial_psn + 3) & PSN_MASK)
        assert carried_icrc(answer.raw) == compute_icrc(answer.raw)
        assert_drained(fabric)
        responder = fabric.arrays.qps[qp_index(0, RESPONDER)]
        assert (responder["rx_packets"], responder["duplicate_packets"], responder["out_of_order_packets"]) == (4, 2, 0)
