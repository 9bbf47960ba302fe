"""What is ours on this host: every lab, recorded before it is built, so that all of it and nothing else can be removed.

``/run/testbed/labs/NAME/state.json`` names the namespaces of a lab and the mark that proves them ours; ``lock`` is held
(flock) by the process that builds or uses it, so the kernel itself tells whether that process is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from testbed.errors import LabError, MachineError
from testbed.kernel.host_tuning import restore_host
from testbed.kernel.links import delete_link
from testbed.kernel.namespaces import NETNS_DIR, delete_namespace, entered, open_namespace, read_mark
from testbed.kernel.netlink import RouteSocket
from testbed.kernel.processes import end_programs
from testbed.kernel.rxe import delete_rxe, has_device

REGISTRY_DIR = Path("/run/testbed")
_NAME = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,38}[a-z0-9])?")
_STATE_VERSION = 1


@dataclass
class LabState:
    """The record of one lab.

    Attributes:
        name: The lab's name.
        mark: What proves a namespace to be this lab's.
        namespaces: Node name to namespace name, in the order of the topology.
        ephemeral: Built by ``run`` for itself; to be removed when that process is gone.
        ready: False while it is being built.
        pid: The process that built it, for people.
        scenario: The resolved scenario.
        details: What the fabric needs to find itself again (map ids, sizes).
        rxe_devices: Name of the soft-RoCE device of each port that has one, by the port's id as text.
        run_devices: Names of those that a run has made for itself on a deployed lab.
        attachments: Namespace and interface index of the end beside the NIC, of each NIC that is attached to the namespace of the
            process, by the port's id as text.
    """

    name: str
    mark: str
    namespaces: dict[str, str]
    ephemeral: bool
    ready: bool = False
    pid: int = field(default_factory=os.getpid)
    scenario: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    rxe_devices: dict[str, str] = field(default_factory=dict)
    run_devices: list[str] = field(default_factory=list)
    attachments: dict[str, tuple[str, int]] = field(default_factory=dict)


class LabLock:
    """A lab held by this process; close it to let go."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Let go of the lab."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def check_lab_name(name: str) -> None:
    """Raise LabError unless ``name`` can name a lab.

    Raises:
        LabError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise LabError(
            f"{name!r} cannot name a lab: it must be 1 to 40 lower-case letters, digits, '-', '_' or '.'",
            hint="give another with --name",
        )


def _lab_dir(name: str) -> Path:
    return REGISTRY_DIR / "labs" / name


@contextlib.contextmanager
def _registry_lock() -> Iterator[None]:
    """Hold the registry: labs appear and vanish one at a time."""
    try:
        (REGISTRY_DIR / "labs").mkdir(parents=True, exist_ok=True)
        descriptor = os.open(REGISTRY_DIR / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise MachineError(
            f"{REGISTRY_DIR} cannot be written", hint="run as root, or in a privileged container"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(name: str) -> LabLock | None:
    """Take a lab's lock, or return None when another process holds it."""
    try:
        descriptor = os.open(_lab_dir(name) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None  # its holder has just removed it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return LabLock(descriptor)


def create_lab(
    name: str, nodes: Sequence[str], *, ephemeral: bool, scenario: dict[str, Any]
) -> tuple[LabState, LabLock]:
    """Record a lab before anything of it exists.

    Raises:
        LabError: The name is taken or is none.
    """
    check_lab_name(name)
    mark = f"testbed:{name}:{uuid.uuid4().hex}"
    state = LabState(name, mark, {node: f"{name}-{node}" for node in nodes}, ephemeral, scenario=scenario)
    with _registry_lock():
        try:
            _lab_dir(name).mkdir()
        except FileExistsError:
            held = _try_lock(name)
            if held is None:
                hint = "a run is using it; choose another with --name"
            else:
                held.close()
                hint = f"`testbed destroy {name}`, `testbed gc`, or choose another with --name"
            raise LabError(f"a lab named {name!r} exists already", hint=hint) from None
        lock = _try_lock(name)
        if lock is None:
            raise LabError(f"lab {name!r} is in use")
        write_state(state)
    return state, lock


def write_state(state: LabState) -> None:
    """Write a lab's record so that it is either the old or the new one, also after a crash."""
    target = _lab_dir(state.name) / "state.json"
    draft = target.with_suffix(".new")
    with open(draft, "w") as file:
        json.dump({"version": _STATE_VERSION, **asdict(state)}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(target)


def read_state(name: str) -> LabState:
    """Return a lab's record.

    Raises:
        LabError: There is no such lab.
    """
    check_lab_name(name)
    try:
        data = json.loads((_lab_dir(name) / "state.json").read_text())
    except FileNotFoundError:
        known = ", ".join(list_labs()) or "none"
        raise LabError(f"there is no lab named {name!r} (labs: {known})", hint="`testbed deploy` builds one") from None
    data.pop("version")
    return LabState(**data)


def namespace_of(state: LabState, node: str) -> str:
    """Return the namespace of a lab's node.

    Raises:
        LabError: The lab has no such node.
    """
    try:
        return state.namespaces[node]
    except KeyError:
        known = ", ".join(state.namespaces)
        raise LabError(f"lab {state.name!r} has no node {node!r} (nodes: {known})") from None


def list_labs() -> list[str]:
    """Return the names of all recorded labs, sorted."""
    try:
        return sorted(entry.name for entry in (REGISTRY_DIR / "labs").iterdir())
    except FileNotFoundError:
        return []


def lock_lab(name: str) -> LabLock:
    """Take a deployed lab for this process.

    Raises:
        LabError: It does not exist, or another process uses it.
    """
    read_state(name)
    lock = _try_lock(name)
    if lock is None:
        raise LabError(f"lab {name!r} is in use by another process", hint="wait for it, or deploy another with --name")
    return lock


def delete_lab(state: LabState) -> list[str]:
    """Remove a lab's devices, namespaces (and so links, qdiscs and programs) and its record; its lock must be held.

    Returns:
        Namespaces that bear a name of this lab and are not its own; they are left alone.
    """
    if state.ready:  # what is left of a lab whose removal was killed is garbage, deployed or not
        state.ready = False
        with contextlib.suppress(FileNotFoundError):
            write_state(state)
    _end_processes(state)
    end_programs((), state.mark)  # setup's are in no namespace of the lab
    # Before the interfaces that they stand on, and waited for: their deletion is asynchronous.
    for name in (*state.rxe_devices.values(), *state.run_devices):
        if has_device(name):
            with contextlib.suppress(MachineError):  # without the program for it: it goes with its interface
                delete_rxe(name)
    # They would go with the namespaces, but not at once, and they have addresses here.
    delete_attachments(state, list(state.attachments))
    foreign = [name for name in state.namespaces.values() if not delete_namespace(name, state.mark)]
    shutil.rmtree(_lab_dir(state.name), ignore_errors=True)
    return foreign


def delete_leftovers(state: LabState) -> None:
    """Remove what a killed run has left in a deployed lab, its programs and devices; the lab's lock must be held."""
    end_programs((), state.mark)
    for name in state.run_devices:
        if has_device(name):
            with contextlib.suppress(MachineError):  # without the program for it: it stays on record
                delete_rxe(name)
    delete_attachments(state, [port_id for port_id in state.attachments if port_id not in state.rxe_devices])
    if state.run_devices:
        state.run_devices = [name for name in state.run_devices if has_device(name)]
        write_state(state)


def delete_attachments(state: LabState, port_ids: Sequence[str]) -> None:
    """Remove attachments of a lab's NICs by their ports' ids, those of its own namespaces alone; its lock must be held."""
    for port_id in port_ids:
        namespace, index = state.attachments[port_id]
        if read_mark(namespace) == state.mark:
            netns = open_namespace(namespace)
            try:
                with entered(netns), RouteSocket() as route:
                    route.request([delete_link(index, f"index {index}")])
            finally:
                os.close(netns)
        del state.attachments[port_id]
    if port_ids:
        with contextlib.suppress(FileNotFoundError):
            write_state(state)


def _end_processes(state: LabState) -> None:
    """Kill what still runs in the lab's namespaces: it would keep them alive without a name."""
    nodes = set()
    for name in state.namespaces.values():
        with contextlib.suppress(OSError):
            found = os.stat(NETNS_DIR / name)
            if read_mark(name) == state.mark:
                nodes.add((found.st_dev, found.st_ino))
    if not nodes:
        return
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{entry.name}/ns/net")
                if (found.st_dev, found.st_ino) in nodes:
                    os.kill(int(entry.name), signal.SIGKILL)


def collect_garbage() -> tuple[list[str], list[str]]:
    """Remove every lab whose process is gone and that nobody asked to keep.

    A lab is garbage when its lock is free and it was built by ``run`` for itself, or was never finished. Of another whose lock is
    free, what a killed run has left in it is removed. What runs changed on the host itself is put back too, when no run needs it.

    Returns:
        Names of the labs removed, and namespaces left alone because they are not ours.
    """
    removed, foreign = [], []
    restore_host()
    with _registry_lock():
        for name in list_labs():
            lock = _try_lock(name)
            if lock is None:
                continue
            try:
                try:
                    state = read_state(name)
                except (LabError, ValueError, TypeError, KeyError):
                    # Killed between making the folder and writing the record: nothing else of it exists yet.
                    shutil.rmtree(_lab_dir(name), ignore_errors=True)
                    removed.append(name)
                    continue
                if state.ephemeral or not state.ready:
                    foreign += delete_lab(state)
                    removed.append(name)
                else:
                    delete_leftovers(state)
            finally:
                lock.close()
    return removed, foreign
