"""DCQCN for queue pairs that are the kernel's: who is told of CE, what reaches the kernel, and whose frames are held back.

A UDP socket stands in for rxe, which has one on the same port.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from testbed.carriers.reaction import Reaction, reaction
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.kernel import layout
from testbed.kernel.netlink import RouteSocket
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.tc import read_qdiscs
from testbed.roce.bth import FramePath, WriteTarget, build_write
from testbed.roce.icrc import carried_icrc, compute_icrc
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qp_index
from testbed.roce.wire import ROCE_UDP_PORT, Opcode, data_tos
from tests.netns.labs import (
    PATIENCE_S,
    assert_drained,
    in_node,
    is_drained,
    lab_name,
    listening_socket,
    small_fabric,
    small_plan,
    wait_until,
)

pytestmark = pytest.mark.root

SETTINGS = (
    "transport.carrier=rxe",
    "transport.congestion_control=dcqcn",
    "qos.ecn.enabled=true",
    "qos.pfc.enabled=true",
)
# As rxe numbers them: from the same small numbers on every device.
NUMBERS = (0x11, 0x12)
PRIORITY = 3
CE, ECT = 3, 2
PAYLOAD_BYTES = 4096
CNP_OPCODE, OPCODE_OFFSET, QPN_OFFSET, UDP_PAYLOAD_OFFSET = 0x81, 42, 46, 42


@dataclass
class Bench:
    """A fabric between whose first connection's NICs frames of a made-up queue pair pass."""

    fabric: Fabric
    reaction: Reaction
    sending: socket.socket
    returning: socket.socket
    requester: socket.socket
    responder: socket.socket

    def row(self, role: int) -> np.void:
        row: np.void = self.fabric.arrays.qps[qp_index(0, role)]
        return row

    def send(self, count: int, *, ecn: int = ECT, dest_qp: int = NUMBERS[1]) -> bytes:
        """Send data frames; return one of them."""
        end = self.fabric.plan.workloads[0].connections[0].requester
        path = FramePath(end.local.mac, end.local.next_hop_mac, end.local.address, end.remote.address, 0xC123)
        frame = bytearray(
            build_write(
                path,
                opcode=Opcode.WRITE_ONLY,
                dest_qp=dest_qp,
                psn=7,
                payload=bytes(PAYLOAD_BYTES),
                ack_request=True,
                target=WriteTarget(0, 1, PAYLOAD_BYTES),
                tos=data_tos(PRIORITY) & ~3 | ecn,
            )
        )
        for _ in range(count):
            self.sending.send(frame)
        return bytes(frame)


def frames_each(wall_s: float) -> int:
    """Return the rate at which a frame takes so long, in bytes per second."""
    return round((PAYLOAD_BYTES + 98) / wall_s)


@contextlib.contextmanager
def opened_bench() -> Iterator[Bench]:
    with small_fabric(*SETTINGS, name="kqps") as fabric, bench_on(fabric) as bench:
        yield bench
        assert_drained(fabric)


@contextlib.contextmanager
def bench_on(fabric: Fabric) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        planned = fabric.plan.workloads[0]
        ends = planned.connections[0].requester
        hosts = [f"host{end.host}" for end in (ends.local, ends.remote)]
        opened = []
        for host in hosts:
            with in_node(fabric, host):
                one = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                one.bind(("0.0.0.0", ROCE_UDP_PORT))
                one.settimeout(PATIENCE_S)
                opened.append(one)
        with in_node(fabric, hosts[0]):
            sending = stack.enter_context(contextlib.closing(open_packet_socket("eth0")))
        numbers = [NUMBERS] * len(planned.connections)
        returning = stack.enter_context(listening_socket(fabric, hosts[0], "eth0"))
        with reaction(fabric, planned, numbers) as reacting:
            yield Bench(fabric, reacting, sending, returning, *opened)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with opened_bench() as opened:
        yield opened


def next_cnp(bench: Bench) -> bytes:
    """Return the next CNP that the sending NIC hears; other frames do not matter."""
    while True:
        frame = bench.returning.recv(1 << 16)
        if frame[12:14] == b"\x08\0" and frame[OPCODE_OFFSET] == CNP_OPCODE:
            return frame


def test_marked_frame_reaches_the_kernel_as_it_is_and_a_cnp_its_sender(bench: Bench) -> None:
    before = bench.fabric.arrays.qps.copy()
    sent = bench.send(1, ecn=CE)
    assert bench.responder.recv(1 << 16) == sent[UDP_PAYLOAD_OFFSET:]
    cnp = next_cnp(bench)
    wait_until(lambda: bool(bench.row(REQUESTER)["cnps_packets"]), "a CNP counted")
    assert int.from_bytes(cnp[QPN_OFFSET + 1 : QPN_OFFSET + 4], "big") == NUMBERS[0]
    assert carried_icrc(cnp) == compute_icrc(cnp)
    assert cnp[26:34] == sent[30:34] + sent[26:30]  # from where the data went to where it came from
    for row, role in (("sent_cnps_packets", RESPONDER), ("ce_packets", RESPONDER), ("cnps_packets", REQUESTER)):
        assert bench.row(role)[row] == before[row][qp_index(0, role)] + 1
    assert (
        bench.row(RESPONDER)["rx_payload_bytes"] == before["rx_payload_bytes"][qp_index(0, RESPONDER)] + PAYLOAD_BYTES
    )
    # Another within the interval is counted and not told.
    bench.send(1, ecn=CE)
    bench.responder.recv(1 << 16)
    assert bench.row(RESPONDER)["ce_packets"] == 2
    assert bench.row(RESPONDER)["sent_cnps_packets"] == 1
    assert_drained(bench.fabric)
    bench.requester.setblocking(False)
    with pytest.raises(BlockingIOError):  # no CNP has reached the kernel
        bench.requester.recv(1 << 16)


