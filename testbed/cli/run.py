"""``testbed run``: build, run, judge, remove."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.options import Format, LabName, OutputFormat, PcapPorts, ScenarioFile, Set, SnapLength, read_overrides

if TYPE_CHECKING:
    from testbed.errors import Mistake
    from testbed.results import ApplicationResult, Check, CollectiveResult, FabricResult, Result
    from testbed.scenario import Scenario
    from testbed.scenario.workload import WorkloadItem

# nccl-tests' options, and the key of a workload item that each one sets.
SWEEP_OPTIONS = {
    "size": "-b/--minbytes",
    "max_size": "-e/--maxbytes",
    "size_factor": "-f/--stepfactor",
    "size_step": "-i/--stepbytes",
}
EXIT_CHECK_FAILED = 3
EXIT_UNTRUSTED = 4


class Required(StrEnum):
    """The least that a verdict must be."""

    TRUSTED = "trusted"
    DEGRADED = "degraded"


class StderrListener:
    """Progress as short plain lines; cheap, for it runs in the engine's process."""

    def note(self, text: str) -> None:
        """Write a line."""
        sys.stderr.write(f"{text}\n")

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """Write a line."""
        kind = "warm-up" if warmup else "iteration"
        sys.stderr.write(f"  {kind} {number + 1}/{of}\n")


def run(
    file: ScenarioFile,
    overrides: Set = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, envvar="TESTBED_SEED", help="Same as --set seed=N.", show_default=False),
    ] = None,
    iters: Annotated[
        int | None,
        typer.Option(
            "--iters",
            min=1,
            envvar="TESTBED_ITERS",
            help="Measured iterations of every workload item.",
            show_default=False,
        ),
    ] = None,
    minbytes: Annotated[
        str | None,
        typer.Option(
            "-b",
            "--minbytes",
            metavar="SIZE",
            envvar="TESTBED_MINBYTES",
            help="Size to begin with, such as 1MiB. [default: the scenario's size]",
            show_default=False,
        ),
    ] = None,
    maxbytes: Annotated[
        str | None,
        typer.Option(
            "-e",
            "--maxbytes",
            metavar="SIZE",
            envvar="TESTBED_MAXBYTES",
            help="Run every workload item at several sizes, up to this one.",
            show_default=False,
        ),
    ] = None,
    stepfactor: Annotated[
        int | None,
        typer.Option(
            "-f",
            "--stepfactor",
            envvar="TESTBED_STEPFACTOR",
            help="Each size over the one before. [default: 2]",
            show_default=False,
        ),
    ] = None,
    stepbytes: Annotated[
        str | None,
        typer.Option(
            "-i",
            "--stepbytes",
            metavar="SIZE",
            envvar="TESTBED_STEPBYTES",
            help="Each size less the one before, instead of -f.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            envvar="TESTBED_OUTPUT",
            help="Folder for result.json, scenario.yaml, time series, applications' output. [default: results/NAME-DATE-TIME]",
            show_default=False,
        ),
    ] = None,
    output_format: Format = OutputFormat.TABLE,
    name: LabName = None,
    pcap: Annotated[
        Path | None,
        typer.Option(
            "--pcap",
            metavar="FILE.pcapng",
            envvar="TESTBED_PCAP",
            help="Capture the run into this file; costs capacity.",
            show_default=False,
        ),
    ] = None,
    pcap_ports: PcapPorts = None,
    snap_length: SnapLength = None,
    series: Annotated[
        bool,
        typer.Option(
            "--series/--no-series",
            envvar="TESTBED_SERIES",
            help="Write the time series of queues and QPs into the results folder, for `testbed plot`.",
        ),
    ] = True,
    virtual_time: Annotated[
        bool,
        typer.Option(
            "--virtual-time",
            envvar="TESTBED_VIRTUAL_TIME",
            help="Run in a virtual machine whose clock counts instructions: slow, and the same beside any neighbour.",
        ),
    ] = False,
    require: Annotated[
        Required,
        typer.Option("--require", envvar="TESTBED_REQUIRE", help="Exit with 4 when the verdict is worse than this."),
    ] = Required.DEGRADED,
) -> None:
    """Run a scenario: table on stdout, progress on stderr, everything in the results folder.

    Without --name a fabric is built for the run and removed after. With it, the run uses the lab deployed under that name,
    at its time dilation. -b, -e, -f and -i sweep over sizes as in nccl-tests, a row for each. Exit code 3: a check failed; 4:
    the figures cannot be trusted.
    """
    from testbed import api
    from testbed.host import in_virtual_time
    from testbed.results import render_json

    sweep = {"size": minbytes, "max_size": maxbytes, "size_factor": stepfactor, "size_step": stepbytes}
    scenario = load_with_options(file, read_overrides(overrides), seed=seed, iters=iters, sweep=sweep)
    folder = output or _default_folder(scenario)
    if pcap is None and pcap_ports:
        raise typer.BadParameter("--pcap-port says where to capture, --pcap to which file: give both")
    if virtual_time and not in_virtual_time():
        if name is not None or pcap is not None:
            raise typer.BadParameter("the run is in a machine of its own: neither --name nor --pcap goes with it")
        result = api.run_in_virtual_time(scenario, listener=StderrListener(), output=folder, series=series)
    else:
        result = api.run(
            scenario,
            name=name,
            listener=StderrListener(),
            output=folder,
            pcap=pcap,
            pcap_ports=pcap_ports or (),
            snap_bytes=snap_length,
            series=series,
        )
    if output_format is OutputFormat.JSON:
        sys.stdout.write(render_json(result))
    else:
        sys.stdout.write(render_result(result))
    sys.stdout.flush()
    print(f"results: {folder}", file=sys.stderr)
    raise typer.Exit(exit_code(result, require))


