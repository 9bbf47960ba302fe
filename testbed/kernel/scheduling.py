"""The engine's place on the machine: its CPU, its priority, its clock."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from testbed.errors import MachineError

# Above ordinary work, below what the kernel runs at (watchdogs and migration threads are at 99).
ENGINE_FIFO_PRIORITY = 40
_MCL_CURRENT, _MCL_FUTURE = 1, 2


def available_cpus() -> list[int]:
    """Return the CPUs this process may use, sorted."""
    return sorted(os.sched_getaffinity(0))


def choose_cpus() -> tuple[int, tuple[int, ...]]:
    """Return the engine's CPU and the CPUs of the fabric's ports.

    The engine takes the last CPU, the ports the others: on one shared CPU the engine would preempt the very frames it
    waits for.
    """
    cpus = available_cpus()
    if len(cpus) == 1:
        return cpus[0], (cpus[0],)
    return cpus[-1], tuple(cpus[:-1])


def read_max_backlog() -> int:
    """Return how many frames may wait for a CPU between two ports (``sysctl net.core.netdev_max_backlog``)."""
    return int(Path("/proc/sys/net/core/netdev_max_backlog").read_text())


@contextlib.contextmanager
def engine_thread(cpu: int) -> Iterator[list[str]]:
    """Pin the calling process to ``cpu`` with SCHED_FIFO, memory locked and no garbage collection, for the block.

    Yields:
        Warnings about what was refused (a container without CAP_SYS_NICE).
    """
    warnings: list[str] = []
    affinity = os.sched_getaffinity(0)
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    collecting = gc.isenabled()
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:
            raise MachineError(
                f"cannot pin to CPU {cpu}: {error.strerror}", hint="check the container's cpuset"
            ) from None
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(ENGINE_FIFO_PRIORITY))
        except PermissionError:
            warnings.append("SCHED_FIFO was refused (CAP_SYS_NICE): ticks come later on a busy machine")
        if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
            warnings.append("mlockall was refused: page faults may delay ticks")
        gc.disable()
        yield warnings
    finally:
        libc.munlockall()
        if collecting:
            gc.enable()
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy, parameter)
        os.sched_setaffinity(0, affinity)


@contextlib.contextmanager
def ordinary_thread(cpus: Collection[int]) -> Iterator[None]:
    """Give the calling thread the usual priority and ``cpus`` for the block: what a child that begins in it inherits."""
    affinity = os.sched_getaffinity(0)
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, cpus)
        yield
    finally:
        os.sched_setaffinity(0, affinity)
        os.sched_setscheduler(0, policy, parameter)


class MonotonicClock:
    """CLOCK_MONOTONIC, the clock of ``bpf_ktime_get_ns()``."""

    def now_ns(self) -> int:
        """Return the time in ns."""
        return time.monotonic_ns()

    def sleep_until_ns(self, when_ns: int) -> None:
        """Sleep until ``when_ns``; return at once when it has passed."""
        delay_ns = when_ns - time.monotonic_ns()
        if delay_ns > 0:
            time.sleep(delay_ns / 1e9)
