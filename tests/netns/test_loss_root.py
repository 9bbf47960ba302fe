"""Random loss on links, on the wire."""

from __future__ import annotations

import math

import pytest

from testbed.fabric import Fabric
from testbed.kernel.packet_socket import open_packet_socket
from testbed.topology import Port
from tests.netns.labs import assert_drained, in_node, ip_frame, small_fabric, wait_until

pytestmark = pytest.mark.root

DATA, CONTROL = 3, 6
FRAMES = 2000


def send(fabric: Fabric, priority: int, frames: int = FRAMES) -> int:
    """Send small frames from host 0 to host 2, under the other leaf; return how many its link from the leaf carried."""
    topology = fabric.plan.topology
    last = topology.port(topology.host_port(2).peer)
    before = int(fabric.arrays.queues["deq_packets"][last.id, priority])
    with in_node(fabric, "host0"):
        sending = open_packet_socket("eth0")
    frame = ip_frame(fabric, 0, topology.host_port(2).address, bytes(20), tos=priority << 5)
    with sending:
        for _ in range(frames):
            sending.send(frame)
    wait_until(
        lambda: int(fabric.arrays.queues["enq_packets"][topology.host_port(0).id, priority]) >= frames, "all sent"
    )
    assert_drained(fabric)
    return int(fabric.arrays.queues["deq_packets"][last.id, priority]) - before


def lost(fabric: Fabric, port: Port, priority: int) -> int:
    return int(fabric.arrays.queues["lost_packets"][port.id, priority])


@pytest.mark.parametrize("frames", ["all", "data"])
def test_a_lossy_link_loses_its_share_and_accounts_for_it(frames: str) -> None:
    share = 0.25
    with small_fabric(
        f"fabric.host_link.loss={share}", f"fabric.lost_frames={frames}", "time_dilation=200", name="gray"
    ) as fabric:
        topology = fabric.plan.topology
        nic = topology.host_port(0)
        last = topology.port(topology.host_port(2).peer)
        for priority in (DATA, CONTROL):
            carried = send(fabric, priority)
            first = lost(fabric, nic, priority)
            assert carried == FRAMES - first  # no other link of the way loses, and none counts as dropped
            if frames == "data" and priority == CONTROL:
                assert first == lost(fabric, last, priority) == 0
                continue
            # Five standard deviations of a binomial count.
            spread = 5 * math.sqrt(FRAMES * share * (1 - share))
            assert abs(first - FRAMES * share) < spread
            assert abs(lost(fabric, last, priority) - carried * share) < spread
        assert not fabric.arrays.queues["drop_packets"].any()


def test_loss_is_set_and_ended_while_the_fabric_runs() -> None:
    with small_fabric("time_dilation=200", name="loss") as fabric:
        nic = fabric.plan.topology.host_port(0)
        assert send(fabric, DATA, 100) == 100
        fabric.set_loss(nic.id, 1.0)
        assert send(fabric, DATA, 100) <= 1  # all but one in 2^32
        fabric.set_loss(nic.id, 0)
        assert send(fabric, DATA, 100) == 100
        with pytest.raises(ValueError, match="fraction must be from 0 to 1"):
            fabric.set_loss(nic.id, 1.5)