def exit_code(result: Result, require: Required) -> int:
    """Return 4 for figures that cannot be trusted, else 3 for a failed check, else 0."""
    from testbed.results import FidelityVerdict
    from testbed.scenario import Verdict

    verdict = result.fidelity.verdict if result.fidelity else FidelityVerdict.INVALID
    if verdict is FidelityVerdict.INVALID or (require is Required.TRUSTED and verdict is not FidelityVerdict.TRUSTED):
        return EXIT_UNTRUSTED
    if any(check.verdict == Verdict.FAIL for check in result.checks):
        return EXIT_CHECK_FAILED
    return 0


def load_with_options(
    file: Path, overrides: list[str], *, seed: int | None, iters: int | None, sweep: Mapping[str, Any]
) -> Scenario:
    """Return the scenario with every override and option.

    Args:
        file: The scenario's file.
        overrides: Those of ``--set``.
        seed: The option, if given; so are the others.
        iters: For all items of the workload.
        sweep: For all items of the workload, by the keys of `SWEEP_OPTIONS`; None where an option is not given.

    Raises:
        ScenarioError: The file or an override is wrong.
        BadParameter: An option of the sweep is wrong, or does not suit the scenario; names the option.
    """
    from testbed import api
    from testbed.errors import ScenarioError
    from testbed.scenario import ApplicationWorkload, FlowsWorkload

    if seed is not None:
        overrides = [*overrides, f"seed={seed}"]
    scenario = api.load(file, overrides)
    given = {key: value for key, value in sweep.items() if value is not None}
    each = given if iters is None else {**given, "iters": iters}
    growth = ("size_factor", "size_step")
    if len(given.keys() & growth) == 1:  # the one that is given replaces what the file says, which may be the other
        each = {**dict.fromkeys(growth, "null"), **each}
    if not each:
        return scenario
    places: dict[str, WorkloadItem] = {f"workload[{index}]": item for index, item in enumerate(scenario.items)}
    for number, job in enumerate(scenario.jobs):
        places |= {f"jobs[{number}].workload[{index}]": item for index, item in enumerate(job.workload)}
    if given:
        for place, item in places.items():
            if isinstance(item, FlowsWorkload | ApplicationWorkload):
                what = (
                    "lists flows, each with a size of its own"
                    if isinstance(item, FlowsWorkload)
                    else "is an application"
                )
                raise typer.BadParameter(
                    f"{place} {what}: there is nothing to sweep",
                    param_hint=SWEEP_OPTIONS[next(iter(given))],
                )
    set_each = [f"{place}.{key}={value}" for place in places for key, value in each.items()]
    try:
        return api.load(file, [*overrides, *set_each])
    except ScenarioError as error:
        for mistake in error.mistakes:  # the file alone has none, so the options made them
            key = mistake.key.rpartition(".")[2]
            if given and key in SWEEP_OPTIONS:
                option = SWEEP_OPTIONS[key if key in given else next(iter(given))]
                raise typer.BadParameter(_describe_mistake(mistake), param_hint=option) from None
        raise


