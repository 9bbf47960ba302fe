"""What a late machine costs a NIC whose queue pairs a congestion control limits: it is not made up for, so it must be noted."""

from __future__ import annotations

import time

import pytest

from testbed.measure.verdict import estimate_error
from tests.netns.labs import Quiet, plain_carrier, small_fabric

pytestmark = pytest.mark.root

_STALL_S = 0.05
_EVERY_TICKS = 100


@pytest.mark.parametrize("congestion_control", ["dcqcn", "timely"])
def test_what_stalls_cost_limited_queue_pairs_is_in_the_estimate(congestion_control: str) -> None:
    settings = ["qos.ecn.enabled=true", f"transport.congestion_control={congestion_control}", "routing.scheme=pinning"]
    ring = "workload=[{collective: all_reduce, order: rails, size: 8 MiB, iters: 1, warmup_iters: 0}]"
    ticks = 0

    def stall_now_and_then() -> None:
        nonlocal ticks
        ticks += 1
        if ticks % _EVERY_TICKS == 0:
            time.sleep(_STALL_S)

    with small_fabric(*settings, ring, "time_dilation=8000") as fabric:
        with plain_carrier(fabric, stall_now_and_then) as carrier:
            samples = carrier.run(0, Quiet())
        ideal_ns = fabric.plan.workloads[0].ideal_cct_ns
    (cct_ns,) = samples.cct_ns
    (machine,) = samples.machine
    cost = 1 - ideal_ns / cct_ns
    print(congestion_control, cost, estimate_error(machine))
    assert cost > 0.1
    assert estimate_error(machine).total > 0.8 * cost
