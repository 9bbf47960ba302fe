"""Everything that the command line does, as documented, typed calls.

::

    import testbed

    scenario = testbed.load("scenarios/ai-zone.yaml", ["routing.scheme=ecmp"])
    print(testbed.paths(scenario).predicted_cct_ratio)   # no root, nothing is built
    result = testbed.run(scenario)                       # root: builds the fabric, runs, removes it
    print(result.results[0].cct_ratio, result.fidelity.verdict)

    with testbed.deploy(scenario, name="zone"):          # stays until testbed.destroy("zone")
        pass
    testbed.execute("zone", "host0", ["ping", "-c1", "10.0.0.3"])
    testbed.run(scenario, name="zone")
    testbed.destroy("zone")

What cannot be done is a :class:`testbed.errors.TestbedError`. Imports are made where they are needed: looking at a scenario
loads neither scapy nor the engine.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from testbed.errors import LabError, MachineError, PlanError, TestbedError

if TYPE_CHECKING:
    from testbed.carriers.protocol import ApplicationSamples, WorkloadSamples
    from testbed.fabric import Fabric, Lab
    from testbed.fabric.capture import Capture, CaptureReport
    from testbed.fabric.inject import Injection
    from testbed.kernel.probe import Finding
    from testbed.measure.counters import FabricCounters
    from testbed.measure.samples import MachineSamples
    from testbed.plan.model import Plan
    from testbed.plan.operations import BackEnds
    from testbed.plan.prediction import Prediction
    from testbed.plan.report import PathComparison, PathReport
    from testbed.results import Fidelity, LinkDirection, Result
    from testbed.results.graph import Graph
    from testbed.scenario import Fault, Scenario
    from testbed.vm import KernelName, VmListener

# Room for "-99" behind a name, within what a lab's name may be.
_LAB_NAME_LENGTH = 37
_MAX_LABS_OF_A_SCENARIO = 99
_SIGNAL_EXIT = 128
_WAITING = "waiting for another run on this machine"
# Steps of a plotted line: more than a picture has pixels; on a page that can be zoomed, as many as a browser draws at ease.
_IMAGE_STEPS, _PAGE_STEPS = 1200, 4000


class RunListener(Protocol):
    """Told what a run is doing; must be quick, for it is called in the engine's process."""

    def note(self, text: str) -> None:
        """Something worth a line began."""

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """An iteration begins, ``number`` counting from 0."""


class SilentListener:
    """Hears everything, says nothing."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """Ignore it."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Return the scenario in a file.

    Args:
        path: The YAML file.
        overrides: Changes such as ``"fabric.spines=8"``, applied in order.

    Raises:
        ScenarioError: With every mistake in the file.
    """
    from testbed.scenario import load_scenario

    return load_scenario(Path(path), overrides)


def build_plan(scenario: Scenario, *, measure: bool = True) -> Plan:
    """Return the plan of a scenario; nothing is built, nothing is measured, no root is needed.

    Args:
        scenario: The scenario.
        measure: Take this machine's capacity from the cache, if it was ever measured. False gives the plan of a machine
            whose capacity is not known: the same everywhere.

    Raises:
        PlanError: No fabric can be planned from it.
    """
    from testbed.plan.compile import compile_plan

    if not measure:
        return compile_plan(scenario, capacity_packets_per_s=None)
    from testbed.carriers.capacity import known_capacity, known_tick_lateness_ns, wall_tick_ns

    return compile_plan(
        scenario,
        capacity_packets_per_s=known_capacity(),
        wall_tick_lateness_ns=known_tick_lateness_ns(),
        wall_tick_ns=wall_tick_ns(),
    )


def find_back_ends(plan: Plan) -> BackEnds | None:
    """Return which of this kernel's means a fabric of the plan would be made with; None without root, which trying them needs."""
    import os

    if os.geteuid() != 0:
        return None
    from testbed.fabric.back_ends import choose_back_ends

    return choose_back_ends(plan)


def paths(scenario: Scenario, lab: str | None = None) -> PathReport:
    """Return every flow's path, the load of each link and the predicted slowdown; nothing is built.

    Args:
        scenario: Its flows.
        lab: A deployed lab of the same fabric: what is broken there is broken here.

    Raises:
        PlanError: No fabric can be planned from it.
        LabError: There is no such lab, or it was built from another fabric.
    """
    from testbed.plan.report import describe_paths

    if lab is None:
        return describe_paths(build_plan(scenario, measure=False))
    from testbed.fabric.fabric import require_same_fabric
    from testbed.kernel.registry import read_state

    plan = _plan_for_lab(scenario, lab)
    require_same_fabric(plan, read_state(lab))
    return describe_paths(plan)


