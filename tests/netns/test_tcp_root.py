"""The carrier `tcp`: kernel sockets over the fabric carry the real bytes of a collective, over the paths that are predicted."""

from __future__ import annotations

import pytest

from testbed import api
from testbed.carriers.choose import open_carrier
from testbed.carriers.protocol import WorkloadSamples
from testbed.fabric import Fabric
from testbed.measure.verdict import judge
from testbed.results import FidelityVerdict
from testbed.scenario import load_scenario
from testbed.topology import NodeKind
from tests.netns.labs import SCENARIO, Quiet, lab_name, run_in, small_plan

pytestmark = pytest.mark.root

TCP = ("transport.carrier=tcp", "transport.retransmit_timeout=auto", "time_dilation=4000")
ALL_REDUCE = "workload=[{collective: all_reduce, size: 256 KiB, iters: 2, warmup_iters: 0}]"


def run_tcp(*overrides: str) -> tuple[WorkloadSamples, dict[str, int], dict[str, int]]:
    """Return the samples, the data bytes that each port sent, and what the plan's paths say it should have."""
    plan = small_plan(*TCP, *overrides)
    with Fabric.build(plan, lab_name("tcp"), any_workload=True) as fabric, open_carrier(fabric) as (carrier, _):
        samples = carrier.run(0, Quiet())
        priority = plan.scenario.qos.lossless_priority
        sent = {
            plan.topology.port_name(port.id): int(fabric.arrays.queues[port.id, priority]["deq_bytes"])
            for port in plan.topology.ports
        }
    planned, predicted = plan.workloads[0], dict.fromkeys(sent, 0)
    carried = [0] * len(planned.connections)
    for connection, nbytes in zip(planned.schedule.connection.tolist(), planned.schedule.nbytes.tolist(), strict=True):
        carried[connection] += nbytes
    for path, nbytes in zip(planned.paths, carried, strict=True):
        for port in path.ports:
            predicted[plan.topology.port_name(port)] += nbytes
    return samples, sent, predicted


def test_all_reduce_over_tcp_is_right_and_takes_the_predicted_paths() -> None:
    samples, sent, predicted = run_tcp(ALL_REDUCE, "transport.qps_per_connection=2")
    assert samples.wrong_elements == 0
    assert len(samples.cct_ns) == 2
    iterations = 2
    for port, nbytes in predicted.items():
        # Headers are 2 % of full frames; ACKs, which go the other way, are about as much of what they acknowledge.
        assert nbytes * iterations <= sent[port] <= 1.1 * iterations * (nbytes + sum(predicted.values()) / 100), port
    assert sum(nbytes for port, nbytes in sent.items() if port.startswith(str(NodeKind.SPINE))) > 0


def test_result_of_a_whole_run_says_what_was_wrong() -> None:
    settings = [*TCP, ALL_REDUCE.replace("iters: 2", "iters: 1"), "qos.pfc.enabled=true"]
    row = api.run(load_scenario(SCENARIO, settings)).results[0]
    assert row.wrong_elements == 0
    assert row.fabric.drops_packets == 0
    assert row.fabric.pause_frames is not None


def test_lost_segments_are_sent_again_and_the_sum_is_still_right() -> None:
    incast = "workload=[{pattern: incast, fan_in: 3, size: 512 KiB, iters: 1, warmup_iters: 0}]"
    samples, _, _ = run_tcp(incast, "fabric.switch.buffer=128 KiB")
    assert samples.retransmitted_packets > 0
    assert samples.wrong_elements == 0


@pytest.mark.parametrize("is_shaped", [True, False])
def test_frames_that_went_past_their_shapers_make_a_run_invalid(is_shaped: bool) -> None:
    settings = ["workload=[{collective: all_reduce, size: 8 MiB, iters: 1, warmup_iters: 0}]", "transport.carrier=tcp"]
    plan = small_plan(*settings, "transport.retransmit_timeout=auto", "time_dilation=8000")
    with Fabric.build(plan, lab_name("shapers"), any_workload=True) as fabric:
        for port in [] if is_shaped else plan.topology.ports:
            node = plan.topology.nodes[port.node].name
            command = [
                "tc",
                "qdisc",
                "replace",
                "dev",
                port.ifname,
                "parent",
                "1:1",
                "handle",
                "30:",
                "pfifo",
                "limit",
                "10000",
            ]
            done = run_in(fabric, node, *command)
            assert done.returncode == 0, done.stderr
        with open_carrier(fabric) as (carrier, _):
            (machine,) = carrier.run(0, Quiet()).machine
    if is_shaped:
        assert machine.wall_excess_ns == 0
    else:
        assert machine.wall_excess_ns > 0
        fidelity = judge([machine], wall_tick_ns=machine.wall_tick_ns, softnet_drops=0, steal_fraction=0.0)
        assert fidelity.verdict is FidelityVerdict.INVALID
        assert "went past its shaper" in fidelity.reasons[0]
