"""Mechanisms proved one by one elsewhere, together: admission with priorities and jobs, selective repair with all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from testbed.carriers import engine
from testbed.carriers.protocol import WorkloadSamples
from testbed.engine.rate_limit import CongestionLimit, RateLimit
from testbed.fabric import Fabric
from testbed.plan.model import Plan
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qp_index
from tests.netns.labs import Quiet, assert_drained, plain_carrier, small_fabric
from tests.netns.test_retransmission_root import expect_whole

pytestmark = pytest.mark.root

USUAL, OTHER = 3, 4
WINDOW_PACKETS, GRANTS = 8, 4
FRAME_BYTES = 4154 + 16  # with a RETH, as the first of a message
CTS = "transport.admission={scheme: cts, channel_buffer: 32 KiB, grants: 4}"
CONTROL_CTS = "transport.admission.priority=6"
SELECTIVE = "transport.loss_recovery=selective"
PRIORITIES = "qos.priorities=[{priority: 4, weight: 1}]"
LOSSY = ("fabric.host_link.loss=2 %", "fabric.lost_frames=data", "transport.retransmit_timeout=60 us")
PACE = ("time_dilation=2000", "transport.retransmit_timeout=400 us")
FLOW_PACKETS = 64


def flows(*places: str) -> str:
    """Return a workload of flows of 64 packets each."""
    listed = ", ".join(f"{{{place}, size: 256 KiB}}" for place in places)
    return f"workload=[{{pattern: flows, iters: 1, warmup_iters: 0, flows: [{listed}]}}]"


# All under one leaf: they meet in the receiver's queues and nowhere else.
TWO_AND_ONE = (
    "fabric.hosts_per_leaf=4",
    flows("src: 1, dst: 0", "src: 2, dst: 0", f"src: 3, dst: 0, priority: {OTHER}"),
)


@contextmanager
def ran(*settings: str, name: str, hook: Callable[[], None] = lambda: None) -> Iterator[tuple[Fabric, WorkloadSamples]]:
    with small_fabric(*PACE, *settings, name=name) as fabric:
        with plain_carrier(fabric, hook) as carrier:
            samples = carrier.run(0, Quiet())
        expect_whole(fabric)
        yield fabric, samples


def queue_to(fabric: Fabric, rank: int) -> int:
    """Return the port of the leaf towards a rank's host."""
    topology = fabric.plan.topology
    return topology.port(topology.host_port(rank).peer).id


def grants_needed(packets: int) -> int:
    return math.ceil(packets * GRANTS / WINDOW_PACKETS)


# --- receiver-driven admission -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [USUAL, OTHER, 6])
def test_windows_bound_the_queue_of_each_priority(priority: int) -> None:
    with ran(CTS, PRIORITIES, *TWO_AND_ONE, f"transport.admission.priority={priority}", name="ctsprio") as (
        fabric,
        samples,
    ):
        queues = fabric.arrays.queues
        (noted,) = samples.admission
        assert samples.retransmitted_packets == 0  # precondition: what is in the queues was sent once
        peaks = queues["peak_bytes"][queue_to(fabric, 0)]
        assert 0 < peaks[USUAL] <= 2 * WINDOW_PACKETS * FRAME_BYTES
        assert 0 < peaks[OTHER] <= WINDOW_PACKETS * FRAME_BYTES
        # Grants have the class that they were given, whatever the priority of the data that they admit.
        expected = grants_needed(FLOW_PACKETS)
        for rank in (1, 2, 3):
            left = queues["deq_packets"][queue_to(fabric, rank)]
            acks = int(left[6]) - (expected if priority == 6 else 0)
            assert acks > 0
            assert [int(left[one]) for one in (USUAL, OTHER)] == [
                expected if priority == one else 0 for one in (USUAL, OTHER)
            ]
        assert noted.cts_frames == 3 * expected
        assert noted.repeated_frames == 0


def test_without_windows_the_same_queues_are_deeper() -> None:
    """Negative control: of the test above."""
    with ran(PRIORITIES, *TWO_AND_ONE, name="noctsprio") as (fabric, _):
        peaks = fabric.arrays.queues["peak_bytes"][queue_to(fabric, 0)]
        assert peaks[USUAL] > 2 * WINDOW_PACKETS * FRAME_BYTES
        assert peaks[OTHER] > WINDOW_PACKETS * FRAME_BYTES


