"""Can the figures of a run be trusted? An estimate of the machine's share in the completion time, against two thresholds.

What the machine can do to a completion time, and how it is seen without knowing the right answer:

* *resolution*: the engine reacts at ticks; computed before the run by the ideal model with a tick more latency, and grown by
  the measured lateness of the ticks;
* *lag*: a NIC that has something to send is behind its own schedule: the engine came late or the fabric's CPU did not take
  its frames;
* *stalls*: the fabric's CPU did nothing for a while; probe frames waited;
* *lost time*: a port whose queue was never empty sent less than its rate;
* *excess*: a port sent more than its shaper lets through: frames went past it;
* *gained time*: the shaper of a congested switch port is a little fast (``plan.SHARED_SHAPER_SPEEDUP``), and what its bucket
  had saved left at once.

Each is a time. Ports have saved a few ticks' worth of their rate in their token buckets and catch up by that much at once;
what lag and stalls take beyond it, with lost time and resolution, over the iteration's length estimates the relative error of
its completion time from above. The result reports the median iteration, so the median estimate is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from testbed.measure.samples import MachineSamples
from testbed.results.model import Fidelity, FidelityVerdict

# The bars of the project: figures that miss by more than 1 % must not be trusted, those within 0.5 % should be. The estimate
# is an upper bound, so the threshold lies between.
TRUSTED_ERROR_FRACTION = 0.0075
# Beyond this the ratio of two runs says more about the machine than about the fabric.
INVALID_ERROR_FRACTION = 0.05
# A probe that waits less than a tick is hidden by the tick itself.
_STALL_TICKS = 1.0
# What the buckets of the ports absorb in an iteration: two thirds of plan.SHARED_BURST_TICKS, for a bucket is not always full.
_ABSORBED_TICKS = 2
# Steal is time the hypervisor gave to others. What it does shows as lag and stalls, but this much makes them unreliable: at
# 7 to 10 % runs were estimated at 0.7 % that were 1.1 to 1.3 % off, at less than 3 % none.
_DEGRADED_STEAL_FRACTION = 0.05
# No p99 below this many samples.
_MIN_P99_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class ErrorEstimate:
    """Estimated relative error of one iteration's completion time, by cause."""

    resolution: float
    lag: float
    stalls: float
    lost: float
    gained: float
    excess: float

    @property
    def total(self) -> float:
        """Return what all causes together may come to."""
        # A port that gains hides as much of what others lose.
        return self.resolution + max(self.lag + self.stalls + self.lost, self.gained + self.excess)


def estimate_error(samples: MachineSamples) -> ErrorEstimate:
    """Return the machine's estimated share in one iteration's completion time."""
    duration = max(1, samples.wall_duration_ns)
    tick = samples.wall_tick_ns
    lateness = float(samples.wall_lateness_ns.mean()) if len(samples.wall_lateness_ns) else 0.0
    waits = samples.wall_probe_ns.astype(np.float64) - _STALL_TICKS * tick
    stalls = float(np.maximum(waits, 0.0).sum())
    lag = max(0.0, float(samples.wall_nic_lag_ns.max(initial=0.0)) - tick)
    excess = max(0.0, stalls + lag - _ABSORBED_TICKS * tick) / max(1.0, stalls + lag)
    return ErrorEstimate(
        resolution=samples.resolution_error_fraction * (1.0 + lateness / tick),
        lag=lag * excess / duration,
        stalls=stalls * excess / duration,
        lost=float(samples.wall_lost_ns.max(initial=0.0)) / duration,
        gained=samples.wall_gained_ns / duration,
        excess=samples.wall_excess_ns / duration,
    )