def compare_paths(file: Path) -> PathComparison:
    """Return what a run measured beside what its paths had promised: bytes of every link, and completion times.

    Args:
        file: Its ``result.json``, or the folder that holds it.

    Raises:
        TestbedError: The file cannot be read, or is no result.
    """
    from testbed.plan.report import PathComparison, RatioComparison, compare_links
    from testbed.units import format_size

    result, scenario = _read_result(file)
    sent = {way.src: way.bytes for link in result.fabric.links for way in link.directions}
    rows = tuple(
        RatioComparison(
            f"{row.collective} ({row.algorithm}) of {format_size(row.size_bytes)}",
            row.predicted_cct_ratio,
            row.cct_ratio,
        )
        for row in result.results
    )
    return PathComparison(rows, compare_links(build_plan(scenario, measure=False), sent))


def predict(
    scenario: Scenario, *, seeds: int = 200, links_down: Sequence[str] = (), per_seed: bool = False
) -> Prediction:
    """Return the slowdown to expect over many hash seeds, by a model; nothing is built, and no limit of emulation holds.

    Args:
        scenario: The scenario.
        seeds: Number of hash seeds, from the scenario's own on.
        links_down: Links such as ``leaf0:spine1``, and switches, that are down all the time.
        per_seed: Return the ratio under each seed too.

    Raises:
        PlanError: There is no such link, or a flow has no way to its destination.
    """
    from testbed.plan.prediction import predict as predict_scenario

    return predict_scenario(scenario, seeds=seeds, links_down=links_down, per_seed=per_seed)


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
    from testbed.kernel.netlink import require_root

    require_root()
    heard = listener or SilentListener()
    with _result_folder(output), contextlib.ExitStack() as stack:
        plan = _plan_with_capacity(scenario, heard) if name is None else _plan_for_lab(scenario, name)
        capturing = None if pcap is None else stack.enter_context(_planned_capture(plan, pcap, pcap_ports, snap_bytes))
        if name is None:
            heard.note(_building(plan))
            fabric = stack.enter_context(_ephemeral_fabric(plan))
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


def run_in_virtual_time(
    scenario: Scenario,
    *,
    kernel: KernelName | None = None,
    listener: RunListener | None = None,
    output: Path | None = None,
    series: bool = True,
    timeout_s: float | None = None,
) -> Result:
    """Run a scenario in a virtual machine whose clock counts instructions; return what was found out. Needs root.

    Fabric, engine and all are in the guest: what else this machine does changes how long the run takes, not what it finds.

    Args:
        scenario: The scenario.
        kernel: The guest's kernel.
        listener: Told of the machine; what the run in it says of its progress goes to standard error.
        output: Folder for ``result.json`` and ``scenario.yaml``; made if missing. None writes nothing.
        series: Write the time series of the run into ``output`` too.
        timeout_s: Wall time that the run may take on this machine; None for no limit.

    Raises:
        MachineError: This machine lacks something.
        VmError: The virtual machine failed.
        RunError: The run in it failed; it has said why.
    """
    import json
    import sys
    import tempfile

    from testbed.errors import RunError
    from testbed.results import Result

    build_plan(scenario, measure=False)  # what cannot be planned needs no machine
    with tempfile.TemporaryDirectory(prefix="testbed-run-") as name, _result_folder(output):
        private = Path(name).resolve()
        folder = private if output is None else output.resolve()
        _write_scenario(scenario.resolved(), private / "scenario.yaml")
        command = [sys.executable, "-m", "testbed", "run", str(private / "scenario.yaml"), "--output", str(folder)]
        command += ["--format", "json", "--series" if series and output is not None else "--no-series"]
        code = run_in_vm(
            ["sh", "-c", 'exec "$@" >/dev/null', "sh", *command],  # the result comes as a file
            kernel=kernel,
            virtual_time=True,
            # A run waits for timers alone, but applications for their files, which are this machine's: time must not fly then.
            skip_idle=not scenario.applications,
            outputs=[folder],
            timeout_s=timeout_s,
            environment={},  # its options are given, and must not be read a second time
            listener=listener,
        )
        try:
            return Result.from_json_dict(json.loads((folder / "result.json").read_text()))
        except (OSError, ValueError) as error:
            raise RunError(
                f"the run in the virtual machine left no result, and ended with exit code {code}",
                hint="what it said is above",
            ) from error