JOBS = (
    "fabric.hosts_per_leaf=3",
    "workload=[]",
    PRIORITIES,
    "jobs=[{name: a, placement: [0, 3, 4], workload: [{pattern: incast, fan_in: 2, size: 256 KiB, iters: 1, warmup_iters: 0}]},"
    " {name: b, placement: [1, 5], start: 10 us, workload: [{pattern: incast, fan_in: 1, size: 128 KiB, iters: 1,"
    " warmup_iters: 0, priority: 4}]}]",
    "measure_jobs=alone",
)


@pytest.mark.parametrize("qps", [1, 3])
def test_each_job_is_granted_its_own_windows(qps: int) -> None:
    settings = (*PACE, *JOBS, CTS, CONTROL_CTS, f"transport.qps_per_connection={qps}")
    with small_fabric(*settings, name="ctsjobs") as fabric, plain_carrier(fabric) as carrier:
        frames, granted = [], []
        for index in range(3):
            samples = carrier.run(index, Quiet())
            assert samples.retransmitted_packets == 0  # precondition
            (noted,) = samples.admission
            frames.append(noted.cts_frames)
            assert noted.repeated_frames == 0
            granted.append(fabric.arrays.qps["cts_packets"].copy())  # of this run: each counts from 0
            assert_drained(fabric)
        only_a, only_b, both = frames
        # Splitting cuts a last packet of its own for each queue pair.
        assert 2 * grants_needed(64) <= only_a <= 2 * (grants_needed(64) + 2)
        assert grants_needed(32) <= only_b <= grants_needed(32) + 2
        assert both == only_a + only_b
        # Nobody grants anything to the job that is silent.
        assert not (granted[0] * granted[1]).any()
        assert (granted[2] == granted[0] + granted[1]).all()
        peaks = fabric.arrays.queues["peak_bytes"]
        assert 0 < peaks[queue_to(fabric, 0), USUAL] <= 2 * WINDOW_PACKETS * FRAME_BYTES
        assert 0 < peaks[queue_to(fabric, 1), OTHER] <= WINDOW_PACKETS * FRAME_BYTES


# --- selective repair ----------------------------------------------------------------------------------------------------


def resent_of_lost(fabric: Fabric, samples: WorkloadSamples) -> None:
    """Check that what was lost was sent again, and besides nothing but what the receiver had."""
    lost = int(fabric.arrays.queues["lost_packets"].sum())
    assert lost > 0  # precondition
    assert samples.retransmitted_packets == lost + int(fabric.arrays.qps["duplicate_packets"].sum())
    assert not fabric.arrays.qps["naks_packets"].any()


def test_selective_repairs_within_windows_on_two_priorities() -> None:
    with ran(CTS, CONTROL_CTS, PRIORITIES, *TWO_AND_ONE, SELECTIVE, *LOSSY, name="selcts") as (fabric, samples):
        resent_of_lost(fabric, samples)
        lost = fabric.arrays.queues["lost_packets"].sum(axis=0)
        assert lost[USUAL] > 0  # precondition
        peaks = fabric.arrays.queues["peak_bytes"][queue_to(fabric, 0)]
        # What is sent again comes beside what is granted: at most a window more for each.
        assert peaks[USUAL] <= 2 * 2 * WINDOW_PACKETS * FRAME_BYTES
        assert peaks[OTHER] <= 2 * WINDOW_PACKETS * FRAME_BYTES


def test_windows_hold_where_packets_overtake_each_other() -> None:
    spray = ("routing.scheme=spray", "routing.spray_order=random", "fabric.spines=3", "fabric.hosts_per_leaf=3")
    patient = ("transport.retransmit_timeout=10 ms", "transport.reorder_time=100 us")
    window, packets, ranks = 48, 256, 6
    wider = f"transport.admission={{scheme: cts, channel_buffer: {4 * window} KiB, grants: {GRANTS}, priority: 6}}"
    size = f"workload.0.size={4 * packets} KiB"
    with ran(wider, SELECTIVE, *spray, *patient, size, name="selspray") as (fabric, samples):
        assert fabric.arrays.qps["out_of_order_packets"].any()  # precondition
        assert samples.retransmitted_packets == 0
        (noted,) = samples.admission
        assert noted.cts_frames == ranks * math.ceil(packets * GRANTS / window)
        peaks = fabric.arrays.queues["peak_bytes"]
        for rank in range(ranks):  # each receives from one
            assert 0 < peaks[queue_to(fabric, rank), USUAL] <= window * FRAME_BYTES


