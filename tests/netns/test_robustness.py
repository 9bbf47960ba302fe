"""Frames that nobody should send: nothing crashes, no counter drifts, no other queue pair notices."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from testbed.errors import KernelError
from testbed.fabric import Fabric
from testbed.kernel.packet_socket import open_packet_socket
from testbed.roce.bth import FramePath, WriteTarget, build_write
from testbed.roce.icrc import with_icrc
from testbed.roce.queue_pairs import QPN_BASE, RESPONDER, Connection, qp_index
from testbed.roce.wire import Opcode
from tests.netns.labs import (
    Quiet,
    activate_qps,
    address_of,
    assert_drained,
    in_node,
    ip_checksum,
    plain_carrier,
    run_in,
    small_fabric,
)

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Bench:
    """A fabric with active QPs, and a way to send any bytes from host0."""

    fabric: Fabric
    connection: Connection
    send: Callable[[bytes], object]

    def qps(self) -> npt.NDArray[Any]:
        return self.fabric.arrays.qps.copy()

    def sent_packets(self) -> int:
        return int(self.fabric.arrays.queues["enq_packets"].sum())


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        fabric = stack.enter_context(small_fabric(name="robust"))
        connections = activate_qps(fabric)
        (connection,) = (one for one in connections if one.requester.local.rank == 0)
        with in_node(fabric, "host0"):
            sending = stack.enter_context(contextlib.closing(open_packet_socket("eth0")))
        yield Bench(fabric, connection, sending.send)


def good_frame(connection: Connection, *, psn_offset: int = 0, dest_qp: int | None = None, ack: bool = False) -> bytes:
    requester = connection.requester
    path = FramePath.of(requester)
    return build_write(
        path,
        opcode=Opcode.WRITE_ONLY,
        dest_qp=requester.peer_qpn if dest_qp is None else dest_qp,
        psn=connection.initial_psn + psn_offset,
        payload=bytes(100),
        ack_request=ack,
        target=WriteTarget(0, 1, 100),
    )


def patched(frame: bytes, **words: tuple[int, bytes]) -> bytes:
    """Return the frame with bytes replaced at offsets, its IP checksum and ICRC put right."""
    result = bytearray(frame)
    for offset, value in words.values():
        result[offset : offset + len(value)] = value
    if result[14] == 0x45:
        result[24:26] = struct.pack("!H", ip_checksum(bytes(result[14:34])))
        if result[12:14] == b"\x08\0" and result[23] == 17:
            return with_icrc(result)
    return bytes(result)


def cut(frame: bytes, nbytes: int) -> bytes:
    """Return the frame cut short, with lengths in its headers that say so."""
    return (
        patched(frame[:nbytes], total=(16, struct.pack("!H", nbytes - 14)), udp=(38, struct.pack("!H", nbytes - 34)))[
            :nbytes
        ]
        if nbytes >= 58
        else bytes(frame[:16] + struct.pack("!H", nbytes - 14) + frame[18:nbytes])
    )


def with_options(frame: bytes) -> bytes:
    header = bytearray(frame[14:34] + b"\x01\x01\x01\x00")  # three no-ops, end of options
    header[0] = 0x46
    header[2:4] = struct.pack("!H", len(frame) - 14 + 4)
    header[10:12] = struct.pack("!H", ip_checksum(bytes(header)))
    return frame[:14] + bytes(header) + frame[34:]


def as_fragment(frame: bytes, field: int) -> bytes:
    return patched(frame, flags=(20, struct.pack("!H", field)))


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    **{f"cut to {nbytes} bytes": lambda frame, n=nbytes: cut(frame, n) for nbytes in (34, 41, 42, 50, 53, 54, 57)},
    **{
        f"opcode {opcode:#04x}": lambda frame, o=opcode: patched(frame, opcode=(42, bytes([o])))
        for opcode in (0x00, 0x04, 0x09, 0x0B, 0x0C, 0x0D, 0x12, 0x64, 0x80, 0xFF)
    },
    "length beyond the frame": lambda frame: patched(frame, total=(16, struct.pack("!H", len(frame)))),
    "length below the headers": lambda frame: patched(frame, total=(16, struct.pack("!H", 40))),
    "length below the extension header": lambda frame: patched(frame, total=(16, struct.pack("!H", 58))),
    "length zero": lambda frame: patched(frame, total=(16, b"\0\0")),
    "IP options": with_options,
    "IP header too short": lambda frame: patched(frame, ihl=(14, b"\x44")),
    "first fragment": lambda frame: as_fragment(frame, 0x2000),
    "later fragment": lambda frame: as_fragment(frame, 0x0010),
    "last fragment": lambda frame: as_fragment(frame, 0x2010),
    "another UDP port": lambda frame: patched(frame, port=(36, b"\x12\xb6")),
    "TCP": lambda frame: patched(frame, protocol=(23, b"\x06")),
    "IPv6": lambda frame: patched(frame, ether=(12, b"\x86\xdd")),
    "no IP behind the EtherType": lambda frame: frame[:20],
    "Ethernet alone": lambda frame: frame[:14],
    "multicast": lambda frame: patched(frame, mac=(0, b"\x01\0\x5e\0\0\1")),
    "broadcast": lambda frame: patched(frame, mac=(0, b"\xff" * 6)),
    "VLAN tag": lambda frame: frame[:12] + b"\x81\0\0\x05" + frame[12:],
    "two VLAN tags": lambda frame: frame[:12] + b"\x88\xa8\0\x05\x81\0\0\x06" + frame[12:],
    "TTL zero": lambda frame: patched(frame, ttl=(22, b"\0")),
    "TTL one": lambda frame: patched(frame, ttl=(22, b"\1")),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_frame_changes_no_qp_and_no_count(bench: Bench, kind: str) -> None:
    before = bench.qps()
    frame = MALFORMED[kind](good_frame(bench.connection))
    for _ in range(3):
        bench.send(frame)
    settle(bench)
    np.testing.assert_array_equal(bench.qps(), before)


def settle(bench: Bench) -> None:
    """Wait until all that was sent is through, and check the counters."""
    target = address_of(bench.fabric, bench.connection.requester.remote.rank)
    assert run_in(bench.fabric, "host0", "ping", "-n", "-c1", "-W5", target).returncode == 0
    assert_drained(bench.fabric)


@pytest.mark.parametrize("mac", ["ffff", "0000", "0001", "0102"])
def test_source_mac_that_a_host_makes_up_is_counted_as_any_other(bench: Bench, mac: str) -> None:
    # Switches mark what their own kernel sends by these bytes; from a host they mean nothing.
    frame = patched(good_frame(bench.connection, dest_qp=1), mac=(10, bytes.fromhex(mac)))
    sent = bench.sent_packets()
    bench.send(frame)
    settle(bench)
    assert bench.sent_packets() > sent


@pytest.mark.parametrize("qpn", [0, 1, QPN_BASE - 1, QPN_BASE + 8, QPN_BASE + 16383, QPN_BASE + 16384, 0xFFFFFF])
def test_frame_for_a_qp_that_does_not_exist_changes_none(bench: Bench, qpn: int) -> None:
    before = bench.qps()
    bench.send(good_frame(bench.connection, dest_qp=qpn))
    settle(bench)
    np.testing.assert_array_equal(bench.qps(), before)


def test_frame_for_a_qp_of_another_host_changes_none(bench: Bench) -> None:
    before = bench.qps()
    others = [one for one in bench.fabric.plan.workloads[0].connections if one is not bench.connection]
    strangers = [one.responder.qpn for one in others if one.responder.local != bench.connection.responder.local]
    assert strangers
    for qpn in strangers:
        bench.send(good_frame(bench.connection, dest_qp=qpn))
    settle(bench)
    np.testing.assert_array_equal(bench.qps(), before)


def test_cnp_is_counted_by_its_own_qp_and_changes_nothing_else(bench: Bench) -> None:
    before = bench.qps()
    index = bench.fabric.plan.workloads[0].connections.index(bench.connection)
    row = qp_index(index, RESPONDER)
    bench.send(patched(good_frame(bench.connection), opcode=(42, b"\x81")))
    settle(bench)
    after = bench.qps()
    assert after["cnps_packets"][row] == before["cnps_packets"][row] + 1
    after["cnps_packets"][row] -= 1
    np.testing.assert_array_equal(after, before)


def test_good_frame_changes_its_own_qp_alone(bench: Bench) -> None:
    # The negative control of all above: the same frame, unharmed, is taken.
    before = bench.qps()
    index = bench.fabric.plan.workloads[0].connections.index(bench.connection)
    row = qp_index(index, RESPONDER)
    bench.send(good_frame(bench.connection, psn_offset=int(before["rx_packets"][row])))
    settle(bench)
    after = bench.qps()
    assert after["rx_packets"][row] == before["rx_packets"][row] + 1
    assert after["rx_payload_bytes"][row] == before["rx_payload_bytes"][row] + 100
    others = np.delete(np.arange(len(after)), row)
    np.testing.assert_array_equal(after[others], before[others])


def test_random_damage_leaves_the_counters_exact() -> None:
    rng = random.Random(11)
    with small_fabric(name="fuzz") as fabric:
        connection = next(one for one in activate_qps(fabric) if one.requester.local.rank == 0)
        own = {connection.requester.qpn - QPN_BASE, connection.responder.qpn - QPN_BASE}
        frame = good_frame(connection, ack=True)
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        bench = Bench(fabric, connection, sending.send)
        before = bench.qps()
        with sending:
            for _ in range(600):
                damaged = bytearray(frame[: rng.choice([len(frame), rng.randrange(14, len(frame))])])
                for _ in range(rng.randrange(1, 6)):
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
                with contextlib.suppress(OSError):
                    sending.send(damaged)
        settle(bench)
        # A frame whose QP number was hit may have met another QP of that host; QPs of other hosts must be as they were.
        port = fabric.plan.topology.host_port(connection.responder.local.rank).id
        foreign = [index for index in np.flatnonzero(before["port"] != port) if index not in own]
        np.testing.assert_array_equal(bench.qps()[foreign], before[foreign])


def test_run_after_damage_is_sound() -> None:
    with small_fabric(name="after") as fabric:
        connection = next(one for one in activate_qps(fabric) if one.requester.local.rank == 0)
        with in_node(fabric, "host0"):
            sending = open_packet_socket("eth0")
        with sending:
            for damage in MALFORMED.values():
                with contextlib.suppress(KernelError):
                    sending.send(damage(good_frame(connection)))
        settle(Bench(fabric, connection, sending.send))
        with plain_carrier(fabric) as carrier:
            samples = carrier.run(0, Quiet())
        assert samples.retransmitted_packets == 0
        assert [one.unaccounted_bytes for one in samples.machine] == [0]
        assert_drained(fabric)
