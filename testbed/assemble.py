"""Puts the Result of a run together from its plan and its raw figures. Pure."""

from __future__ import annotations

import functools
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.carriers.protocol import ApplicationSamples, WorkloadSamples
from testbed.measure.counters import FabricCounters
from testbed.measure.verdict import worst
from testbed.plan.model import Plan, PlannedWorkload
from testbed.plan.operations import BackEnds
from testbed.plan.report import describe_back_ends
from testbed.plan.victims import find_victims
from testbed.results import (
    ApplicationResult,
    Check,
    CollectiveResult,
    CommandResult,
    FabricCounts,
    FabricResult,
    FaultResult,
    Fidelity,
    FidelityVerdict,
    FigureResult,
    FlowResult,
    LinkDirection,
    LinkResult,
    Result,
)
from testbed.roce.wire import LINK_OVERHEAD_BYTES
from testbed.scenario import (
    FIGURE_METRIC,
    FLOW_METRIC,
    JOB_METRIC,
    Carrier,
    CollectiveWorkload,
    CongestionControl,
    Expectation,
    Figure,
    FigureKind,
    Verdict,
    evaluate,
    parse_expectation,
)

# Which of several rows a check looks at: the one that is furthest from holding.
_WORST: Mapping[str, Callable[..., int]] = {"<=": max, "<": max, ">=": min, ">": min}
# No percentile of fewer.
_PERCENTILE_SAMPLES = 100
_LOSSLESS = parse_expectation("headroom_drops_packets == 0")


def assemble_result(
    plan: Plan,
    samples: Sequence[WorkloadSamples],
    counters: Sequence[FabricCounters],
    fidelities: Sequence[Fidelity],
    *,
    host: Mapping[str, Any],
    warnings: Sequence[str],
    back_ends: BackEnds | None = None,
) -> Result:
    """Return the result of a run.

    Args:
        plan: What was run.
        samples: Raw figures of each row, one per workload item and size, in order; at least one.
        counters: What the fabric did in each row's measured iterations.
        fidelities: The verdict on the machine for each row; the worst is the run's.
        host: Facts about it.
        warnings: Beside the plan's own.
        back_ends: Which of the kernel's means did the work, if that is known.
    """
    results = collective_results(plan, samples, counters, fidelities)
    together = functools.reduce(operator.add, counters)
    fabric = fabric_result(plan, together, samples)
    return Result(
        scenario=plan.scenario.resolved(),
        seed=plan.scenario.seed,
        time_dilation=plan.dilation.value,
        host=host,
        results=results,
        fabric=fabric,
        fidelity=worst(fidelities),
        checks=tuple(judge_check(line, results) for line in expectations(plan)),
        warnings=(*plan.warnings, *warnings),
        back_ends={} if back_ends is None else describe_back_ends(plan, back_ends),
    )


def assemble_applications(
    plan: Plan,
    samples: Sequence[ApplicationSamples],
    counters: Sequence[FabricCounters],
    fidelities: Sequence[Fidelity],
    *,
    host: Mapping[str, Any],
    warnings: Sequence[str],
    back_ends: BackEnds,
) -> Result:
    """Return the result of a run of applications; arguments as for `assemble_result`."""
    paused_ns = [sample.wall_paused_ns for sample in samples]
    rows = tuple(
        ApplicationResult(
            application=item.application,
            wall_duration_ns=sample.wall_duration_ns,
            figures=tuple(figure_result(figure, sample, plan.dilation.value) for figure in item.figures),
            commands=tuple(
                CommandResult(
                    iteration, one.host, one.command, one.exit_code, one.wall_duration_ns, one.output.as_posix()
                )
                for iteration, commands in enumerate(sample.commands)
                for one in commands
            ),
            fabric=fabric_counts(counted_fabric(plan, counted, sample.wall_paused_ns)),
            fidelity=fidelity,
        )
        for item, sample, counted, fidelity in zip(plan.applications, samples, counters, fidelities, strict=True)
    )
    return Result(
        scenario=plan.scenario.resolved(),
        seed=plan.scenario.seed,
        time_dilation=plan.dilation.value,
        host=host,
        fabric=counted_fabric(plan, functools.reduce(operator.add, counters), np.sum(paused_ns, axis=0)),
        fidelity=worst(fidelities),
        checks=tuple(judge_application_check(line, rows) for line in expectations(plan)),
        warnings=(*plan.warnings, *warnings),
        back_ends=describe_back_ends(plan, back_ends),
        applications=rows,
    )


