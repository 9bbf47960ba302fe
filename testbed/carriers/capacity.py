"""How many packets a second this machine carries: measured once with the real data plane and engine, and cached."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from testbed.carriers.engine import engine_carrier
from testbed.fabric import Fabric
from testbed.host import in_virtual_time
from testbed.plan.compile import compile_plan
from testbed.plan.dilation import WALL_TICK_NS
from testbed.scenario import load_scenario

# Loads tried, packets per second over four hops; the last that was carried is the capacity.
_STEPS_PACKETS_PER_S = (30_000, 45_000, 60_000, 75_000, 90_000, 105_000, 120_000, 140_000, 160_000, 190_000, 220_000)
_STEP_WALL_SECONDS = 0.5
# A load counts as carried when its transfers took at most this much longer than asked.
_CARRIED_RATIO = 1.01
_ATTEMPTS = 3
_CACHE_VERSION = 2
# The wire bits of a full frame: 4096 + 58 + 24 bytes.
_FRAME_BITS = 4178 * 8
_RATE_BITS_PER_S = 400_000_000_000
_HOSTS = 16
_REFERENCE = """
name: capacity
fabric:
  kind: clos
  leaves: 4
  spines: 4
  hosts_per_leaf: 4
  host_link: {rate: 400 Gbit/s, delay: 600 ns}
  switch: {buffer: 64 MiB}
routing: {scheme: pinning}
workload:
  - {collective: send_recv, order: rails, size: 1 MiB, iters: 1, warmup_iters: 0}
"""
# A CPU of 10^9 instructions a second, engine and fabric together on it: what it carries, and the tick that leaves it room.
VIRTUAL_PACKETS_PER_S = 20_000.0
VIRTUAL_TICK_NS = 4_000_000


class _Quiet:
    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """Say nothing."""


def cache_path() -> Path:
    """Return the file that remembers the capacity of this machine."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "testbed" / "capacity.json"


def machine_key() -> str:
    """Return what identifies this machine, as far as its speed goes: CPUs, kernel, and the version of the measurement."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line
                break
    except OSError:
        pass
    facts = (
        _CACHE_VERSION,
        model,
        sorted(os.sched_getaffinity(0)),
        platform.release(),
        platform.machine(),
        WALL_TICK_NS,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def wall_tick_ns() -> int:
    """Return the length of the engine's tick on this machine, with few senders."""
    return VIRTUAL_TICK_NS if in_virtual_time() else WALL_TICK_NS


def known_capacity() -> float | None:
    """Return the cached capacity of this machine in packets per second, or None when it was not measured.

    In virtual time all machines are one, whose capacity is known.
    """
    if in_virtual_time():
        return VIRTUAL_PACKETS_PER_S
    try:
        data: dict[str, Any] = json.loads(cache_path().read_text())
        return float(data[machine_key()]["packets_per_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def known_tick_lateness_ns() -> int | None:
    """Return how late this machine's ticks were at their 99th percentile when its capacity was measured; None if unknown."""
    try:
        data: dict[str, Any] = json.loads(cache_path().read_text())
        return int(data[machine_key()]["tick_lateness_ns"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure_capacity(report: Callable[[str], None] = lambda text: None) -> float:
    """Measure the capacity of this machine, remember and return it.

    Rising loads run over a 4x4x4 fabric until one takes more than a percent longer than asked.

    Args:
        report: Told what is being tried.

    Returns:
        Packets per second over host, leaf, spine, leaf, host.

    Raises:
        KernelError: The fabric could not be built.
    """
    carried = 0.0
    lateness_ns: list[int] = []
    for asked in _STEPS_PACKETS_PER_S:
        if not any(try_load(asked, lateness_ns=lateness_ns) <= _CARRIED_RATIO for _ in range(_ATTEMPTS)):
            break
        carried = float(asked)
        report(f"carries {asked:,} packets/s")
    capacity = carried or _STEPS_PACKETS_PER_S[0] / 2
    path = cache_path()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known[machine_key()] = {"packets_per_s": capacity, "tick_lateness_ns": round(float(np.percentile(lateness_ns, 99)))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
    except OSError:
        report(f"{path} cannot be written: the capacity will be measured again")
    return capacity


def try_load(
    packets_per_s: float,
    *,
    leaves: int = 4,
    seconds: float = _STEP_WALL_SECONDS,
    lateness_ns: list[int] | None = None,
) -> float:
    """Run a load over the reference fabric for a moment; return its completion time over the ideal, inf when frames were lost.

    Args:
        packets_per_s: Asked of all hosts together, wall time.
        leaves: Leaves of the reference fabric, four hosts each.
        seconds: How long, wall time.
        lateness_ns: Gets how late each tick was.
    """
    hosts = 4 * leaves
    dilation = hosts * _RATE_BITS_PER_S / _FRAME_BITS / packets_per_s
    size = max(1, round(packets_per_s * seconds / hosts)) * 4096
    settings = [f"time_dilation={dilation:.3f}", f"workload.0.size={size}", f"fabric.leaves={leaves}"]
    plan = compile_plan(load_scenario(_REFERENCE, settings), capacity_packets_per_s=None, wall_tick_ns=wall_tick_ns())
    with Fabric.build(plan, f"capacity-{os.getpid()}") as fabric, engine_carrier(fabric) as (carrier, _):
        samples = carrier.run(0, _Quiet())
    if lateness_ns is not None:
        lateness_ns += samples.machine[0].wall_lateness_ns.tolist()
    if samples.retransmitted_packets or any(one.unaccounted_bytes for one in samples.machine):
        return float("inf")
    return samples.cct_ns[0] / plan.workloads[0].ideal_cct_ns
