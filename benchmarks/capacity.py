"""Packets per second and CPU per packet: the engine, and the kernel path without it, in one run.

``python -m benchmarks.capacity`` prints a table; ``--write`` keeps it. All rows go over host, leaf, spine, leaf, host, 16 hosts
in a 4x4x4 fabric, in frames of 4154 bytes. CPU per packet is what a long run takes more than a short one, of all CPUs together,
by the packets it sends more. The engine's rows include its acknowledgements; the bare sender (``bare_sender.c``) asks for none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.bare_path import Shaping, bare_sender, compiled_sender
from benchmarks.machine import Soakers, Taken, watched
from benchmarks.record import Column, Row, Table, run_benchmark
from benchmarks.reference import Quiet, load_plan
from testbed.carriers.engine import engine_carrier
from testbed.errors import RunError
from testbed.fabric import Fabric

TABLE: Table = Table(
    "capacity",
    (
        Column("sender", "sender"),
        Column("data_plane", "data plane"),
        Column("asked_packets_per_s", "asked", "packets/s", ",.0f"),
        Column("packets_per_s", "carried", "packets/s", ",.0f"),
        Column("lost_packets", "lost", "packets", ",.0f"),
        Column("cct_ratio", "CCT", "ratio", ".4f"),
        Column("cpu_us_per_packet", "CPU per packet", "µs", ".2f"),
        Column("sender_cpu_us_per_packet", "of it sender's CPU", "µs", ".2f"),
    ),
)
_LOADS = (60_000, 90_000, 120_000)
_COMPARED_LOAD = 90_000
_LONG_S, _SHORT_S = 3.0, 0.4
_ENGINE = "engine"
_BARE = "C, same pace"
_FLAT_OUT = "C, flat out"


def _cost(short: Taken, long: Taken, packets: float) -> dict[str, Any]:
    """Return the figures that both kinds of rows have, from a short and a long run that differ by ``packets``."""
    if not short.cpu_s or not long.cpu_s:
        return {"cpu_us_per_packet": None, "sender_cpu_us_per_packet": None, **long.row()}
    # Stolen and foreign time counts as used; the rows say how much there was.
    per_cpu = [1e6 * (b - a) / packets for a, b in zip(short.cpu_s, long.cpu_s, strict=True)]
    return {
        "cpu_us_per_packet": sum(per_cpu),
        "sender_cpu_us_per_packet": per_cpu[-1],  # the engine takes the last CPU
        **long.row(),
    }


def measure_engine(packets_per_s: float, seconds: tuple[float, float], soakers: Soakers) -> Row:
    """Run a load with the engine."""
    counts = [one * packets_per_s for one in seconds]
    plan = load_plan(packets_per_s, counts)
    taken, samples = [], []
    asked = {"sender": _ENGINE, "data_plane": str(Shaping.WHOLE), "asked_packets_per_s": packets_per_s}
    with Fabric.build(plan, f"bench-{os.getpid()}") as fabric, engine_carrier(fabric) as (carrier, _):
        for item in range(2):
            try:
                with watched(soakers) as one:
                    samples.append(carrier.run(item, Quiet()))
            except RunError as error:
                return {**asked, "error": str(error)}
            taken.append(one)
    lost = samples[1].retransmitted_packets
    ratio = samples[1].cct_ns[0] / plan.workloads[1].ideal_cct_ns
    return {
        **asked,
        "packets_per_s": counts[1] / (samples[1].wall_cct_ns[0] / 1e9),
        "lost_packets": lost,
        "cct_ratio": ratio,
        **_cost(taken[0], taken[1], counts[1] - counts[0] + lost - samples[0].retransmitted_packets),
    }


def measure_bare(
    packets_per_s: float, shaping: Shaping, seconds: tuple[float, float], program: Path, soakers: Soakers
) -> Row:
    """Run a load with the bare sender; rate 0 is as fast as it goes."""
    plan = load_plan(packets_per_s or _COMPARED_LOAD, [1.0])
    taken, sent = [], []
    with bare_sender(plan, f"bench-{os.getpid()}", program, shaping) as sender:
        for one_s in seconds:
            with watched(soakers) as one:
                sent.append(sender.send(one_s, packets_per_s))
            taken.append(one)
    return {
        "sender": _BARE if packets_per_s else _FLAT_OUT,
        "data_plane": str(shaping),
        "asked_packets_per_s": packets_per_s or None,
        "packets_per_s": sent[1].arrived_packets / sent[1].seconds,
        "lost_packets": sent[1].packets - sent[1].arrived_packets,
        "cct_ratio": None,
        **_cost(taken[0], taken[1], sent[1].packets - sent[0].packets),
    }


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    seconds = (0.1, 0.3) if quick else (_SHORT_S, _LONG_S)
    with Soakers() as soakers, compiled_sender() as program:
        rows = [measure_engine(load, seconds, soakers) for load in ((8_000,) if quick else _LOADS)]
        for shaping in Shaping:
            rows.append(measure_bare(8_000 if quick else _COMPARED_LOAD, shaping, seconds, program, soakers))
        for shaping in (Shaping.UNSHAPED, Shaping.KERNEL):
            rows.append(measure_bare(0, shaping, seconds, program, soakers))
    return rows


if __name__ == "__main__":
    run_benchmark(TABLE, measure, __doc__ or "")