def figure_result(figure: Figure, sample: ApplicationSamples, dilation: float) -> FigureResult:
    """Return a figure as it was printed, and as it is on the emulated fabric."""
    printed = sample.figures[figure.name]
    known = [value for value in printed if value is not None]
    factor = {FigureKind.NUMBER: 1.0, FigureKind.RATE: dilation, FigureKind.TIME: 1.0 / dilation}[figure.kind]
    value = statistics.median(known) * factor if known and len(known) == len(printed) else math.nan
    return FigureResult(
        name=figure.name,
        kind=str(figure.kind),
        unit=figure.unit,
        printed=printed,
        value=value if math.isfinite(value) else None,
    )


def expectations(plan: Plan) -> tuple[Expectation, ...]:
    """Return what must hold: the scenario's lines, and that a lossless priority loses nothing."""
    stated = plan.scenario.expect
    if not plan.pausing or any(one.metric == _LOSSLESS.metric for one in stated):
        return stated
    return (*stated, _LOSSLESS)


def collective_results(
    plan: Plan,
    samples: Sequence[WorkloadSamples],
    counters: Sequence[FabricCounters],
    fidelities: Sequence[Fidelity],
) -> tuple[CollectiveResult, ...]:
    """Return the row of each workload item and size; of jobs one for each of them, whenever it ran."""
    rows = [
        replace(job_result(plan, planned, job, sample, counted, fidelity), faults=fault_results(plan, index, sample))
        for index, (planned, sample, counted, fidelity) in enumerate(
            zip(plan.workloads, samples, counters, fidelities, strict=True)
        )
        for job in range(len(planned.jobs))
    ]
    if rows:
        return compare_jobs(rows)
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
            predicted_cct_ratio=planned.predicted_cct_ratio
            if sample.predicted_cct_ratio is None
            else sample.predicted_cct_ratio,
            count=planned.count,
            fabric=fabric_counts(fabric_result(plan, counted, [sample])),
            fidelity=fidelity,
            flows=flow_results(planned, sample),
            nvlink_bytes=max(sample.nvlink_bytes, default=None),
            wrong_elements=sample.wrong_elements,
            faults=fault_results(plan, index, sample),
            warmup_cct_ns=sample.warmup_cct_ns,
            retransmitted_bytes=sample.retransmitted_packets * plan.scenario.transport.mtu_bytes,
        )
        for index, (planned, sample, counted, fidelity) in enumerate(
            zip(plan.workloads, samples, counters, fidelities, strict=True)
        )
    )


def job_result(
    plan: Plan,
    planned: PlannedWorkload,
    number: int,
    sample: WorkloadSamples,
    counted: FabricCounters,
    fidelity: Fidelity,
) -> CollectiveResult:
    """Return the row of one of the jobs that ran at the same time; counters and verdict are those of all."""
    job = planned.jobs[number]
    flows = (
        () if isinstance(job.workload, CollectiveWorkload) else [int(job.connections[one]) for one in job.flow_order]
    )
    return CollectiveResult.from_samples(
        collective=job.collective_name,
        algorithm=job.algorithm_name,
        size_bytes=job.size_bytes,
        nranks=job.nranks,
        cct_ns=[round(time) for time in sample.job_cct_ns[number]],
        cct_ideal_ns=job.ideal_cct_ns,
        traffic_factor=job.traffic_factor,
        predicted_cct_ratio=job.predicted_cct_ratio,
        count=job.count,
        fabric=fabric_counts(fabric_result(plan, counted, [sample])),
        fidelity=fidelity,
        flows=_flow_results(planned, sample, flows),
        nvlink_bytes=job.nvlink_bytes if sample.nvlink_bytes else None,
        job=job.name,
        hosts=job.hosts,
        beside=tuple(other.name for other in planned.jobs if other is not job),
    )


