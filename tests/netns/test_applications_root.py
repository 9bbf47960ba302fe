"""Programs run unmodified from a scenario over kernel sockets; whatever becomes of them, none of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testbed import api
from testbed.errors import RunError
from testbed.kernel.processes import find_programs
from testbed.kernel.registry import read_state
from testbed.results import Result
from testbed.scenario import load_scenario
from tests.netns.labs import PATIENCE_S, SCENARIO, lab_name, wait_until

pytestmark = pytest.mark.root

IPERF3 = Path(__file__).parents[2] / "scenarios" / "applications" / "iperf3.yaml"
BASE = ("transport.carrier=tcp", "transport.retransmit_timeout=auto", "time_dilation=1000")


def run_commands(*commands: str, output: Path | None = None, name: str | None = None, **keys: Any) -> Result:
    rest = "".join(f", {key}: {value}" for key, value in keys.items())
    workload = f"workload=[{{application: tried, commands: [{', '.join(commands)}]{rest}}}]"
    return api.run(load_scenario(SCENARIO, [*BASE, workload]), output=output, name=name)


def marked_programs() -> list[int]:
    """Processes that any application has left."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"TESTBED_APPLICATION=" in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    yield
    assert marked_programs() == []


@pytest.mark.parametrize(("uplink", "share"), [("100 Gbit/s", 1.0), ("50 Gbit/s", 0.5)])
def test_iperf3_gets_what_its_path_carries(uplink: str, share: float, tmp_path: Path) -> None:
    settings = [f"fabric.uplink.rate={uplink}", "time_dilation=1000", "expect=[]", "fabric.uplink.delay=0 ns"]
    result = api.run(load_scenario(IPERF3, settings), output=tmp_path)
    (row,) = result.applications
    value, printed = row.figures[0].value or 0.0, row.figures[0].printed[0] or 0.0
    assert value == pytest.approx(printed * 1000)
    # 98 % of a frame is payload, and the shaper is up to 0.3 % fast; TCP needs a moment to find the rate.
    assert 0.85 * share * 100_000 <= value <= 1.003 * share * 100_000
    sent = {way.src: way for link in result.fabric.links for way in link.directions}
    received = (tmp_path / "applications" / row.commands[0].output).read_text()
    assert "receiver" in received
    # One connection takes one spine, with all of its bytes.
    payload = printed * 1e6 / 8 * 2.0
    spines = sorted(sent[f"spine{spine}/down1"].bytes or 0 for spine in range(2))
    assert spines[0] < payload / 100
    assert payload * 0.9 <= spines[1] <= payload * 1.2
    assert [command.exit_code for command in row.commands] == [0, 0]


def test_commands_see_their_host_and_reach_others_by_rsh(tmp_path: Path) -> None:
    commands = [
        '{host: 1, command: "ip -4 -brief address show dev {ifname}; echo $HERE"}',
        "{host: 0, command: \"{rsh} host3 ip -4 -brief address show dev {ifname:3} ';' echo '$HERE'; cat given {hostfile}\"}",
        '{host: 2, command: "{rsh} {address:1} cat /no/such/file || echo code $?"}',
    ]
    result = run_commands(
        *commands, output=tmp_path, environment="{HERE: at {host}}".replace("at {host}", '"at {host}"'),
        files="{given: from the scenario}", setup='["cp given copied"]',
    )  # fmt: skip
    first, second, third = (
        (tmp_path / "applications" / one.output).read_text() for one in result.applications[0].commands
    )
    plan = api.build_plan(load_scenario(SCENARIO), measure=False)
    for text, host in ((first, 1), (second, 3)):
        address = plan.topology.nics[host].address
        assert ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0)) in text
        assert f"at {host}\n" in text
    assert second.endswith("from the scenariohost0\nhost1\nhost2\nhost3\n")
    assert third == "code 1\n"
    assert (tmp_path / "applications" / "0-tried" / "copied").exists()


def test_background_is_waited_for_and_a_service_is_ended() -> None:
    result = run_commands(
        '{host: 0, mode: service, ready_output: up, command: "echo up; setsid sleep 1000 & sleep 1000"}',
        '{host: 1, mode: background, command: "sleep 0.3; echo done"}',
        '{host: 2, command: "true"}',
        iters=2,
    )
    (row,) = result.applications
    assert [(one.iteration, one.host, one.exit_code) for one in row.commands] == [
        (iteration, host, code) for iteration in range(2) for host, code in ((0, None), (1, 0), (2, 0))
    ]
    assert min(row.wall_duration_ns) >= 0.3e9


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            '{host: 2, command: "echo first; echo its last words >&2; exit 3"}',
            r"host2: `echo first.*exit code 3; it said.*words",
        ),
        ('{host: 1, command: "kill -9 $$"}', r"host1: `kill -9 \$\$` was ended by signal 9; it said nothing"),
        ('{host: 1, command: "no-such-program"}', r"host1: `no-such-program` ended with exit code 127.*not found"),
        (
            '{host: 0, mode: background, ready_port: 9, command: "echo over"}, {host: 1, command: "true"}',
            r"host0: `echo over` ended before it was ready; it said last:\n  over",
        ),
        (
            '{host: 3, command: "setsid sleep 1000 & sleep 1000"}',
            r"host3: `setsid.*` had not ended after wall_timeout, 1 s; it said nothing",
        ),
    ],
)
def test_a_command_that_fails_fails_the_run_and_is_named(command: str, says: str, tmp_path: Path) -> None:
    output = tmp_path / "results"
    with pytest.raises(RunError, match=f"(?s)application tried, {says}"):
        run_commands(command, output=output, wall_timeout="1 s")
    assert list(output.glob("applications/0-tried/*.out"))  # what was written stays


def test_setup_that_fails_is_named() -> None:
    with pytest.raises(RunError, match=r"(?s)application tried, setup: `false` ended with exit code 1"):
        run_commands('{host: 0, command: "true"}', setup='["true", "false"]')


def test_figure_that_is_not_printed_is_a_warning() -> None:
    result = run_commands('{host: 0, command: "echo 1"}', figures='[{name: two, pattern: "two ([0-9])"}]')
    assert result.applications[0].figures[0].value is None
    assert any("figure two is not known" in warning for warning in result.warnings)


def test_programs_of_a_deployed_lab_end_with_the_run_alone() -> None:
    name = lab_name("apps")
    with api.deploy(load_scenario(SCENARIO, BASE), name):
        pass
    try:
        mine = subprocess.Popen(
            [sys.executable, "-m", "testbed", "exec", "--lab", name, "host0", "--", "sleep", "1000"]
        )
        run_commands('{host: 0, command: "setsid sleep 1000 & true"}', name=name)
        assert find_programs(read_state(name).mark) == []
        assert mine.poll() is None
        mine.terminate()
        mine.wait(PATIENCE_S)
    finally:
        api.destroy(name)


def test_interrupt_ends_what_runs(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    workload = '[{application: tried, commands: [{host: 0, command: "setsid sleep 1000 & echo up; sleep 1000"}]}]'
    file.write_text(SCENARIO)
    settings = [part for one in (*BASE, f"workload={workload}") for part in ("--set", one)]
    command = [sys.executable, "-m", "testbed", "run", str(file), *settings, "--output", str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(
            lambda: any("up" in file.read_text() for file in tmp_path.glob("out/applications/*/*.out")), "it runs"
        )
        os.kill(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE_S)
    finally:
        child.kill()
    assert child.returncode not in (0, None), err