def deploy(scenario: Scenario, name: str | None = None, *, listener: RunListener | None = None) -> Fabric:
    """Build a lab that stays until it is destroyed. Needs root.

    Args:
        scenario: The scenario.
        name: The lab's name; by default the scenario's.
        listener: Told of the progress.

    Returns:
        The lab, held by this process until it is closed: use it in a ``with`` block, or close it.

    Raises:
        LabError: The name is taken, or cannot name a lab.
        KernelError: The kernel refused something; nothing is left behind.
    """
    from testbed.fabric import Fabric
    from testbed.fabric.broken import set_broken, standing_faults
    from testbed.kernel.netlink import require_root
    from testbed.kernel.registry import check_lab_name

    require_root()
    heard = listener or SilentListener()
    lab_name = lab_name_of(scenario) if name is None else name
    check_lab_name(lab_name)
    plan = _plan_with_capacity(scenario, heard)
    heard.note(_building(plan))
    fabric = Fabric.deploy(plan, lab_name)
    try:
        if standing := standing_faults(plan):
            set_broken(fabric, standing)
    except BaseException:
        fabric.destroy()
        raise
    return fabric


def inspect(name: str | None = None) -> Lab:
    """Return a lab as it is now: nodes, links, queue depths, counters. Needs root, for the counters.

    Args:
        name: The lab; may be left out when there is exactly one.

    Raises:
        LabError: There is no such lab, or none is named and there is not exactly one.
    """
    from testbed.fabric import read_lab

    return read_lab(find_lab(name))


def break_lab(name: str, what: str, *, loss: str | None = None, rate: str | None = None) -> list[str]:
    """Break a link or a switch of a deployed lab until it is healed. Needs root.

    Frames on a link that is down are lost, and the lab's switches forward by what is left. Runs with the lab's name have it
    as a fault that stands from the beginning.

    Args:
        name: The lab.
        what: A link such as ``leaf0:spine1``, or a switch.
        loss: Share of its frames that the link loses, such as ``1/100``, instead of all.
        rate: The link's rate from now on, such as ``100 Gbit/s``; it stays up.

    Returns:
        All that is broken now, in words.

    Raises:
        LabError: There is no such lab, or another process uses it.
        PlanError: The lab has no such link or switch.
        TestbedError: Loss or rate cannot be read.
    """
    from pydantic import ValidationError

    from testbed.fabric.broken import broken_state, read_broken
    from testbed.scenario import Fault

    if loss is not None and rate is not None:
        raise TestbedError("a link is either lossy or slow at once", hint="break it twice to have both")
    fault: dict[str, object] = {"at": "0 ns"}
    if loss is not None:
        fault["loss"] = {"link": what, "fraction": loss}
    elif rate is not None:
        fault["rate"] = {"link": what, "rate": rate}
    else:
        fault["link_down" if ":" in what else "switch_down"] = what
    try:
        new = Fault.model_validate(fault)
    except ValidationError as error:
        raise TestbedError(f"{what}: {error.errors()[0]['msg']}") from None

    def add(fabric: Fabric) -> tuple[Fault, ...]:
        try:
            broken_state(fabric.plan.scenario, fabric.plan.topology, (new,))
        except PlanError as error:
            wanted = "a switch" if "switch_down" in fault else "a link"
            raise PlanError(f'must be {wanted} of lab {name}, got "{what}"', hint=error.hint) from None
        return (*read_broken(fabric.state), new)

    return _change_broken(name, add)


def heal_lab(name: str, what: str | None = None) -> list[str]:
    """Heal a link or a switch of a deployed lab; without ``what``, all. Needs root.

    Returns:
        All that is still broken, in words.

    Raises:
        LabError: There is no such lab, another process uses it, or nothing is broken there.
    """
    from testbed.fabric.broken import heal, read_broken

    return _change_broken(name, lambda fabric: heal(read_broken(fabric.state), what))


