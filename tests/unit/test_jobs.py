"""Several jobs at once: where they are placed, what their schedules are together, and what they cost each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from testbed.assemble import compare_jobs, judge_check
from testbed.carriers.jobs import job_cct_ns
from testbed.cli.run import render_result
from testbed.collectives import find_algorithm, ideal_arrivals_ns, keep_connections, merge_schedules, place_schedule
from testbed.errors import ScenarioError
from testbed.plan.compile import compile_plan
from testbed.plan.jobs import fluid_ends_ns
from testbed.plan.model import Plan
from testbed.plan.placement import place_jobs
from testbed.results import CollectiveResult, Fidelity, FidelityVerdict, Result, render_table
from testbed.scenario import load_scenario, parse_expectation

SCENARIOS = Path(__file__).parents[2] / "scenarios" / "jobs"
RNG = np.random.default_rng(1)
SCENARIO = """
name: jobs
fabric: {kind: clos, leaves: 4, spines: 4, hosts_per_leaf: 4, host_link: {rate: 400 Gbit/s, delay: 600 ns}}
routing: {scheme: pinning}
jobs:
  - {name: a, placement: fragmented, workload: [{collective: all_reduce, size: 1 MiB}]}
  - {name: b, placement: fragmented, workload: [{collective: all_reduce, size: 1 MiB}]}
  - {name: c, placement: fragmented, workload: [{collective: all_reduce, size: 1 MiB}]}
  - {name: d, placement: fragmented, workload: [{collective: all_reduce, size: 1 MiB}]}
