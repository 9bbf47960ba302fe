"""Every benchmark runs; its figures are not looked at, for they mean nothing when it is quick."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import capacity, hosts, machine, tick
from benchmarks.machine import others_run_ns
from benchmarks.record import run_benchmark
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.root


def test_capacity_counts_what_every_path_carries(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CALIBRATION_WINDOW_S", 0.01)
    if not (shutil.which("cc") or shutil.which("clang")):
        skip_or_fail("no C compiler")
    rows = run_benchmark(capacity.TABLE, capacity.measure, "", ["--quick"])
    printed = capsys.readouterr().out
    assert {row["data_plane"] for row in rows} == {"eBPF and shapers", "eBPF, no shapers", "kernel forwarding"}
    for row in rows:
        assert row["packets_per_s"] > 0, row
        assert row["cpu_us_per_packet"] is None or math.isfinite(row["cpu_us_per_packet"])
        assert row["data_plane"] in printed


def test_tick_splits_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_benchmark(tick.TABLE, tick.measure, "", ["--quick"])
    assert "active QPs" in capsys.readouterr().out
    for row in rows:
        parts = [value for key, value in row.items() if key.endswith("_mean_ns") and key not in ("tick_mean_ns",)]
        assert sum(parts) == pytest.approx(row["tick_mean_ns"])
        # Each part was found and timed, and none twice: something is left for the loop itself.
        assert all(value > 0 for value in parts), row


def test_hosts_finds_what_a_fabric_carries(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run_benchmark(hosts.TABLE, hosts.measure, "", ["--quick"])
    assert "all-reduce" in capsys.readouterr().out
    assert row["hosts"] == 4
    assert row["build_s"] > 0
    assert row["cct_ratio"] > 0.9


def test_time_of_others_is_told_from_that_of_children() -> None:
    spin = "import time; end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    # A process whose parent is gone is not ours: started through one that ends at once.
    start = (
        "import subprocess, sys; null = subprocess.DEVNULL; "
        f"print(subprocess.Popen([sys.executable, '-c', {spin!r}], stdout=null, stderr=null).pid)"
    )
    child = subprocess.Popen([sys.executable, "-c", spin])
    other = int(subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True).stdout)
    try:
        before = others_run_ns()
        assert other in before
        assert child.pid not in before
        deadline = time.monotonic() + 10
        while (now := others_run_ns()[other]) == before[other] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert now > before[other]
    finally:
        os.kill(other, signal.SIGKILL)
        child.kill()
        child.wait()
