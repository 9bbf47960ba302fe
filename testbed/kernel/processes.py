"""Programs started in the fabric's nodes: begun at an ordinary priority, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from testbed.errors import MachineError
from testbed.kernel.namespaces import entered
from testbed.kernel.scheduling import ordinary_thread

MARK_VARIABLE = "TESTBED_APPLICATION"
"""Whatever a program starts, in whatever session, has this variable of its own and is found by it, unless it drops it."""

_GROUP_PREFIX = "testbed-"
# Joins the group that it is named after before anything else can be started, and becomes the program, in the group or not.
_JOIN_SCRIPT = '{ echo 0 >"$0"; } 2>/dev/null; exec "$@"'
_TCP_LISTEN = "0A"
_GRACE_S = 2.0
_LOOK_S = 0.005


def start_program(
    arguments: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    mark: str,
    stdout: Path,
    stderr: Path,
    cpus: Collection[int],
    netns_fd: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, its output in files, and in the control group of its mark where there can be one.

    Args:
        arguments: Path of the program and arguments.
        folder: Its working directory.
        environment: All of its variables but the mark.
        mark: By which `end_programs` finds it.
        stdout: File for its standard output.
        stderr: File for its standard error.
        cpus: CPUs that it may use.
        netns_fd: Descriptor of the network namespace to be in; None for this process's.

    Raises:
        MachineError: It cannot be executed.
    """
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(path.open("wb")) for path in (stdout, stderr))
        group = _create_group(mark)
        joining = [] if group is None else ["/bin/sh", "-c", _JOIN_SCRIPT, str(group / "cgroup.procs")]
        stack.enter_context(ordinary_thread(cpus))
        if netns_fd is not None:
            stack.enter_context(entered(netns_fd))
        try:
            return subprocess.Popen(
                [*joining, *arguments],
                cwd=folder,
                env={**environment, MARK_VARIABLE: mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as error:
            raise MachineError(f"{arguments[0]} cannot be executed: {error.strerror}") from None


def read_is_listening(pid: int, port: int) -> bool:
    """Return whether something listens at a TCP port in the network namespace of a process."""
    wanted = f":{port:04X}"
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _TCP_LISTEN and fields[1].endswith(wanted):
                    return True
    return False


def end_programs(
    children: Sequence[subprocess.Popen[bytes]], mark: str, pause: Callable[[], None] = lambda: time.sleep(_LOOK_S)
) -> list[int]:
    """End programs and all that they have started: politely, then at once after a while.

    What they have started is what is in their process groups while they run, what descends from them, what bears the mark, and
    what is in its control group.

    Args:
        children: The programs; empty to end what others have left under that mark.
        mark: Their mark.
        pause: Called between two looks.

    Returns:
        Processes that have not ended all the same.
    """
    descendants = _find_descendants(children)
    for child in children:
        _signal_group(child, signal.SIGTERM)
    _wait_for(children, pause)
    for child in children:
        _signal_group(child, signal.SIGKILL)
    _wait_for(children, pause)
    deadline = time.monotonic() + _GRACE_S
    while left := [*find_programs(mark), *_alive(descendants)]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        pause()
    _delete_groups(mark)
    return sorted({*left, *(child.pid for child in children if child.returncode is None)})


def find_programs(mark: str) -> list[int]:
    """Return the other processes that bear a mark or are in its control group.

    Those that have ended and are not yet waited for are not among them.
    """
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    for group in _find_groups(mark):
        for folder, _, _ in os.walk(group):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in Path(folder, "cgroup.procs").read_text().split())
    return sorted(found - {os.getpid()})


def _find_hierarchy() -> Path | None:
    """Return where control groups (version 2) are mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(folder)
    return None


def _create_group(mark: str) -> Path | None:
    """Return the control group of a mark, below this process's own, whose share of the machine it has; None where none can be."""
    hierarchy = _find_hierarchy()
    own = next(
        (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), None
    )
    if hierarchy is None or own is None:
        return None
    group = hierarchy / own.lstrip("/") / f"{_GROUP_PREFIX}{mark}"
    try:
        group.mkdir(exist_ok=True)
    except OSError:  # read-only in many containers
        return None
    return group


def _find_groups(mark: str) -> list[Path]:
    """Return the control groups of a mark: each process that has started programs under it may have made one."""
    hierarchy, wanted = _find_hierarchy(), f"{_GROUP_PREFIX}{mark}"
    if hierarchy is None:
        return []
    # Others come and go meanwhile: os.walk() passes over what it no longer finds.
    return [Path(folder, wanted) for folder, names, _ in os.walk(hierarchy) if wanted in names]


def _delete_groups(mark: str) -> None:
    for group in _find_groups(mark):
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):  # something in it has not ended
                os.rmdir(folder)


def _wait_for(children: Sequence[subprocess.Popen[bytes]], pause: Callable[[], None]) -> None:
    """Wait a while until all have ended: one in the kernel's hands may never."""
    deadline = time.monotonic() + _GRACE_S
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        pause()


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # Of one that was waited for, the number may be another's by now.
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def _find_descendants(children: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Return what descends from programs that run, and when each began: it may have dropped the mark."""
    parents = {pid: stat for pid in _pids() if (stat := _read_stat(pid)) is not None}
    found = {child.pid for child in children if child.returncode is None}
    while more := {pid for pid, stat in parents.items() if stat[1] in found} - found:
        found |= more
    return {pid: parents[pid][2] for pid in found & parents.keys()}


def _alive(began: Mapping[int, int]) -> list[int]:
    """Return which of some processes still run, by their begins: a number may have become another's."""
    stats = {pid: _read_stat(pid) for pid in began}
    return [pid for pid, stat in stats.items() if stat is not None and stat[0] not in "ZX" and stat[2] == began[pid]]


def _read_stat(pid: int) -> tuple[str, int, int] | None:
    """Return state, parent and begin of a process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19])


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
