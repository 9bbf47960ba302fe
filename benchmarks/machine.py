"""What a run took of the machine, and who else took some of it meanwhile.

CPU time is measured by soakers: a SCHED_IDLE process on each CPU counts as fast as it can; what it loses against an idle
machine is what the run took, softirqs included (``/proc/stat`` misses most of them). What a hypervisor or another process took
counts as the run's, so both are measured beside it, and a row that either disturbed is marked.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from testbed.host import MachineCounters
from testbed.kernel.host_tuning import tuned_host

# A row is marked when others had more than this share of the CPU time: about what moves a figure by its last digit but one.
DISTURBED_STEAL_FRACTION = 0.02
DISTURBED_OTHERS_FRACTION = 0.05
_CALIBRATIONS = 4
_CALIBRATION_WINDOWS = 15
_CALIBRATION_WINDOW_S = 0.1
# Of the windows the one that this share is slower than: disturbed ones are slow, a lucky one is fast.
_CALIBRATION_QUANTILE = 0.8
_LEAST_RATE_FRACTION = 0.7


def _soak(cpu: int, counter: mmap.mmap) -> None:
    os.sched_setaffinity(0, {cpu})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    count = 0
    while True:
        for _ in range(200):
            pass
        count += 1
        struct.pack_into("=Q", counter, 0, count)


class Soakers:
    """Counts on every CPU what nobody else wants."""

    def __init__(self) -> None:
        self._cpus = sorted(os.sched_getaffinity(0))
        self._counters = [mmap.mmap(-1, 4096) for _ in self._cpus]
        context = multiprocessing.get_context("fork")
        self._processes = [
            context.Process(target=_soak, args=(cpu, counter), daemon=True)
            for cpu, counter in zip(self._cpus, self._counters, strict=True)
        ]
        for process in self._processes:
            process.start()
        # Runs take turns by the machine's lock; what holds no lock is waited for, a few times.
        rates = []
        with tuned_host(()):
            time.sleep(0.2)
            for _ in range(_CALIBRATIONS):
                with watched() as taken:
                    rates.append(self._calibrate())
                if not taken.row()["disturbed"]:
                    break
        self.idle_rate = np.max(rates, axis=0)
        """Counts per second of each idle CPU."""
        # CPUs are alike; one that never came near the others' rate was never idle.
        self.usable = bool(self.idle_rate.min() > _LEAST_RATE_FRACTION * self.idle_rate.max())
        """Whether every CPU was seen idle; else nothing can be said of CPU time."""

    def _calibrate(self) -> npt.NDArray[np.float64]:
        """Return the counts per second of each CPU while nothing runs."""
        rates = []
        for _ in range(_CALIBRATION_WINDOWS):
            before, begin = self.counts(), time.monotonic()
            time.sleep(_CALIBRATION_WINDOW_S)
            rates.append((self.counts() - before) / (time.monotonic() - begin))
        fast: npt.NDArray[np.float64] = np.quantile(np.array(rates), _CALIBRATION_QUANTILE, axis=0)
        return fast

    def counts(self) -> npt.NDArray[np.float64]:
        """Return the count of each CPU."""
        return np.array([struct.unpack_from("=Q", counter, 0)[0] for counter in self._counters], np.float64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@dataclass
class Taken:
    """What a block took of the machine; filled in when it ends.

    Attributes:
        seconds: Its length.
        cpu_s: CPU time of each CPU that was not idle; empty where that is not known.
        steal_fraction: Share of all CPU time that the hypervisor kept for others.
        others_fraction: Share of all CPU time that processes had which are neither ours nor the kernel's.
    """

    seconds: float = 0.0
    cpu_s: list[float] = field(default_factory=list)
    steal_fraction: float = 0.0
    others_fraction: float = 0.0

    def row(self) -> dict[str, Any]:
        """Return what a row of results says of it."""
        disturbed = self.steal_fraction > DISTURBED_STEAL_FRACTION or self.others_fraction > DISTURBED_OTHERS_FRACTION
        return {
            "steal_fraction": round(self.steal_fraction, 4),
            "others_fraction": round(self.others_fraction, 4),
            "disturbed": disturbed,
        }


def others_run_ns() -> dict[int, int]:
    """Return the CPU time of every thread that is neither the kernel's nor this process's or a descendant's, by its id."""
    parents: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The second field, the name, is in parentheses and may hold anything.
                parents[int(entry.name)] = int(
                    Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()[1]
                )
    others = {}
    for pid in parents:
        ancestor = pid
        while ancestor not in (0, 2, os.getpid()):  # 2 is kthreadd
            ancestor = parents.get(ancestor, 0)
        if ancestor == 0:
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with contextlib.suppress(OSError):  # one that has just ended must not hide those after it
                        others[int(thread)] = int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return others


@contextlib.contextmanager
def watched(soakers: Soakers | None = None) -> Iterator[Taken]:
    """Measure what a block takes of the machine."""
    taken = Taken()
    looked_before, others = time.monotonic(), others_run_ns()
    machine = MachineCounters.read()
    begin = time.monotonic()
    before = soakers.counts() if soakers else np.zeros(0)
    yield taken
    after_counts = soakers.counts() if soakers else np.zeros(0)
    taken.seconds = time.monotonic() - begin
    if soakers and soakers.usable:
        taken.cpu_s = (taken.seconds - (after_counts - before) / soakers.idle_rate).tolist()
    taken.steal_fraction = MachineCounters.read().steal_fraction_since(machine)
    looked_after, after = time.monotonic(), others_run_ns()
    # A thread that began meanwhile counts from 0; what one that ended meanwhile had is not known.
    run_ns = sum(ns - others.get(thread, 0) for thread, ns in after.items())
    taken.others_fraction = run_ns / 1e9 / (looked_after - looked_before) / len(os.sched_getaffinity(0))
