"""Time series of real runs: they add up to the counters of the result, and outlive the run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import testbed
from testbed.cli.main import app
from testbed.results.series import QPS_FILE, QUEUES_FILE, read_series
from tests.conftest import TEST_LAB_PREFIX

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("host_unchanged")]

NAME = f"{TEST_LAB_PREFIX}series"
# 3:1 into a switch that marks early and pauses soon.
SCENARIO = f"""
name: {NAME}
fabric:
  kind: star
  hosts_per_leaf: 4
  host_link: {{rate: 400 Gbit/s, delay: 600 ns}}
qos:
  pfc: {{enabled: true, xoff: 64 KiB}}
  ecn: {{enabled: true, kmin: 16 KiB, kmax: 64 KiB}}
transport: {{congestion_control: dcqcn}}
workload:
  - {{pattern: incast, fan_in: 3, size: 512 KiB, iters: 2, warmup_iters: 1}}
time_dilation: 20000
"""
PATIENCE_S = 120.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def incast(tmp_path: Path) -> Path:
    file = tmp_path / "incast.yaml"
    file.write_text(SCENARIO)
    return file


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "testbed.cli.main", *map(str, arguments)]


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def read_rows(folder: Path, file: str) -> list[dict[str, Any]]:
    return read_series(folder / file).to_pylist()


def draw(out: Path, picture: Path) -> None:
    """Draw what is in a folder, as the command does, without the start of a process."""
    drawn = CliRunner().invoke(app, ["plot", str(out), "-o", str(picture)])
    assert drawn.exit_code == 0, drawn.output


def list_writers() -> set[str]:
    """Return the processes that write series for runs begun in this directory: others have their own."""
    done = subprocess.run(
        ["pgrep", "-f", "testbed.carriers.series_process"], capture_output=True, text=True, check=False
    )
    found = set()
    for pid in done.stdout.split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cwd").readlink() == Path.cwd():
                found.add(pid)
    return found


def test_series_adds_up_to_the_counters_of_the_result(incast: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_command("run", incast, "--output", out)
    assert done.returncode in (0, 4), done.stderr
    result = json.loads((out / "result.json").read_text())
    queues = [row for row in read_rows(out, QUEUES_FILE) if not row["warmup"]]
    ways = {way["src"]: way for link in result["fabric"]["links"] for way in link["directions"]}
    data_ports = ["switch0/down0", *(f"host{rank}/eth0" for rank in (1, 2, 3))]
    for port in data_ports:
        rows = [row for row in queues if row["port"] == port]
        assert sum(row["deq_bytes"] for row in rows) == ways[port]["bytes"]
        assert sum(row["deq_packets"] for row in rows) == ways[port]["packets"]
        assert sum(row["enq_bytes"] for row in rows) == ways[port]["bytes"]
        assert sum(row["drop_packets"] for row in rows) == ways[port]["drops_packets"]
        assert max((row["depth_bytes"] for row in rows), default=0) <= ways[port]["peak_depth_bytes"]
        assert sum(row["marked_packets"] for row in rows) == (ways[port]["marked_packets"] or 0)
    fabric = result["fabric"]
    assert sum(row["marked_packets"] for row in queues) == fabric["ecn_marked_packets"] > 0
    assert sum(row["pause_frames"] for row in queues) == fabric["pause_frames"] > 0
    # Pauses too, but for what lies between the end of an iteration and the fabric's rest.
    seconds = sum(row["interval_ns"] for row in queues if row["port"] == "host1/eth0" and row["paused"]) / 1e9
    measured = ways["host1/eth0"]["paused_fraction"] * sum(result["results"][0]["cct_ns"]) / 1e9
    assert seconds == pytest.approx(measured, rel=0.1)
    assert any(row["ingress_xoff"] for row in queues)

    qps = [row for row in read_rows(out, QPS_FILE) if not row["warmup"]]
    packets = 2 * 3 * 512 // 4
    assert sum(row["acked_packets"] for row in qps) == packets
    assert sum(row["sent_packets"] for row in qps) == packets + fabric["retransmitted_packets"]
    assert sum(row["cnps_packets"] for row in qps) == fabric["cnp_packets"]
    assert {(row["src_rank"], row["dst_rank"]) for row in qps} == {(1, 0), (2, 0), (3, 0)}
    assert all(0 < row["rate_limit_bytes_per_s"] <= 50e9 for row in qps)
    assert {row["iteration"] for row in qps} == {0, 1}

    draw(out, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.startswith("<?xml")


def test_no_series_is_written_where_none_is_wanted(incast: Path, tmp_path: Path) -> None:
    done = run_command("run", incast, "--no-series", "--iters", "1", "--output", tmp_path / "out")
    assert done.returncode in (0, 4), done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["result.json", "scenario.yaml"]
    drawn = run_command("plot", tmp_path / "out")
    assert drawn.returncode == 1
    assert QUEUES_FILE in drawn.stderr


def test_a_run_that_sends_nothing_over_the_network_has_no_series(tmp_path: Path) -> None:
    done = run_command("run", ROOT / "scenarios" / "one-host.yaml", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / QUEUES_FILE).exists()


@pytest.fixture
def no_writer_left() -> Iterator[None]:
    """Check that what writes the series ends with its run."""
    before = list_writers()
    yield
    deadline = time.monotonic() + PATIENCE_S
    while list_writers() - before:
        assert time.monotonic() < deadline, "the process that writes the series is still there"
        time.sleep(0.05)


@pytest.mark.usefixtures("no_writer_left")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_leaves_what_it_saw(incast: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = list_writers()
    out = tmp_path / "out"
    arguments = command("run", incast, "--iters", "500", "--output", out)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "iteration 3/" in line:
                break
        process.send_signal(number)
    deadline = time.monotonic() + PATIENCE_S
    while list_writers() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    testbed.collect_garbage()
    assert not (out / "result.json").exists()
    queues, qps = read_rows(out, QUEUES_FILE), read_rows(out, QPS_FILE)
    for iteration in (0, 1):  # all of what ended before, to the last packet
        rows = [row for row in qps if not row["warmup"] and row["iteration"] == iteration]
        assert sum(row["acked_packets"] for row in rows) == 3 * 512 // 4
    assert sum(row["deq_packets"] for row in queues if row["port"] == "switch0/down0") >= 3 * 3 * 512 // 4
    draw(out, tmp_path / "plot.html")