time_dilation: 20000
"""


def plan_of(*overrides: str, text: str = SCENARIO) -> Plan:
    return compile_plan(load_scenario(text, overrides), capacity_packets_per_s=None)


def test_packed_jobs_fill_rack_after_rack_around_listed_hosts() -> None:
    placed = place_jobs([("packed", 3), ((7, 1), 2), ("packed", 2)], [4, 4], RNG)
    assert placed == [(0, 2, 3), (7, 1), (4, 5)]


def test_fragmented_jobs_send_to_the_same_half_of_the_racks_beside_theirs() -> None:
    placed = place_jobs([("fragmented", 4)] * 4, [4] * 4, RNG)
    assert sorted(host for hosts in placed for host in hosts) == list(range(16))
    for rack in range(4):
        jobs = {number for number, hosts in enumerate(placed) if any(host // 4 == rack for host in hosts)}
        assert len(jobs) == 2
        halves = [{host % 4 // 2 for host in placed[job] if host // 4 != rack} for job in jobs]
        assert halves[0] == halves[1]
        assert len(halves[0]) == 1


def test_random_jobs_follow_the_seed_and_share_no_host() -> None:
    def draw(seed: int) -> list[tuple[int, ...]]:
        return place_jobs([("random", 6), ("random", 6)], [4] * 4, np.random.default_rng(seed))

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1)[0]) | set(draw(1)[1])) == 12


def test_jobs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 hosts, 2 are free"):
        place_jobs([("packed", 2), ("packed", 3)], [4], RNG)
    with pytest.raises(ValueError, match="two jobs"):
        place_jobs([((0, 1), 2), ((1, 2), 2)], [4], RNG)


def test_merged_schedules_arrive_as_each_alone() -> None:
    ring = find_algorithm("all_reduce", "ring").build_schedule(range(4), 1 << 20, 8)
    tree = find_algorithm("broadcast", "binary_tree").build_schedule(range(3), 1 << 18, 8)
    parts = [place_schedule(ring, [5, 1, 2, 7], 8), place_schedule(tree, [0, 3, 4], 8, start_ns=5000)]
    merged = merge_schedules(parts)
    rate, alone = 400 * 10**9, []
    for part in parts:
        alone.append(
            ideal_arrivals_ns(part, nic_rate_bits_per_s=np.full(8, rate), latency_ns=np.full((8, 8), 900), mtu=4096)
        )
    together = ideal_arrivals_ns(
        merged, nic_rate_bits_per_s=np.full(8, rate), latency_ns=np.full((8, 8), 900), mtu=4096
    )
    assert np.allclose(together, np.concatenate(alone))
    assert {(5, 1), (1, 2), (2, 7), (7, 5)} <= set(merged.connections)

    for number, part in enumerate(parts):
        of_part = np.arange(len(merged.connections)) >= len(ring.connections)
        kept = keep_connections(merged, of_part if number else ~of_part)
        assert kept.nbytes.tolist() == part.nbytes.tolist()
        assert kept.deps.tolist() == part.deps.tolist()
        assert kept.connections == merged.connections


def test_a_transfer_cannot_be_kept_without_what_it_waits_for() -> None:
    ring = find_algorithm("all_reduce", "ring").build_schedule(range(4), 1 << 20, 8)
    with pytest.raises(ValueError, match="waits for what is not"):
        keep_connections(ring, np.array([True, False, False, False]))


def test_half_racks_meet_under_pinning_and_twice_the_uplinks_part_them() -> None:
    for spines, expected in ((4, 2.0), (8, 1.0)):
        (planned,) = plan_of(f"fabric.spines={spines}").workloads
        assert [job.predicted_cct_ratio for job in planned.jobs] == pytest.approx([expected] * 4)
    (planned,) = plan_of("fabric.uplink.rate=800Gbit/s").workloads  # twice the rate does so wherever the jobs are
    assert [job.predicted_cct_ratio for job in planned.jobs] == pytest.approx([1.0] * 4)
    (planned,) = plan_of(*(f"jobs[{job}].placement=packed" for job in range(4))).workloads
    assert [job.predicted_cct_ratio for job in planned.jobs] == pytest.approx([1.0] * 4)


def test_a_job_alone_has_the_queue_pairs_and_paths_that_it_has_beside_others() -> None:
    plan = plan_of("measure_jobs=pairs", "routing.scheme=ecmp")
    *parts, together = plan.workloads
    assert [len(planned.jobs) for planned in plan.workloads] == [1] * 4 + [2] * 6 + [4]
    assert {planned.connections for planned in parts} == {together.connections}
    assert {planned.paths for planned in parts} == {together.paths}
    for planned in parts:
        ranks = {rank for job in planned.jobs for rank in job.order}
        assert set(planned.schedule.src.tolist()) == ranks
        # The worst link of a job is the same or better with fewer jobs.
        for job in planned.jobs:
            beside_all = next(one for one in together.jobs if one.name == job.name)
            assert job.predicted_cct_ratio <= beside_all.predicted_cct_ratio + 1e-9
    assert plan.largest_workloads == (together,)


def test_ranks_of_a_job_count_within_it_and_its_ring_changes_the_rack_at_every_hop() -> None:
    (planned,) = plan_of("jobs[3].workload=[{pattern: flows, flows: [{src: 3, dst: 0, size: 1 KiB}]}]").workloads
    first, last = planned.jobs[0], planned.jobs[3]
    assert first.hosts == (0, 1, 6, 7)
    assert first.order == (0, 6, 1, 7)
    assert [planned.messages.connections[one] for one in last.connections] == [(last.hosts[3], last.hosts[0])]


def test_a_job_with_a_start_is_timed_from_there() -> None:
    (at_once,), (later,) = plan_of().workloads, plan_of("jobs[1].start=20us").workloads
    assert later.jobs[1].ideal_cct_ns == pytest.approx(at_once.jobs[1].ideal_cct_ns)
    assert later.ideal_cct_ns == pytest.approx(20_000 + at_once.ideal_cct_ns)
    # It begins when the others have moved a part: they wait for it less, and it for them.
    assert 1 < later.jobs[1].predicted_cct_ratio < 2


def test_a_job_with_one_item_runs_beside_every_size_of_another() -> None:
    plan = plan_of("jobs[0].workload[0].max_size=4MiB")
    assert [[job.size_bytes >> 20 for job in planned.jobs] for planned in plan.workloads] == [
        [1, 1, 1, 1],
        [2, 1, 1, 1],
        [4, 1, 1, 1],
    ]
    assert plan.largest_workloads == plan.workloads[2:]


def test_gpus_of_a_job_keep_their_hosts_and_nvlink() -> None:
    plan = plan_of("fabric.gpus_per_host=2", "fabric.nics_per_host=2", "transport.qps_per_connection=4")
    (planned,) = plan.workloads
    for job in planned.jobs:
        assert job.nranks == 8
        assert job.nvlink_bytes == 0  # by rails every hop leaves the host
    (planned,) = plan_of(
        "fabric.gpus_per_host=2", "jobs[0].workload[0].order=packed", "transport.qps_per_connection=4"
    ).workloads
    inside = [job.nvlink_bytes for job in planned.jobs]
    assert inside[0] > 0
    assert sum(inside) == planned.nvlink_bytes
    assert len(planned.connections) % 4 == 0


def test_fluid_jobs_share_a_port_until_one_of_them_ends() -> None:
    # Two rings over one port: the shorter ends at twice its time, the other makes up for it.
    assert fluid_ends_ns([{1: 100.0}, {1: 300.0}], [100, 300], [0, 0]) == pytest.approx([200, 400])
    # The second's worst port is elsewhere: it leaves the first what it does not use.
    assert fluid_ends_ns([{1: 100.0}, {1: 50.0, 2: 200.0}], [100, 100], [0, 0]) == pytest.approx([100 / 0.75, 200])
    assert fluid_ends_ns([{1: 100.0}, {1: 100.0}], [100, 100], [0, 150]) == pytest.approx([100, 250])
    assert fluid_ends_ns([{}, {1: 100.0}], [0, 100], [10, 0]) == pytest.approx([10, 100])


@pytest.mark.parametrize("strategy", ["split", "dynamic"])
def test_the_completion_time_of_a_job_is_that_of_its_own_connections(strategy: str) -> None:
    (planned,) = plan_of(
        "fabric.gpus_per_host=2",
        "jobs[0].workload[0].order=packed",
        "transport.qps_per_connection=2",
        f"transport.qp_strategy={strategy}",
    ).workloads
    schedule = planned.pieces or planned.schedule
    networked = len(planned.connections)
    for job in planned.jobs:
        ranks = set(job.order)
        ends = np.array([connection.requester.local.rank in ranks for connection in planned.connections]) * 100.0
        inside = np.array([src in ranks for src, _ in schedule.connections]) * 50.0
        assert job_cct_ns(planned, job, ends, inside) == 100
        inside[: networked if planned.pieces is None else networked // 2] = 0
        expected = 50.0 if job.nvlink_bytes else 0.0
        assert job_cct_ns(planned, job, np.zeros(networked), inside) == expected


def _row(
    job: str, beside: tuple[str, ...], cct_ns: int, verdict: FidelityVerdict = FidelityVerdict.TRUSTED
) -> CollectiveResult:
    return CollectiveResult.from_samples(
        collective="all_reduce",
        algorithm="ring",
        size_bytes=1 << 20,
        nranks=4,
        cct_ns=[cct_ns],
        cct_ideal_ns=1000.0,
        traffic_factor=1.5,
        fidelity=Fidelity(verdict),
        job=job,
        beside=beside,
    )


def test_rows_of_jobs_say_what_the_others_cost() -> None:
    rows = compare_jobs(
        [
            _row("a", (), 1000),
            _row("b", (), 2000),
            _row("c", (), 1000),
            _row("a", ("b",), 1500),
            _row("b", ("a",), 2000),
            _row("a", ("b", "c"), 3000),
            _row("b", ("a", "c"), 2200),
            _row("c", ("a", "b"), 1100),
        ]
    )
    assert [row.slowdown for row in rows] == [None, None, None, 1.5, 1.0, 3.0, 1.1, 1.1]
    assert rows[5].slowdown_by == {"b": 1.5}
    assert rows[7].slowdown_by == {}
    table = render_table(rows)
    assert "(time/alone)" in table
    assert ["a", "b,c", "3.0000"] in [line.split()[:3] for line in table.splitlines()]

    text = render_result(Result(scenario={"name": "jobs"}, seed=1, time_dilation=1.0, host={}, results=rows))
    assert "# job a: 1.500 times as long beside b\n" in text
    assert "# job c" not in text

    def judge(line: str) -> tuple[str, float | None]:
        check = judge_check(parse_expectation(line), rows)
        return check.verdict, check.observed

    assert judge("cct_ratio <= 2.5") == ("fail", 3.0)  # of all rows where all jobs run
    assert judge("job.b.cct_ratio <= 2.5") == ("pass", 2.2)
    assert judge("job.c.slowdown <= 1.05") == ("fail", 1.1)
    assert judge("job.a.cct_ratio >= 1.1")[0] == "pass"  # alone it is 1


def test_rows_that_ran_together_alone_have_no_slowdown() -> None:
    rows = compare_jobs([_row("a", ("b",), 1500), _row("b", ("a",), 2000)])
    assert [row.slowdown for row in rows] == [None, None]
    assert judge_check(parse_expectation("job.a.cct_ratio <= 1.5"), rows).verdict == "pass"


def test_slowdown_over_a_time_alone_that_the_machine_spoilt_is_not_judged() -> None:
    rows = compare_jobs([_row("a", (), 1050, FidelityVerdict.INVALID), _row("b", (), 1000), _row("a", ("b",), 2000)])
    assert rows[2].slowdown is None
    check = judge_check(parse_expectation("job.a.slowdown >= 1.9"), rows)
    assert (check.verdict, check.observed) == ("not_judged", None)


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*.yaml")), ids=lambda file: file.stem)
def test_scenarios_expect_what_is_predicted(file: Path) -> None:
    plan = compile_plan(load_scenario(file), capacity_packets_per_s=None)
    worst = max(job.predicted_cct_ratio for job in plan.workloads[-1].jobs)
    for line in plan.scenario.expect:
        if line.metric == "cct_ratio" and line.operator == "<=":
            assert worst <= line.value


def test_a_job_that_shares_its_name_or_hosts_is_named() -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(SCENARIO, ["jobs[1].name=a", "jobs[2].placement=[0, 1]", "jobs[3].placement=[1, 2]"])
    assert sorted(mistake.key for mistake in caught.value.mistakes) == [
        "jobs[0].name",
        "jobs[1].name",
        "jobs[3].placement",
    ]
