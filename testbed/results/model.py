"""The result of a run, and its JSON, which other people's scripts read.

Field names are JSON keys: renaming one breaks those scripts and needs a new `SCHEMA_VERSION`. Adding one does
not, so a reader skips keys that it does not know. A figure that nothing measured is None (``null``), never 0.
Times, rates and bandwidths are emulated unless their name begins with ``wall_``.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self, TypeVar

import numpy as np

SCHEMA_VERSION = 1

T = TypeVar("T")


class FidelityVerdict(StrEnum):
    """Whether this machine could be trusted to emulate the run."""

    TRUSTED = "trusted"
    DEGRADED = "degraded"
    INVALID = "invalid"


DATATYPE = "uint8"
"""What an element is: sizes are in bytes, and nothing is summed, so no other type would change a figure."""


@dataclass(frozen=True, slots=True)
class FabricCounts:
    """What the fabric counted over some measured iterations; attributes are named after what they count.

    Attributes:
        leaf_down_peak_bytes: Greatest depth of any leaf's queue towards a host.
        out_of_order_packets: Data packets ahead of their turn; None, as the three below, where the carrier does not tell.
        nak_packets: NAKs that reached their requester.
        duplicate_packets: Data packets that their receivers had already.
        timeouts: Retransmission timers that ran out.
        cts_frames: CTS frames sent; None, as the following, without receiver-driven admission.
        cts_repeated_frames: Those that repeated a grant after a silence.
        cts_delay_p50_ns: From a grant to its receipt by the sender, median; None under 100 samples.
        cts_delay_p99_ns: The same, 99th percentile.
    """

    drops_packets: int | None = None
    headroom_drops_packets: int | None = None
    lost_packets: int | None = None
    out_of_order_packets: int | None = None
    retransmitted_packets: int | None = None
    nak_packets: int | None = None
    duplicate_packets: int | None = None
    timeouts: int | None = None
    ecn_marked_packets: int | None = None
    cnp_packets: int | None = None
    pause_frames: int | None = None
    paused_fraction_max: float | None = None
    leaf_down_peak_bytes: int | None = None
    cts_frames: int | None = None
    cts_repeated_frames: int | None = None
    cts_delay_p50_ns: int | None = None
    cts_delay_p99_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Whether the figures can be trusted, and the evidence.

    Attributes:
        verdict: A `FidelityVerdict`.
        reasons: One sentence for each threshold that was missed; empty when trusted.
        wall_tick_lateness_p50_ns: Median lateness of the engine's ticks, wall time.
        wall_tick_lateness_p99_ns: 99th percentile of the same.
        cpu_fraction: Share of its CPU that the engine used.
        shaping_error_fraction: Largest share of an iteration that a port lost while its queue was never empty.
        estimated_error_fraction: The machine's estimated share in the completion time, from above.
        wall_nic_lag_max_ns: How far a NIC fell behind its own schedule at most, wall time.
        wall_fabric_wait_p99_ns: 99th percentile of how long a frame waits for the fabric's CPU, wall time.
        softnet_drops_packets: Frames the kernel dropped between two ports.
        steal_fraction: Share of the CPU time that a hypervisor gave to others.
        wall_pause_lateness_max_ns: How late a pause was obeyed at most, wall time; None where nothing was paused.
    """

    verdict: FidelityVerdict
    reasons: tuple[str, ...] = ()
    wall_tick_lateness_p50_ns: int | None = None
    wall_tick_lateness_p99_ns: int | None = None
    cpu_fraction: float | None = None
    shaping_error_fraction: float | None = None
    estimated_error_fraction: float | None = None
    wall_nic_lag_max_ns: int | None = None
    wall_fabric_wait_p99_ns: int | None = None
    softnet_drops_packets: int | None = None
    steal_fraction: float | None = None
    wall_pause_lateness_max_ns: int | None = None


