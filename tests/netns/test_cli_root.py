"""The command line on a real fabric: small, slow and short. What is measured is judged elsewhere (tests/fidelity)."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import testbed as api
from testbed.errors import LabError
from testbed.results.series import QUEUES_FILE
from tests.conftest import TEST_LAB_PREFIX, list_test_labs, list_test_namespaces
from tests.netns.labs import wait_until

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("host_unchanged")]

A, B, SMALL = (f"{TEST_LAB_PREFIX}{name}" for name in ("a", "b", "small"))
SCENARIO = f"""
name: {SMALL}
fabric:
  kind: clos
  leaves: 2
  spines: 2
  hosts_per_leaf: 2
  host_link: {{rate: 400 Gbit/s, delay: 600 ns}}
routing: {{scheme: pinning}}
workload:
  - {{collective: all_reduce, size: 256 KiB, iters: 1, warmup_iters: 1}}
time_dilation: 20000
expect: [drops_packets == 0]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A 2x2x2 fabric, slow enough for any machine."""
    file = tmp_path / "small.yaml"
    file.write_text(SCENARIO)
    return file


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "testbed.cli.main", *map(str, arguments)]


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=120)


@contextmanager
def deployed(file: Path, name: str) -> Iterator[str]:
    """Deploy a lab as the command does, without the time that two more processes take to start."""
    api.deploy(api.load(file), name).close()
    try:
        yield name
    finally:
        with contextlib.suppress(LabError):  # it is gone already
            api.destroy(name)


def ping(lab: str, address: str, count: int = 1) -> None:
    """Ping from a lab's first host, without the start of a ``testbed exec``."""
    words = ["ip", "netns", "exec", f"{lab}-host0", "ping", "-c", str(count), "-i", "0.01", "-W", "5", address]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_deployed_lab_can_be_seen_used_and_removed(small: Path) -> None:
    name = A
    result = run_command("deploy", small, "--name", name)
    assert result.returncode == 0, result.stderr
    try:
        shown = json.loads(run_command("inspect", name, "--format", "json").stdout)
        assert [node["name"] for node in shown["nodes"]] == [
            *("host0", "host1", "host2", "host3", "leaf0", "leaf1", "spine0", "spine1")
        ]
        assert {node["kind"] for node in shown["nodes"]} == {"host", "leaf", "spine"}
        assert [node["namespace"] for node in shown["nodes"]] == [f"{A}-{node['name']}" for node in shown["nodes"]]
        assert list_test_namespaces() == sorted(node["namespace"] for node in shown["nodes"])
        assert len(shown["links"]) == 8
        assert shown["time_dilation"] == 20000

        addresses = {end["node"]: end["address"].split("/")[0] for link in shown["links"][:4] for end in link["ends"]}
        pinged = run_command("exec", "--lab", name, "host0", "--", "ping", "-c1", "-W5", addresses["host1"])
        assert pinged.returncode == 0, pinged.stdout + pinged.stderr
        for target in ("host2", "host3"):
            ping(name, addresses[target])

        links = json.loads(run_command("inspect", name, "--format", "json").stdout)["links"]
        sent = {way["src"]: way["packets"] for link in links for way in link["directions"]}
        assert sent["host0/eth0"] == 3
        assert {way["depth_bytes"] for link in links for way in link["directions"]} == {0}
        assert "host0/eth0 > leaf0/down0" in run_command("inspect", name).stdout

        assert run_command("exec", "--lab", name, "host0", "--", "sh", "-c", "exit 7").returncode == 7
        missing = run_command("exec", "--lab", name, "nosuch", "--", "true")
        assert missing.returncode == 1
        assert missing.stderr.startswith(f"error: lab '{A}' has no node 'nosuch'")
        assert run_command("exec", "--lab", name, "host0", "--", "no-such-program").returncode == 1
    finally:
        destroyed = run_command("destroy", name)
    assert destroyed.returncode == 0, destroyed.stderr
    assert list_test_namespaces() == []


def test_kernel_routes_and_links_are_ordinary_linux(small: Path) -> None:
    with deployed(small, A):
        routes = json.loads(
            subprocess.run(["ip", "-n", f"{A}-host0", "-j", "route"], check=True, capture_output=True, text=True).stdout
        )
        assert any(route["dst"] == "default" and route["gateway"] == "10.0.0.0" for route in routes)
        qdiscs = subprocess.run(
            ["tc", "-n", f"{A}-leaf0", "qdisc", "show", "dev", "up0"], check=True, capture_output=True, text=True
        ).stdout
        assert "qdisc mq" in qdiscs
        assert "qdisc tbf" in qdiscs


