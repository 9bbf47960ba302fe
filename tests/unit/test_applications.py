"""Applications without running any: what stands in their command lines, what is planned and predicted, what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from testbed import api
from testbed.api import guest
from testbed.assemble import assemble_applications
from testbed.carriers.applications import OutputTail, find_figure
from testbed.carriers.placeholders import NicNames, Places, render_rsh
from testbed.carriers.protocol import ApplicationSamples, CommandSample
from testbed.cli.main import app
from testbed.cli.run import render_result
from testbed.errors import PlanError, RunError, ScenarioError
from testbed.kernel.processes import MARK_VARIABLE
from testbed.measure.counters import FabricCounters, Snapshot
from testbed.measure.samples import MachineSamples
from testbed.plan.model import Plan
from testbed.plan.operations import BackEnds
from testbed.plan.report import describe_paths, describe_plan
from testbed.results import Fidelity, FidelityVerdict, Result
from testbed.scenario import application, load_scenario

TEXT = """
name: applications
fabric:
  kind: clos
  leaves: 2
  spines: 2
  hosts_per_leaf: 2
  host_link: {rate: 100 Gbit/s, delay: 600 ns}
transport: {carrier: tcp}
workload:
  - application: transfer
    iters: 3
    environment: {PEER: '{address:1}'}
    commands:
      - {host: 3, mode: service, ready_port: 99, command: 'serve {address}'}
      - {host: 0, command: 'fetch {address:3}'}
    figures:
      - {name: speed, pattern: '([0-9.]+) Mbit/s', kind: rate, unit: Mbit/s}
      - {name: delay, pattern: 'in ([0-9.]+) s', kind: time, unit: s}
      - {name: errors, pattern: '([0-9]+) errors'}
  - application: count
    commands: [{host: 1, command: 'count'}]
    figures: [{name: errors, pattern: '([0-9]+) errors'}]