def compare_jobs(rows: Sequence[CollectiveResult]) -> tuple[CollectiveResult, ...]:
    """Return the rows of jobs with what the others cost each, where it ran without them as well.

    Rows of different items or sizes are not compared: the rounds follow each other, and in each a job runs alone before it runs
    beside others. Where the machine spoilt the time alone there is no slowdown.
    """
    alone: dict[str, float] = {}
    beside_one: dict[tuple[str, str], float] = {}
    result = []
    for row in rows:
        assert row.job is not None
        median_ns = statistics.median(row.cct_ns) if row.cct_ns else None
        if median_ns is None or (row.beside and row.job not in alone):
            result.append(row)
            continue
        if not row.beside:
            result.append(replace(row, slowdown=None, slowdown_by={}))
            alone.pop(row.job, None)
            if _may_be_judged(row):
                alone[row.job] = median_ns
            continue
        slowdown = median_ns / alone[row.job]
        if len(row.beside) == 1:
            beside_one[row.job, row.beside[0]] = slowdown
        known = {other: beside_one[row.job, other] for other in row.beside if (row.job, other) in beside_one}
        result.append(replace(row, slowdown=slowdown, slowdown_by=known))
    return tuple(result)


def fault_results(plan: Plan, workload: int, sample: WorkloadSamples) -> tuple[FaultResult, ...]:
    """Return what came of each fault during a row's measured iterations."""
    if not sample.faults:
        return ()
    found = []
    for number, victims in enumerate(find_victims(plan, workload)):
        seen = [iteration[number] for iteration in sample.faults if iteration[number].happened]
        recoveries = [one.wall_recovery_ns for one in seen if one.wall_recovery_ns is not None]
        found.append(
            FaultResult(
                text=victims.incident.text,
                at_ns=victims.incident.begin_ns,
                until_ns=victims.incident.end_ns,
                happened_iters=len(seen),
                victim_qps=int(victims.victims.sum()),
                moved_qps=victims.moved,
                detours=victims.detours,
                lost_packets=sum(one.lost_packets for one in seen),
                recovery_ns=round(statistics.median(recoveries) / plan.dilation.value)
                if recoveries and len(recoveries) == len(seen)
                else None,
            )
        )
    return tuple(found)


def flow_results(planned: PlannedWorkload, sample: WorkloadSamples) -> tuple[FlowResult, ...]:
    """Return the flows of a pattern, in the order in which the scenario lists them."""
    if isinstance(planned.workload, CollectiveWorkload):
        return ()
    networked = len(planned.connections) // planned.qps_per_connection
    return _flow_results(planned, sample, planned.flow_order or range(networked))


def _flow_results(planned: PlannedWorkload, sample: WorkloadSamples, order: Sequence[int]) -> tuple[FlowResult, ...]:
    """Return flows, given the connections of each."""
    if not len(sample.end_ns):
        return ()
    sent = np.bincount(planned.messages.connection, planned.messages.nbytes, len(planned.messages.connections))
    qps = planned.qps_per_connection
    networked = len(planned.connections) // qps
    return tuple(
        FlowResult(
            src=planned.messages.connections[index][0],
            dst=planned.messages.connections[index][1],
            size_bytes=int(sent[index]),
            cct_ns=round(float(sample.end_ns[qps * index : qps * (index + 1)].max())),
            together_bytes_per_s=float(sample.together_bytes_per_s[qps * index : qps * (index + 1)].sum()),
        )
        for index in order
        if index < networked  # what stays inside a host has none
    )