def judge(
    samples: Sequence[MachineSamples],
    *,
    wall_tick_ns: int,
    softnet_drops: int,
    steal_fraction: float,
    wall_gate_allowance_ns: int = 0,
    lossless_drops: int = 0,
) -> Fidelity:
    """Return the verdict on a run.

    Args:
        samples: One per measured iteration, of all workloads.
        wall_tick_ns: Length of a tick.
        softnet_drops: Frames that the kernel dropped on its way from port to port for want of CPU time.
        steal_fraction: Share of the CPU time that a hypervisor gave to others meanwhile.
        wall_gate_allowance_ns: How late a pause may be obeyed: what the headroom was computed with.
        lossless_drops: Frames of a lossless priority for which there was no room.
    """
    if not samples:
        return Fidelity(FidelityVerdict.INVALID, ("nothing was measured",))
    if not any(
        len(one.wall_lateness_ns) for one in samples
    ):  # no tick: a model told the time, whatever the machine did
        softnet_drops, steal_fraction = 0, 0.0
    estimates = [estimate_error(one) for one in samples]
    median = sorted(estimates, key=lambda estimate: estimate.total)[len(estimates) // 2]
    lateness = np.concatenate([one.wall_lateness_ns for one in samples])
    busy = np.concatenate([one.wall_busy_ns for one in samples])
    waits = np.concatenate([one.wall_probe_ns for one in samples])
    unaccounted = sum(one.unaccounted_bytes for one in samples)

    verdict, reasons = FidelityVerdict.TRUSTED, []
    if median.total > TRUSTED_ERROR_FRACTION:
        verdict = FidelityVerdict.DEGRADED if median.total <= INVALID_ERROR_FRACTION else FidelityVerdict.INVALID
        reasons.append(
            f"the machine's share in the completion time may be {median.total:.1%} (at most {TRUSTED_ERROR_FRACTION:.2%} "
            "is trusted): " + _causes(median)
        )
    if softnet_drops or unaccounted:
        verdict = FidelityVerdict.INVALID
        lost = f"{softnet_drops} frames" if softnet_drops else f"{unaccounted} bytes"
        reasons.append(f"the kernel dropped {lost} between two ports for want of CPU time")
    gates = np.concatenate([one.wall_gate_lateness_ns for one in samples])
    late = int(gates.max(initial=0))
    if late > wall_gate_allowance_ns and lossless_drops:
        verdict = FidelityVerdict.INVALID
        reasons.append(
            f"a pause was obeyed {late / 1e6:.1f} ms late, the headroom allows for {wall_gate_allowance_ns / 1e6:.1f} ms: the "
            f"machine may have caused the {lossless_drops} lossless drops"
        )
    elif len(gates) and np.percentile(gates, 99) > wall_gate_allowance_ns and verdict is FidelityVerdict.TRUSTED:
        verdict = FidelityVerdict.DEGRADED
        reasons.append(
            f"pauses were obeyed up to {late / 1e6:.1f} ms late ({wall_gate_allowance_ns / 1e6:.1f} ms is allowed for)"
        )
    if steal_fraction > _DEGRADED_STEAL_FRACTION and verdict is FidelityVerdict.TRUSTED:
        verdict = FidelityVerdict.DEGRADED
        reasons.append(f"the hypervisor took {steal_fraction:.0%} of the CPU time")
    enough = len(lateness) >= _MIN_P99_SAMPLES
    return Fidelity(
        verdict=verdict,
        reasons=tuple(reasons),
        wall_tick_lateness_p50_ns=int(np.median(lateness)) if len(lateness) else None,
        wall_tick_lateness_p99_ns=int(np.percentile(lateness, 99)) if enough else None,
        cpu_fraction=round(float(busy.mean()) / wall_tick_ns, 4) if len(busy) else None,
        shaping_error_fraction=round(max(estimate.lost for estimate in estimates), 6),
        estimated_error_fraction=round(median.total, 6),
        wall_nic_lag_max_ns=int(max(one.wall_nic_lag_ns.max(initial=0.0) for one in samples)),
        wall_fabric_wait_p99_ns=int(np.percentile(waits, 99)) if len(waits) >= _MIN_P99_SAMPLES else None,
        softnet_drops_packets=softnet_drops,
        steal_fraction=round(steal_fraction, 4),
        wall_pause_lateness_max_ns=late if len(gates) else None,
    )


def worst(verdicts: Sequence[Fidelity]) -> Fidelity:
    """Return the worst of several verdicts, the later where two are alike; at least one."""
    order = [FidelityVerdict.TRUSTED, FidelityVerdict.DEGRADED, FidelityVerdict.INVALID]
    return max(verdicts, key=lambda one: (order.index(one.verdict), one.estimated_error_fraction or 0.0))


def _causes(estimate: ErrorEstimate) -> str:
    """Return the causes that matter, largest first."""
    words = {
        "resolution": "a tick is long beside this collective's steps",
        "lag": "a NIC fell behind its schedule",
        "stalls": "the fabric's CPU stalled",
        "lost": "a port sent less than its rate",
        "excess": "a port sent more than its rate: frames went past its shaper",
        "gained": "congested ports are a little fast and their buckets were full",
    }
    shares = sorted(((getattr(estimate, name), text) for name, text in words.items()), reverse=True)
    return ", ".join(f"{text} ({share:.1%})" for share, text in shares if share > TRUSTED_ERROR_FRACTION / 4)