def _describe_mistake(mistake: Mistake) -> str:
    """Return a mistake on one line, and what nccl-tests' suffixes are called here."""
    value = mistake.got.removesuffix(" (from --set)")
    got = f", got {value}" if value else ""
    hint = f" ({mistake.hint})" if mistake.hint else ""
    if suffix := re.fullmatch(r'"([0-9]+)([KMG])"', value):
        hint = f" (nccl-tests' {suffix[1]}{suffix[2]} is {suffix[1]}{suffix[2]}iB)"
    return f"{mistake.key}: {mistake.rule}{got}{hint}"


def _default_folder(scenario: Scenario) -> Path:
    """Return a folder named after scenario and time that does not exist yet."""
    from datetime import datetime

    stem = f"{scenario.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, number = Path("results") / stem, 1
    while folder.exists():
        number += 1
        folder = Path("results") / f"{stem}-{number}"
    return folder


def render_result(result: Result) -> str:
    """Return table, verdict, checks and warnings; all lines but the table's rows begin with ``#``."""
    from testbed.results import render_applications, render_table

    host = result.host
    comments = [
        f"{result.scenario['name']}: time dilation {result.time_dilation:g}, seed {result.seed}; all figures are emulated",
        f"{host.get('cpu_model')}, {host.get('cpus_available')} CPUs, Linux {host.get('kernel')}{_clock(host)}",
    ]
    fabric = result.fabric
    if result.applications:
        lines = [render_applications(result.applications, comments)]
        lines.append(f"# fabric: {fabric.drops_packets} drops (packets)\n")
        lines += _switch_lines(fabric)
    else:
        lines = [render_table(result.results, comments)]
        lines.append(
            "# fabric: {} drops, {} out of order, {} NAKs, {} retransmitted (packets)\n".format(
                *_figures(
                    fabric.drops_packets, fabric.out_of_order_packets, fabric.nak_packets, fabric.retransmitted_packets
                )
            )
        )
    if fabric.retransmitted_packets or fabric.duplicate_packets or fabric.timeouts:
        figures = _figures(fabric.timeouts, fabric.duplicate_packets)
        lines.append("# loss recovery: {} timeouts, {} duplicates (packets)\n".format(*figures))
    lines += _congestion_lines(fabric)
    used = [f"{what} {name}" for what, name in result.back_ends.items() if name is not None]
    if len(used) > 1 or (used and result.back_ends.get("scheduler") != "tbf"):
        lines.append(f"# back ends: {', '.join(used)}\n")
    lines += _slowdown_lines(result)
    for row in result.results:
        lines += _fault_lines(row, several=len(result.results) > 1)
    if result.fidelity is not None:
        lines.append(f"# verdict: {result.fidelity.verdict}\n")
        lines += [f"#   {reason}\n" for reason in _reasons(result)]
    for check in result.checks:
        lines.append(f"# check: {check.expect}: {check.verdict} ({_observed(check, result)})\n")
    lines += [f"# warning: {warning}\n" for warning in result.warnings]
    return "".join(lines)


_MOST_SWITCHES = 8


def _switch_lines(fabric: FabricResult) -> list[str]:
    """Return what each switch sent, the busiest first: which of them an application's packets took."""
    from testbed.units import format_size

    nbytes: Counter[str] = Counter()
    packets: Counter[str] = Counter()
    for way in (way for link in fabric.links for way in link.directions):
        node = way.src.partition("/")[0]
        nbytes[node] += way.bytes or 0
        packets[node] += way.packets or 0
    switches = [node for node, _ in nbytes.most_common() if not node.startswith("host")]
    words = [f"{node} {packets[node]} packets, {format_size(nbytes[node])}" for node in switches[:_MOST_SWITCHES]]
    more = f"; {len(switches) - _MOST_SWITCHES} more" if len(switches) > _MOST_SWITCHES else ""
    return [f"# sent: {'; '.join(words)}{more}\n"]


def _figures(*values: int | None) -> list[str]:
    """Return counts as text; a dash for what nothing counted."""
    return ["-" if one is None else str(one) for one in values]


def _clock(host: Mapping[str, Any]) -> str:
    """Return what a reader must know of the machine's clock."""
    if host.get("virtual_time"):
        return ", in virtual time"
    return ", a virtual machine" if host.get("virtual_machine") else ""


def _congestion_lines(fabric: FabricResult) -> list[str]:
    """Return what marked, notified and paused, where the scenario has any of it."""
    words = []
    if fabric.ecn_marked_packets is not None:
        words.append(f"{fabric.ecn_marked_packets} marked")
    if fabric.cnp_packets is not None:
        words.append(f"{fabric.cnp_packets} CNPs")
    if fabric.pause_frames is not None:
        most = f" (the worst port paused {fabric.paused_fraction_max:.1%} of the time)" if fabric.pause_frames else ""
        words.append(f"{fabric.pause_frames} PFC frames{most}")
        words.append(f"{fabric.headroom_drops_packets} lossless drops")
    if fabric.lost_packets:
        words.append(f"{fabric.lost_packets} lost on links")
    lines = [f"# congestion: {', '.join(words)}\n"] if words else []
    return lines + _admission_lines(fabric)


