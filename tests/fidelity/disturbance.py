"""What can go wrong with a machine while it measures: hogs, a hog above the engine, a CPU quota."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Above the engine's own priority (testbed.kernel.scheduling.ENGINE_FIFO_PRIORITY).
_FIFO_PRIORITY = 60
_PERIOD_US = 100_000
_HOG = "while True: pass"
# Busy for `sys.argv[1]` seconds, idle for `sys.argv[2]`, for ever.
_PULSED_HOG = (
    "import sys, time\nbusy, idle = float(sys.argv[1]), float(sys.argv[2])\n"
    "while True:\n    end = time.monotonic() + busy\n    while time.monotonic() < end: pass\n    time.sleep(idle)\n"
)


@contextlib.contextmanager
def _running(*commands: list[str]) -> Iterator[list[int]]:
    processes = [subprocess.Popen(command) for command in commands]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cpu_hogs(count: int) -> Iterator[None]:
    """Run ordinary processes that never sleep."""
    with _running(*([sys.executable, "-c", _HOG] for _ in range(count))):
        yield


@contextlib.contextmanager
def fifo_hog(cpu: int, busy_s: float, idle_s: float) -> Iterator[None]:
    """Run a pulsed SCHED_FIFO process above the engine on its CPU."""
    with _running([sys.executable, "-c", _PULSED_HOG, str(busy_s), str(idle_s)]) as pids:
        os.sched_setaffinity(pids[0], {cpu})
        os.sched_setscheduler(pids[0], os.SCHED_FIFO, os.sched_param(_FIFO_PRIORITY))
        yield


def quota_folder() -> Path | None:
    """Return where a CPU quota can be made on this machine, cgroup v1 or v2; None where it cannot."""
    v1 = Path("/sys/fs/cgroup/cpu")
    if (v1 / "cpu.cfs_quota_us").exists() or (v1 / "cpu.cfs_period_us").exists():
        return v1
    v2 = Path("/sys/fs/cgroup")
    if (
        "cpu" in (v2 / "cgroup.subtree_control").read_text().split()
        if (v2 / "cgroup.subtree_control").exists()
        else False
    ):
        return v2
    return None


@contextlib.contextmanager
def cpu_quota(cpus: float) -> Iterator[Path]:
    """Make a control group that may use ``cpus`` CPUs' worth of time; yields its ``cgroup.procs``."""
    root = quota_folder()
    assert root is not None
    group = root / f"testbed-quota-{os.getpid()}"
    group.mkdir()
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{round(cpus * _PERIOD_US)} {_PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(round(cpus * _PERIOD_US)))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()
