"""Counters, checks and the quota: figures that a result states, from values made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from testbed.assemble import assemble_result, fabric_result, judge_check
from testbed.carriers.protocol import WorkloadSamples
from testbed.kernel.layout import QUEUE
from testbed.kernel.probe import read_cpu_quota
from testbed.measure.counters import FabricCounters, Snapshot
from testbed.plan.compile import compile_plan
from testbed.results import CollectiveResult, FabricCounts, Fidelity, FidelityVerdict
from testbed.scenario import load_scenario, parse_expectation

STAR = """
name: two
fabric: {kind: star, hosts_per_leaf: 2, host_link: {rate: 8 Gbit/s, delay: 1 us}}
workload: [{collective: all_reduce, size: 64 KiB}]
time_dilation: 1000
"""


def counters(ports: int) -> FabricCounters:
    queues = np.zeros((ports + 1, 8), QUEUE)
    queues["deq_bytes"][1, 3], queues["deq_packets"][1, 3] = 1_000, 10
    before = Snapshot(queues.copy(), 3, 1, duplicate_packets=2)
    queues["deq_bytes"][1, 3], queues["deq_packets"][1, 3] = 1_000 + 4_154 * 10, 20
    queues["deq_bytes"][1, 6], queues["deq_packets"][1, 6] = 62, 1
    queues["drop_packets"][2, 3] = 5
    queues["peak_bytes"][1, 3], queues["peak_bytes"][1, 6] = 9_000, 62
    return FabricCounters.between(before, Snapshot(queues, 7, 1, duplicate_packets=8), wall_duration_ns=100_000_000)


def test_counters_are_the_difference_of_two_snapshots() -> None:
    counted = counters(4)
    assert counted.sent_bytes.tolist() == [0, 41_540 + 62, 0, 0, 0]
    assert counted.sent_packets[1] == 11
    assert counted.drops_packets.tolist() == [0, 0, 5, 0, 0]
    assert counted.peak_bytes[1] == 9_000
    assert (counted.out_of_order_packets, counted.nak_packets, counted.duplicate_packets) == (4, 0, 6)


def test_counters_of_two_stretches_add_up_but_for_the_peak() -> None:
    both = counters(4) + counters(4)
    assert both.sent_packets[1] == 22
    assert both.duplicate_packets == 12
    assert both.peak_bytes[1] == 9_000
    assert both.wall_duration_ns == 200_000_000


def test_utilisation_is_wire_bytes_over_what_the_link_carries_on_the_wall_clock() -> None:
    plan = compile_plan(load_scenario(STAR), capacity_packets_per_s=None)
    result = fabric_result(
        plan,
        counters(len(plan.topology.ports)),
        [WorkloadSamples((1e6,), (1,), 2, (), np.zeros(len(plan.topology.ports) + 1))],
    )
    way = result.links[0].directions[0]
    # 8 Gbit/s at D = 1000 is 1 MB/s on the wall clock: 100 kB in 100 ms.
    assert way.utilisation_fraction == pytest.approx((41_602 + 11 * 24) / 100_000)
    assert (way.src, way.dst) == ("host0/eth0", "switch0/down0")
    assert result.links[0].directions[1].drops_packets == 5
    assert (result.drops_packets, result.retransmitted_packets) == (5, 2)
    assert (result.duplicate_packets, result.timeouts) == (6, None)  # the carrier did not tell
    assert result.ecn_marked_packets is None
    assert result.cnp_packets is None
    assert result.pause_frames is None


@pytest.mark.parametrize(("carrier", "seen"), [("engine", (4, 0, 6)), ("rxe", (None,) * 3), ("tcp", (None,) * 3)])
def test_what_only_our_responders_count_is_not_known_of_other_carriers(
    carrier: str, seen: tuple[int | None, ...]
) -> None:
    plan = compile_plan(load_scenario(STAR, [f"transport.carrier={carrier}"]), capacity_packets_per_s=None)
    ports = len(plan.topology.ports)
    samples = [WorkloadSamples((1e6,), (1,), 2, (), np.zeros(ports + 1))]
    result = fabric_result(plan, counters(ports), samples)
    assert (result.out_of_order_packets, result.nak_packets, result.duplicate_packets) == seen


def test_timeouts_are_known_where_every_row_tells_and_duplicates_where_the_receivers_are_ours() -> None:
    def counted(carrier: str, *timeouts: int | None) -> tuple[int | None, int | None]:
        plan = compile_plan(load_scenario(STAR, [f"transport.carrier={carrier}"]), capacity_packets_per_s=None)
        ports = len(plan.topology.ports)
        samples = [WorkloadSamples((1e6,), (1,), 2, (), np.zeros(ports + 1), timeouts=one) for one in timeouts]
        result = fabric_result(plan, counters(ports), samples)
        return result.timeouts, result.duplicate_packets

    assert counted("engine", 3, 4) == (7, 6)
    assert counted("engine", 3, None) == (None, 6)
    assert counted("tcp", None) == (None, None)


def row(
    ratio: float | None, verdict: FidelityVerdict = FidelityVerdict.TRUSTED, drops_packets: int = 5
) -> CollectiveResult:
    return CollectiveResult(
        "all_reduce",
        "ring",
        1024,
        4,
        cct_ns=(1_000, 3_000, 2_000),
        cct_ratio=ratio,
        fabric=FabricCounts(drops_packets=drops_packets),
        fidelity=Fidelity(verdict),
    )


@pytest.mark.parametrize(
    ("line", "ratios", "observed", "verdict"),
    [
        ("cct_ratio <= 1.05", (1.01, 1.2), 1.2, "fail"),
        ("cct_ratio >= 1.05", (1.1, 1.2), 1.1, "pass"),
        ("cct_ratio == 1", (1.0, 1.5), 1.5, "fail"),
        ("cct_ratio <= 1.05", (1.01, None), 1.01, "not_judged"),
        ("cct_ratio <= 1.05", (1.2, None), 1.2, "fail"),
        ("cct_ns < 3 us", (1.0,), 2_000, "pass"),
        ("drops_packets == 0", (1.0,), 5, "fail"),
        ("pause_frames == 0", (1.0,), None, "not_judged"),
    ],
)
def test_check_looks_at_the_row_furthest_from_holding(
    line: str, ratios: tuple[float | None, ...], observed: float | None, verdict: str
) -> None:
    rows = [row(ratio) for ratio in ratios]
    check = judge_check(parse_expectation(line), rows)
    assert (check.observed, check.verdict) == (observed, verdict)


@pytest.mark.parametrize(
    ("ratios", "invalid", "verdict", "observed", "place"),
    [
        ((1.0, 1.01, 1.02), (), "pass", 1.02, 2),
        ((1.0, 1.2, 1.02), (), "fail", 1.2, 1),
        # A row that may not be judged neither fails nor passes, nor does it hide another that fails.
        ((1.5, 1.0, 1.0), (0,), "not_judged", 1.5, 0),
        ((1.5, 1.1, 1.0), (0,), "fail", 1.1, 1),
        ((1.0, 1.0, 1.0), (0, 1, 2), "not_judged", 1.0, 0),
    ],
)
def test_check_must_hold_in_every_row_that_may_be_judged(
    ratios: tuple[float, ...], invalid: tuple[int, ...], verdict: str, observed: float, place: int
) -> None:
    rows = [
        row(ratio, FidelityVerdict.INVALID if index in invalid else FidelityVerdict.DEGRADED)
        for index, ratio in enumerate(ratios)
    ]
    check = judge_check(parse_expectation("cct_ratio <= 1.05"), rows)
    assert (check.verdict, check.observed, check.row) == (verdict, observed, place)


def test_counted_metric_is_that_of_each_row_not_their_sum() -> None:
    rows = [row(1.0, drops_packets=6), row(1.0, drops_packets=7)]
    assert judge_check(parse_expectation("drops_packets <= 7"), rows).verdict == "pass"
    assert judge_check(parse_expectation("drops_packets <= 6"), rows).verdict == "fail"


def test_nothing_is_judged_where_nothing_ran() -> None:
    assert judge_check(parse_expectation("drops_packets == 0"), []).verdict == "not_judged"


def test_rows_of_a_sweep_keep_their_figures_and_the_worst_verdict_is_the_runs() -> None:
    plan = compile_plan(
        load_scenario(STAR, ["workload[0].max_size=256 KiB", "expect=[drops_packets == 0]"]),
        capacity_packets_per_s=None,
    )
    verdicts = [FidelityVerdict.DEGRADED, FidelityVerdict.INVALID, FidelityVerdict.TRUSTED]
    result = assemble_result(
        plan,
        [
            WorkloadSamples((1e6 * number,), (1,), number, (), np.zeros(len(plan.topology.ports) + 1))
            for number in (1, 2, 4)
        ],
        [counters(len(plan.topology.ports))] * 3,
        [Fidelity(verdict, (f"because of {verdict}",)) for verdict in verdicts],
        host={},
        warnings=(),
    )
    assert [one.size_bytes for one in result.results] == [64 << 10, 128 << 10, 256 << 10]
    assert [one.count for one in result.results] == [64 << 10, 128 << 10, 256 << 10]
    assert [one.fidelity and one.fidelity.verdict for one in result.results] == verdicts
    assert [one.algbw_bytes_per_s for one in result.results] == pytest.approx([(64 << 10) * 1e3] * 3)
    assert [one.fabric.drops_packets for one in result.results] == [5, 5, 5]
    assert [one.fabric.retransmitted_packets for one in result.results] == [1, 2, 4]
    assert (result.fabric.drops_packets, result.fabric.retransmitted_packets) == (15, 7)
    assert result.fidelity == Fidelity(FidelityVerdict.INVALID, ("because of invalid",))
    assert [check.verdict for check in result.checks] == ["fail"]
    assert result.scenario["workload"][0]["max_size"] == "256 KiB"


def test_smallest_cpu_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("50000 100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert read_cpu_quota(tmp_path, membership) == 0.5


def test_cpu_quota_of_the_first_cgroup_version_is_read(tmp_path: Path) -> None:
    group = tmp_path / "cpu,cpuacct" / "job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("150000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("3:cpu,cpuacct:/job\n2:memory:/job\n")
    assert read_cpu_quota(tmp_path, membership) == 1.5


def test_no_quota_is_none(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/\n")
    assert read_cpu_quota(tmp_path, membership) is None
