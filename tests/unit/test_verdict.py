"""The verdict: each cause alone, its threshold, and what the sum of small ones does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from testbed.measure import verdict
from testbed.measure.samples import MachineSamples
from testbed.measure.verdict import INVALID_ERROR_FRACTION, TRUSTED_ERROR_FRACTION, estimate_error, judge
from testbed.results import Fidelity, FidelityVerdict

TICK_NS = 1_000_000
TICKS = 1000
DURATION_NS = TICK_NS * TICKS
# What the token buckets of the ports make good before it costs anything.
ABSORBED_NS = verdict._ABSORBED_TICKS * TICK_NS

QUIET = MachineSamples(
    wall_tick_ns=TICK_NS,
    wall_lateness_ns=np.full(TICKS, 10_000),
    wall_busy_ns=np.full(TICKS, 400_000),
    wall_probe_ns=np.full(TICKS // 8, 50_000),
    wall_nic_lag_ns=np.full(TICKS // 4, 80_000.0),
    wall_lost_ns=np.zeros(5),
    wall_gained_ns=0.0,
    wall_duration_ns=DURATION_NS,
    unaccounted_bytes=0,
    resolution_error_fraction=0.0001,
)


def disturbed(**changes: Any) -> MachineSamples:
    return dataclasses.replace(QUIET, **changes)


def judge_one(samples: MachineSamples, **more: Any) -> Fidelity:
    return judge([samples], **{"wall_tick_ns": TICK_NS, "softnet_drops": 0, "steal_fraction": 0.0, **more})


def with_lag(fraction: float) -> MachineSamples:
    lag = QUIET.wall_nic_lag_ns.copy()
    lag[40] = fraction * DURATION_NS + ABSORBED_NS + TICK_NS
    return disturbed(wall_nic_lag_ns=lag)


def with_stall(fraction: float) -> MachineSamples:
    waits = QUIET.wall_probe_ns.copy()
    waits[40] = fraction * DURATION_NS + ABSORBED_NS + TICK_NS
    return disturbed(wall_probe_ns=waits)


def with_lost_time(fraction: float) -> MachineSamples:
    return disturbed(wall_lost_ns=np.array([0, 0, 0.3, 1.0, 0.5]) * fraction * DURATION_NS)


def with_gained_time(fraction: float) -> MachineSamples:
    return disturbed(wall_gained_ns=fraction * DURATION_NS)


def with_excess(fraction: float) -> MachineSamples:
    return disturbed(wall_excess_ns=fraction * DURATION_NS)


def with_coarse_ticks(fraction: float) -> MachineSamples:
    return disturbed(resolution_error_fraction=fraction, wall_lateness_ns=np.zeros(TICKS, np.int64))


CAUSES = {
    with_lag: "a NIC fell behind its schedule",
    with_stall: "the fabric's CPU stalled",
    with_lost_time: "a port sent less than its rate",
    with_gained_time: "congested ports are a little fast",
    with_excess: "a port sent more than its rate",
    with_coarse_ticks: "a tick is long beside this collective's steps",
}


def test_a_quiet_machine_is_trusted_without_reasons() -> None:
    fidelity = judge_one(QUIET)
    assert (fidelity.verdict, fidelity.reasons) == (FidelityVerdict.TRUSTED, ())
    assert fidelity.estimated_error_fraction == pytest.approx(0.0001, rel=0.02)
    assert fidelity.wall_tick_lateness_p50_ns == fidelity.wall_tick_lateness_p99_ns == 10_000
    assert fidelity.cpu_fraction == 0.4
    assert fidelity.wall_nic_lag_max_ns == 80_000
    assert fidelity.wall_fabric_wait_p99_ns == 50_000


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.9 * TRUSTED_ERROR_FRACTION, FidelityVerdict.TRUSTED),
        (1.1 * TRUSTED_ERROR_FRACTION, FidelityVerdict.DEGRADED),
        (0.9 * INVALID_ERROR_FRACTION, FidelityVerdict.DEGRADED),
        (1.1 * INVALID_ERROR_FRACTION, FidelityVerdict.INVALID),
    ],
)
def test_each_cause_alone_crosses_both_thresholds_and_is_named(
    cause: Any, fraction: float, expected: FidelityVerdict
) -> None:
    fidelity = judge_one(cause(fraction))
    assert fidelity.verdict is expected
    named = [words for words in CAUSES.values() if any(words in reason for reason in fidelity.reasons)]
    assert named == ([] if expected is FidelityVerdict.TRUSTED else [CAUSES[cause]])


def test_causes_too_small_alone_add_up() -> None:
    half = 0.6 * TRUSTED_ERROR_FRACTION
    assert judge_one(with_lost_time(half)).verdict is FidelityVerdict.TRUSTED
    both = dataclasses.replace(with_lost_time(half), wall_nic_lag_ns=with_lag(half).wall_nic_lag_ns)
    fidelity = judge_one(both)
    assert fidelity.verdict is FidelityVerdict.DEGRADED
    assert fidelity.estimated_error_fraction == pytest.approx(2 * half, rel=0.05)


def test_waits_within_a_tick_cost_nothing_and_longer_ones_add_up() -> None:
    assert estimate_error(disturbed(wall_probe_ns=np.full(125, TICK_NS))).stalls == 0
    waits = np.full(125, 2 * TICK_NS)
    expected = (125 * TICK_NS - ABSORBED_NS) / DURATION_NS
    assert estimate_error(disturbed(wall_probe_ns=waits)).stalls == pytest.approx(expected)


def test_what_the_buckets_absorb_costs_nothing() -> None:
    assert estimate_error(with_lag(0.0)).lag == 0
    assert estimate_error(with_stall(0.0)).stalls == 0
    assert estimate_error(with_stall(0.001)).stalls == pytest.approx(0.001)


def test_late_ticks_coarsen_the_resolution() -> None:
    samples = disturbed(resolution_error_fraction=0.004, wall_lateness_ns=np.full(TICKS, 3 * TICK_NS))
    assert estimate_error(samples).resolution == pytest.approx(0.016)


def test_the_estimate_grows_with_every_cause() -> None:
    for cause in CAUSES:
        totals = [estimate_error(cause(fraction)).total for fraction in (0.0, 0.001, 0.01, 0.1, 1.0)]
        assert totals == sorted(totals)
        assert totals[-1] > 0.9


def test_the_median_iteration_is_judged() -> None:
    bad, good = with_lost_time(0.5), QUIET
    arguments: dict[str, Any] = {"wall_tick_ns": TICK_NS, "softnet_drops": 0, "steal_fraction": 0.0}
    assert judge([good, bad, good], **arguments).verdict is FidelityVerdict.TRUSTED
    assert judge([bad, good, bad], **arguments).verdict is FidelityVerdict.INVALID
    assert judge([good, bad, good], **arguments).shaping_error_fraction == 0.5


def test_frames_that_the_kernel_lost_make_every_figure_invalid() -> None:
    for fidelity in (judge_one(QUIET, softnet_drops=1), judge_one(disturbed(unaccounted_bytes=4154))):
        assert fidelity.verdict is FidelityVerdict.INVALID
        assert "dropped" in fidelity.reasons[0]
    assert judge_one(QUIET, softnet_drops=1).softnet_drops_packets == 1


def test_much_steal_alone_degrades() -> None:
    assert judge_one(QUIET, steal_fraction=0.04).verdict is FidelityVerdict.TRUSTED
    fidelity = judge_one(QUIET, steal_fraction=0.06)
    assert fidelity.verdict is FidelityVerdict.DEGRADED
    assert "hypervisor" in fidelity.reasons[0]
    assert judge_one(with_lag(0.5), steal_fraction=0.3).verdict is FidelityVerdict.INVALID


def test_a_run_without_samples_is_invalid() -> None:
    fidelity = judge([], wall_tick_ns=TICK_NS, softnet_drops=0, steal_fraction=0.0)
    assert fidelity.verdict is FidelityVerdict.INVALID


def test_no_p99_is_given_below_a_hundred_samples() -> None:
    few = disturbed(wall_lateness_ns=np.full(99, 5), wall_probe_ns=np.full(99, 5))
    fidelity = judge_one(few)
    assert fidelity.wall_tick_lateness_p99_ns is None
    assert fidelity.wall_fabric_wait_p99_ns is None
    assert fidelity.wall_tick_lateness_p50_ns == 5