def _change_broken(name: str, change: Callable[[Fabric], Sequence[Fault]]) -> list[str]:
    from testbed.fabric import Fabric
    from testbed.fabric.broken import set_broken
    from testbed.kernel.netlink import require_root
    from testbed.kernel.registry import read_state
    from testbed.plan.faults import describe_fault
    from testbed.scenario import Scenario

    require_root()
    scenario = Scenario.model_validate(read_state(name).scenario)
    # What the lab is made of, whatever is broken in it.
    plan = _plan_at_dilation(scenario.model_copy(update={"faults": ()}), name)
    with Fabric.attach(plan, name) as fabric:
        broken = tuple(change(fabric))
        set_broken(fabric, broken)
    return [describe_fault(fault) for fault in broken]


def labs() -> list[str]:
    """Return the names of all labs on this machine, sorted."""
    from testbed.kernel.registry import list_labs

    return list_labs()


def find_lab(name: str | None = None) -> str:
    """Return the name of the lab that is meant: the one named, or the only one there is.

    Raises:
        LabError: None is named and there is not exactly one.
    """
    if name is not None:
        return name
    known = labs()
    if not known:
        raise LabError("there is no lab", hint="`testbed deploy FILE` builds one")
    if len(known) > 1:
        raise LabError(f"there are {len(known)} labs ({', '.join(known)})", hint="name the one you mean")
    return known[0]


def execute(name: str | None, node: str, command: Sequence[str]) -> int:
    """Run a command in the network namespace of a lab's node, on this process's standard streams. Needs root.

    Args:
        name: The lab; None for the only one there is.
        node: Such as ``host0`` or ``leaf1``.
        command: Program and arguments.

    Returns:
        Its exit code; 128 + N when signal N ended it.

    Raises:
        LabError: There is no such lab or node.
        MachineError: There is no such program.
    """
    import os
    import subprocess

    from testbed.fabric.fabric import namespace_of
    from testbed.kernel.namespaces import entered, open_namespace
    from testbed.kernel.registry import read_state

    if not command:
        raise TestbedError("there is no command to execute", hint="testbed exec NODE -- COMMAND")
    descriptor = open_namespace(namespace_of(read_state(find_lab(name)), node))
    try:
        with entered(descriptor):  # a child begins in the namespace of the thread that makes it
            child = subprocess.Popen(list(command))
    except FileNotFoundError:
        raise MachineError(f"there is no program {command[0]!r}", hint="install it, or check its name") from None
    except PermissionError:
        raise MachineError(f"{command[0]!r} cannot be executed", hint="check its permissions") from None
    finally:
        os.close(descriptor)
    try:
        code = child.wait()
    except BaseException:  # Ctrl-C reached the child as well, SIGTERM did not
        child.terminate()
        child.wait()
        raise
    return code if code >= 0 else _SIGNAL_EXIT - code


def inject(
    name: str | None,
    host: str,
    file: Path,
    *,
    frames_per_s: float | None = None,
    rate_bits_per_s: int | None = None,
    count: int | None = None,
    timeout_s: float | None = None,
) -> Injection:
    """Send the frames of a Python file from a host of a deployed lab; return what came back. Needs root.

    The file's ``frames()`` yields scapy packets or bytes; it is code, and runs in this process as the user who calls. See
    :mod:`testbed.fabric.frame_file`.

    Args:
        name: The lab; None for the only one there is.
        host: Such as ``host0``, or ``host0/eth1``.
        file: The Python file.
        frames_per_s: Pace on this machine's clock; 1000 by default.
        rate_bits_per_s: Pace as an emulated rate of frame bytes instead.
        count: Frames to send at most; all by default.
        timeout_s: How long to listen after the last, on this machine's clock; 2 by default.

    Raises:
        LabError: There is no such lab or host.
        TestbedError: The file is wrong; the message names its line.
    """
    from testbed.fabric.inject import DEFAULT_TIMEOUT_S, inject_frames
    from testbed.kernel.netlink import require_root

    require_root()
    return inject_frames(
        find_lab(name),
        host,
        file,
        frames_per_s=frames_per_s,
        rate_bits_per_s=rate_bits_per_s,
        count=count,
        timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
    )


