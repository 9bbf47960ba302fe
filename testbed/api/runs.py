"""A run: on a fabric of its own or in a lab, captured or not, of collectives or of applications."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.api.files import result_folder, save_result
from testbed.api.lab import lab_name_of, labs
from testbed.api.listener import RunListener, SilentListener
from testbed.api.planning import describe_building, plan_for_lab, plan_with_capacity
from testbed.api.rows import Rows
from testbed.errors import LabError

if TYPE_CHECKING:
    from testbed.carriers.protocol import ApplicationSamples, WorkloadSamples
    from testbed.fabric import Fabric
    from testbed.fabric.capture import Capture
    from testbed.plan.model import Plan
    from testbed.results import Result
    from testbed.scenario import Scenario

_MAX_LABS_OF_A_SCENARIO = 99
_WAITING = "waiting for another run on this machine"


def run(
    scenario: Scenario,
    *,
    name: str | None = None,
    listener: RunListener | None = None,
    output: Path | None = None,
    pcap: Path | None = None,
    pcap_ports: Sequence[str] = (),
    snap_bytes: int | None = None,
    series: bool = True,
) -> Result:
    """Run a scenario's workload and return what was found out. Needs root.

    The process takes a real-time priority and one CPU of its own meanwhile. The first run on a machine with an automatic
    time dilation measures the machine's capacity and caches it.

    Args:
        scenario: The scenario.
        name: A deployed lab to run on, at that lab's time dilation; None builds a lab for the run and removes it after.
        listener: Told of the progress.
        output: Folder for ``result.json``, ``scenario.yaml`` and what applications write; made if missing. None writes nothing.
        pcap: Capture the run, warm-up included, into this pcapng file. That costs capacity; the result's warnings say so.
        pcap_ports: Nodes and ports to capture at, such as ``leaf0/up1``; by default the NICs of all hosts, where each
            frame is seen as it leaves and as it arrives.
        snap_bytes: Bytes captured of each frame, 0 for all; by default all headers.
        series: Write the time series of the run into ``output`` too, see :mod:`testbed.results.series`.

    Raises:
        LabError: There is no lab ``name``, it is in use, or it was built from another fabric.
        MachineError: This machine lacks something.
        KernelError: The kernel refused something; nothing is left behind.
        RunError: The workload could not finish.
    """
    from testbed.carriers.choose import needs_any_workload
    from testbed.kernel.netlink import require_root

    require_root()
    heard = listener or SilentListener()
    with result_folder(output), contextlib.ExitStack() as stack:
        plan = plan_with_capacity(scenario, heard) if name is None else plan_for_lab(scenario, name)
        capturing = None if pcap is None else stack.enter_context(_planned_capture(plan, pcap, pcap_ports, snap_bytes))
        if name is None:
            heard.note(describe_building(plan))
            shared = needs_any_workload(scenario.transport.carrier)
            fabric = stack.enter_context(ephemeral_fabric(plan, any_workload=shared))
        else:
            fabric = stack.enter_context(_attached(plan, name))
            heard.note(f"lab {name}: time dilation {plan.dilation.value:g}")
        capture = None if capturing is None else stack.enter_context(capturing(fabric))
        if plan.applications:
            result = _run_applications_on(fabric, heard, capture, output=output)
        else:
            result = _run_on(fabric, heard, capture, series=output if series else None)
        if output is not None:
            save_result(result, output)
    return result


@contextlib.contextmanager
def _attached(plan: Plan, name: str) -> Iterator[Fabric]:
    from testbed.fabric import Fabric

    with Fabric.attach(plan, name) as fabric:
        yield fabric


@contextlib.contextmanager
def ephemeral_fabric(plan: Plan, *, any_workload: bool) -> Iterator[Fabric]:
    """Build a lab for the block, named after the scenario, with a number where that name is taken."""
    from testbed.fabric import Fabric

    base = lab_name_of(plan.scenario)
    with contextlib.ExitStack() as stack:
        for number in range(1, _MAX_LABS_OF_A_SCENARIO + 1):
            name = base if number == 1 else f"{base}-{number}"
            if name in labs():
                continue
            try:
                fabric = stack.enter_context(Fabric.build(plan, name, any_workload=any_workload))
            except LabError:
                if name in labs():  # another run was quicker
                    continue
                raise
            break
        else:
            raise LabError(f"there are {_MAX_LABS_OF_A_SCENARIO} labs named after {base!r}", hint="testbed gc")
        yield fabric


@contextlib.contextmanager
def _planned_capture(
    plan: Plan, pcap: Path, wanted: Sequence[str], snap_bytes: int | None
) -> Iterator[Callable[[Fabric], contextlib.AbstractContextManager[Capture]]]:
    """Choose the ports and open the file before anything is built; yield what then starts the capture."""
    from testbed.fabric import capture

    ports = capture.select_ports(plan.topology, wanted)
    snap = capture.DEFAULT_SNAP_BYTES if snap_bytes is None else snap_bytes
    with capture.opened_capture_file(pcap) as output:
        yield lambda fabric: capture.captured(fabric.state, plan.topology, ports, output, pcap, snap_bytes=snap)


def _run_on(
    fabric: Fabric, listener: RunListener, capture: Capture | None = None, *, series: Path | None = None
) -> Result:
    """Run every workload item, at each of its sizes, over a fabric, one after the other."""
    from testbed.assemble import assemble_result
    from testbed.carriers.choose import open_carrier
    from testbed.host import read_host_facts

    plan = fabric.plan
    host = read_host_facts()
    samples: list[WorkloadSamples] = []
    with open_carrier(fabric, lambda: listener.note(_WAITING), series=series) as (carrier, refused):
        rows = Rows(fabric, listener)
        for index, planned in enumerate(plan.workloads):
            samples.append(rows.run(planned.title, functools.partial(carrier.run, index)))
        refused = refused + carrier.warnings()
    warnings = [*refused, *(capture.stop().warnings() if capture is not None else ())]
    return assemble_result(
        plan, samples, rows.counters, rows.fidelities, host=host, warnings=warnings, back_ends=fabric.back_ends
    )


def _run_applications_on(
    fabric: Fabric, listener: RunListener, capture: Capture | None = None, *, output: Path | None = None
) -> Result:
    """Run every application over a fabric, one after the other; what they write goes below ``output``."""
    from testbed.assemble import assemble_applications
    from testbed.carriers.applications import application_carrier
    from testbed.host import read_host_facts

    plan = fabric.plan
    host = read_host_facts()
    samples: list[ApplicationSamples] = []
    with application_carrier(fabric, output, lambda: listener.note(_WAITING)) as (carrier, refused):
        rows = Rows(fabric, listener)
        for index, item in enumerate(plan.applications):
            samples.append(rows.run(f"application {item.application}", functools.partial(carrier.run, index)))
        refused = refused + carrier.warnings()
    warnings = [*refused, *(capture.stop().warnings() if capture is not None else ())]
    return assemble_applications(
        plan, samples, rows.counters, rows.fidelities, host=host, warnings=warnings, back_ends=fabric.back_ends
    )
