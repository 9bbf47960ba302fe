"""What a tick of the engine costs, by the number of active QPs, and where the time goes.

``python -m benchmarks.tick`` prints a table; ``--write`` keeps it. Sixteen hosts under four leaves send on a growing number of
QPs, all of which have something to send nearly to the end; the load stays the same, so that what grows is the QPs. The frames go
out over the real fabric. Times are the engine's own, of ticks on its own CPU at real-time priority; the parts are the means of
timers around the engine's functions, and cost about a microsecond each themselves. ``--profile QPS`` prints cProfile's view
instead.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import os
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.machine import watched
from benchmarks.record import Column, Row, Table, run_benchmark
from benchmarks.reference import FRAME_BITS, PAYLOAD_BYTES, RATE_BITS_PER_S, Quiet, clos_text
from testbed.carriers.engine import engine_carrier
from testbed.engine import loop
from testbed.engine.delay_line import DelayLine
from testbed.engine.frames import FrameWriter
from testbed.engine.nic import NicPacer
from testbed.engine.observer import ShapingObserver
from testbed.engine.progress import Progress
from testbed.fabric import Fabric
from testbed.kernel import packet_socket
from testbed.kernel.probe_link import ProbeLink
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.scenario import load_scenario

_PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "arrivals": ((DelayLine, "advance"), (DelayLine, "note_sent"), (Progress, "record_arrivals")),
    "pacing": ((NicPacer, "budget"), (NicPacer, "charge"), (NicPacer, "lag_ns"), (loop, "share_budget")),
    "frames": ((FrameWriter, "prepare"), (FrameWriter, "slots_of"), (packet_socket.FrameRing, "line_up")),
    "sendmmsg": ((packet_socket, "_send_messages"),),
    "watching": ((ShapingObserver, "observe"), (ProbeLink, "send")),
}
TABLE: Table = Table(
    "tick",
    (
        Column("active_qps", "active QPs", "", ",.0f"),
        Column("ticks", "ticks", "", ",.0f"),
        Column("frames_per_tick", "frames per tick", "", ".1f"),
        Column("tick_p50_ns", "tick p50", "ms", ".3f", 1e-6),
        Column("tick_p99_ns", "tick p99", "ms", ".3f", 1e-6),
        Column("tick_mean_ns", "mean", "ms", ".3f", 1e-6),
        *(Column(f"{part}_mean_ns", part, "ms", ".3f", 1e-6) for part in _PARTS),
        Column("rest_mean_ns", "rest", "ms", ".3f", 1e-6),
    ),
)
_QPS = (16, 64, 256, 1024, 4096)
_HOSTS = 16
_PACKETS_PER_S = 32_000
_SECONDS = 2.0
# No p99 below this many samples.
_MIN_P99_TICKS = 100


@contextlib.contextmanager
def _timers() -> Iterator[dict[str, int]]:
    """Time the engine's parts for the block: yields the ns of each so far."""
    spent = dict.fromkeys(_PARTS, 0)

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        clock = time.perf_counter_ns

        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            begin = clock()
            result = function(*arguments)
            spent[part] += clock() - begin
            return result

        return wrapper

    with contextlib.ExitStack() as stack:
        for part, functions in _PARTS.items():
            for owner, name in functions:
                original = getattr(owner, name)
                setattr(owner, name, timed(original, part))
                stack.callback(setattr, owner, name, original)
        yield spent


def load_plan_with_qps(qps: int, packets_per_s: float, seconds: float) -> Plan:
    """Return the plan of a load over ``qps`` QPs: each host sends to others in turn, all QPs the same."""
    size = max(1, round(packets_per_s * seconds / qps)) * PAYLOAD_BYTES
    # The steps go over the hosts of other leaves first, then over all others.
    steps = [*range(4, 13), 1, 2, 3, 13, 14, 15]
    flows = [
        f"{{src: {host}, dst: {(host + steps[turn % len(steps)]) % _HOSTS}, size: {size}}}"
        for turn in range(qps // _HOSTS)
        for host in range(_HOSTS)
    ]
    text = (
        clos_text(4, 4, 4)
        + f"workload:\n- {{pattern: flows, flows: [{', '.join(flows)}], iters: 1, warmup_iters: 0}}\n"
    )
    dilation = _HOSTS * RATE_BITS_PER_S / FRAME_BITS / packets_per_s
    # A QP waits long for its turn: no retransmission shall come of that.
    settings = [f"time_dilation={dilation:.3f}", "transport.retransmit_timeout=50 ms"]
    return compile_plan(load_scenario(text, settings), capacity_packets_per_s=None)


def measure_row(qps: int, packets_per_s: float, seconds: float, profile: bool = False) -> Row:
    """Run a load over ``qps`` QPs; return the figures of its ticks."""
    plan = load_plan_with_qps(qps, packets_per_s, seconds)
    profiler = cProfile.Profile(time.perf_counter)
    with (
        Fabric.build(plan, f"bench-{os.getpid()}") as fabric,
        contextlib.nullcontext(dict.fromkeys(_PARTS, 0)) if profile else _timers() as spent,
        engine_carrier(fabric) as (carrier, _),
        watched() as taken,
        profiler if profile else contextlib.nullcontext(),
    ):
        samples = carrier.run(0, Quiet())
    if profile:
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(25)
    busy_ns = samples.machine[0].wall_busy_ns
    ticks = len(busy_ns)
    means = {f"{part}_mean_ns": ns / ticks for part, ns in spent.items()}
    packets = plan.workloads[0].schedule.nbytes.sum() / PAYLOAD_BYTES + samples.retransmitted_packets
    return {
        "active_qps": qps,
        "ticks": ticks,
        "frames_per_tick": float(packets / ticks),
        "retransmitted_packets": samples.retransmitted_packets,
        "tick_p50_ns": float(np.percentile(busy_ns, 50)),
        "tick_p99_ns": float(np.percentile(busy_ns, 99)) if ticks >= _MIN_P99_TICKS else None,
        "tick_mean_ns": float(busy_ns.mean()),
        **means,
        "rest_mean_ns": float(busy_ns.mean()) - sum(means.values()),
        **taken.row(),
    }


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    if quick:
        return [measure_row(qps, 8_000, 0.1) for qps in (16, 64)]
    return [measure_row(qps, _PACKETS_PER_S, _SECONDS) for qps in _QPS]


def main() -> None:
    """Measure, or profile the QPs named."""
    if "--profile" in sys.argv:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--profile", type=int, metavar="QPS", help="profile this many QPs instead")
        measure_row(parser.parse_args().profile, _PACKETS_PER_S, _SECONDS, profile=True)
    else:
        run_benchmark(TABLE, measure, __doc__ or "")


if __name__ == "__main__":
    main()
