"""Facts about this machine that go into a result, and what else happened on it meanwhile."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

# Set in a guest of `testbed vm run`, to what its clock follows. No option reads it.
GUEST_VARIABLE = "TESTBED_GUEST"
VIRTUAL_TIME, REAL_TIME = "virtual-time", "real-time"
_SOFTNET = Path("/proc/net/softnet_stat")


def in_virtual_time() -> bool:
    """Return whether time here passes with the instructions that are executed."""
    return os.environ.get(GUEST_VARIABLE) == VIRTUAL_TIME


def read_host_facts() -> dict[str, Any]:
    """Return what a reader of a result must know of the machine: CPUs, kernel, memory, load, versions."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "hostname": platform.node(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu_model": _read_cpu_model(),
        "virtual_machine": GUEST_VARIABLE in os.environ,
        "virtual_time": in_virtual_time(),
        "cpus": os.cpu_count(),
        "cpus_available": len(os.sched_getaffinity(0)),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "testbed": testbed_version(),
    }


def testbed_version() -> str:
    """Return the version of this package, or ``unknown`` where it runs uninstalled."""
    try:
        return metadata.version("testbed")
    except metadata.PackageNotFoundError:
        return "unknown"


def _read_cpu_model() -> str:
    """Return the CPU as the kernel names it; arm64 kernels give no name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class MachineCounters:
    """Counters of the whole machine at one time.

    Attributes:
        softnet_drops: Frames that a CPU's backlog had no room for, all CPUs.
        cpu_seconds: Time of all CPUs by kind, since boot.
    """

    softnet_drops: int
    cpu_seconds: Mapping[str, float]

    @classmethod
    def read(cls) -> Self:
        """Return the counters now."""
        import psutil

        return cls(_read_softnet_drops(), psutil.cpu_times()._asdict())

    def drops_since(self, before: MachineCounters) -> int:
        """Return the frames dropped since an earlier reading."""
        return self.softnet_drops - before.softnet_drops

    def steal_fraction_since(self, before: MachineCounters) -> float:
        """Return the share of CPU time that the hypervisor kept for others since an earlier reading."""
        # Guest time is part of user time already.
        kinds = [kind for kind in self.cpu_seconds if kind not in ("guest", "guest_nice")]
        total = sum(self.cpu_seconds[kind] - before.cpu_seconds[kind] for kind in kinds)
        steal = self.cpu_seconds.get("steal", 0.0) - before.cpu_seconds.get("steal", 0.0)
        return max(0.0, steal / total) if total > 0 else 0.0


def _read_softnet_drops() -> int:
    """Return the second column of softnet_stat, summed over the CPUs; 0 where there is no such file."""
    try:
        return sum(int(line.split()[1], 16) for line in _SOFTNET.read_text().splitlines())
    except (OSError, IndexError, ValueError):
        return 0
