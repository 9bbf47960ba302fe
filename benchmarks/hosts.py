"""How far it scales: bring-up, memory, packets per second and completion time by the number of hosts.

``python -m benchmarks.hosts`` prints a table; ``--write`` keeps it. Fabrics have four hosts under
each leaf and four spines; the smallest has two each. *Capacity* is the largest step of a ladder of loads that was carried within
1 % of the asked time, without a loss, in one of two attempts, found by halving. The completion time is that of a ring all-reduce
at the time dilation that follows from that capacity as in any run.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import watched
from benchmarks.record import Column, Row, Table, run_benchmark
from benchmarks.reference import Quiet, clos_text, load_plan
from testbed.carriers.engine import engine_carrier
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.host import MachineCounters
from testbed.measure.verdict import judge
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.scenario import load_scenario

TABLE: Table = Table(
    "hosts",
    (
        Column("hosts", "hosts", "", ",.0f"),
        Column("switches", "switches", "", ",.0f"),
        Column("build_s", "build", "s", ".2f"),
        Column("remove_s", "remove", "s", ".2f"),
        Column("kernel_memory_bytes", "kernel memory", "MiB", ",.0f", 2**-20),
        Column("process_memory_bytes", "process memory", "MiB", ",.0f", 2**-20),
        Column("capacity_packets_per_s", "capacity", "packets/s", ",.0f"),
        Column("time_dilation", "time dilation", "", ",.0f"),
        Column("packets_per_s", "all-reduce", "packets/s", ",.0f"),
        Column("cct_ratio", "CCT", "ratio", ".4f"),
        Column("verdict", "verdict"),
    ),
)
# Leaves, spines, hosts under each leaf.
_FABRICS = ((2, 2, 2), (2, 4, 4), (4, 4, 4), (8, 4, 4), (16, 4, 4), (32, 4, 4))
_LADDER = (
    5_000,
    10_000,
    20_000,
    30_000,
    45_000,
    60_000,
    75_000,
    90_000,
    105_000,
    120_000,
    140_000,
    160_000,
    190_000,
    220_000,
    260_000,
)
_CARRIED_RATIO = 1.01
_ATTEMPTS = 2
_SETTLE_S = 0.1
_MAX_SETTLE_LOOKS = 30


def _kernel_memory_bytes() -> int:
    """Return what the kernel has in slabs and per-CPU areas, once it has stopped shrinking."""
    least = 1 << 62
    for _ in range(_MAX_SETTLE_LOOKS):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        now = sum(int(fields[name].split()[0]) * 1024 for name in ("Slab", "Percpu") if name in fields)
        if now >= least - (1 << 18):
            return min(now, least)
        least = now
        time.sleep(_SETTLE_S)
    return least


def _process_memory_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def _carried(packets_per_s: float, shape: tuple[int, int, int], seconds: float) -> bool:
    """Tell whether a fabric carries a load within 1 % of the time asked."""
    plan = load_plan(packets_per_s, [packets_per_s * seconds], *shape)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(RunError):
            done = _run(plan)
            if not done.lost and done.cct_ratio <= _CARRIED_RATIO:
                return True
    return False


@dataclass(frozen=True)
class _Done:
    """A run: its CCT over the ideal, whether frames were lost, its wall time, this process's memory, and the verdict on it."""

    cct_ratio: float
    lost: bool
    wall_s: float
    process_memory_bytes: int
    verdict: str


def _run(plan: Plan) -> _Done:
    """Run the first item of a plan."""
    with Fabric.build(plan, f"bench-{os.getpid()}") as fabric, engine_carrier(fabric) as (carrier, _):
        before = MachineCounters.read()
        samples = carrier.run(0, Quiet())
        after = MachineCounters.read()
        memory = _process_memory_bytes()
    verdict = judge(
        samples.machine,
        wall_tick_ns=plan.dilation.wall_tick_ns,
        softnet_drops=after.drops_since(before),
        steal_fraction=after.steal_fraction_since(before),
    ).verdict
    lost = bool(samples.retransmitted_packets) or any(one.unaccounted_bytes for one in samples.machine)
    ratio = samples.cct_ns[0] / plan.workloads[0].ideal_cct_ns
    return _Done(ratio, lost, samples.wall_cct_ns[0] / 1e9, memory, str(verdict))


def _find_capacity(shape: tuple[int, int, int], ladder: tuple[int, ...], seconds: float) -> float | None:
    """Return the largest load of a ladder that a fabric carries, None if not even the smallest."""
    low, high = -1, len(ladder)
    while high - low > 1:
        middle = (low + high) // 2
        if _carried(ladder[middle], shape, seconds):
            low = middle
        else:
            high = middle
    return float(ladder[low]) if low >= 0 else None


def measure_row(shape: tuple[int, int, int], ladder: tuple[int, ...], seconds: float) -> Row:
    """Return the figures of a fabric of ``(leaves, spines, hosts per leaf)``."""
    leaves, spines, hosts_per_leaf = shape
    hosts = leaves * hosts_per_leaf
    with watched() as taken:
        plan = load_plan(ladder[0], [1.0], *shape)
        memory = _kernel_memory_bytes()
        begin = time.monotonic()
        with Fabric.build(plan, f"bench-{os.getpid()}"):
            build_s = time.monotonic() - begin
            kernel_memory = _kernel_memory_bytes() - memory
            begin = time.monotonic()
        remove_s = time.monotonic() - begin

        capacity = _find_capacity(shape, ladder, seconds)
        text = clos_text(*shape) + "workload:\n- {collective: all_reduce, size: SIZE, iters: 1, warmup_iters: 0}\n"
        # The dilation does not depend on the size; with it, the size that takes the time wanted.
        draft = compile_plan(load_scenario(text.replace("SIZE", "1 MiB")), capacity_packets_per_s=capacity)
        dilation = draft.dilation
        packets = dilation.offered_packets_per_s / dilation.value * seconds * 2
        # A ring all-reduce sends 2 (n - 1) times the buffer, all ranks together.
        size = max(1, round(packets * 4096 / (2 * (hosts - 1)) / 65536)) * 65536
        plan = compile_plan(load_scenario(text.replace("SIZE", str(size))), capacity_packets_per_s=capacity)
        done = _run(plan)
    return {
        "hosts": hosts,
        "switches": leaves + spines,
        "build_s": build_s,
        "remove_s": remove_s,
        "kernel_memory_bytes": kernel_memory,
        "process_memory_bytes": done.process_memory_bytes,
        "capacity_packets_per_s": capacity,
        "time_dilation": plan.dilation.value,
        "time_dilation_bound": str(plan.dilation.bound),
        "size_bytes": size,
        "packets_per_s": 2 * (hosts - 1) * size / 4096 / done.wall_s,
        "cct_ratio": done.cct_ratio,
        "verdict": done.verdict,
        "lost": done.lost,
        **taken.row(),
    }


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    if quick:
        return [measure_row((2, 2, 2), (4_000, 8_000), 0.1)]
    return [measure_row(shape, _LADDER, 0.5 if shape[0] <= 8 else 1.0) for shape in _FABRICS]


if __name__ == "__main__":
    run_benchmark(TABLE, measure, __doc__ or "")