def fabric_counts(fabric: FabricResult) -> FabricCounts:
    """Return what the fabric counted without its links."""
    return FabricCounts(**{one.name: getattr(fabric, one.name) for one in fields(FabricCounts)})


def fabric_result(plan: Plan, counters: FabricCounters, samples: Sequence[WorkloadSamples]) -> FabricResult:
    """Return what the fabric counted; figures of mechanisms that are off stay None."""
    controlled = plan.scenario.transport.congestion_control is not CongestionControl.NONE
    # What the fabric's own responders and requesters count; those of other carriers are the kernel's.
    ours = plan.scenario.transport.carrier is Carrier.ENGINE
    paused_ns = sum((sample.wall_paused_ns for sample in samples), np.zeros(len(plan.topology.ports) + 1))
    return replace(
        counted_fabric(plan, counters, paused_ns),
        out_of_order_packets=counters.out_of_order_packets if ours else None,
        retransmitted_packets=sum(sample.retransmitted_packets for sample in samples),
        nak_packets=counters.nak_packets if ours else None,
        duplicate_packets=counters.duplicate_packets if ours else None,
        timeouts=_sum_of_all([sample.timeouts for sample in samples]),
        cnp_packets=counters.cnp_packets if controlled else None,
        **admission_figures(samples),
    )


def counted_fabric(plan: Plan, counters: FabricCounters, wall_paused_ns: npt.NDArray[np.float64]) -> FabricResult:
    """Return what switches and links counted, whatever sent it."""
    return FabricResult(
        drops_packets=int(counters.drops_packets.sum()),
        headroom_drops_packets=int(counters.headroom_drops_packets.sum()) if plan.pausing else None,
        lost_packets=int(counters.lost_packets.sum()),
        ecn_marked_packets=int(counters.marked_packets.sum()) if plan.marking else None,
        pause_frames=int(counters.pause_frames.sum()) if plan.pausing else None,
        paused_fraction_max=float(wall_paused_ns.max()) / counters.wall_duration_ns
        if plan.pausing and counters.wall_duration_ns
        else None,
        leaf_down_peak_bytes=max((int(counters.peak_bytes[port.peer]) for port in plan.topology.nics), default=None),
        links=tuple(
            LinkResult(
                link.name, tuple(link_direction(plan, counters, port, wall_paused_ns) for port in (link.a, link.b))
            )
            for link in plan.topology.links
        ),
    )


