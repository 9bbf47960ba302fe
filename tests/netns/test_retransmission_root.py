"""What is lost on the way is sent again by the engine."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import pytest

from testbed.collectives import ScheduleBuilder
from testbed.fabric import Fabric
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qp_index
from tests.netns.labs import LINE, Quiet, assert_drained, plain_carrier, small_fabric

pytestmark = pytest.mark.root

# 64 packets each way, one every 1.7 ticks.
STREAM = ("workload.0.size=256 KiB", "transport.mtu=4096")
PACKETS = 64


def expect_whole(fabric: Fabric, iterations: int = 1) -> None:
    """Check that every message arrived once, whole and in order."""
    planned = fabric.plan.workloads[0]
    received: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for connection, nbytes in zip(planned.schedule.connection.tolist(), planned.schedule.nbytes.tolist(), strict=True):
        messages, total = received[connection]
        received[connection] = messages + iterations, total + nbytes * iterations
    for connection, (messages, total) in received.items():
        row = fabric.arrays.qps[qp_index(connection, RESPONDER)]
        assert (row["rx_messages"], row["rx_payload_bytes"]) == (messages, total)
    assert_drained(fabric)


def test_nothing_is_sent_again_when_nothing_is_lost() -> None:
    with small_fabric(*LINE, *STREAM, name="whole") as fabric, plain_carrier(fabric) as carrier:
        samples = carrier.run(0, Quiet())
        assert samples.retransmitted_packets == samples.timeouts == 0
        qps = fabric.arrays.qps
        assert not qps["naks_packets"].any()
        assert not qps["duplicate_packets"].any()
        assert int(qps["rx_packets"].sum()) == 2 * PACKETS
        expect_whole(fabric)


def test_lost_frames_in_the_middle_are_sent_again_after_a_nak() -> None:
    with small_fabric(*LINE, *STREAM, name="middle") as fabric:
        queues, nodes = fabric.arrays.queues, fabric.arrays.nodes
        limits = nodes["shared_bytes"].copy()

        def lose_some() -> None:
            lost, arrived = queues["drop_packets"].any(), fabric.arrays.qps["rx_packets"].sum() > PACKETS // 2
            nodes["shared_bytes"] = 0 if arrived and not lost else limits

        with plain_carrier(fabric, lose_some) as carrier:
            samples = carrier.run(0, Quiet())
        qps = fabric.arrays.qps
        dropped = int(queues["drop_packets"].sum())
        assert dropped > 0  # precondition
        assert int(qps["naks_packets"].sum()) == int(qps["sent_naks_packets"].sum()) >= 1
        assert 0 < samples.retransmitted_packets < 2 * PACKETS
        # Go-back-N: what is sent again is what was lost and what came behind it.
        again = int(qps["out_of_order_packets"].sum()) + int(qps["duplicate_packets"].sum()) + lost_data(fabric)
        assert samples.retransmitted_packets <= again
        assert samples.retransmitted_packets >= lost_data(fabric)
        expect_whole(fabric)


def lost_data(fabric: Fabric) -> int:
    return int(fabric.arrays.queues["drop_packets"][:, fabric.plan.scenario.qos.lossless_priority].sum())


def test_lost_tail_is_sent_again_after_the_timeout() -> None:
    # The last packet of each direction, of three: nothing behind it tells the receiver. It is sent when the others of the other
    # direction have come, which the engine takes notice of a path's delay later: 40 ticks, in which the loss is arranged.
    settings = ("fabric.host_link.delay=500 ns", "transport.retransmit_timeout=20 us")
    with small_fabric(*LINE, *settings, name="tail") as fabric:
        builder = ScheduleBuilder(2, 12288, in_place=False)
        there, back = (builder.add(src, 1 - src, offset_bytes=0, nbytes=8192) for src in (0, 1))
        builder.add(0, 1, offset_bytes=8192, nbytes=4096, after=[back])
        builder.add(1, 0, offset_bytes=8192, nbytes=4096, after=[there])
        schedule = builder.build().sorted_by_sender()
        planned = dataclasses.replace(fabric.plan.workloads[0], schedule=schedule)
        fabric.plan = dataclasses.replace(fabric.plan, workloads=(planned,))
        topology, data = fabric.plan.topology, fabric.plan.scenario.qos.lossless_priority
        queues, nodes = fabric.arrays.queues, fabric.arrays.nodes
        limits = nodes["shared_bytes"].copy()

        def lose_the_last() -> None:
            # Once a leaf has the first two packets of either direction it takes nothing, until it has refused the third.
            for leaf in topology.leaves:
                up, down = topology.uplinks(leaf)[0].id, topology.down_ports(leaf)[0].id
                passed = all(queues["enq_packets"][port, data] == 2 for port in (up, down))
                lost = queues["drop_packets"][up, data] > 0
                nodes["shared_bytes"][leaf.index] = 0 if passed and not lost else limits[leaf.index]

        with plain_carrier(fabric, lose_the_last) as carrier:
            samples = carrier.run(0, Quiet())
        qps = fabric.arrays.qps
        assert lost_data(fabric) == 2  # precondition
        assert not qps["sent_naks_packets"].any()
        assert not qps["out_of_order_packets"].any()
        assert samples.retransmitted_packets == samples.timeouts == 2
        assert samples.cct_ns[0] > 20_000  # not before the timeout
        expect_whole(fabric)


def test_lost_acks_are_made_up_for_by_duplicates() -> None:
    # Long enough for a timeout while the data still goes on: an ACK is asked for at the 32nd packet, 2.8 us from the beginning.
    size = "workload.0.size=512 KiB"
    with small_fabric(*LINE, *STREAM, size, "transport.retransmit_timeout=3 us", name="acks") as fabric:
        qps = fabric.arrays.qps
        requesters = [qp_index(connection, REQUESTER) for connection in (0, 1)]

        def lose_acks() -> None:
            # A QP that is not active leaves its frames to the kernel: the ACKs never reach the engine.
            duplicates = int(qps["duplicate_packets"].sum())
            qps["active"][requesters] = 1 if duplicates >= 8 else 0

        with plain_carrier(fabric, lose_acks) as carrier:
            samples = carrier.run(0, Quiet())
        assert samples.retransmitted_packets >= 8
        assert int(qps["duplicate_packets"].sum()) >= 8
        assert not qps["sent_naks_packets"].any()
        assert not fabric.arrays.queues["drop_packets"].any()
        expect_whole(fabric)


def test_iteration_after_a_lost_last_ack_begins_clean() -> None:
    with small_fabric(
        *LINE, "workload.0.size=12 KiB", "workload.0.iters=3", "transport.retransmit_timeout=20 us", name="last"
    ) as fabric:
        qps = fabric.arrays.qps
        lost = []

        def lose_first_acks() -> None:
            done = int(qps["rx_messages"].sum()) >= 2 * len(fabric.plan.workloads[0].schedule) // 2
            lost.append(not done)
            qps["active"][[qp_index(0, REQUESTER), qp_index(1, REQUESTER)]] = int(
                done and len(lost) - lost.index(False) > 20
            )

        with plain_carrier(fabric, lose_first_acks) as carrier:
            samples = carrier.run(0, Quiet())
        assert len(samples.cct_ns) == 3
        assert samples.retransmitted_packets == 0
        expect_whole(fabric, iterations=3)
        sent = [int(qps["rx_packets"][qp_index(connection, RESPONDER)]) for connection in (0, 1)]
        assert [int(qps["acked_packets"][qp_index(connection, REQUESTER)]) for connection in (0, 1)] == sent
