"""Puts the Result of a run together from its plan and its raw figures. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from testbed.carriers.protocol import WorkloadSamples
from testbed.measure.counters import FabricCounters
from testbed.plan.model import Plan
from testbed.results import (
    Check,
    CollectiveResult,
    FabricResult,
    Fidelity,
    FidelityVerdict,
    LinkDirection,
    LinkResult,
    Result,
)
from testbed.roce.wire import LINK_OVERHEAD_BYTES
from testbed.scenario import Expectation, Verdict, evaluate

# Which of several workload items a check looks at: the one that is furthest from holding.
_WORST: Mapping[str, Callable[[Sequence[float]], float]] = {"<=": max, "<": max, ">=": min, ">": min}


def assemble_result(
    plan: Plan,
    samples: Sequence[WorkloadSamples],
    counters: FabricCounters,
    fidelity: Fidelity,
    *,
    host: Mapping[str, Any],
    warnings: Sequence[str],
) -> Result:
    """Return the result of a run.

    Args:
        plan: What was run.
        samples: Raw figures of each workload item, in order.
        counters: What the fabric did in the measured iterations, all items together.
        fidelity: The verdict on the machine.
        host: Facts about it.
        warnings: Beside the plan's own.
    """
    results = collective_results(plan, samples)
    fabric = fabric_result(plan, counters, sum(sample.retransmitted_packets for sample in samples))
    trusted = fidelity.verdict is not FidelityVerdict.INVALID
    return Result(
        scenario=plan.scenario.resolved(),
        seed=plan.scenario.seed,
        time_dilation=plan.dilation.value,
        host=host,
        results=results,
        fabric=fabric,
        fidelity=fidelity,
        checks=tuple(judge_check(line, results, fabric, trusted=trusted) for line in plan.scenario.expect),
        warnings=(*plan.warnings, *warnings),
    )


def collective_results(plan: Plan, samples: Sequence[WorkloadSamples]) -> tuple[CollectiveResult, ...]:
    """Return the row of each workload item."""
    return tuple(
        CollectiveResult.from_samples(
            collective=planned.collective_name,
            algorithm=planned.algorithm_name,
            size_bytes=planned.size_bytes,
            nranks=planned.nranks,
            cct_ns=[round(time) for time in sample.cct_ns],
            wall_cct_ns=sample.wall_cct_ns,
            cct_ideal_ns=planned.ideal_cct_ns,
            traffic_factor=planned.traffic_factor,
            predicted_cct_ratio=planned.predicted_cct_ratio,
            nvlink_bytes=max(sample.nvlink_bytes, default=None),
        )
        for planned, sample in zip(plan.workloads, samples, strict=True)
    )


def fabric_result(plan: Plan, counters: FabricCounters, retransmitted_packets: int) -> FabricResult:
    """Return what the fabric counted; figures of mechanisms that are not built stay None."""
    return FabricResult(
        drops_packets=int(counters.drops_packets.sum()),
        out_of_order_packets=counters.out_of_order_packets,
        retransmitted_packets=retransmitted_packets,
        nak_packets=counters.nak_packets,
        links=tuple(
            LinkResult(link.name, tuple(link_direction(plan, counters, port) for port in (link.a, link.b)))
            for link in plan.topology.links
        ),
    )


def link_direction(plan: Plan, counters: FabricCounters, port_id: int) -> LinkDirection:
    """Return what one port sent."""
    port = plan.topology.port(port_id)
    return LinkDirection(
        src=plan.topology.port_name(port.id),
        dst=plan.topology.port_name(port.peer),
        bytes=int(counters.sent_bytes[port.id]),
        packets=int(counters.sent_packets[port.id]),
        utilisation_fraction=counters.utilisation_fraction(
            port.id,
            wall_rate_bytes_per_s=plan.wall_rate_bytes_per_s(port.rate_bits_per_s),
            overhead_bytes=LINK_OVERHEAD_BYTES,
        ),
        peak_depth_bytes=int(counters.peak_bytes[port.id]),
        drops_packets=int(counters.drops_packets[port.id]),
    )


def judge_check(
    expectation: Expectation, results: Sequence[CollectiveResult], fabric: FabricResult, *, trusted: bool
) -> Check:
    """Return what came of one line of ``expect:``.

    A metric that every workload item has is judged by the item furthest from holding; ``cct_ns`` is the median of an
    item's iterations. It is not judged where an item lacks it.

    Args:
        expectation: The line.
        results: One row per workload item.
        fabric: What the fabric counted.
        trusted: Whether the figures may be judged at all.
    """
    observed = _observe(expectation, results, fabric)
    return Check(
        expect=expectation.text,
        metric=expectation.metric,
        expected=expectation.value,
        observed=observed,
        verdict=str(evaluate(expectation, observed, trusted)),
    )


def _observe(expectation: Expectation, results: Sequence[CollectiveResult], fabric: FabricResult) -> float | None:
    metric = expectation.metric
    if hasattr(fabric, metric):
        counted: float | None = getattr(fabric, metric)
        return counted
    figures: list[float] = []
    for row in results:
        figure = (statistics.median(row.cct_ns) if row.cct_ns else None) if metric == "cct_ns" else getattr(row, metric)
        if figure is None:
            return None
        figures.append(figure)
    if not figures:
        return None
    if expectation.operator in _WORST:
        return _WORST[expectation.operator](figures)
    for figure in figures:  # == and !=: the first that does not hold, else any
        if evaluate(expectation, figure, trusted=True) is Verdict.FAIL:
            return figure
    return figures[0]
