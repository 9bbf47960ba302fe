"""``testbed run``: build, run, judge, remove."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.options import (
    Format,
    LabName,
    OutputFormat,
    PcapPorts,
    ScenarioFile,
    Set,
    SnapLength,
    read_overrides,
)

if TYPE_CHECKING:
    from testbed.results import Result
    from testbed.scenario import Scenario

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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            envvar="TESTBED_OUTPUT",
            help="Folder for result.json and scenario.yaml. [default: results/NAME-DATE-TIME]",
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
    require: Annotated[
        Required,
        typer.Option("--require", envvar="TESTBED_REQUIRE", help="Exit with 4 when the verdict is worse than this."),
    ] = Required.DEGRADED,
) -> None:
    """Run a scenario: table on stdout, progress on stderr, everything in the results folder.

    Without --name a fabric is built for the run and removed after. With it, the run uses the lab deployed under that name,
    at its time dilation. Exit code 3: a check failed; 4: the figures cannot be trusted.
    """
    from testbed import api
    from testbed.results import render_json

    scenario = _load(file, read_overrides(overrides), seed=seed, iters=iters)
    folder = output or _default_folder(scenario)
    if pcap is None and pcap_ports:
        raise typer.BadParameter("--pcap-port says where to capture, --pcap to which file: give both")
    result = api.run(
        scenario,
        name=name,
        listener=StderrListener(),
        output=folder,
        pcap=pcap,
        pcap_ports=pcap_ports or (),
        snap_bytes=snap_length,
    )
    if output_format is OutputFormat.JSON:
        sys.stdout.write(render_json(result))
    else:
        sys.stdout.write(_render(result))
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


def _load(file: Path, overrides: list[str], *, seed: int | None, iters: int | None) -> Scenario:
    """Return the scenario with every override; `iters` needs to know how many items the workload has."""
    from testbed import api

    if seed is not None:
        overrides = [*overrides, f"seed={seed}"]
    scenario = api.load(file, overrides)
    if iters is None:
        return scenario
    each = [f"workload[{index}].iters={iters}" for index in range(len(scenario.workload))]
    return api.load(file, [*overrides, *each])


def _default_folder(scenario: Scenario) -> Path:
    """Return a folder named after scenario and time that does not exist yet."""
    from datetime import datetime

    stem = f"{scenario.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, number = Path("results") / stem, 1
    while folder.exists():
        number += 1
        folder = Path("results") / f"{stem}-{number}"
    return folder


def _render(result: Result) -> str:
    """Return table, verdict, checks and warnings; all lines but the table's rows begin with ``#``."""
    from testbed.results import render_table

    host = result.host
    comments = [
        f"{result.scenario['name']}: time dilation {result.time_dilation:g}, seed {result.seed}; all figures are emulated",
        f"{host.get('cpu_model')}, {host.get('cpus_available')} CPUs, Linux {host.get('kernel')}",
    ]
    lines = [render_table(result.results, comments)]
    fabric = result.fabric
    lines.append(
        f"# fabric: {fabric.drops_packets} drops, {fabric.out_of_order_packets} out of order, "
        f"{fabric.nak_packets} NAKs, {fabric.retransmitted_packets} retransmitted (packets)\n"
    )
    if result.fidelity is not None:
        lines.append(f"# verdict: {result.fidelity.verdict}\n")
        lines += [f"#   {reason}\n" for reason in result.fidelity.reasons]
    for check in result.checks:
        observed = "not measured" if check.observed is None else f"{check.observed:.6g}"
        lines.append(f"# check: {check.expect}: {check.verdict} (observed {observed})\n")
    lines += [f"# warning: {warning}\n" for warning in result.warnings]
    return "".join(lines)
