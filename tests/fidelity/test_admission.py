"""The bars of receiver-driven admission: the queue it bounds, the rate its windows allow, what a class of its own is worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from testbed.carriers.engine import engine_carrier
from testbed.fabric import Fabric
from testbed.measure.verdict import estimate_error, judge
from testbed.plan.admission import forecast_peak_bytes, peak_bound_bytes
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.results import FidelityVerdict
from testbed.scenario import load_scenario
from tests.netns.labs import Quiet, lab_name

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

INCAST = Path("scenarios/congestion/cts-incast.yaml").read_text()
BOTH_WAYS = Path("scenarios/congestion/cts-low-priority.yaml").read_text()
MTU, FRAME_BYTES, FRAME_WIRE_BYTES = 4096, 4170, 4178
LINK_BYTES_PER_NS = 50.0
ATTEMPTS = 4


@dataclass(frozen=True)
class Seen:
    """What one run showed."""

    cct_ns: float
    cct_ratio: float
    peak_bytes: int
    pauses: int
    p99_ns: float


def plan_of(text: str, *settings: str) -> Plan:
    return compile_plan(load_scenario(text, settings), capacity_packets_per_s=150_000.0)


def trusted_run(plan: Plan, tolerance: float = 0.02) -> Seen:
    """Run a plan's first workload until it can be judged; skip when it never can.

    What a tick more of latency would add is no fault of the machine: the forecast of the peak contains the tick, and loops are
    compared at the same one.

    Args:
        plan: What is run.
        tolerance: The machine's share in the completion time, but for the length of a tick, must be below it: a fraction of what
            the bar allows for.
    """
    heard = []
    for _ in range(ATTEMPTS):
        with Fabric.build(plan, lab_name("cts")) as fabric, engine_carrier(fabric) as (carrier, _):
            samples = carrier.run(0, Quiet())
            topology, queues = plan.topology, fabric.arrays.queues
            port = topology.port(topology.host_port(0).peer).id
            peak = int(queues["peak_bytes"][port, plan.scenario.qos.lossless_priority])
            pauses = int(queues["xoff_frames"].sum())
        (machine,) = samples.machine
        verdict = judge(samples.machine, wall_tick_ns=plan.dilation.wall_tick_ns, softnet_drops=0, steal_fraction=0.0)
        error, late = estimate_error(machine), late_fraction(machine.wall_lateness_ns)
        share = error.total - error.resolution
        heard.append(f"{verdict.verdict}, the machine's share {share:.1%}, p99 of lateness {late:.2f} ticks")
        print(heard[-1])
        if verdict.verdict is not FidelityVerdict.INVALID and share < tolerance and late < 0.5:
            delays = samples.admission[0].cts_delay_ns if samples.admission else np.zeros(0)
            return Seen(
                samples.cct_ns[0],
                samples.cct_ns[0] / plan.workloads[0].ideal_cct_ns,
                peak,
                pauses,
                float(np.percentile(delays, 99)) if len(delays) >= 100 else float("nan"),
            )
    pytest.skip(f"not judged: none of {ATTEMPTS} runs could be: {' / '.join(heard)}")


def late_fraction(lateness_ns: np.ndarray) -> float:  # type: ignore[type-arg]
    """Return how late ticks were at their 99th percentile, as a part of one: a later one hands over frames of two."""
    return float(np.percentile(lateness_ns, 99)) / 1e6


def cts(window_packets: int, grants: int) -> tuple[str, str]:
    return f"transport.admission.channel_buffer={window_packets * MTU} B", f"transport.admission.grants={grants}"


def loop_ns(senders: int, window_packets: int, dilation: int = 4000) -> float:
    """Measure a loop of windows of one grant each: the time of three of them less that of one is that of two loops.

    A port that several senders share gains what its bucket had saved, in either run alike; nothing else may be gained or lost.
    """
    tolerance = 0.0075 if senders == 1 else 0.03
    took = []
    for windows in (1, 3):
        size = f"workload.0.size={windows * window_packets * MTU} B"
        settings = (*cts(window_packets, 1), size, f"workload.0.fan_in={senders}", f"time_dilation={dilation}")
        took.append(trusted_run(plan_of(INCAST, *settings), tolerance).cct_ns)
    return (took[1] - took[0]) / 2


@cache
def measured_bdp_bytes() -> float:
    """Return C times the loop time of one sender, without its window's own time on the link."""
    packets = 24
    return LINK_BYTES_PER_NS * loop_ns(1, packets) - packets * FRAME_WIRE_BYTES


