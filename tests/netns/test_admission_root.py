"""Receiver-driven admission on the wire: CTS frames as the NIC, scapy and tshark read them, loss of them, every QP strategy."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scapy.contrib.roce import BTH
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from testbed.carriers.protocol import WorkloadSamples
from testbed.fabric import Fabric
from testbed.kernel.layout import PROBABILITY_ONE
from testbed.kernel.packet_socket import open_packet_socket
from testbed.roce.bth import FramePath, WriteTarget, build_write
from testbed.roce.icrc import carried_icrc, compute_icrc
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, Connection, qp_index
from testbed.roce.wire import CTS_FRAME_BYTES, CTS_RKEY, Opcode
from tests.netns.labs import (
    Quiet,
    activate_qps,
    assert_drained,
    in_node,
    listening_socket,
    plain_carrier,
    small_fabric,
    wait_until,
)

pytestmark = pytest.mark.root

WINDOW_PACKETS, GRANTS, PACKETS = 8, 4, 64
CTS = "transport.admission={scheme: cts, channel_buffer: 32 KiB, grants: 4}"
INCAST = (
    "workload=[{pattern: incast, fan_in: 3, size: 256 KiB, iters: 2, warmup_iters: 0}]",
    "time_dilation=2000",
    "transport.retransmit_timeout=400 us",
)
# Nothing else has this priority: ACKs have 6.
ALONE = "transport.admission.priority=7"
FRAME_BYTES = 4154


@contextmanager
def ran(*overrides: str, hook: Callable[[Fabric], None] = lambda _: None) -> Iterator[tuple[Fabric, WorkloadSamples]]:
    with (
        small_fabric(*INCAST, *overrides, name="cts") as fabric,
        plain_carrier(fabric, lambda: hook(fabric)) as carrier,
    ):
        yield fabric, carrier.run(0, Quiet())
        assert_drained(fabric)


def receivers_peak(fabric: Fabric) -> int:
    """Return the greatest depth of the leaf's queue towards host 0."""
    topology = fabric.plan.topology
    port = topology.port(topology.host_port(0).peer).id
    return int(fabric.arrays.queues["peak_bytes"][port, fabric.plan.scenario.qos.lossless_priority])


@pytest.mark.parametrize(
    "qps",
    [
        (),
        ("transport.qps_per_connection=3",),
        ("transport.qps_per_connection=3", "transport.qp_strategy=round_robin"),
        ("transport.qps_per_connection=3", "transport.qp_strategy=dynamic"),
    ],
    ids=["one", "split", "round_robin", "dynamic"],
)
def test_queue_stays_below_the_windows_of_all_connections(qps: tuple[str, ...]) -> None:
    with ran(CTS, *qps) as (fabric, samples):
        assert samples.retransmitted_packets == 0  # precondition: what is in the queue was sent once
        # Not a frame more than is granted: three windows, and grants that pass by.
        assert receivers_peak(fabric) <= 3 * WINDOW_PACKETS * FRAME_BYTES + 3 * GRANTS * CTS_FRAME_BYTES
        for noted in samples.admission:
            # Splitting cuts a last packet of its own for each queue pair, so there may be a grant more.
            fewest = 3 * math.ceil(PACKETS * GRANTS / WINDOW_PACKETS)
            assert fewest <= noted.cts_frames <= fewest + 3 * 2
            assert noted.repeated_frames == 0
        requesters = fabric.arrays.qps[qp_index(0, REQUESTER) :: 2]
        assert int(requesters["cts_packets"].sum()) == sum(noted.cts_frames for noted in samples.admission)


def test_without_admission_the_same_queue_is_deeper() -> None:
    """Negative control: it is the windows that bound it."""
    with ran("workload.0.iters=1") as (fabric, samples):
        assert receivers_peak(fabric) > 3 * WINDOW_PACKETS * FRAME_BYTES + 3 * GRANTS * CTS_FRAME_BYTES
        assert samples.admission == ()


# --- frames --------------------------------------------------------------------------------------------------------------


def read_all(opened: socket.socket) -> list[bytes]:
    opened.setblocking(False)
    frames = []
    while True:
        try:
            frames.append(opened.recv(16384))
        except BlockingIOError:
            return frames


def is_cts(frame: bytes) -> bool:
    return len(frame) == CTS_FRAME_BYTES and frame[36:38] == b"\x12\xb7" and frame[42] == Opcode.WRITE_ONLY


