"""The command line, as far as it goes without root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed import api
from testbed.carriers.interop_check import InteropRow
from testbed.cli.main import app
from testbed.cli.run import Required, exit_code
from testbed.errors import KernelError
from testbed.results import Check, Fidelity, FidelityVerdict, Result

SCENARIOS = Path(__file__).parents[2] / "scenarios"
AI_ZONE = str(SCENARIOS / "ai-zone.yaml")
STAR = str(SCENARIOS / "star.yaml")


def run_command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
    )


def invoke(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Run a command that succeeds in this process and return its stdout."""
    result = CliRunner().invoke(app, list(arguments), env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_names_every_verb_and_none_that_is_not_built() -> None:
    shown = invoke("--help")
    listed = {line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line.startswith("  ")}
    verbs = {"doctor", "validate", "plan", "paths", "schema", "run", "deploy", "inspect", "exec", "destroy", "gc"}
    verbs |= {"graph", "inject", "capture", "interop"}
    assert verbs <= listed
    for verb in ("break", "replay", "compare", "sweep", "report", "journey"):
        assert CliRunner().invoke(app, [verb]).exit_code == 2


def test_import_of_the_package_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, testbed, testbed.cli.main; print(*({'numpy', 'pydantic', 'scapy', 'pyroute2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_validate_says_ok_for_each_good_file() -> None:
    assert invoke("validate", AI_ZONE, STAR).splitlines() == [f"{AI_ZONE}: ok", f"{STAR}: ok"]


def test_validate_reports_mistakes_of_all_files_without_a_traceback(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nfabric: {kind: star, hosts_per_leaf: 4, host_lnk: {}}\nworkload: []\n")
    result = run_command("validate", str(bad), AI_ZONE, str(tmp_path / "missing.yaml"))
    assert result.returncode == 1
    assert result.stdout == f"{AI_ZONE}: ok\n"
    lines = result.stderr.splitlines()
    assert all(line.startswith(("error: ", "hint:  ")) for line in lines)
    assert any("bad.yaml:2: fabric.host_lnk" in line for line in lines)
    assert "hint:  did you mean host_link?" in lines
    assert any("missing.yaml: cannot be read" in line for line in lines)


def test_usage_errors_exit_with_2() -> None:
    assert run_command("destroy").returncode == 2
    # In this process, which spares the start of two more.
    assert CliRunner().invoke(app, ["run"]).exit_code == 2
    assert CliRunner().invoke(app, ["plan", AI_ZONE, "--format", "xml"]).exit_code == 2


def test_plan_table_shows_rates_dilation_and_both_bounds() -> None:
    shown = invoke("plan", AI_ZONE)
    assert "leaf0:spine1" in shown
    assert "400 Gbit/s" in shown
    assert "capacity bound" in shown
    assert "fidelity bound" in shown
    assert "set by: " in shown
    assert "all_reduce" in shown


def test_plan_json_has_nodes_links_dilation_and_workloads() -> None:
    plan = json.loads(invoke("plan", AI_ZONE, "--format", "json", "--set", "time_dilation=5000"))
    assert len(plan["nodes"]) == 24
    assert len(plan["links"]) == 32
    assert plan["time_dilation"] == 5000
    assert plan["dilation"]["bound"] == "fixed"
    assert plan["links"][0]["wall_rate_bytes_per_s"] == pytest.approx(400e9 / 8 / 5000)
    assert plan["workloads"][0]["predicted_cct_ratio"] == pytest.approx(1.0)
    assert "operations" not in plan


def test_plan_operations_name_node_and_command() -> None:
    plan = json.loads(invoke("plan", STAR, "--format", "json", "--operations"))
    assert plan["operations"][0] == {"node": "host0", "command": "ip netns add host0"}
    assert any(operation["node"] == "switch0" and "tbf" in operation["command"] for operation in plan["operations"])
    assert "ip netns add host0" in invoke("plan", STAR, "--operations")


def test_plan_is_the_same_every_time() -> None:
    assert invoke("plan", AI_ZONE, "--format", "json") == invoke("plan", AI_ZONE, "--format", "json")


def test_paths_json_lists_flows_links_and_prediction() -> None:
    report = json.loads(invoke("paths", AI_ZONE, "--format", "json"))
    assert set(report) == {"flows", "links", "collisions", "predicted_cct_ratio"}
    assert len(report["flows"]) == 16
    flow = report["flows"][0]
    assert {"name", "src", "dst", "qpn", "udp_source_port", "path", "ports"} <= set(flow)
    assert flow["path"][0] == flow["src"]
    assert flow["path"][-1] == flow["dst"]
    assert len(flow["path"]) == 5
    assert flow["ports"][0] == f"{flow['src']}/eth0"
    assert report["collisions"] == []
    assert {link["flows"] for link in report["links"]} == {1}
    assert {link["load_fraction"] for link in report["links"]} == {1.0}


def test_paths_of_ecmp_collide_as_predicted() -> None:
    report = json.loads(invoke("paths", AI_ZONE, "--format", "json", "--set", "routing.scheme=ecmp"))
    worst = max(link["flows"] for link in report["links"])
    assert worst > 1
    assert report["predicted_cct_ratio"] == pytest.approx(worst)
    assert max(len(collision["flows"]) for collision in report["collisions"]) == worst
    assert max(link["load_fraction"] for link in report["links"]) == pytest.approx(worst)
    assert "collision at " in invoke("paths", AI_ZONE, "--set", "routing.scheme=ecmp")


def test_items_of_a_workload_are_kept_apart_in_paths() -> None:
    second = "workload[1]={collective: send_recv, size: 1 MiB}"
    report = json.loads(invoke("paths", AI_ZONE, "--format", "json", "--set", second))
    assert {flow["workload"] for flow in report["flows"]} == {0, 1}
    assert {link["flows"] for link in report["links"]} == {1}


def test_options_are_read_from_the_environment() -> None:
    env = {"TESTBED_FORMAT": "json", "TESTBED_SET": "fabric.spines=2; workload[0].size=8 MiB"}
    plan = json.loads(invoke("plan", AI_ZONE, env=env))
    assert len(plan["links"]) == 16 + 4 * 2
    assert plan["workloads"][0]["size_bytes"] == 8 << 20


def test_set_on_the_command_line_wins_over_the_environment() -> None:
    plan = json.loads(
        invoke("plan", AI_ZONE, "--format", "json", "--set", "seed=9", env={"TESTBED_SET": "time_dilation=7;seed=3"})
    )
    assert plan["time_dilation"] == 7


def test_schema_is_the_one_shipped() -> None:
    shipped = (SCENARIOS.parent / "testbed" / "scenario" / "schema.json").read_text()
    assert invoke("schema") == shipped


def result_with(verdict: FidelityVerdict, *checks: str) -> Result:
    made = tuple(Check("drops_packets == 0", "drops_packets", 0.0, 1.0, check) for check in checks)
    return Result({"name": "x"}, 1, 1.0, {}, fidelity=Fidelity(verdict), checks=made)


@pytest.mark.parametrize(
    ("verdict", "checks", "require", "expected"),
    [
        (FidelityVerdict.TRUSTED, ("pass",), Required.TRUSTED, 0),
        (FidelityVerdict.TRUSTED, ("pass", "fail"), Required.DEGRADED, 3),
        (FidelityVerdict.DEGRADED, ("pass",), Required.DEGRADED, 0),
        (FidelityVerdict.DEGRADED, ("fail",), Required.DEGRADED, 3),
        (FidelityVerdict.DEGRADED, ("fail",), Required.TRUSTED, 4),
        (FidelityVerdict.INVALID, ("not_judged",), Required.DEGRADED, 4),
    ],
)
def test_exit_code_follows_verdict_and_checks(
    verdict: FidelityVerdict, checks: tuple[str, ...], require: Required, expected: int
) -> None:
    assert exit_code(result_with(verdict, *checks), require) == expected


@pytest.mark.parametrize("arguments", [("run", AI_ZONE), ("deploy", AI_ZONE), ("destroy", "x"), ("gc",)])
def test_user_without_root_is_told_so_before_anything_is_done(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, KernelError)
    assert "EPERM" in result.exception.message
    assert result.exception.hint == "run as root, or in a privileged container"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("whole", "code"), [(True, 0), (False, 3)])
def test_interop_says_what_became_of_the_bytes(whole: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def check(size_bytes: int, overrides: list[str], **_: object) -> tuple[InteropRow, ...]:
        asked.extend((size_bytes, overrides))
        last = InteropRow("b to a", size_bytes, error=None if whole else "stuck", is_whole=whole)
        return InteropRow("a to b", size_bytes, 7, 5, 30, is_whole=True), last

    monkeypatch.setattr(api, "check_interop", check)
    result = CliRunner().invoke(app, ["interop", "--size", "1 MiB", "--loss", "1/100", "--set", "fabric.spines=2"])
    assert result.exit_code == code
    assert asked == [1 << 20, ["fabric.uplink.loss=1/100", "fabric.spines=2"]]
    ends = [line.split()[-1] for line in result.stdout.splitlines()[1:]]
    assert ends == ["yes", "yes" if whole else "stuck"]
    assert result.stdout.splitlines()[1].split()[3:-1] == ["1048576", "7", "5", "30"]
