"""Labs that stay: built, looked at, broken and healed, used, removed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.api.listener import RunListener, SilentListener
from testbed.api.planning import describe_building, plan_at_dilation, plan_with_capacity
from testbed.errors import LabError, MachineError, PlanError, TestbedError

if TYPE_CHECKING:
    from testbed.fabric import Fabric, Lab
    from testbed.fabric.capture import CaptureReport
    from testbed.fabric.inject import Injection
    from testbed.scenario import Fault, Scenario

# Room for "-99" behind a name, within what a lab's name may be.
_LAB_NAME_LENGTH = 37
_SIGNAL_EXIT = 128


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
    plan = plan_with_capacity(scenario, heard)
    heard.note(describe_building(plan))
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
    plan = plan_at_dilation(scenario.model_copy(update={"faults": ()}), name)
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

    from testbed.kernel.namespaces import entered, open_namespace
    from testbed.kernel.registry import namespace_of, read_state

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


def lab_name_of(scenario: Scenario) -> str:
    """Return the name of a scenario's lab: its own in what characters a lab's name may have."""
    cleaned = re.sub(r"[^a-z0-9_.-]", "-", scenario.name.lower())[:_LAB_NAME_LENGTH]
    return cleaned.strip("_.-") or "lab"