DCQCN = ("transport.congestion_control=dcqcn", "qos.ecn={enabled: true, kmin: 20 KB, kmax: 60 KB, pmax: 1}")


@pytest.mark.parametrize("recovery", ["selective", "go_back_n"])
def test_marked_packets_slow_their_sender_down_whatever_repairs_losses(
    recovery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line_bytes_per_s = 50e9
    limits: list[CongestionLimit] = []
    slowest = np.full(3, np.inf)
    rate_limit = engine.rate_limit

    def keep(plan: Plan, workload: int) -> RateLimit:
        limit = rate_limit(plan, workload)
        assert isinstance(limit, CongestionLimit)
        limits.append(limit)
        return limit

    def look() -> None:
        for limit in limits:
            np.minimum(slowest, limit.control.rate_bytes_per_s, out=slowest)

    monkeypatch.setattr(engine, "rate_limit", keep)
    with ran(
        *DCQCN, *TWO_AND_ONE, PRIORITIES, f"transport.loss_recovery={recovery}", *LOSSY, name="cnp", hook=look
    ) as (fabric, samples):
        if recovery == "selective":
            resent_of_lost(fabric, samples)
        else:
            assert int(fabric.arrays.queues["lost_packets"].sum()) > 0  # precondition
            assert samples.retransmitted_packets >= int(fabric.arrays.queues["lost_packets"].sum())
            assert fabric.arrays.qps["naks_packets"].any()
        requesters = fabric.arrays.qps[qp_index(0, REQUESTER) : 2 * 3 : 2]
        responders = fabric.arrays.qps[qp_index(0, RESPONDER) : 2 * 3 : 2]
        # Those of the priority that two senders fill are marked, and told.
        marked = fabric.arrays.queues["marked_packets"].sum(axis=0)
        assert marked[USUAL] > 0
        assert not np.delete(marked, [USUAL, OTHER]).any()
        assert int(requesters["cnps_packets"].sum()) == int(responders["sent_cnps_packets"].sum()) > 0
        # The first CNP halves the rate; who gets none keeps the line's.
        told = requesters["cnps_packets"] > 0
        assert (slowest[told] <= line_bytes_per_s / 2).all()
        assert (slowest[~told] == line_bytes_per_s).all()


def test_everything_at_once() -> None:
    """Windows, marks, pauses, losses and two priorities between the same hosts."""
    xoff_bytes = 9_000  # the third frame that waits makes a pause; by the fourth, one run in six had none
    # What makes a port pause stands above Kmax.
    marks = f"qos.ecn={{enabled: true, kmin: 4 KB, kmax: {xoff_bytes} B, pmax: 1}}"
    settings = (CTS, PRIORITIES, *TWO_AND_ONE, SELECTIVE, *LOSSY, *DCQCN, marks)
    assert xoff_bytes < WINDOW_PACKETS * FRAME_BYTES  # or a window would not make its port pause
    with ran(*settings, f"qos.pfc={{enabled: true, xoff: {xoff_bytes} B}}", "fabric.spines=1", name="all") as (
        fabric,
        samples,
    ):
        assert fabric.arrays.queues["xoff_frames"].any()
        assert fabric.arrays.queues["marked_packets"].any()
        assert fabric.arrays.qps["cnps_packets"].any()
        lost = int(fabric.arrays.queues["lost_packets"].sum())
        assert lost > 0  # precondition
        assert samples.retransmitted_packets > 0
        assert not fabric.arrays.queues["drop_packets"].any()
        assert not fabric.arrays.ingress["headroom_drops_packets"].any()
        assert not fabric.arrays.ingress["used_bytes"].any()
        (noted,) = samples.admission
        assert noted.cts_frames >= 3 * grants_needed(FLOW_PACKETS)
