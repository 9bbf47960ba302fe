"""The guest is what it promises to be: a full kernel, a root in memory, a clock of instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed.host import in_virtual_time
from tests.conftest import skip_or_fail

MODULES = (
    "veth",
    "sch_red",
    "sch_plug",
    "sch_netem",
    "sch_ets",
    "sch_prio",
    "sch_htb",
    "sch_tbf",
    "rdma_rxe",
    "ib_uverbs",
)


@pytest.mark.root
@pytest.mark.parametrize("module", MODULES)
def test_kernel_has_what_the_hosts_may_lack(module: str) -> None:
    done = subprocess.run(["modprobe", module], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.root
def test_kernel_loads_modules_by_itself() -> None:
    subprocess.run(["modprobe", "-r", "sch_plug"], check=False, capture_output=True)
    subprocess.run(["ip", "link", "add", "tbplug0", "type", "veth", "peer", "name", "tbplug1"], check=True)
    try:
        subprocess.run(["tc", "qdisc", "add", "dev", "tbplug0", "root", "plug", "limit", "100000"], check=True)
    finally:
        subprocess.run(["ip", "link", "del", "tbplug0"], check=True)


def test_checkout_can_be_written_to_in_memory(tmp_path: Path) -> None:
    here = Path(__file__).parent / "written-in-the-guest"
    here.write_text("x")
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        assert ("overlay", "/") in {(words[2], words[1]) for words in mounts}
    finally:
        here.unlink()


def test_command_line_doctor_misses_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "testbed", "doctor", "--format", "json"], capture_output=True, text=True, check=False
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0, [one for one in report["findings"] if one["status"] == "missing"]
    assert report["ok"]
    # The kernel has every qdisc, so trying one that is not found is wrong itself.
    qdiscs = {one["name"]: one["status"] for one in report["findings"] if one["name"].startswith("qdisc ")}
    assert {"qdisc ets", "qdisc netem", "qdisc plug", "qdisc red", "qdisc prio"} <= set(qdiscs)
    assert set(qdiscs.values()) == {"ok"}, qdiscs


def test_same_instructions_take_the_same_time() -> None:
    if not in_virtual_time():
        skip_or_fail("needs virtual time")
    durations = []
    os.sched_setaffinity(0, {0})
    for _ in range(5):
        begin = time.monotonic_ns()
        for _ in range(100_000):
            pass
        durations.append(time.monotonic_ns() - begin)
    # Interrupts of the guest's own come between; what the host does does not.
    assert min(durations) > 1e6
    assert sorted(durations)[len(durations) // 2] <= 1.05 * min(durations)