def test_nobody_is_told_of_what_is_not_marked(bench: Bench) -> None:
    """The negative control."""
    before = bench.fabric.arrays.qps["sent_cnps_packets"].copy()
    bench.send(3)
    for _ in range(3):
        bench.responder.recv(1 << 16)
    assert_drained(bench.fabric)
    np.testing.assert_array_equal(bench.fabric.arrays.qps["sent_cnps_packets"], before)


def test_a_queue_pair_is_held_back_alone(bench: Bench) -> None:
    """At a frame in 0.4 s ten frames stand behind the first ones, and those of another queue pair of the NIC pass them."""
    wall_rate = frames_each(0.4)
    bench.reaction._shaper.change({0: wall_rate})
    port = bench.fabric.plan.topology.nics[bench.fabric.plan.workloads[0].connections[0].requester.local.nic].id
    queue = bench.fabric.arrays.queues[port, PRIORITY]
    before, other = int(queue["deq_packets"]), NUMBERS[1] + 0x100
    bench.send(10)
    bench.send(10, dest_qp=other)
    arrived = [int.from_bytes(bench.responder.recv(1 << 16)[5:8], "big") for _ in range(12)]
    assert arrived.count(other) == 10
    standing = before + 20 - int(queue["deq_packets"])
    assert 0 < standing <= 8
    bench.reaction._shaper.change({0: 100 * wall_rate})
    assert [int.from_bytes(bench.responder.recv(1 << 16)[5:8], "big") for _ in range(8)] == [NUMBERS[1]] * 8
    assert_drained(bench.fabric)


def test_fabric_is_as_before_when_nobody_reacts_any_more() -> None:
    with small_fabric(*SETTINGS, name="kqpsend") as fabric:
        planned = fabric.plan.workloads[0]
        flags = fabric.arrays.ports["flags"].copy()
        for _ in range(2):  # nor does what one leaves hinder the next
            with reaction(fabric, planned, [NUMBERS] * len(planned.connections)):
                assert (fabric.arrays.ports["flags"] & layout.PORT_KERNEL_QPS).any()
        np.testing.assert_array_equal(fabric.arrays.ports["flags"], flags)
        assert_drained(fabric)


def qp_shapers(fabric: Fabric) -> int:
    """Return how many HTBs with rates of queue pairs stand in the first host."""
    with in_node(fabric, "host0"), RouteSocket() as route:
        return sum(kind == "htb" for _, _, kind, _ in read_qdiscs(route))


def hold_back(bench: Bench, wall_s: float) -> None:
    """Let frames stand at the NIC, each of which takes so long."""
    bench.reaction._shaper.change({0: frames_each(wall_s)})
    bench.send(10)
    for _ in range(2):  # the bucket
        bench.responder.recv(1 << 16)
    assert not is_drained(bench.fabric)


def fail_while_frames_stand(fabric: Fabric, wall_s: float) -> None:
    with bench_on(fabric) as bench:
        hold_back(bench, wall_s)
        raise RunError("as when nothing arrives")


@pytest.mark.parametrize(("wall_s", "left"), [(0.4, 0), (2.7, 1)], ids=["in time", "too late"])
def test_what_stands_when_a_run_fails_leaves_all_the_same(wall_s: float, left: int) -> None:
    """The classes go when nothing waits in them, and stay, without their rates, where something does for too long."""
    with small_fabric(*SETTINGS, name="kqpfail") as fabric:
        with pytest.raises(RunError):
            fail_while_frames_stand(fabric, wall_s)
        assert qp_shapers(fabric) == left
        with bench_on(fabric) as bench:  # whatever has been left, it may still hold frames
            sent = bench.send(10)
            assert [bench.responder.recv(1 << 16) for _ in range(10)] == [sent[UDP_PAYLOAD_OFFSET:]] * 10
        assert not qp_shapers(fabric)
        assert_drained(fabric)


def test_what_stands_when_a_run_is_killed_leaves_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.fabric.fabric.create_lab_devices", lambda *_: None)  # which many kernels have not
    plan, frame_s = small_plan(*SETTINGS), 2.0
    with Fabric.deploy(plan, lab_name("kqpkill")) as fabric:
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException), bench_on(fabric) as bench:
                hold_back(bench, frame_s)
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert qp_shapers(fabric) == 1
    begin = time.monotonic()
    with Fabric.attach(plan, fabric.name) as again:
        try:
            assert time.monotonic() - begin < 4 * frame_s  # the last one's, and not that of the eight behind it
            assert_drained(again)
            assert not qp_shapers(again)
            assert not (again.arrays.ports["flags"] & layout.PORT_KERNEL_QPS).any()
        finally:
            again.destroy()
