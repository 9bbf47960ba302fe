"""An idle path takes its configured delay, to a tick."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from testbed.carriers.engine import engine_carrier
from testbed.collectives import ScheduleBuilder
from testbed.measure.samples import MachineSamples
from tests.netns.labs import LINE, Quiet, small_fabric

pytestmark = pytest.mark.root


def skip_unless_on_time(machine: Sequence[MachineSamples]) -> None:
    """Skip as not judged where the ticks themselves came late: a starved machine says nothing about a delay."""
    late = [float(np.median(one.wall_lateness_ns)) / one.wall_tick_ns for one in machine]
    if (
        statistics.median(late) > 0.1
        or statistics.median(max(one.wall_lateness_ns) / one.wall_tick_ns for one in machine) > 1
    ):
        pytest.skip(f"not judged: ticks came late, {max(late):.2f} ticks in the median and more than one at the worst")


def completion_times(delay: str) -> tuple[list[float], Any]:
    """Return the completion times of one small packet each way over four links of a delay, and the plan."""
    settings = ("workload.0.size=1 KiB", "workload.0.iters=9", "time_dilation=2000", f"fabric.host_link.delay={delay}")
    with small_fabric(*LINE, *settings, "transport.retransmit_timeout=10 ms", name="delay") as fabric:
        with engine_carrier(fabric) as (carrier, _):
            samples = carrier.run(0, Quiet())
        skip_unless_on_time(samples.machine)
        return list(samples.cct_ns), fabric.plan


def test_idle_path_takes_its_configured_delay_to_a_tick() -> None:
    times, plan = completion_times("50 us")
    one_way_ns = int(plan.workloads[0].one_way_ns[0])
    tick_ns = plan.dilation.wall_tick_ns / plan.dilation.value
    frame_ns = sum(
        plan.topology.port(port).rate_bits_per_s and 8e9 * (1024 + 74 + 24) / 400e9
        for port in plan.workloads[0].paths[0].ports
    )
    assert one_way_ns == pytest.approx(4 * 50_000 + frame_ns, abs=2)
    # Never before its time, and within a tick after it.
    assert min(times) >= one_way_ns - 1
    assert statistics.median(times) <= one_way_ns + tick_ns

    # Negative control: without a delay only the engine's two ticks and the kernel's time are left.
    quick, _ = completion_times("0 ns")
    assert statistics.median(quick) < one_way_ns / 20


def test_idle_round_trip_takes_the_configured_time_to_a_tick() -> None:
    settings = ("workload.0.size=1 KiB", "workload.0.iters=9", "time_dilation=2000", "fabric.host_link.delay=20 us")
    with small_fabric(*LINE, *settings, "transport.retransmit_timeout=10 ms", name="rtt") as fabric:
        planned = fabric.plan.workloads[0]
        builder = ScheduleBuilder(2, 1024, in_place=False)
        ping = builder.add(0, 1, offset_bytes=0, nbytes=1024)
        builder.add(1, 0, offset_bytes=0, nbytes=1024, after=[ping])
        echo = dataclasses.replace(planned, schedule=builder.build().sorted_by_sender())
        fabric.plan = dataclasses.replace(fabric.plan, workloads=(echo,))
        with engine_carrier(fabric) as (carrier, _):
            samples = carrier.run(0, Quiet())
        skip_unless_on_time(samples.machine)
        tick_ns = fabric.plan.dilation.wall_tick_ns / fabric.plan.dilation.value
        rtt_ns = int(planned.one_way_ns.sum())
        clock_ns = [wall_ns / fabric.plan.dilation.value for wall_ns in samples.wall_cct_ns]
    assert statistics.median(samples.cct_ns) == pytest.approx(rtt_ns, abs=tick_ns)
    # By the clock alone, without the account of what happens between ticks: a tick for each way.
    assert statistics.median(clock_ns) == pytest.approx(rtt_ns, abs=2 * tick_ns)
