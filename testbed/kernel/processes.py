"""Programs started in the fabric's nodes: begun at an ordinary priority, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from testbed.errors import MachineError
from testbed.kernel.namespaces import entered
from testbed.kernel.scheduling import ordinary_thread

MARK_VARIABLE = "TESTBED_APPLICATION"
"""Whatever a program starts, in whatever session, has this variable of its own and is found by it."""

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
    """Start a program in a session of its own, its output in files.

    Args:
        arguments: Program and arguments.
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
        stack.enter_context(ordinary_thread(cpus))
        if netns_fd is not None:
            stack.enter_context(entered(netns_fd))
        try:
            return subprocess.Popen(
                list(arguments),
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


def end_programs(children: Sequence[subprocess.Popen[bytes]], mark: str) -> None:
    """End programs and all that they have started: politely, then at once after a while."""
    for child in children:
        _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    for child in children:
        _signal_group(child, signal.SIGKILL)
        child.wait()
    deadline = time.monotonic() + _GRACE_S
    while (left := find_programs(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


def find_programs(mark: str) -> list[int]:
    """Return the processes that bear a mark; those that have ended and are not yet waited for are not among them."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{entry.name}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The group may outlive its leader; its number is not given to others while one of it is left.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
