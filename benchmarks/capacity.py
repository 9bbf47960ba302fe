"""Packets per second and CPU per packet of the data plane and engine, beside the bare kernel path, in one run.

``python -m benchmarks.capacity`` prints a table and writes ``benchmarks/results/capacity.json``.

CPU time is measured by soakers: a SCHED_IDLE process on each CPU counts as fast as it can; what it loses against an idle
machine is what the run took, softirqs included (``/proc/stat`` misses most of them).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from testbed.carriers.capacity import try_load

RESULTS = Path(__file__).parent / "results" / "capacity.json"
_CALIBRATION_S = 1.5


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
        time.sleep(0.2)
        before, begin = self._read(), time.monotonic()
        time.sleep(_CALIBRATION_S)
        seconds = time.monotonic() - begin
        self._idle_rate = [(b - a) / seconds for a, b in zip(before, self._read(), strict=True)]

    def _read(self) -> list[int]:
        return [struct.unpack_from("=Q", counter, 0)[0] for counter in self._counters]

    @contextlib.contextmanager
    def used_cpu_s(self) -> Iterator[Callable[[], list[float]]]:
        """Measure a block: the yielded function tells the CPU seconds used since, per CPU."""
        before, begin = self._read(), time.monotonic()

        def used() -> list[float]:
            seconds = time.monotonic() - begin
            counts = [b - a for a, b in zip(before, self._read(), strict=True)]
            return [seconds - count / rate for count, rate in zip(counts, self._idle_rate, strict=True)]

        yield used

    def close(self) -> None:
        """End the soakers."""
        for process in self._processes:
            process.kill()
            process.join()


def measure(packets_per_s: float, leaves: int, seconds: float, soakers: Soakers) -> dict[str, Any]:
    """Run a load with and, for the fixed cost of building and starting, almost without packets."""
    with soakers.used_cpu_s() as used:
        short = try_load(packets_per_s, leaves=leaves, seconds=seconds / 8)
        fixed = used()
    with soakers.used_cpu_s() as used:
        ratio = try_load(packets_per_s, leaves=leaves, seconds=seconds)
        total = used()
    packets = packets_per_s * seconds * (1 - 1 / 8)
    per_cpu = [1e6 * (b - a) / packets for a, b in zip(fixed, total, strict=True)]
    return {
        "hosts": 4 * leaves,
        "asked_packets_per_s": packets_per_s,
        "completion_over_ideal": ratio,
        "completion_over_ideal_short": short,
        "cpu_us_per_packet": sum(per_cpu),
        "cpu_us_per_packet_of_each_cpu": per_cpu,
    }


def main() -> None:
    """Measure and print."""
    soakers = Soakers()
    try:
        rows = [
            measure(packets_per_s, leaves, 4.0, soakers)
            for packets_per_s, leaves in ((60_000, 4), (96_000, 4), (120_000, 4), (144_000, 8))
        ]
    finally:
        soakers.close()
    print(f"{'hosts':>6} {'asked':>9} {'CCT/ideal':>10} {'CPU/packet':>11}")
    print(f"{'':>6} {'(pps)':>9} {'':>10} {'(us)':>11}")
    for row in rows:
        print(
            f"{row['hosts']:>6} {row['asked_packets_per_s']:>9,} {row['completion_over_ideal']:>10.4f} "
            f"{row['cpu_us_per_packet']:>11.2f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    host = {"cpus": os.cpu_count(), "kernel": platform.release(), "machine": platform.machine()}
    RESULTS.write_text(json.dumps({"host": host, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
