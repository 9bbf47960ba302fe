"""The page of benchmark figures, and the pure parts of the benchmarks."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from benchmarks import machine, virtual_time
from benchmarks.all import TABLES
from benchmarks.record import PAGE, RESULTS, Column, Table, fill_page
from benchmarks.reference import load_plan
from benchmarks.tick import load_plan_with_qps
from tests.fidelity import bars
from tests.fidelity.bars import build_cases, follows_its_own_seed

TABLE = Table("speed", (Column("name", "name"), Column("time_ns", "time", "ms", ".2f", 1e-6)))
ROWS: list[dict[str, Any]] = [
    {"name": "engine", "time_ns": 1_234_567, "disturbed": False, "steal_fraction": 0.001, "others_fraction": 0.0},
    {"name": "bare", "time_ns": None, "disturbed": True, "steal_fraction": 0.125, "others_fraction": 0.5},
]
SECTION: dict[str, Any] = {
    "recorded": "2030-01-02",
    "revision": "0123456789",
    "command": "python -m benchmarks.speed --write",
    "host": {"cpu_model": "A CPU", "cpus_available": 2, "kernel": "9.9", "python": "3.99", "numpy": "9.0"},
    "rows": ROWS,
}


def test_the_page_shows_the_recorded_figures() -> None:
    page = PAGE.read_text()
    results = json.loads(RESULTS.read_text())
    assert set(results) <= {table.name for table in TABLES}
    assert fill_page(page, TABLES, results) == page, "`python -m benchmarks.record` writes the page from the figures"


def test_a_table_gives_units_and_marks_disturbed_rows() -> None:
    assert TABLE.text(ROWS).splitlines() == ["name    time", "        (ms)", "engine  1.23", "bare *     –"]
    markdown = TABLE.markdown(SECTION)
    assert markdown.splitlines()[:4] == [
        "| name | time (ms) |",
        "| --- | ---: |",
        "| engine | 1.23 |",
        "| bare * | – |",
    ]
    assert "12.5% of the CPU time was stolen" in markdown
    assert "50.0% used by other processes" in markdown
    assert "revision 0123456789: A CPU, 2 CPUs, Linux 9.9" in markdown


def test_only_the_place_of_a_table_is_written() -> None:
    page = "before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n"
    filled = fill_page(page, [TABLE], {"speed": SECTION})
    assert filled.startswith("before\n<!-- speed -->\n\n| name |")
    assert filled.endswith("\n\n<!-- /speed -->\nafter\n")
    assert "old" not in filled
    assert fill_page(filled, [TABLE], {"speed": SECTION}) == filled


@pytest.mark.parametrize("page", ["", "<!-- speed -->\n", "<!-- speed -->\n<!-- /speed -->" * 2])
def test_a_page_without_the_one_place_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="one place for 'speed'"):
        fill_page(page, [TABLE], {})


def test_the_reference_load_asks_for_what_is_said() -> None:
    plan = load_plan(80_000, [4_000, 40_000])
    assert plan.dilation.offered_packets_per_s / plan.dilation.value == pytest.approx(80_000)
    assert [item.schedule.nbytes.sum() / 4096 for item in plan.workloads] == [4_000, 40_000]
    # Every host sends to another leaf, and no two share a port: four hops each, nothing slower than ideal.
    assert {len(path.ports) for path in plan.workloads[0].paths} == {4}
    assert plan.workloads[0].predicted_cct_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("qps", [16, 64, 1024])
def test_the_tick_load_has_as_many_qps_the_same_on_every_host(qps: int) -> None:
    planned = load_plan_with_qps(qps, 32_000, 2.0).workloads[0]
    assert len(planned.connections) == qps
    for end in (0, 1):
        ranks = [pair[end] for pair in planned.schedule.connections]
        assert all(ranks.count(rank) == qps // 16 for rank in range(16))


def test_a_thread_that_ends_while_it_is_looked_at_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else what it hides would be missing before a run and be there after it, with all its time since it began.
    listdir = os.listdir

    def with_one_that_is_gone(path: str) -> list[str]:
        return ["999999999", *listdir(path)]

    assert 1 in machine.others_run_ns()
    monkeypatch.setattr(machine.os, "listdir", with_one_that_is_gone)
    assert 1 in machine.others_run_ns()


def test_a_ratio_that_follows_another_seed_than_its_own_is_found() -> None:
    assert follows_its_own_seed([1.98, 2.97, 2.0], [2.0, 3.0, 2.0])
    assert not follows_its_own_seed([2.97, 1.98, 2.97], [2.0, 3.0, 2.0])  # the seeds mixed up
    assert not follows_its_own_seed([2.0, 3.0, 3.0], [2.0, 3.0, 2.0])  # one follows another's
    assert not follows_its_own_seed([2.0, 2.0], [2.0, 2.0])  # nothing tells them apart
    assert not follows_its_own_seed([2.0, 2.0, 2.0], [2.0, 2.04, 1.97])
    assert not follows_its_own_seed([1.98, 2.97, 2.97, 1.98], [2.0, 3.0, 3.0, 4.0])  # one is off


def test_the_recorded_bars_are_judged_by_the_rules_as_they_are() -> None:
    recorded = json.loads(bars.RESULTS.read_text())["cases"]
    cases = {case.name: case for case in build_cases(quick=False)}
    assert recorded.keys() & cases.keys()
    for name in recorded.keys() & cases.keys():
        assert recorded[name]["bar"] == cases[name].bar, name
        assert recorded[name]["holds"] == cases[name].holds(recorded[name]["runs"]), name


def test_invalid_runs_are_not_judged() -> None:
    holds = next(case for case in build_cases(quick=False) if case.name == "e-ecmp, 16 QP").holds
    runs = [{"cct_ratio": m, "predicted_cct_ratio": m, "verdict": "degraded"} for m in (1.25, 1.5, 1.75, 2.0)]
    off = {"cct_ratio": 9.0, "predicted_cct_ratio": 2.0, "verdict": "invalid"}
    assert holds(runs) is True
    assert holds([*runs, off]) is True
    assert holds([*runs, {**off, "verdict": "degraded"}]) is False
    assert holds([*runs, {"error": "exit 1"}]) is False
    assert holds([*runs[:3], off, off]) is None


def run_of(cct_ns: float, verdict: str = "trusted") -> virtual_time.Run:
    return virtual_time.Run("virtual time", 0, cct_ns, verdict, 1.0)


def test_runs_repeat_where_they_spread_little_and_trust_themselves() -> None:
    assert virtual_time.judge([run_of(1000.0), run_of(1004.0), run_of(1002.0)]) == (
        True,
        "virtual time: 3 runs spread by 0.400%, 0 of them not trusted",
    )
    assert not virtual_time.judge([run_of(1000.0), run_of(1006.0)])[0]
    assert not virtual_time.judge([run_of(1000.0), run_of(1000.0, "degraded")])[0]
