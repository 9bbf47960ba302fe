"""DCQCN and TIMELY on a fluid model of one 400 Gbit/s bottleneck: what facts.md section 4 says of them, and issue 4's bars."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.support.fluid import Ecn, Trace, simulate

# SimAI's thresholds at 400 Gbit/s.
ECN = Ecn(kmin_bytes=800e3, kmax_bytes=3200e3, pmax=0.2)
NO_ECN = Ecn(kmin_bytes=1e15, kmax_bytes=2e15, pmax=0.0)
PAPER_CNP_INTERVAL_NS, FIRMWARE_CNP_INTERVAL_NS = 50_000, 4_000
FIRMWARE_CONSTANTS = {
    "g": 1 / 204.8, "alpha_timer_ns": 1_000, "rate_timer_ns": 300_000, "fast_recovery": 1, "rai_bits_per_s": 50_000_000,
    "rhai_bits_per_s": 500_000_000,
}  # fmt: skip


@functools.cache
def paper(qps: int, stagger_ms: float, scale: float | None = None) -> Trace:
    parameters: dict[str, Any] = {"machine": "paper", "scale": scale}
    return simulate(
        "dcqcn",
        parameters,
        qps=qps,
        ecn=ECN,
        cnp_interval_ns=PAPER_CNP_INTERVAL_NS,
        stagger_ms=stagger_ms,
        step_ns=4_000,
    )


@pytest.mark.parametrize("qps", [2, 8])
def test_tuned_dcqcn_is_fair_full_and_keeps_its_queue(qps: int) -> None:
    trace = paper(qps, stagger_ms=1.0)
    assert trace.jain(30, 40) >= 0.95
    assert trace.throughput(30, 40) >= 0.90
    assert trace.depth(50, 30, 40) > 0
    assert trace.depth(95, 30, 40) <= ECN.kmax_bytes


def test_constants_for_40_gbit_leave_a_400_gbit_link_idle_at_8_to_1() -> None:
    tuned, slow = paper(8, stagger_ms=0.1), paper(8, stagger_ms=0.1, scale=1)
    assert slow.throughput(0, 20) < 0.6 * tuned.throughput(0, 20)


def test_without_congestion_control_the_queue_grows_without_end() -> None:
    trace = simulate("none", {}, qps=2, ecn=ECN, cnp_interval_ns=50_000, duration_ms=4, stagger_ms=0.1, step_ns=4_000)
    assert trace.depth_bytes[-1] > 50 * ECN.kmax_bytes


def test_the_papers_machine_collapses_with_the_firmwares_constants() -> None:
    common: dict[str, Any] = {"ecn": ECN, "cnp_interval_ns": FIRMWARE_CNP_INTERVAL_NS, "qps": 2, "step_ns": 4_000}
    wrong = simulate("dcqcn", {"machine": "paper", **FIRMWARE_CONSTANTS}, **common)
    right = simulate("dcqcn", {"machine": "firmware", **FIRMWARE_CONSTANTS}, **common)
    assert wrong.throughput(0, 40) < 0.48
    assert right.throughput(0, 40) > 0.90


def test_timely_shares_a_link_from_round_trip_times_alone() -> None:
    trace = simulate("timely", {}, qps=2, ecn=NO_ECN, cnp_interval_ns=50_000, step_ns=4_000)
    assert not trace.cnps.any()
    assert trace.throughput(30, 40) >= 0.90
    assert trace.jain(30, 40) >= 0.95
    assert trace.depth(95, 30, 40) < 50e9 * 500e-6  # t_high of queueing
