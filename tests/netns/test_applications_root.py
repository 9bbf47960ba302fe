"""Programs run unmodified from a scenario over kernel sockets; whatever becomes of them, none of them stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
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
def _nothing_left(deployed: str) -> Iterator[None]:
    yield
    assert marked_programs() == []


@pytest.fixture(scope="module")
def deployed() -> Iterator[str]:
    """Name a lab that stays: there only the run itself ends what it has started."""
    name = lab_name("apps")
    with api.deploy(load_scenario(SCENARIO, BASE), name):
        pass
    try:
        yield name
    finally:
        api.destroy(name)


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


def run_incast(*, tos: str) -> Result:
    """Two hosts send to a third for a while, by TCP, through switches with PFC."""
    servers = [
        f'{{host: 2, mode: background, ready_port: {port}, command: "iperf3 -s -1 -p {port}"}}' for port in (7001, 7002)
    ]
    clients = [
        f'{{host: {host}, mode: background, command: "iperf3 -c {{address:2}} -p {7001 + host} -t 1 {tos}"}}'
        for host in (0, 1)
    ]
    workload = f"workload=[{{application: incast, commands: [{', '.join(servers + clients)}]}}]"
    return api.run(load_scenario(SCENARIO, [*BASE, workload, "qos.pfc.enabled=true", "qos.pfc.xoff=200 KB"]))


def test_programs_in_the_lossless_priority_are_paused_and_lose_nothing() -> None:
    fabric = run_incast(tos="--tos {traffic_class}").applications[0].fabric
    assert fabric.pause_frames
    assert fabric.drops_packets == 0
    assert 0 < (fabric.paused_fraction_max or 0) <= 1


def test_programs_in_another_priority_are_not_paused() -> None:
    fabric = run_incast(tos="").applications[0].fabric
    assert fabric.pause_frames == 0
    assert fabric.paused_fraction_max == 0


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
def test_a_command_that_fails_fails_the_run_and_is_named(
    command: str, says: str, deployed: str, tmp_path: Path
) -> None:
    output = tmp_path / "results"
    with pytest.raises(RunError, match=f"(?s)application tried, {says}"):
        run_commands(command, output=output, wall_timeout="1 s", name=deployed)
    assert list(output.glob("applications/0-tried/*.out"))  # what was written stays


def test_what_is_under_way_at_the_end_is_of_the_same_iteration() -> None:
    # Sent at once, it takes 150 ms to its host at this rate.
    send = "import socket; s = socket.socket(2, 2); [s.sendto(bytes(1400), ('{address:2}', 9)) for _ in range(50)]"
    command = f'{{host: 0, command: "{sys.executable} -c \\"{send}\\""}}'
    workload = f"workload=[{{application: burst, commands: [{command}]}}]"
    result = api.run(load_scenario(SCENARIO, [*BASE, "time_dilation=100000", workload]))
    sent = {way.src: way.packets or 0 for link in result.fabric.links for way in link.directions}
    assert sent["host0/eth0"] >= 50
    assert sent["leaf1/down0"] == sent["host0/eth0"]


def test_setup_that_fails_is_named() -> None:
    with pytest.raises(RunError, match=r"(?s)application tried, setup: `false` ended with exit code 1"):
        run_commands('{host: 0, command: "true"}', setup='["true", "false"]')


def test_figure_that_is_not_printed_is_a_warning() -> None:
    result = run_commands('{host: 0, command: "echo 1"}', figures='[{name: two, pattern: "two ([0-9])"}]')
    assert result.applications[0].figures[0].value is None
    assert any("figure two is not known" in warning for warning in result.warnings)


def test_programs_of_a_deployed_lab_end_with_the_run_alone(deployed: str) -> None:
    mine = subprocess.Popen(
        [sys.executable, "-m", "testbed", "exec", "--lab", deployed, "host0", "--", "sleep", "1000"]
    )
    try:
        run_commands('{host: 0, command: "setsid sleep 1000 & true"}', name=deployed)
        assert find_programs(read_state(deployed).mark) == []
        assert mine.poll() is None
    finally:
        mine.terminate()
        mine.wait(PATIENCE_S)


def test_what_setup_has_started_is_ended(deployed: str) -> None:
    run_commands('{host: 0, command: "true"}', setup='["setsid sleep 1000 & sleep 1000 &"]', name=deployed)
    with pytest.raises(RunError, match=r"setup: `setsid.*had not ended after wall_timeout"):
        run_commands(
            '{host: 0, command: "true"}', setup='["setsid sleep 1000 & sleep 1000"]', name=deployed, wall_timeout="1 s"
        )


@contextlib.contextmanager
def running_programs(deployed: str, folder: Path, setup: str = "true") -> Iterator[subprocess.Popen[str]]:
    """Run, in a process of its own, programs on a lab that do not end by themselves."""
    file = folder / "scenario.yaml"
    command = '{host: 0, command: "setsid sleep 1000 & echo up; sleep 1000"}'
    workload = f'[{{application: tried, setup: ["{setup}"], commands: [{command}]}}]'
    file.write_text(SCENARIO)
    settings = [part for one in (*BASE, f"workload={workload}") for part in ("--set", one)]
    arguments = [sys.executable, "-m", "testbed", "run", str(file), *settings, "--output", str(folder / "out")]
    child = subprocess.Popen(
        [*arguments, "--name", deployed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: any("up" in file.read_text() for file in folder.glob("out/applications/*/*.out")), "it runs")
        yield child
    finally:
        child.kill()
        child.communicate()


def test_interrupt_ends_what_runs(deployed: str, tmp_path: Path) -> None:
    with running_programs(deployed, tmp_path) as child:
        os.kill(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE_S)
    assert child.returncode not in (0, None), err


@pytest.mark.parametrize("after", ["gc", "run"])
def test_what_a_killed_run_has_left_is_ended(after: str, deployed: str, tmp_path: Path) -> None:
    mark = read_state(deployed).mark
    with running_programs(deployed, tmp_path) as child:
        child.kill()
        child.wait(PATIENCE_S)
        assert len(find_programs(mark)) >= 2  # what this is about: nobody has ended them
        if after == "gc":
            assert deployed not in api.collect_garbage()[0]
        else:
            run_commands('{host: 0, command: "true"}', name=deployed)
        assert find_programs(mark) == []


def test_what_a_killed_run_has_left_ends_with_its_lab(tmp_path: Path) -> None:
    name = lab_name("killed")
    with api.deploy(load_scenario(SCENARIO, BASE), name):
        pass
    mark = read_state(name).mark
    try:
        # In setup, which is in no namespace of the lab.
        with running_programs(name, tmp_path, setup="setsid sleep 1000 & echo up; sleep 1000") as child:
            child.kill()
            child.wait(PATIENCE_S)
            assert find_programs(mark)
    finally:
        api.destroy(name)
    assert find_programs(mark) == []