def test_one_senders_loop_is_that_of_the_path() -> None:
    forecast = plan_of(INCAST).workloads[0].admission
    assert forecast is not None
    # A tick at D = 4000 is 0.25 us of 16: a loop has two, each rounded by up to half.
    assert measured_bdp_bytes() == pytest.approx(forecast.bdp_bytes, rel=0.03)


# --- the queue -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("senders", "window_packets", "grants"), [(2, 49, 8), (4, 25, 4), (4, 49, 12), (4, 300, 16), (8, 100, 8)]
)
def test_peak_queue_stays_below_its_bound(senders: int, window_packets: int, grants: int) -> None:
    plan = plan_of(
        INCAST,
        f"fabric.hosts_per_leaf={senders + 1}",
        f"workload.0.fan_in={senders}",
        "workload.0.size=2 MiB",
        *cts(window_packets, grants),
    )
    seen = trusted_run(plan)
    tick_ns = plan.dilation.wall_tick_ns / plan.dilation.value
    batch = (np.ceil(LINK_BYTES_PER_NS * tick_ns / FRAME_WIRE_BYTES) + 1) * FRAME_BYTES
    bound = peak_bound_bytes(senders, window_packets * FRAME_BYTES, measured_bdp_bytes(), batch)

    assert seen.peak_bytes <= bound
    assert seen.peak_bytes > bound / 3  # the bound says something
    assert bound == pytest.approx(forecast_peak_bytes(plan, plan.workloads[0]), rel=0.05)


def test_peak_queue_exceeds_the_bound_without_admission() -> None:
    """Negative control: nothing else keeps the queue there."""
    settings = ("workload.0.size=2 MiB", *cts(49, 12))
    bound = forecast_peak_bytes(plan_of(INCAST, *settings), plan_of(INCAST, *settings).workloads[0])
    seen = trusted_run(plan_of(INCAST, *settings, "transport.admission.scheme=none"))

    assert bound is not None
    assert seen.peak_bytes > 2 * bound


# --- throughput ----------------------------------------------------------------------------------------------------------


def test_windows_of_a_share_of_the_bdp_fill_the_link_in_many_grants() -> None:
    window = int(measured_bdp_bytes() / 4 / FRAME_WIRE_BYTES)
    seen = trusted_run(plan_of(INCAST, *cts(window, 12)))

    assert seen.pauses == 0
    assert seen.cct_ratio <= 1 / 0.9


def test_one_grant_per_window_begins_at_half_of_the_link_and_never_fills_it() -> None:
    """Negative control of the above. Windows that begin together drift apart after some loops: see the plan's forecast."""
    window = int(measured_bdp_bytes() / 4 / FRAME_WIRE_BYTES)
    bytes_per_loop = 4 * window * FRAME_WIRE_BYTES
    together = bytes_per_loop / (LINK_BYTES_PER_NS * loop_ns(4, window))
    # The bucket of a port that was idle lets three ticks' worth go at once: 0.75 us of 32.
    assert together == pytest.approx(0.5, abs=0.04)

    plan = plan_of(INCAST, *cts(window, 1))
    seen = trusted_run(plan)
    forecast = plan.workloads[0].admission
    assert forecast is not None
    assert seen.cct_ratio > 1 / 0.9
    in_turn_ns = forecast.stretched_ns(plan.workloads[0].ideal_cct_ns)
    assert seen.cct_ratio >= 0.98 * in_turn_ns / plan.workloads[0].ideal_cct_ns


# --- the class of CTS frames ---------------------------------------------------------------------------------------------


def test_grants_in_the_control_queue_are_five_times_as_fast_as_in_the_datas() -> None:
    """Of data both ways. The slowest hundredth are those that meet data: the others find empty queues."""
    low = trusted_run(plan_of(BOTH_WAYS))
    high = trusted_run(plan_of(BOTH_WAYS, "transport.admission.priority=6"))

    assert low.p99_ns >= 5 * high.p99_ns


def test_grants_that_meet_no_data_are_as_fast_in_either_queue() -> None:
    """Negative control: it is the data of the other direction that they wait for."""
    one_way = "workload=[{pattern: incast, fan_in: 4, size: 2 MiB, iters: 1, warmup_iters: 0}]"
    low = trusted_run(plan_of(BOTH_WAYS, one_way))
    high = trusted_run(plan_of(BOTH_WAYS, one_way, "transport.admission.priority=6"))

    assert low.p99_ns < 2 * high.p99_ns