def test_grants_pass_the_fabric_as_writes_of_fifo_entries(tmp_path: Path) -> None:
    with small_fabric(*INCAST, CTS, ALONE, name="frames") as fabric, listening_socket(fabric, "host3", "eth0") as heard:
        with plain_carrier(fabric) as carrier:
            carrier.run(0, Quiet())
        frames = [frame for frame in read_all(heard) if is_cts(frame)]
        connections = fabric.plan.workloads[0].connections
        (connection,) = (one for one in connections if one.requester.local.host == 3)
    total = 2 * math.ceil(PACKETS * GRANTS / WINDOW_PACKETS)
    assert len(frames) == total
    reads = [Ether(frame) for frame in frames]
    assert all(carried_icrc(frame) == compute_icrc(frame) for frame in frames)
    assert {(read[IP].tos, read[BTH].dqpn) for read in reads} == {(58 << 2, connection.requester.qpn)}
    assert [read[BTH].psn for read in reads] == [(connection.initial_psn + n) % 2**24 for n in range(total)]
    assert [int.from_bytes(frame[110:118], "little") for frame in frames] == list(range(1, total + 1))
    if shutil.which("tshark") is None:
        pytest.skip("the rest needs tshark")
    file = tmp_path / "cts.pcap"
    wrpcap(str(file), reads)
    names = ("infiniband.bth.opcode", "infiniband.reth.r_key", "infiniband.reth.dmalen")
    command = ["tshark", "-r", str(file), "-T", "fields", *(part for name in names for part in ("-e", name))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {tuple(int(value, 0) for value in line.split("\t")) for line in shown if line} == {(0x0A, CTS_RKEY, 64)}


def entry_frame(connection: Connection, number: int, *, rkey: int = CTS_RKEY, psn: int = 0) -> bytes:
    """Return what the responder's NIC would send to the requester: a write of 64 bytes."""
    responder = connection.responder
    path = FramePath.of(responder)
    return build_write(
        path,
        opcode=Opcode.WRITE_ONLY,
        dest_qp=responder.peer_qpn,
        psn=psn,
        payload=bytes(40) + number.to_bytes(8, "little") + bytes(16),
        target=WriteTarget(0, rkey, 64),
        ack_request=True,
    )


def test_nic_keeps_the_latest_grant_whatever_order_they_come_in() -> None:
    with small_fabric(*INCAST, CTS, name="nic") as fabric:
        connection = activate_qps(fabric)[0]
        row = fabric.arrays.qps[qp_index(0, REQUESTER)]
        with in_node(fabric, "host0"):
            opened = open_packet_socket("eth0")
        with opened:
            for count, (number, latest) in enumerate([(1, 1), (3, 3), (2, 3), (2**40, 2**40)], 1):
                opened.send(entry_frame(connection, number))
                wait_until(lambda count=count: int(row["cts_packets"]) == count, "the NIC counts it")  # type: ignore[misc]
                assert int(row["grants"]) == latest
            assert (int(row["rx_packets"]), int(row["sent_acks_packets"])) == (0, 0)
            # Negative control: a write of as many bytes to another key is data, and answered.
            opened.send(entry_frame(connection, 2**41, rkey=1, psn=connection.initial_psn))
            wait_until(lambda: int(row["rx_packets"]) == 1, "the NIC takes it as data")
            assert (int(row["cts_packets"]), int(row["grants"]), int(row["sent_acks_packets"])) == (4, 2**40, 1)
        assert_drained(fabric)


# --- loss ----------------------------------------------------------------------------------------------------------------


def lose_grants(fabric: Fabric, share: float) -> None:
    """Lose a share of the frames of priority 7 on the leaves' links to the senders."""
    topology = fabric.plan.topology
    for rank in (1, 2, 3):
        port = topology.port(topology.host_port(rank).peer).id
        fabric.arrays.queues["loss_threshold"][port, 7] = min(round(share * PROBABILITY_ONE), PROBABILITY_ONE - 1)


def test_lost_grants_are_made_up_for_by_later_ones() -> None:
    with ran(CTS, ALONE, "transport.retransmit_timeout=60 us", hook=lambda fabric: lose_grants(fabric, 0.3)) as (
        fabric,
        samples,
    ):
        sent = sum(noted.cts_frames for noted in samples.admission)
        received = int(fabric.arrays.qps["cts_packets"].sum())
        lost = int(fabric.arrays.queues["lost_packets"][:, 7].sum())
        assert lost > 0  # precondition
        assert received == sent - lost
        responders = fabric.arrays.qps[qp_index(0, RESPONDER) :: 2]
        assert int(responders["rx_packets"].sum()) == 2 * 3 * PACKETS


@pytest.mark.parametrize("recovery", ["go_back_n", "selective"])
@pytest.mark.parametrize("qps", [1, 3])
def test_lost_data_is_sent_again_within_the_window(recovery: str, qps: int) -> None:
    lossy = ("fabric.host_link.loss=1/50", "fabric.lost_frames=data", "transport.retransmit_timeout=60 us")
    with ran(CTS, *lossy, f"transport.loss_recovery={recovery}", f"transport.qps_per_connection={qps}") as (
        fabric,
        samples,
    ):
        assert samples.retransmitted_packets > 0  # precondition
        responders = fabric.arrays.qps[qp_index(0, RESPONDER) :: 2]
        assert int(responders["rx_payload_bytes"].sum()) == 2 * 3 * PACKETS * 4096
        # What is sent again comes beside what is granted, but for what was lost: at most a window more.
        assert receivers_peak(fabric) <= 2 * 3 * WINDOW_PACKETS * FRAME_BYTES


def test_grant_is_repeated_after_a_silence_when_all_were_lost() -> None:
    def lose_the_first(fabric: Fabric) -> None:
        enough = int(fabric.arrays.queues["lost_packets"][:, 7].sum()) >= 3 * GRANTS
        lose_grants(fabric, 0.0 if enough else 1.0)

    with ran(CTS, ALONE, "workload.0.iters=1", "transport.retransmit_timeout=80 us", hook=lose_the_first) as (
        fabric,
        samples,
    ):
        assert int(fabric.arrays.queues["lost_packets"][:, 7].sum()) >= 3 * GRANTS  # precondition
        (noted,) = samples.admission
        assert noted.repeated_frames >= 3
        assert samples.cct_ns[0] > 40_000
        assert samples.retransmitted_packets == 0
        # What was lost came late, not never: its delay is that of its repetition.
        assert float(np.max(noted.cts_delay_ns)) > 40_000