def capture(
    name: str,
    ports: Sequence[str],
    file: Path,
    *,
    wall_duration_s: float | None = None,
    count: int = 0,
    snap_bytes: int | None = None,
    emulated_time: bool = True,
    listener: RunListener | None = None,
) -> CaptureReport:
    """Capture at ports of a lab into a pcapng file until Ctrl-C, the time, the count or the lab's end. Needs root.

    The lab is not taken: runs with its name go on meanwhile.

    Args:
        name: The lab.
        ports: Nodes and ports such as ``leaf0/up1``; none stands for the NICs of all hosts.
        file: The pcapng file; ``-`` is standard output.
        wall_duration_s: How long, on this machine's clock.
        count: Frames after which it ends; 0 for no limit.
        snap_bytes: Bytes kept of each frame, 0 for all; by default all headers.
        emulated_time: Whether the file tells emulated time since its beginning or wall time.
        listener: Told when it has begun.

    Raises:
        LabError: There is no such lab, node or port.
        TestbedError: The file cannot be written.
    """
    from testbed.fabric.capture import DEFAULT_SNAP_BYTES, captured, opened_capture_file, select_ports
    from testbed.fabric.recorded import read_recorded
    from testbed.kernel.netlink import require_root

    require_root()
    state, topology = read_recorded(name)
    chosen = select_ports(topology, ports)
    with (
        opened_capture_file(file) as output,
        captured(
            state,
            topology,
            chosen,
            output,
            file,
            snap_bytes=DEFAULT_SNAP_BYTES if snap_bytes is None else snap_bytes,
            count=count,
            emulated_time=emulated_time,
        ) as under_way,
    ):
        (listener or SilentListener()).note(
            f"capturing at {len(chosen)} port{'s' * (len(chosen) != 1)} of lab {name}; Ctrl-C ends"
        )
        with contextlib.suppress(KeyboardInterrupt):
            under_way.wait(wall_duration_s)
        return under_way.stop()


def describe_graph(scenario: Scenario) -> Graph:
    """Return the fabric of a scenario, ready to be drawn by :mod:`testbed.results.graph`; nothing is built.

    Raises:
        PlanError: No fabric can be planned from it.
    """
    return _graph_of(scenario, {})


def _read_result(file: Path) -> tuple[Result, Scenario]:
    """Return a run's result and scenario from its ``result.json``, or the folder that holds it."""
    import json

    from testbed.results import Result
    from testbed.scenario import Scenario

    hint = "name the result.json that `testbed run` wrote"
    if file.is_dir():
        file /= "result.json"
    try:
        result = Result.from_json_dict(json.loads(file.read_text()))
        scenario = Scenario.model_validate(result.scenario)
    except OSError as error:
        raise TestbedError(f"{file} cannot be read: {error.strerror}", hint=hint) from None
    except (ValueError, AttributeError) as error:  # JSON's and pydantic's errors are ValueErrors
        raise TestbedError(f"{file}: {str(error).splitlines()[0]}", hint=hint) from None
    return result, scenario


def describe_result_graph(file: Path) -> Graph:
    """Return the fabric of a run with the figures of its links, from its ``result.json``.

    Args:
        file: The file, or the folder that holds it.

    Raises:
        TestbedError: The file cannot be read, or is no result.
    """
    result, scenario = _read_result(file)
    measured = {way.src: way for link in result.fabric.links for way in link.directions}
    return _graph_of(scenario, measured)


def plot_series(folder: Path, output: Path, *, row: int | None = None, iteration: int | None = None) -> None:
    """Draw the time series of a run.

    Args:
        folder: Its results; it may have been interrupted.
        output: The file to write: ``.html``, or ``.svg``, ``.png``, ``.pdf``.
        row: Row of the results table; by default the last that was run.
        iteration: A single measured iteration; by default all.

    Raises:
        TestbedError: There is no series, no such row or iteration, or the file cannot be written.
        MachineError: What draws is not installed.
    """
    from testbed.results.series import QPS_FILE, QUEUES_FILE, read_series
    from testbed.results.series_html import render_html
    from testbed.results.series_image import IMAGE_SUFFIXES, save_image
    from testbed.results.series_plot import build_plot

    is_image = output.suffix.lower() in IMAGE_SUFFIXES
    drawn = build_plot(
        read_series(folder / QUEUES_FILE),
        read_series(folder / QPS_FILE),
        row=row,
        iteration=iteration,
        steps=_IMAGE_STEPS if is_image else _PAGE_STEPS,
    )
    try:
        if is_image:
            save_image(drawn, output)
        else:
            output.write_text(render_html(drawn), encoding="utf-8")
    except ImportError as error:
        raise MachineError(f"{error.name} is not installed", hint="pip install 'testbed[plot]'") from None
    except OSError as error:
        raise TestbedError(f"{output} cannot be written: {error.strerror}", hint="use --output") from None


