"""Every collective, algorithm and pattern on the wire: what arrives is what its schedule says.

Not when: at these sizes a tick is as long as a message. Times are judged in tests/fidelity.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from testbed.engine.stream import build_streams
from testbed.plan.model import PlannedWorkload
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qp_index
from testbed.topology import format_address
from tests.netns.labs import Quiet, assert_drained, plain_carrier, run_in, small_fabric

pytestmark = pytest.mark.root

# Odd sizes: chunks and slices differ by a byte, messages end in odd packets, and some are shorter than a packet.
ITEMS = [
    "collective: all_reduce, algorithm: ring, size: 40003",
    "collective: all_reduce, algorithm: halving_doubling, size: 40003",
    "collective: all_reduce, algorithm: double_binary_tree, size: 70003",
    "collective: reduce_scatter, algorithm: ring, size: 40003",
    "collective: all_gather, algorithm: ring, size: 40003",
    "collective: all_to_all, algorithm: direct, size: 40003",
    "collective: all_to_all, algorithm: pairwise, size: 40003",
    "collective: broadcast, algorithm: ring, size: 70003",
    "collective: broadcast, algorithm: binary_tree, size: 70003",
    "collective: reduce, algorithm: ring, size: 70003",
    "collective: reduce, algorithm: binary_tree, size: 70003",
    "collective: gather, algorithm: direct, size: 40003",
    "collective: scatter, algorithm: direct, size: 40003",
    "collective: send_recv, algorithm: direct, size: 20001",
    "collective: all_reduce, algorithm: ring, order: random, size: 4",
    "pattern: incast, fan_in: 3, size: 20001",
    "pattern: permutation, size: 20001",
    "pattern: flows, flows: [{src: 0, dst: 3, size: 20001}, {src: 0, dst: 3, size: 5}, {src: 2, dst: 1, size: 4096}]",
]
ROUNDS = 2  # a warm-up and a measured one


def payload_bytes(planned: PlannedWorkload) -> npt.NDArray[np.int64]:
    """Return the payload of each connection in one iteration, without padding."""
    totals = np.zeros(len(planned.connections), np.int64)
    np.add.at(totals, planned.schedule.connection, planned.schedule.nbytes)
    return totals


@pytest.mark.parametrize(
    "spread",
    [
        (),
        ("transport.qps_per_connection=5", "transport.qp_strategy=split"),
        ("transport.qps_per_connection=3", "transport.qp_strategy=round_robin"),
        ("transport.qps_per_connection=3", "transport.qp_strategy=dynamic"),
    ],
    ids=["one QP", "split", "round robin", "dynamic"],
)
def test_everything_arrives_once_and_nothing_is_sent_twice(spread: tuple[str, ...]) -> None:
    """One lab for all items: they run one after the other over the same QP table, as in a run."""
    items = [f"workload[{index}]={{{item}, iters: 1, warmup_iters: 1}}" for index, item in enumerate(ITEMS)]
    settings = ("transport.mtu=1024", "transport.retransmit_timeout=auto", "routing.scheme=e-ecmp", *spread)
    with small_fabric(*settings, *items, name="collectives") as fabric, plain_carrier(fabric) as carrier:
        for index, planned in enumerate(fabric.plan.workloads):
            what = ITEMS[index]
            samples = carrier.run(index, Quiet())
            count = len(planned.connections)
            responders = fabric.arrays.qps[qp_index(0, RESPONDER) : 2 * count : 2]
            requesters = fabric.arrays.qps[qp_index(0, REQUESTER) : 2 * count : 2]
            if planned.pieces is not None:
                # Which queue pair sent what was decided on the way: what matters is that each connection's bytes are there.
                assert samples.retransmitted_packets == 0, what
                received = responders["rx_payload_bytes"].reshape(len(planned.messages.connections), -1).sum(axis=1)
                asked = np.zeros(len(received), np.int64)
                np.add.at(asked, planned.messages.connection, planned.messages.nbytes)
                assert received.tolist() == (ROUNDS * asked).tolist(), what
                assert int(responders["rx_messages"].sum()) == ROUNDS * len(planned.pieces), what
                assert responders["rx_packets"].tolist() == requesters["acked_packets"].tolist(), what
                assert_drained(fabric)
                continue
            packets = build_streams(planned.schedule, fabric.plan.scenario.transport.mtu_bytes).packets
            messages = np.bincount(planned.schedule.connection, minlength=count)

            assert len(samples.cct_ns) == 1, what
            assert samples.retransmitted_packets == 0, what
            assert responders["rx_payload_bytes"].tolist() == (ROUNDS * payload_bytes(planned)).tolist(), what
            assert responders["rx_messages"].tolist() == (ROUNDS * messages).tolist(), what
            assert responders["rx_packets"].tolist() == (ROUNDS * packets).tolist(), what
            assert not responders["duplicate_packets"].any(), what
            assert not responders["out_of_order_packets"].any(), what
            assert requesters["acked_packets"].tolist() == (ROUNDS * packets).tolist(), what
            assert not fabric.arrays.queues["drop_packets"].any(), what
            assert_drained(fabric)


# Two leaves of one host each, four GPUs and two NICs per host: pairs of ranks share a NIC.
GPU_HOSTS = ("fabric.hosts_per_leaf=1", "fabric.nics_per_host=2", "fabric.gpus_per_host=4")
GPU_ITEMS = [
    "collective: all_reduce, algorithm: hierarchical, order: packed, size: 70003",
    "collective: all_reduce, algorithm: ring, order: packed, size: 40003",
    "collective: all_reduce, algorithm: ring, order: rails, size: 40003",
    "collective: all_to_all, algorithm: direct, order: random, size: 40003",
    "pattern: flows, flows: [{src: 0, dst: 1, size: 20001}, {src: 1, dst: 7, size: 5}, {src: 0, dst: 4, size: 4096}]",
    "pattern: flows, flows: [{src: 5, dst: 6, size: 20001}]",
]


def test_hosts_with_several_gpus_send_over_their_own_nics_what_leaves_the_host() -> None:
    items = [f"workload[{index}]={{{item}, iters: 1, warmup_iters: 1}}" for index, item in enumerate(GPU_ITEMS)]
    settings = ("transport.mtu=1024", "transport.retransmit_timeout=auto", *GPU_HOSTS)
    with small_fabric(*settings, *items, name="gpus") as fabric, plain_carrier(fabric) as carrier:
        for index, planned in enumerate(fabric.plan.workloads):
            what = GPU_ITEMS[index]
            before = fabric.arrays.queues["enq_bytes"].sum(axis=1)
            samples = carrier.run(index, Quiet())
            sent = fabric.arrays.queues["enq_bytes"].sum(axis=1) - before
            count = len(planned.connections)
            responders = fabric.arrays.qps[qp_index(0, RESPONDER) : 2 * count : 2]
            networked = planned.schedule.connection < count
            payload, nvlink = (int(planned.schedule.nbytes[part].sum()) for part in (networked, ~networked))

            assert len(samples.cct_ns) == 1, what
            assert samples.nvlink_bytes == (nvlink,), what
            assert payload + nvlink == planned.schedule.nbytes.sum(), what
            if count:  # else the QP table holds what the item before left
                assert responders["rx_payload_bytes"].sum() == ROUNDS * payload, what
                assert not responders["duplicate_packets"].any(), what
            senders = {path.ports[0] for path in planned.paths}
            carried = {nic.id: int(sent[nic.id]) for nic in fabric.plan.topology.nics}
            receivers = {fabric.plan.topology.port(path.ports[-1]).peer for path in planned.paths}
            for nic, nbytes in carried.items():  # data, or ACKs for what arrived
                assert (nbytes > 0) == (nic in senders | receivers), what
            assert sum(carried.values()) >= ROUNDS * payload, what
            assert not fabric.arrays.queues["drop_packets"].any(), what
            assert_drained(fabric)


def test_a_host_answers_by_the_nic_that_was_asked() -> None:
    with small_fabric(*GPU_HOSTS, name="nics") as fabric:
        topology = fabric.plan.topology
        for asking in (0, 1):
            for asked in (0, 1):
                nics = topology.host_port(0, asking), topology.host_port(1, asked)
                before = fabric.arrays.queues["enq_packets"].sum(axis=1)
                done = run_in(fabric, "host0", "ping", "-c", "1", "-I", nics[0].ifname, format_address(nics[1].address))
                assert done.returncode == 0, done.stdout + done.stderr
                moved = fabric.arrays.queues["enq_packets"].sum(axis=1) - before
                for nic in topology.nics:
                    assert moved[nic.id] == (1 if nic in nics else 0)


@pytest.mark.parametrize("strategy", ["split", "round_robin", "dynamic"])
def test_queue_pairs_carry_what_leaves_the_host_and_nvlink_the_rest(strategy: str) -> None:
    items = [f"workload[{index}]={{{item}, iters: 1, warmup_iters: 1}}" for index, item in enumerate(GPU_ITEMS[:5])]
    spread = ("transport.qps_per_connection=3", f"transport.qp_strategy={strategy}", "routing.scheme=e-ecmp")
    settings = ("transport.mtu=1024", "transport.retransmit_timeout=auto", *GPU_HOSTS, *spread)
    with small_fabric(*settings, *items, name="gpuqps") as fabric, plain_carrier(fabric) as carrier:
        for index, planned in enumerate(fabric.plan.workloads):
            what = GPU_ITEMS[index]
            samples = carrier.run(index, Quiet())
            count = len(planned.connections)
            assert count % 3 == 0
            responders = fabric.arrays.qps[qp_index(0, RESPONDER) : 2 * count : 2]
            received = responders["rx_payload_bytes"].reshape(count // 3, 3).sum(axis=1)
            asked = np.zeros(len(planned.messages.connections), np.int64)
            np.add.at(asked, planned.messages.connection, planned.messages.nbytes)
            assert received.tolist() == (ROUNDS * asked[: count // 3]).tolist(), what
            assert samples.nvlink_bytes == (int(asked[count // 3 :].sum()),), what
            assert samples.retransmitted_packets == 0, what
            assert (samples.end_ns[asked[: count // 3].repeat(3) > 0] > 0).any(), what
            assert_drained(fabric)


JOBS = (
    "workload=[]",
    "jobs=[{name: a, placement: [0, 2], workload: [{collective: all_reduce, size: 256 KiB, iters: 1, warmup_iters: 0}]},"
    " {name: b, placement: [1, 3], start: 20 us, workload: [{pattern: flows, flows: [{src: 0, dst: 1, size: 64 KiB}],"
    " iters: 1, warmup_iters: 0}]}]",
    "measure_jobs=alone",
    "routing.scheme=pinning",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("fabric.gpus_per_host=2", "jobs[0].workload[0].order=packed", "transport.qps_per_connection=2"),
        (
            *("fabric.gpus_per_host=2", "jobs[0].workload[0].order=packed", "transport.qps_per_connection=2"),
            "transport.qp_strategy=dynamic",
        ),
    ],
    ids=["a QP each", "NVLink and two QPs", "dynamic"],
)
def test_jobs_run_at_the_same_time_and_each_is_timed_by_itself(overrides: tuple[str, ...]) -> None:
    with small_fabric(*JOBS, *overrides, name="jobs") as fabric, plain_carrier(fabric) as carrier:
        sent = []
        for index, planned in enumerate(fabric.plan.workloads):
            samples = carrier.run(index, Quiet())
            assert samples.retransmitted_packets == 0
            times = [time for (time,) in samples.job_cct_ns]
            assert len(times) == len(planned.jobs)
            # No faster than ideal but for a tick; of 20000 it is 50 ns.
            for job, time in zip(planned.jobs, times, strict=True):
                assert time >= 0.99 * job.ideal_cct_ns - 100
            ends = [job.start_ns + time for job, time in zip(planned.jobs, times, strict=True)]
            if planned.connections:  # what stays inside hosts is computed
                assert max(ends) == pytest.approx(samples.cct_ns[0], abs=1)
            sent.append(int(planned.schedule.nbytes.sum()))
            assert_drained(fabric)
        assert sent[2] == sent[0] + sent[1]