def _admission_lines(fabric: FabricResult) -> list[str]:
    """Return what receiver-driven admission did, where the scenario has it."""
    from testbed.units import format_size, format_time

    if fabric.cts_frames is None:
        return []
    words = [f"{fabric.cts_frames} CTS frames"]
    if fabric.cts_repeated_frames:
        words.append(f"{fabric.cts_repeated_frames} of them repeated")
    if fabric.cts_delay_p50_ns is not None and fabric.cts_delay_p99_ns is not None:
        p50, p99 = (format_time(time, significant=3) for time in (fabric.cts_delay_p50_ns, fabric.cts_delay_p99_ns))
        words.append(f"delay p50 {p50}, p99 {p99}")
    if fabric.leaf_down_peak_bytes is not None:
        words.append(f"peak queue of a leaf's port to a host {format_size(fabric.leaf_down_peak_bytes)}")
    return [f"# admission: {', '.join(words)}\n"]


def _fault_lines(row: CollectiveResult, *, several: bool) -> list[str]:
    """Return what the faults of a row did and cost."""
    from testbed.units import format_size, format_time

    if not row.faults:
        return []
    where = f"{_name_row(row)}: " if several else ""
    lines = []
    for fault in row.faults:
        until = "" if fault.until_ns is None else f" until {format_time(fault.until_ns)}"
        head = f"# fault: {where}{fault.text} at {format_time(fault.at_ns)}{until}"
        if not fault.happened_iters:
            lines.append(f"{head}: no iteration lasted so long\n")
            continue
        recovered = (
            "no recovery seen" if fault.recovery_ns is None else f"recovered in {format_time(fault.recovery_ns)}"
        )
        lines.append(
            f"{head}: {fault.victim_qps} QPs hit, {fault.moved_qps} took another way, "
            f"{fault.lost_packets} packets lost on its links, {recovered}\n"
        )
    again = "" if row.retransmitted_bytes is None else f", {format_size(row.retransmitted_bytes)} sent again"
    if row.fault_cost_ratio is None or row.cct_without_fault_ns is None:
        return [*lines, f"# fault cost: {where}not known without warm-up iterations{again}\n"]
    without = format_time(round(row.cct_without_fault_ns), significant=5)
    cost = f"{row.fault_cost_ratio:.4g} x the time of the warm-up iterations without ({without})"
    return [*lines, f"# fault cost: {where}{cost}{again}\n"]


def _slowdown_lines(result: Result) -> list[str]:
    """Return what each job costs each other one, where pairs of jobs ran by themselves."""
    all_jobs = len({row.job for row in result.results})
    lines = []
    for row in result.results:
        if row.slowdown_by and len(row.beside) == all_jobs - 1:
            each = (f"{factor:.3f} times as long beside {other}" for other, factor in row.slowdown_by.items())
            lines.append(f"# job {row.job}: {', '.join(each)}\n")
    return lines


def _reasons(result: Result) -> list[str]:
    """Return why the figures are not trusted: row by row where there are several."""
    rows = result.applications or result.results
    if len(rows) == 1:
        return list(result.fidelity.reasons) if result.fidelity else []
    return [
        f"{_name_row(row)}: {row.fidelity.verdict}, {reason}"
        for row in rows
        if row.fidelity
        for reason in row.fidelity.reasons
    ]


def _observed(check: Check, result: Result) -> str:
    """Return the figure of a check, and the row that it is from where there are several."""
    rows = result.applications or result.results
    where = f", {_name_row(rows[check.row])}" if check.row is not None and len(rows) > 1 else ""
    if check.observed is None:
        return f"observed {'nothing written' if check.verdict == 'fail' else 'not measured'}{where}"
    return f"observed {check.observed:.6g}{where}"


def _name_row(row: CollectiveResult | ApplicationResult) -> str:
    from testbed.results import ApplicationResult
    from testbed.units import format_size

    if isinstance(row, ApplicationResult):
        return row.application

    job = "" if row.job is None else f"job {row.job}{' beside ' + ','.join(row.beside) if row.beside else ' alone'}: "
    return f"{job}{row.collective} of {format_size(row.size_bytes)}"