def destroy(name: str) -> list[str]:
    """Remove a lab. Needs root.

    Returns:
        Namespaces that bear a name of the lab but are not its own; they are left alone.

    Raises:
        LabError: There is no such lab, or another process uses it.
    """
    from testbed.fabric.signals import signals_held
    from testbed.kernel import registry
    from testbed.kernel.netlink import require_root

    require_root()
    lock = registry.lock_lab(name)
    try:
        with signals_held():
            return registry.delete_lab(registry.read_state(name))
    finally:
        lock.close()


def collect_garbage() -> tuple[list[str], list[str]]:
    """Remove what killed processes left behind; labs in use and deployed labs are kept. Needs root.

    Returns:
        Names of the labs removed, and namespaces left alone because they are not ours.
    """
    from testbed.fabric.signals import signals_held
    from testbed.kernel import registry
    from testbed.kernel.netlink import require_root

    require_root()
    with signals_held():
        return registry.collect_garbage()


def probe_machine() -> tuple[Finding, ...]:
    """Try everything that runs need on this machine and say what was found; nothing is left behind."""
    from testbed.kernel.probe import probe_capacity, probe_machine

    return (*probe_machine(), probe_capacity(_known_capacity_or_none()))


def run_in_vm(
    command: Sequence[str],
    *,
    kernel: KernelName | None = None,
    virtual_time: bool = False,
    skip_idle: bool = False,
    outputs: Sequence[Path] = (),
    memory_bytes: int = 2 << 30,
    timeout_s: float | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    listener: VmListener | None = None,
) -> int:
    """Run a command as root under a full kernel, in a virtual machine around this machine's files. Needs root.

    Its output goes to this process's. The guest sees this machine's root read-only, under a layer in its own memory.

    Args:
        command: Program and arguments.
        kernel: Which; by default the newest that is tried.
        virtual_time: Let a nanosecond pass with each guest instruction, whatever this machine does.
        skip_idle: In virtual time, skip what the guest waits for: no figure depends on this machine, deadlines may be missed.
        outputs: Folders that the command may write to, made if missing; all else it writes is lost.
        memory_bytes: The guest's memory.
        timeout_s: Wall time that the command may take; None for no limit.
        folder: Its working directory; by default this process's.
        environment: Variables that it gets beside PATH and the like; by default those of this process that begin with
            ``TESTBED_`` or ``PYTEST_``.
        listener: Told of the machine.

    Returns:
        The command's exit code.

    Raises:
        MachineError: This machine lacks something; the hint is what mends it.
        VmError: The virtual machine died twice, or the command took too long.
    """
    import os

    from testbed.kernel.netlink import require_root
    from testbed.vm import DEFAULT_KERNEL, VmJob, find_kernel
    from testbed.vm import run_in_vm as boot_and_run

    if not command:
        raise TestbedError("there is no command to run", hint="testbed vm run -- COMMAND")
    require_root()
    heard = listener or SilentListener()
    for path in outputs:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TestbedError(f"{path} cannot be made: {error.strerror}", hint="use --output") from None
    found = find_kernel(kernel or DEFAULT_KERNEL, report=heard.note)
    if environment is None:
        environment = {name: os.environ[name] for name in os.environ if name.startswith(("TESTBED_", "PYTEST_"))}
    job = VmJob(
        tuple(command),
        (folder or Path.cwd()).resolve(),
        tuple(path.resolve() for path in outputs),
        environment,
        virtual_time=virtual_time,
        skip_idle=skip_idle,
        memory_bytes=memory_bytes,
        timeout_s=timeout_s,
    )
    return boot_and_run(job, found, heard)


def save_result(result: Result, folder: Path) -> None:
    """Write ``result.json`` and ``scenario.yaml`` (the resolved scenario) into a folder, made if missing.

    Raises:
        TestbedError: They cannot be written.
    """
    from testbed.results import render_json

    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_scenario(result.scenario, folder / "scenario.yaml")
        draft = folder / "result.json.new"
        draft.write_text(render_json(result))
        draft.rename(folder / "result.json")  # whole, or not there
    except OSError as error:
        raise TestbedError(f"results cannot be written to {folder}: {error.strerror}", hint="use --output") from None