def test_run_writes_a_result_with_the_promised_keys(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = run_command("run", small, "--output", folder, "--format", "json", "--iters", "2", "--seed", "5")
    assert done.returncode in (0, 4), done.stderr  # 4: too busy a machine to trust, which is not judged here
    result = json.loads(done.stdout)
    assert result == json.loads((folder / "result.json").read_text())
    assert set(result) == {
        *("schema_version", "scenario", "seed", "time_dilation", "host", "results", "fabric", "fidelity", "checks"),
        *("applications", "back_ends", "warnings"),
    }
    assert result["seed"] == 5
    assert result["time_dilation"] == 20000
    row = result["results"][0]
    assert (row["collective"], row["algorithm"], row["size_bytes"], row["nranks"]) == (
        "all_reduce",
        "ring",
        256 << 10,
        4,
    )
    assert len(row["cct_ns"]) == 2
    assert row["cct_ratio"] > 0.95
    fabric = result["fabric"]
    assert fabric["drops_packets"] == 0
    assert (fabric["ecn_marked_packets"], fabric["cnp_packets"], fabric["pause_frames"]) == (None, None, None)
    assert len(fabric["links"]) == 8
    sent = sum(
        way["bytes"] for link in fabric["links"][:4] for way in link["directions"] if way["src"].startswith("host")
    )
    # Each rank sends 2 (n - 1) / n of the buffer in each of the two iterations; warm-up is not counted.
    assert sent >= 4 * 2 * 2 * 3 / 4 * (256 << 10)
    assert sent < 1.25 * 4 * 2 * 2 * 3 / 4 * (256 << 10)
    assert all(way["utilisation_fraction"] < 1.05 for link in fabric["links"] for way in link["directions"])
    assert result["fidelity"]["verdict"] in ("trusted", "degraded", "invalid")
    assert result["checks"][0]["metric"] == "drops_packets"
    for fact in ("cpu_model", "cpus", "kernel", "memory_bytes", "load_average", "python", "testbed"):
        assert result["host"][fact] is not None
    assert run_command("validate", folder / "scenario.yaml").returncode == 0
    assert "iteration 2/2" in done.stderr


def test_sweep_runs_every_size_on_one_fabric(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = ("-b", "128KiB", "-e", "256KiB", "-f", "2", "--set", "expect=[drops_packets == 0, cct_ratio <= 0.5]")
    done = run_command("run", small, *options, "--output", folder)
    assert done.returncode in (3, 4), done.stderr
    assert done.stderr.count("building ") == 1
    result = json.loads((folder / "result.json").read_text())
    rows = result["results"]
    assert [row["size_bytes"] for row in rows] == [128 << 10, 256 << 10]
    assert rows[0]["cct_ns"] < rows[1]["cct_ns"]
    assert [row["fabric"]["drops_packets"] for row in rows] == [0, 0]

    sent = sum(
        way["bytes"]
        for link in result["fabric"]["links"][:4]
        for way in link["directions"]
        if way["src"].startswith("host")
    )
    payload = 4 * 2 * 3 / 4 * sum(row["size_bytes"] for row in rows)  # of both sizes, one measured iteration each
    assert payload <= sent < 1.25 * payload

    order = ["trusted", "degraded", "invalid"]
    verdicts = [row["fidelity"]["verdict"] for row in rows]
    worst = max(verdicts, key=order.index)
    assert result["fidelity"]["verdict"] == worst
    assert done.returncode == (4 if worst == "invalid" else 3)
    judged = [verdict for verdict in verdicts if verdict != "invalid"]
    # No row can be twice as fast as its ideal: the check fails unless no row may be judged.
    expected = ["not_judged" if "invalid" in verdicts else "pass", "fail" if judged else "not_judged"]
    assert [check["verdict"] for check in result["checks"]] == expected
    shown = [line.split() for line in done.stdout.splitlines() if not line.startswith("#")]
    assert [(line[0], line[-1]) for line in shown] == list(zip((str(128 << 10), str(256 << 10)), verdicts, strict=True))
    again = run_command("validate", folder / "scenario.yaml")
    assert again.returncode == 0
    assert "max_size: 256 KiB" in (folder / "scenario.yaml").read_text()


def test_failing_check_exits_with_3(small: Path, tmp_path: Path) -> None:
    done = run_command("run", small, "--output", tmp_path / "out", "--set", "expect=[cct_ratio <= 0.5]")
    if json.loads((tmp_path / "out" / "result.json").read_text())["fidelity"]["verdict"] == "invalid":
        assert done.returncode == 4
        assert "not_judged" in done.stdout
    else:
        assert done.returncode == 3, done.stderr
        assert "# check: cct_ratio <= 0.5: fail" in done.stdout


def test_malformed_scenario_builds_nothing(small: Path, tmp_path: Path) -> None:
    for verb in ("run", "deploy"):
        done = run_command(verb, small, "--set", "fabric.spines=none", "--set", "workload[0].size=12 parsecs")
        assert done.returncode == 1
        assert done.stderr.count("error: ") == 2
        assert "Traceback" not in done.stderr
    assert list_test_labs() == []


def test_two_labs_at_once_under_different_names(small: Path) -> None:
    with deployed(small, A), deployed(small, B):
        assert {A, B} <= set(api.labs())
        ping(B, "10.0.0.3")
        packets = [way.packets for link in api.inspect(A).links for way in link.directions]
        assert set(packets) == {0}
        again = run_command("deploy", small, "--name", A)
        assert again.returncode == 1
        assert again.stderr.splitlines()[-2:] == [
            f"error: a lab named '{A}' exists already",
            f"hint:  `testbed destroy {A}`, `testbed gc`, or choose another with --name",
        ]
        assert run_command("gc").returncode == 0
        assert {A, B} <= set(api.labs())


def test_run_uses_a_deployed_lab_and_leaves_it(small: Path, tmp_path: Path) -> None:
    with deployed(small, A) as name:
        scenario = api.load(small, ["time_dilation=auto"])
        result = api.run(scenario, name=name, output=tmp_path / "out")
        assert result.time_dilation == 20000
        assert result.results[0].cct_ratio is not None
        assert list_test_labs() == [name]
        with pytest.raises(LabError, match="another `fabric`"):
            api.run(api.load(small, ["fabric.switch.buffer=1 MiB"]), name=name)
        with pytest.raises(LabError, match="time_dilation"):
            api.run(api.load(small, ["time_dilation=1000"]), name=name)
    with pytest.raises(LabError, match="no lab named"):
        api.run(scenario, name=name)


def test_run_beside_a_lab_of_its_own_name_takes_another(small: Path, tmp_path: Path) -> None:
    with deployed(small, SMALL):
        done = run_command("run", small, "--output", tmp_path / "out")
        assert done.returncode in (0, 4), done.stderr
        assert list_test_labs() == [SMALL]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_during_a_run_leaves_what_it_saw_and_no_lab(
    small: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "out"
    arguments = command("run", small, "--iters", "50", "--output", folder)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "iteration 1/" in line:
                break
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code
    assert rest.splitlines()[-1] == f"ended by {number.name}"
    assert "Traceback" not in rest
    # What was seen until then stays, and can be drawn; there is no result, for the run did not end.
    assert (folder / QUEUES_FILE).exists()
    assert not (folder / "result.json").exists()
    assert list_test_labs() == []


@pytest.mark.parametrize("wait_s", [0.9, 1.2, 1.5])
def test_signal_at_any_moment_of_a_deployment_leaves_all_or_nothing(small: Path, wait_s: float) -> None:
    with subprocess.Popen(command("deploy", small, "--name", A), stderr=subprocess.DEVNULL) as process:
        time.sleep(wait_s)
        process.send_signal(signal.SIGTERM)
    if process.returncode == 0:
        assert run_command("destroy", A).returncode == 0
    assert list_test_labs() == []


def test_killed_run_is_collected_and_a_deployed_lab_stays_usable(small: Path, tmp_path: Path) -> None:
    with deployed(small, A) as name:
        for extra in ((), ("--name", name)):
            arguments = command("run", small, "--iters", "50", "--output", tmp_path / "out", *extra)
            with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr is not None
                for line in process.stderr:
                    if "iteration 1/" in line:
                        break
                process.kill()
        assert SMALL in list_test_labs()
        collected = run_command("gc")
        assert f"removed {SMALL}" in collected.stdout
        assert list_test_labs() == [name]
        done = run_command("run", small, "--name", name, "--output", tmp_path / "again")
        assert done.returncode in (0, 4), done.stderr


@contextmanager
def sleeping(lab: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have something run in a lab's first host by ``testbed exec``."""
    with subprocess.Popen(command("exec", "--lab", lab, "host0", "--", "sleep", "60")) as process:
        pids = ["ip", "netns", "pids", f"{lab}-host0"]
        wait_until(lambda: bool(subprocess.run(pids, check=True, capture_output=True).stdout), "it runs in the host")
        yield process


def test_exec_ends_with_its_process(small: Path) -> None:
    with deployed(small, A) as name:
        with sleeping(name) as process:
            process.terminate()
        assert process.returncode == 143


def test_destroy_ends_what_still_runs_in_the_lab(small: Path) -> None:
    with deployed(small, A) as name:
        with sleeping(name) as process:
            assert run_command("destroy", name).returncode == 0
        assert process.returncode == 128 + signal.SIGKILL


def test_doctor_finds_this_machine_fit_and_leaves_nothing() -> None:
    done = run_command("doctor", "--format", "json")
    report = json.loads(done.stdout)
    missing = [finding["name"] for finding in report["findings"] if finding["status"] == "missing"]
    assert (done.returncode == 0) == (not missing)
    assert {"veth", "qdisc tbf", "eBPF", "SCHED_FIFO", "CPU quota"} <= {item["name"] for item in report["findings"]}
    for finding in report["findings"]:
        assert finding["meaning"]
        assert finding["mend"] or finding["status"] == "ok"