def jain_index(shares: Sequence[float]) -> float | None:
    """Return Jain's fairness index, 1 where all shares are equal, 1/n where one has all; None where nobody has any.

    Source:
        Jain, Chiu, Hawe, "A Quantitative Measure of Fairness", DEC TR-301, 1984.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


@dataclass(frozen=True, slots=True)
class FlowResult:
    """One flow of a pattern.

    Attributes:
        src: Rank that sends.
        dst: Rank that receives.
        size_bytes: What it sends.
        cct_ns: When its last byte had arrived, median of the iterations.
        together_bytes_per_s: What it delivered per second until the first of the flows ended: its share while all ran.
    """

    src: int
    dst: int
    size_bytes: int
    cct_ns: int
    together_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class FaultResult:
    """One fault that happened during the measured iterations of a row.

    Attributes:
        text: What happened, such as ``link_down leaf0:spine1``.
        at_ns: When, from the release of each iteration.
        until_ns: When it was over; None: it lasted to the end.
        happened_iters: Measured iterations that lasted until it happened.
        victim_qps: Connections whose data or answers crossed what failed.
        moved_qps: Connections whose data took another way once all switches had reacted.
        detours: Some of these in words.
        lost_packets: Frames lost on the links that it touched, from then to the end, in all iterations.
        recovery_ns: From the fault until the victims together delivered at least half of what they did before, over a window
            of four round trips or 16 ticks, the longer; see `testbed.engine.faults.recovery_ns`. Median of the iterations.
            0: they did not fall below. None: they had nothing to deliver before, or were not seen to recover before the end.
    """

    text: str
    at_ns: int
    until_ns: int | None
    happened_iters: int
    victim_qps: int
    moved_qps: int
    detours: tuple[str, ...]
    lost_packets: int
    recovery_ns: int | None


@dataclass(frozen=True, slots=True)
class CollectiveResult:
    """One collective at one size: a row of the table; see `from_samples`.

    Attributes:
        collective: Such as ``all_reduce``.
        algorithm: Such as ``ring``.
        size_bytes: Size of the buffer on each rank.
        nranks: Number of ranks.
        cct_ns: Completion time of each measured iteration, in the order in which they ran.
        cct_ideal_ns: Completion time over a core that never blocks.
        wall_cct_ns: Wall time of each until a tick of the engine saw the last arrival: what the clock said, up to a tick.
        cct_ratio: Median of `cct_ns` / `cct_ideal_ns`.
        algbw_bytes_per_s: Size / median completion time.
        busbw_bytes_per_s: Algorithm bandwidth times the bytes that each NIC must send per byte of the buffer.
        predicted_cct_ratio: What the load prediction gave for `cct_ratio` before the run.
        count: Elements that each rank passes to the call, as nccl-tests counts them.
        datatype: Type of an element.
        fabric: What the fabric counted in this row's measured iterations.
        fidelity: Whether this row can be trusted; None when nothing ran.
        flows: Each flow of a pattern of flows, in the order of the file; empty for collectives.
        jain_fraction: Jain's index of what the flows delivered per second while all ran; None without flows.
        nvlink_bytes: Payload of an iteration that stayed inside hosts. A model of NVLink carried it, no packets.
        job: Name of the job, where several run at once; `fabric`, `fidelity` and `nvlink_bytes` are then those of all that ran.
        hosts: Numbers of the job's hosts.
        beside: The jobs that ran at the same time; empty where it ran alone.
        slowdown: Median of `cct_ns` over that of the job alone, measured in the same run; None where it did not run alone.
        slowdown_by: What each other job alone costs it, by name: the same ratio of the run of both. Empty where not measured.
        wrong_elements: Elements that were wrong at their receivers; None where the carrier moves no real contents, or they were
            too many to be checked.
        faults: What happened during the measured iterations; empty where nothing broke on the way.
        cct_without_fault_ns: Median completion time of the warm-up iterations, in which nothing breaks but what is broken from
            the beginning; None without faults or warm-up.
        fault_cost_ratio: Median of `cct_ns` / `cct_without_fault_ns`.
        recovery_ns: The longest of the faults' recoveries; None if there was none, or one is not known.
        retransmitted_bytes: Payload that was sent again, each packet counted as a full one; None where nothing ran.
    """

    collective: str
    algorithm: str
    size_bytes: int
    nranks: int
    cct_ns: tuple[int, ...] = ()
    wall_cct_ns: tuple[int, ...] = ()
    cct_ideal_ns: float | None = None
    cct_ratio: float | None = None
    algbw_bytes_per_s: float | None = None
    busbw_bytes_per_s: float | None = None
    predicted_cct_ratio: float | None = None
    count: int | None = None
    datatype: str = DATATYPE
    fabric: FabricCounts = field(default_factory=FabricCounts)
    fidelity: Fidelity | None = None
    flows: tuple[FlowResult, ...] = ()
    jain_fraction: float | None = None
    nvlink_bytes: int | None = None
    job: str | None = None
    hosts: tuple[int, ...] = ()
    beside: tuple[str, ...] = ()
    slowdown: float | None = None
    slowdown_by: Mapping[str, float] = field(default_factory=dict)
    wrong_elements: int | None = None
    faults: tuple[FaultResult, ...] = ()
    cct_without_fault_ns: float | None = None
    fault_cost_ratio: float | None = None
    recovery_ns: int | None = None
    retransmitted_bytes: int | None = None

    @classmethod
    def from_samples(
        cls,
        *,
        collective: str,
        algorithm: str,
        size_bytes: int,
        nranks: int,
        cct_ns: Sequence[int],
        wall_cct_ns: Sequence[int] = (),
        cct_ideal_ns: float | None,
        traffic_factor: float,
        predicted_cct_ratio: float | None = None,
        count: int | None = None,
        fabric: FabricCounts | None = None,
        fidelity: Fidelity | None = None,
        flows: tuple[FlowResult, ...] = (),
        nvlink_bytes: int | None = None,
        job: str | None = None,
        hosts: tuple[int, ...] = (),
        beside: tuple[str, ...] = (),
        wrong_elements: int | None = None,
        faults: tuple[FaultResult, ...] = (),
        warmup_cct_ns: Sequence[float] = (),
        retransmitted_bytes: int | None = None,
    ) -> Self:
        """Return the result with every figure that follows from the samples; None where there are none.

        Args:
            collective: Name of the collective.
            algorithm: Name of the algorithm.
            size_bytes: Size of the buffer on each rank.
            nranks: Number of ranks.
            cct_ns: Completion time of each measured iteration.
            wall_cct_ns: The same by this machine's clock.
            cct_ideal_ns: Completion time over a core that never blocks, if known.
            traffic_factor: busbw / algbw of the algorithm.
            predicted_cct_ratio: As in the attribute; so are those below.
            count: See there.
            fabric: See there.
            fidelity: See there.
            flows: See there.
            nvlink_bytes: See there.
            job: See there.
            hosts: See there.
            beside: See there.
            wrong_elements: See there.
            faults: See there.
            warmup_cct_ns: Completion time of each warm-up iteration.
            retransmitted_bytes: See there.

        Source:
            nccl-tests, doc/PERFORMANCE.md (algbw and busbw).
        """
        median_ns = statistics.median(cct_ns) if cct_ns else None
        algbw = size_bytes * 1e9 / median_ns if median_ns else None
        without_ns = statistics.median(warmup_cct_ns) if faults and warmup_cct_ns else None
        recoveries = [fault.recovery_ns for fault in faults if fault.happened_iters]
        return cls(
            collective=collective,
            algorithm=algorithm,
            size_bytes=size_bytes,
            nranks=nranks,
            cct_ns=tuple(cct_ns),
            wall_cct_ns=tuple(wall_cct_ns),
            cct_ideal_ns=cct_ideal_ns,
            cct_ratio=median_ns / cct_ideal_ns if median_ns and cct_ideal_ns else None,
            algbw_bytes_per_s=algbw,
            busbw_bytes_per_s=None if algbw is None else algbw * traffic_factor,
            predicted_cct_ratio=predicted_cct_ratio,
            count=count,
            fabric=fabric or FabricCounts(),
            fidelity=fidelity,
            flows=flows,
            jain_fraction=jain_index([flow.together_bytes_per_s for flow in flows]),
            nvlink_bytes=nvlink_bytes,
            job=job,
            hosts=hosts,
            beside=beside,
            wrong_elements=wrong_elements,
            faults=faults,
            cct_without_fault_ns=without_ns,
            fault_cost_ratio=median_ns / without_ns if median_ns and without_ns else None,
            recovery_ns=None
            if None in recoveries
            else max((one for one in recoveries if one is not None), default=None),
            retransmitted_bytes=retransmitted_bytes,
        )


@dataclass(frozen=True, slots=True)
class FigureResult:
    """A number that an application writes.

    Attributes:
        name: By which `expect` calls it.
        kind: ``number``, ``rate`` or ``time``: what it is to time dilation.
        unit: Its unit, for people.
        printed: What each measured iteration wrote, on this machine's clock; None where nothing matched.
        value: Their median, of a rate times the time dilation, of a time over it: what it is on the emulated fabric. None where
            an iteration lacks it.
    """

    name: str
    kind: str
    unit: str
    printed: tuple[float | None, ...]
    value: float | None


@dataclass(frozen=True, slots=True)
class CommandResult:
    """One command of an application in one measured iteration.

    Attributes:
        iteration: Which, from 0.
        host: Number of its host.
        command: Its command line, placeholders filled in.
        exit_code: Its exit code; None of a service, which is ended with the iteration.
        wall_duration_ns: How long it ran on this machine's clock, to a tick.
        output: File below the results' ``applications`` with its standard output; ``.err`` beside it has its standard error.
    """

    iteration: int
    host: int
    command: str
    exit_code: int | None
    wall_duration_ns: int
    output: str


@dataclass(frozen=True, slots=True)
class ApplicationResult:
    """One application that ran as it is.

    Attributes:
        application: Its name.
        wall_duration_ns: Of each measured iteration on this machine's clock, first command's begin to last one's end.
        figures: Numbers that it wrote.
        commands: What ran.
        fabric: What the fabric counted in its measured iterations.
        fidelity: Whether its figures can be trusted.
    """

    application: str
    wall_duration_ns: tuple[int, ...]
    figures: tuple[FigureResult, ...] = ()
    commands: tuple[CommandResult, ...] = ()
    fabric: FabricCounts = field(default_factory=FabricCounts)
    fidelity: Fidelity | None = None


@dataclass(frozen=True, slots=True)
class LinkDirection:
    """What one port sent over its link.

    Attributes:
        src: The port that sends, such as ``leaf0/up1``.
        dst: The port at the other end.
        bytes: Frame bytes without FCS that left the port's queues.
        packets: Frames that did.
        utilisation_fraction: Wire bytes / what the link could have carried while collectives were measured.
        peak_depth_bytes: Greatest depth of the port's queue.
        drops_packets: Frames dropped before the queue.
        marked_packets: Frames on which this port set CE; None where it does not mark.
        lost_packets: Frames lost on the link.
        pause_frames: PFC frames, XOFF and XON, that this port received; None where nothing can pause it.
        paused_fraction: Share of the measured time that it was paused; None where nothing can pause it.
    """

    src: str
    dst: str
    bytes: int | None = None
    packets: int | None = None
    utilisation_fraction: float | None = None
    peak_depth_bytes: int | None = None
    drops_packets: int | None = None
    marked_packets: int | None = None
    lost_packets: int | None = None
    pause_frames: int | None = None
    paused_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class LinkResult:
    """One link and what crossed it.

    Attributes:
        name: Its two nodes, such as ``leaf0:spine1``.
        directions: The two directions.
    """

    name: str
    directions: tuple[LinkDirection, ...] = ()


@dataclass(frozen=True, slots=True)
class FabricResult(FabricCounts):
    """What the fabric counted during all measured iterations, and what crossed each link.

    Attributes:
        links: All links.
    """

    links: tuple[LinkResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One line of ``expect:`` and what came of it.

    Attributes:
        expect: The line as written.
        metric: The result's key that it names.
        expected: The number to compare with, in the metric's unit.
        observed: The measured figure of the row furthest from holding, None when nothing measured it.
        verdict: ``pass``, ``fail`` or ``not_judged``.
        tolerance: How far `observed` may be off, where the check has one.
        row: Index of the row in `Result.results`, or `Result.applications`, that `observed` is from; None when there is none.
    """

    expect: str
    metric: str
    expected: float
    observed: float | None
    verdict: str
    tolerance: float | None = None
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """All that a run found out.

    Attributes:
        scenario: The resolved scenario, defaults filled in.
        seed: Seed of everything that is drawn by chance.
        time_dilation: Wall time / emulated time.
        host: Facts about the machine: kernel, CPUs, versions.
        results: One per collective and size.
        fabric: What the fabric counted, all rows together.
        fidelity: Whether to trust it, that of the worst row; None when nothing ran.
        checks: One per line of ``expect:``.
        warnings: What to look at before trusting a figure, and what is not modelled.
        back_ends: What of the kernel did the work: ``scheduler``, ``gate``, ``marker``, ``link_delay``, ``rxe``; or None.
        applications: One per application; then there are no `results`.
        schema_version: Version of this structure.
    """

    scenario: Mapping[str, Any]
    seed: int
    time_dilation: float
    host: Mapping[str, Any]
    results: tuple[CollectiveResult, ...] = ()
    fabric: FabricResult = field(default_factory=FabricResult)
    fidelity: Fidelity | None = None
    checks: tuple[Check, ...] = ()
    warnings: tuple[str, ...] = ()
    back_ends: Mapping[str, str | None] = field(default_factory=dict)
    applications: tuple[ApplicationResult, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_json_dict(self) -> dict[str, Any]:
        """Return the result as dicts, lists, strings, numbers, booleans and None, ``schema_version`` first."""
        fields = _plain(self)
        return {"schema_version": fields.pop("schema_version"), **fields}

    @classmethod
    def from_json_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the result that `to_json_dict` gave.

        Raises:
            ValueError: If it has another schema version, or a key is missing.
        """
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"this is a result of schema version {version}, expected {SCHEMA_VERSION}")
        try:
            fabric = fields["fabric"]
            links = [
                _load(LinkResult, link, directions=tuple(_load(LinkDirection, way) for way in link["directions"]))
                for link in fabric["links"]
            ]
            return _load(
                cls,
                fields,
                results=tuple(
                    _load(
                        CollectiveResult,
                        row,
                        cct_ns=tuple(row["cct_ns"]),
                        wall_cct_ns=tuple(row.get("wall_cct_ns", ())),
                        fabric=_load(FabricCounts, row.get("fabric", {})),
                        fidelity=_load_fidelity(row.get("fidelity")),
                        flows=tuple(_load(FlowResult, flow) for flow in row.get("flows", ())),
                        hosts=tuple(row.get("hosts", ())),
                        beside=tuple(row.get("beside", ())),
                        faults=tuple(
                            _load(FaultResult, fault, detours=tuple(fault["detours"]))
                            for fault in row.get("faults", ())
                        ),
                    )
                    for row in fields["results"]
                ),
                fabric=_load(FabricResult, fabric, links=tuple(links)),
                fidelity=_load_fidelity(fields["fidelity"]),
                checks=tuple(_load(Check, check) for check in fields["checks"]),
                warnings=tuple(fields["warnings"]),
                applications=tuple(_load_application(row) for row in fields.get("applications", ())),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no result of a run: {error}") from error


def render_json(result: Result) -> str:
    """Return the result as JSON text, two spaces of indent, with a final newline.

    Raises:
        ValueError: If a figure is NaN or infinite, which JSON has no words for: it should have been None.
    """
    return json.dumps(result.to_json_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Return a value made of JSON's own types alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _load_application(fields: Mapping[str, Any]) -> ApplicationResult:
    return _load(
        ApplicationResult,
        fields,
        wall_duration_ns=tuple(fields["wall_duration_ns"]),
        figures=tuple(_load(FigureResult, figure, printed=tuple(figure["printed"])) for figure in fields["figures"]),
        commands=tuple(_load(CommandResult, command) for command in fields["commands"]),
        fabric=_load(FabricCounts, fields["fabric"]),
        fidelity=_load_fidelity(fields["fidelity"]),
    )


def _load_fidelity(fields: Mapping[str, Any] | None) -> Fidelity | None:
    if fields is None:
        return None
    verdict, reasons = FidelityVerdict(fields["verdict"]), tuple(fields["reasons"])
    return _load(Fidelity, fields, verdict=verdict, reasons=reasons)


def _load(kind: type[T], fields: Mapping[str, Any], **parsed: Any) -> T:
    known = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in fields.items() if key in known} | parsed)