def lab_name_of(scenario: Scenario) -> str:
    """Return the name of a scenario's lab: its own in what characters a lab's name may have."""
    cleaned = re.sub(r"[^a-z0-9_.-]", "-", scenario.name.lower())[:_LAB_NAME_LENGTH]
    return cleaned.strip("_.-") or "lab"


def _write_scenario(resolved: Mapping[str, object], path: Path) -> None:
    """Write a resolved scenario as a file that can be loaded."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    # Keys in the order of the file format; ruamel's annotation knows only the default.
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    with path.open("w") as file:
        yaml.dump(dict(resolved), file)


@contextlib.contextmanager
def _result_folder(output: Path | None) -> Iterator[None]:
    """Make the folder of the results before anything is built; take it away again if nothing came of it."""
    if output is None:
        yield
        return
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TestbedError(f"results cannot be written to {output}: {error.strerror}", hint="use --output") from None
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                output.rmdir()
        raise


def _known_capacity_or_none() -> float | None:
    from testbed.carriers.capacity import known_capacity

    return known_capacity()


def _plan_with_capacity(scenario: Scenario, listener: RunListener) -> Plan:
    """Return the plan, after measuring this machine's capacity where that decides and was never done."""
    if scenario.time_dilation is None and _known_capacity_or_none() is None:
        from testbed.carriers.capacity import measure_capacity

        build_plan(scenario, measure=False)  # what cannot be planned needs no measurement
        listener.note("measuring what this machine can carry (once; the figure is cached)")
        measure_capacity(listener.note)
    return build_plan(scenario)


def _plan_for_lab(scenario: Scenario, name: str) -> Plan:
    """Return the plan of a scenario at the time dilation of a deployed lab, with what is broken there.

    Raises:
        LabError: There is no such lab, it was never finished, or the scenario asks for another dilation.
    """
    from testbed.fabric.broken import read_broken
    from testbed.kernel.registry import read_state

    known = scenario.faults
    broken = tuple(fault for fault in read_broken(read_state(name)) if fault not in known)
    return _plan_at_dilation(scenario.model_copy(update={"faults": (*broken, *known)}), name)


def _plan_at_dilation(scenario: Scenario, name: str) -> Plan:
    """Return the plan of a scenario at the time dilation of a deployed lab, as `_plan_for_lab` does."""
    from testbed.kernel.registry import read_state

    dilation = read_state(name).details.get("time_dilation")
    if dilation is None:
        raise LabError(f"lab {name!r} was never finished", hint="`testbed gc` removes it")
    if scenario.time_dilation is None:
        scenario = scenario.model_copy(update={"time_dilation": float(dilation)})
    return build_plan(scenario)


@contextlib.contextmanager
def _attached(plan: Plan, name: str) -> Iterator[Fabric]:
    from testbed.fabric import Fabric

    with Fabric.attach(plan, name) as fabric:
        yield fabric


@contextlib.contextmanager
def _ephemeral_fabric(plan: Plan) -> Iterator[Fabric]:
    """Build a lab for the block, named after the scenario, with a number where that name is taken."""
    from testbed.carriers.choose import needs_any_workload
    from testbed.fabric import Fabric

    base = lab_name_of(plan.scenario)
    shared = needs_any_workload(plan.scenario.transport.carrier)
    with contextlib.ExitStack() as stack:
        for number in range(1, _MAX_LABS_OF_A_SCENARIO + 1):
            name = base if number == 1 else f"{base}-{number}"
            if name in labs():
                continue
            try:
                fabric = stack.enter_context(Fabric.build(plan, name, any_workload=shared))
            except LabError:
                if name in labs():  # another run was quicker
                    continue
                raise
            break
        else:
            raise LabError(f"there are {_MAX_LABS_OF_A_SCENARIO} labs named after {base!r}", hint="testbed gc")
        yield fabric