time_dilation: 1000
expect: [figure.speed >= 90000, figure.errors == 0, drops_packets == 0]
"""
SCENARIOS = Path(__file__).parents[2] / "scenarios" / "applications"

PLACES = Places(
    nics=[
        [NicNames("10.0.0.1", "eth0", "rx0", 1), NicNames("10.0.0.3", "eth1", "rx1", 2)],
        [NicNames("10.0.0.5", "eth0")],
    ],
    names=["host0", "host1"],
    folder=Path("/tmp/a folder"),
    hostfile=Path("/tmp/hosts"),
    rsh=Path("/tmp/rsh"),
    traffic_class=106,
)


def plan_of(*overrides: str) -> Plan:
    return api.build_plan(load_scenario(TEXT, overrides), measure=False)


@pytest.mark.parametrize(
    ("text", "host", "expected"),
    [
        ("x -d {device} -x {gid_index} {address:1}", 0, "x -d rx0 -x 1 10.0.0.5"),
        ("{address:0/1} {device:0/1} {gid_index:0/1} {ifname:0/1}", None, "10.0.0.3 rx1 2 eth1"),
        (
            "{address} {host} {hosts} {addresses} {traffic_class} {hostfile} {rsh}",
            1,
            "10.0.0.5 1 host0,host1 10.0.0.1,10.0.0.5 106 /tmp/hosts /tmp/rsh",
        ),
        ("cd {folder}/x", 0, "cd '/tmp/a folder'/x"),
        ("awk '{ print }' ${HOME} {}", 0, "awk '{ print }' ${HOME} {}"),
        ("awk '{ print $1 }' ${HOME} {}", 0, "awk '{ print $1 }' ${HOME} {}"),
    ],
)
def test_placeholders_are_filled_in_and_other_braces_stay(text: str, host: int | None, expected: str) -> None:
    assert PLACES.fill(text, host, shell=True) == expected


def test_variables_are_not_quoted() -> None:
    assert PLACES.fill("{folder}/x", 0, shell=False) == "/tmp/a folder/x"


def test_rsh_sets_the_variables_of_the_host_that_it_enters() -> None:
    script = render_rsh(PLACES, ["lab-host0", "lab-host1"], {"HERE": "{address}", "WORDS": "it's {host}"})
    first, second = script.split(";;")[:2]
    assert "host0|10.0.0.1|10.0.0.3)\n    netns=lab-host0\n" in first
    assert "export HERE=10.0.0.1\n" in first
    assert "netns=lab-host1\n    export HERE=10.0.0.5\n    export WORDS='it'\"'\"'s 1'\n" in second


@pytest.mark.parametrize(
    ("pattern", "texts", "expected"),
    [
        ("speed ([0-9.]+)", ["speed 1.5\nspeed 2.5\n", ""], 2.5),
        ("^([0-9]+)$", ["a 1\n7\nb 2\n"], 7.0),
        ("speed ([0-9.]+)", ["speed 1", "speed 3"], 3.0),
        ("speed ([a-z]+)", ["speed fast"], None),
        ("speed ([0-9]+)", ["", ""], None),
        ("speed (.*)", ["speed 1\nspeed -1.5e3"], -1500.0),
        ("speed (.*)", ["speed 1\nspeed nan"], None),
        ("speed (.*)", ["speed inf"], None),
        ("speed (.*)", ["speed 1e999"], None),
        ("speed (.*)", ["speed 1_000"], None),
        ("speed (x)?", ["speed 7"], None),
    ],
)
def test_last_match_is_the_figure(pattern: str, texts: list[str], expected: float | None) -> None:
    assert find_figure(pattern, texts) == expected


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_scenario_loads_again_from_what_it_resolves_to(file: Path) -> None:
    scenario = api.load(file)
    assert scenario.applications
    assert type(scenario).model_validate(scenario.resolved()) == scenario
    assert api.build_plan(scenario, measure=False).applications == scenario.applications


def test_plan_expects_every_nic_to_send_and_no_completion_time() -> None:
    plan = plan_of()
    assert plan.workloads == ()
    assert plan.dilation.offered_packets_per_s == pytest.approx(4 * 100e9 / 8 / (4096 + 58 + 24))
    assert [row["application"] for row in describe_plan(plan)["applications"]] == ["transfer", "count"]


@pytest.mark.parametrize(("name", "skips"), [("star.yaml", True), ("applications/perftest.yaml", False)])
def test_virtual_time_waits_while_programs_are_loaded(name: str, skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def boot(command: list[str], **options: Any) -> int:
        asked.update(options)
        return 1

    monkeypatch.setattr(guest, "run_in_vm", boot)
    with pytest.raises(RunError, match="left no result"):
        api.run_in_virtual_time(api.load(SCENARIOS.parent / name))
    assert asked["skip_idle"] is skips


def test_paths_and_predictions_are_none() -> None:
    paths = describe_paths(plan_of())
    assert (paths.flows, paths.predicted_cct_ratio) == ((), None)
    with pytest.raises(PlanError, match="applications open their flows themselves"):
        api.predict(load_scenario(TEXT))


def result_of(*speeds: float | None, verdict: FidelityVerdict = FidelityVerdict.TRUSTED) -> Result:
    """Return the result of the scenario, given what its first application printed in each iteration."""
    plan = plan_of()
    ports = len(plan.topology.ports) + 1
    queues = np.zeros((ports, 8), [(name, np.uint64) for name in QUEUE_FIELDS])
    after = queues.copy()
    spine = next(port.id for port in plan.topology.ports if plan.topology.port_name(port.id) == "spine1/down0")
    after["deq_bytes"][spine, 3], after["deq_packets"][spine, 3] = 4000, 2
    counted = FabricCounters.between(Snapshot(queues, 0, 0), Snapshot(after, 0, 0), wall_duration_ns=10**9)
    machine = MachineSamples(10**6, *([np.zeros(1, np.int64)] * 3), 10**9, 0.0)
    commands = (CommandSample(0, "fetch 10.0.0.7", 0, 10**9, Path("0-transfer/iteration0-1-host0.out")),)

    def sample(figures: dict[str, tuple[float | None, ...]]) -> ApplicationSamples:
        return ApplicationSamples((10**9,) * 3, (machine,), np.zeros(ports), (commands,), figures)

    first = sample({"speed": tuple(speeds), "delay": (2.0,) * 3, "errors": (0.0,) * 3})
    fidelity = Fidelity(verdict)
    return assemble_applications(
        plan,
        [first, sample({"errors": (1.0,)})],
        [counted, counted],
        [fidelity, replace(fidelity)],
        host={},
        warnings=[],
        back_ends=BackEnds(),
    )


QUEUE_FIELDS = (
    "enq_bytes", "deq_bytes", "enq_packets", "deq_packets", "drop_packets", "peak_bytes", "marked_packets", "lost_packets",
    "pause_frames",
)  # fmt: skip


def test_rates_are_multiplied_and_times_divided_by_the_dilation() -> None:
    figures = {figure.name: figure for figure in result_of(97.0, 95.0, 99.0).applications[0].figures}
    assert figures["speed"].printed == (97.0, 95.0, 99.0)
    assert figures["speed"].value == 97_000.0
    assert figures["delay"].value == 0.002
    assert figures["errors"].value == 0.0


def test_a_check_is_of_the_applications_that_have_the_figure() -> None:
    checks = {check.metric: check for check in result_of(97.0, 95.0, 99.0).checks}
    assert (checks["figure.speed"].verdict, checks["figure.speed"].row) == ("pass", 0)
    assert (checks["figure.errors"].verdict, checks["figure.errors"].row) == ("fail", 1)
    assert checks["drops_packets"].verdict == "pass"


def test_what_programs_that_ended_well_did_not_write_fails() -> None:
    result = result_of(97.0, None, 99.0)
    assert result.applications[0].figures[0].value is None
    (check,) = [check for check in result.checks if check.metric == "figure.speed"]
    assert (check.verdict, check.observed, check.row) == ("fail", None, 0)
    assert "# check: figure.speed >= 90000: fail (observed nothing written, transfer)" in render_result(result)


def test_a_figure_beyond_every_number_is_none() -> None:
    result = result_of(1e308, 1e308, 1e308)
    assert result.applications[0].figures[0].value is None
    assert "Infinity" not in json.dumps(result.to_json_dict())


def test_output_is_searched_part_by_part_and_lines_that_parts_divide_are_found(tmp_path: Path) -> None:
    file, tail = tmp_path / "out", OutputTail()
    assert not tail.search("^up$", file)
    file.write_text("not up\n")
    assert not tail.search("^up$", file)
    with file.open("a") as opened:
        opened.write("u")
    assert not tail.search("^up$", file)
    with file.open("a") as opened:
        opened.write("p\n")
    assert tail.search("^up$", file)


def test_output_that_is_longer_than_a_look_is_found_after_some(tmp_path: Path) -> None:
    file, tail = tmp_path / "out", OutputTail()
    file.write_text("x up\n" * 200_000 + "up\n")
    looks = [tail.search("^up$", file) for _ in range(20)]
    assert looks[0] is False
    assert looks[-1] is True


def test_the_mark_is_no_variable_of_a_scenario() -> None:
    assert application.MARK_VARIABLE == MARK_VARIABLE
    for place in ("", "commands: [{host: 1, command: count, environment: {TESTBED_APPLICATION: x}}]"):
        text = (
            TEXT.replace("commands: [{host: 1, command: 'count'}]", place)
            if place
            else TEXT.replace("PEER:", "TESTBED_APPLICATION:")
        )
        with pytest.raises(ScenarioError, match=r"environment\.TESTBED_APPLICATION: must not be set"):
            load_scenario(text)


def test_links_of_a_result_are_beside_no_prediction(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result_of(97.0, 95.0, 99.0).to_json_dict()))
    compared = api.compare_paths(tmp_path)
    assert compared.rows == ()
    assert {link.predicted_bytes for link in compared.links} == {None}
    done = CliRunner().invoke(app, ["paths", str(tmp_path)], catch_exceptions=False)
    assert "neither paths nor completion times are predicted" in done.stdout
    assert "predicted (B)" not in done.stdout
    assert "spine1/down0" in done.stdout


def test_figures_of_an_invalid_run_are_not_judged() -> None:
    assert {check.verdict for check in result_of(1.0, 1.0, 1.0, verdict=FidelityVerdict.INVALID).checks} == {
        "not_judged"
    }


def test_result_is_read_back_as_it_was_written() -> None:
    result = result_of(97.0, 95.0, 99.0)
    again = Result.from_json_dict(result.to_json_dict())
    assert again.applications == result.applications
    assert again.to_json_dict() == result.to_json_dict()


def test_table_has_figures_beside_what_the_fabric_counted() -> None:
    lines = render_result(result_of(97.0, 95.0, 99.0)).splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert rows[0] == ["transfer", "speed", "97000", "Mbit/s", "97", "3", "1.000", "0", "-", "-", "trusted"]
    assert [row[:2] for row in rows] == [
        ["transfer", "speed"],
        ["transfer", "delay"],
        ["transfer", "errors"],
        ["count", "errors"],
    ]
    (sent,) = [line for line in lines if line.startswith("# sent:")]
    assert sent.startswith("# sent: spine1 4 packets, 8 KB; ")  # both applications' together