def _sum_of_all(numbers: Sequence[int | None]) -> int | None:
    """Return the sum; None if any is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def admission_figures(samples: Sequence[WorkloadSamples]) -> dict[str, Any]:
    """Return the figures of receiver-driven admission by key; nothing without it."""
    noted = [one for sample in samples for one in sample.admission]
    if not noted:
        return {}
    delays_ns = np.concatenate([one.cts_delay_ns for one in noted])
    enough = len(delays_ns) >= _PERCENTILE_SAMPLES
    p50, p99 = np.percentile(delays_ns, [50, 99]) if enough else (0.0, 0.0)
    return {
        "cts_frames": sum(one.cts_frames for one in noted),
        "cts_repeated_frames": sum(one.repeated_frames for one in noted),
        "cts_delay_p50_ns": round(float(p50)) if enough else None,
        "cts_delay_p99_ns": round(float(p99)) if enough else None,
    }


def link_direction(
    plan: Plan, counters: FabricCounters, port_id: int, wall_paused_ns: npt.NDArray[np.float64]
) -> LinkDirection:
    """Return what one port sent."""
    port = plan.topology.port(port_id)
    pausable = plan.is_pausable(port.id)
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
        marked_packets=int(counters.marked_packets[port.id]) if port.id in plan.marking else None,
        lost_packets=int(counters.lost_packets[port.id]),
        pause_frames=int(counters.pause_frames[port.id]) if pausable else None,
        paused_fraction=float(wall_paused_ns[port.id]) / counters.wall_duration_ns
        if pausable and counters.wall_duration_ns
        else None,
    )


def judge_check(expectation: Expectation, results: Sequence[CollectiveResult]) -> Check:
    """Return what came of one line of ``expect:``, which must hold in every row; of jobs where all of them run.

    It fails if one row whose figures may be judged fails. Otherwise it is not judged if a row's verdict is ``invalid`` or a
    row lacks the metric. ``cct_ns`` is the median of a row's iterations.

    Args:
        expectation: The line.
        results: The rows, one per workload item and size.
    """
    job = JOB_METRIC.fullmatch(expectation.metric)
    metric = job[2] if job else expectation.metric
    jobs = {row.job for row in results}
    figures = {
        index: _figure(metric, row)
        for index, row in enumerate(results)
        if len(row.beside) == len(jobs) - 1 and (not job or row.job == job[1])
    }
    return _judge(expectation, figures, [_may_be_judged(row) for row in results])


def _judge(expectation: Expectation, figures: Mapping[int, float | None], may_be_judged: Sequence[bool]) -> Check:
    """Return the check of some rows' figures, by the rows' indices."""
    judged = {index: figure for index, figure in figures.items() if may_be_judged[index]}
    row = _furthest(expectation, judged)
    verdict = evaluate(expectation, None if row is None else judged[row], trusted=True)
    if verdict is not Verdict.FAIL:
        if len(judged) < len(figures) or None in figures.values():
            verdict = Verdict.NOT_JUDGED
        row = _furthest(expectation, figures)
    return Check(
        expect=expectation.text,
        metric=expectation.metric,
        expected=expectation.value,
        observed=None if row is None else figures[row],
        verdict=str(verdict),
        row=row,
    )


def judge_application_check(expectation: Expectation, rows: Sequence[ApplicationResult]) -> Check:
    """Return what came of one line of ``expect:`` about applications, as `judge_check` does of collectives.

    A figure's line is of the rows that have the figure, any other of all. The programs have ended well: a figure that they did
    not write is a failure.
    """
    named = FIGURE_METRIC.fullmatch(expectation.metric)
    figures: dict[int, float | None] = {}
    for index, row in enumerate(rows):
        if named is None:
            figures[index] = getattr(row.fabric, expectation.metric)
        else:
            figures.update((index, figure.value) for figure in row.figures if figure.name == named[1])
    may_be_judged = [_may_be_judged(row) for row in rows]
    check = _judge(expectation, figures, may_be_judged)
    missing = [index for index, figure in figures.items() if figure is None and may_be_judged[index]]
    if named is None or not missing or check.verdict == Verdict.FAIL:
        return check
    return replace(check, verdict=str(Verdict.FAIL), observed=None, row=missing[0])


def _may_be_judged(row: CollectiveResult | ApplicationResult) -> bool:
    return row.fidelity is not None and row.fidelity.verdict is not FidelityVerdict.INVALID


def _figure(metric: str, row: CollectiveResult) -> float | None:
    """Return the figure of a row, None where nothing measured it."""
    if metric == "cct_ns":
        return statistics.median(row.cct_ns) if row.cct_ns else None
    flow = FLOW_METRIC.fullmatch(metric)
    if flow is not None:
        number = int(flow[1])
        return row.flows[number].together_bytes_per_s if number < len(row.flows) else None
    figure: float | None = getattr(row.fabric if hasattr(row.fabric, metric) else row, metric)
    return figure


def _furthest(expectation: Expectation, figures: Mapping[int, float | None]) -> int | None:
    """Return which row is furthest from holding, None where no row has a figure."""
    known = {index: figure for index, figure in figures.items() if figure is not None}
    if not known:
        return None
    if expectation.operator in _WORST:
        return _WORST[expectation.operator](known, key=known.__getitem__)
    for index, figure in known.items():  # == and !=: the first that does not hold, else any
        if evaluate(expectation, figure, trusted=True) is Verdict.FAIL:
            return index
    return next(iter(known))