def _graph_of(scenario: Scenario, measured: Mapping[str, LinkDirection]) -> Graph:
    """Return a scenario's fabric as a graph, with the figures of a run by the port that sends."""
    from testbed.plan.compile import build_topology
    from testbed.results import LinkDirection
    from testbed.results.graph import Graph, GraphLink, GraphNode

    topology = build_topology(scenario)

    def way(port_id: int) -> LinkDirection:
        src, dst = topology.port_name(port_id), topology.port_name(topology.port(port_id).peer)
        return measured.get(src) or LinkDirection(src, dst)

    def node_name(port_id: int) -> str:
        return topology.nodes[topology.port(port_id).node].name

    return Graph(
        name=scenario.name,
        nodes=tuple(
            GraphNode(node.name, str(node.kind), tuple(topology.port(port).ifname for port in node.ports))
            for node in topology.nodes
        ),
        links=tuple(
            GraphLink(
                node_name(link.a), node_name(link.b), link.rate_bits_per_s, link.delay_ns, way(link.a), way(link.b)
            )
            for link in topology.links
        ),
        measured=bool(measured),
    )


def _building(plan: Plan) -> str:
    topology, dilation = plan.topology, plan.dilation
    return (
        f"building {len(topology.nodes)} nodes and {len(topology.links)} link{'s' * (len(topology.links) != 1)} "
        f"at time dilation {dilation.value:g} ({dilation.bound})"
    )


class _BaselineListener:
    """Passes progress on, and takes the baseline of the counters when the first measured iteration begins."""

    def __init__(self, fabric: Fabric, listener: RunListener) -> None:
        from testbed.measure.counters import Snapshot

        self._fabric = fabric
        self._listener = listener
        self.baseline = Snapshot.of(fabric.arrays.queues, fabric.arrays.qps, fabric.arrays.ingress)

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        from testbed.measure.counters import Snapshot

        if number == 0 and not warmup:
            self._fabric.read_kernel_marks()
            self._fabric.arrays.queues["peak_bytes"] = 0
            self.baseline = Snapshot.of(
                self._fabric.arrays.queues, self._fabric.arrays.qps, self._fabric.arrays.ingress
            )
        self._listener.iteration(number, of, warmup=warmup)


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


class _Sampled(Protocol):
    """Raw figures of something that ran."""

    @property
    def machine(self) -> Sequence[MachineSamples]:
        """What was noted about the machine in each measured iteration."""


_S = TypeVar("_S", bound=_Sampled)


class _Rows:
    """Counts and judges what runs over a fabric, row by row: a bad one must not hide behind good ones, nor spoil them."""

    def __init__(self, fabric: Fabric, listener: RunListener) -> None:
        from testbed.host import MachineCounters

        self._fabric = fabric
        self._listener = listener
        self._before = MachineCounters.read()
        self.counters: list[FabricCounters] = []
        self.fidelities: list[Fidelity] = []

    def run(self, title: str, run: Callable[[_BaselineListener], _S]) -> _S:
        """Run one row and return its samples."""
        from testbed.host import MachineCounters
        from testbed.measure.counters import FabricCounters, Snapshot
        from testbed.measure.verdict import judge

        fabric, plan = self._fabric, self._fabric.plan
        self._listener.note(title)
        heard = _BaselineListener(fabric, self._listener)
        sampled = run(heard)
        fabric.read_kernel_marks()
        self.counters.append(
            FabricCounters.between(
                heard.baseline,
                Snapshot.of(fabric.arrays.queues, fabric.arrays.qps, fabric.arrays.ingress),
                wall_duration_ns=sum(one.wall_duration_ns for one in sampled.machine),
            )
        )
        after = MachineCounters.read()
        self.fidelities.append(
            judge(
                sampled.machine,
                wall_tick_ns=plan.dilation.wall_tick_ns,
                softnet_drops=after.drops_since(self._before),
                steal_fraction=after.steal_fraction_since(self._before),
                wall_gate_allowance_ns=plan.wall_gate_allowance_ns,
                lossless_drops=int(self.counters[-1].headroom_drops_packets.sum()),
            )
        )
        self._before = after
        return sampled


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
        rows = _Rows(fabric, listener)
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
        rows = _Rows(fabric, listener)
        for index, item in enumerate(plan.applications):
            samples.append(rows.run(f"application {item.application}", functools.partial(carrier.run, index)))
        refused = refused + carrier.warnings()
    warnings = [*refused, *(capture.stop().warnings() if capture is not None else ())]
    return assemble_applications(
        plan, samples, rows.counters, rows.fidelities, host=host, warnings=warnings, back_ends=fabric.back_ends
    )
