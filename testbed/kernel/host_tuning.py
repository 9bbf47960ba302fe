"""What a run changes outside its namespaces, and how it is put back: the priority of ksoftirqd and the length of CPU backlogs.

When the fabric's CPU has more to do than fits into one softirq, the kernel hands the rest to ``ksoftirqd/N``, an ordinary
process that shares the CPU with any hog; and while it waits, a backlog of 1000 frames (``net.core.netdev_max_backlog``) fills
in ten milliseconds and drops. Both are raised while a run lasts. The old values are recorded before, put back after, and by
``testbed gc`` after a SIGKILL.

Two engines on one CPU would measure each other, so a run also has the machine to itself: others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from testbed.kernel.scheduling import ENGINE_FIFO_PRIORITY

_STATE_DIR = Path("/run/testbed")
_RECORD = _STATE_DIR / "host.json"
_LOCK = _STATE_DIR / "host.lock"
_BACKLOG = Path("/proc/sys/net/core/netdev_max_backlog")
# A tenth of a second of all that this data plane can carry.
_BACKLOG_FRAMES = 20_000


def _find_threads(cpus: Sequence[int]) -> dict[str, int]:
    """Return name and process id of the ksoftirqd threads of these CPUs; none where a container hides them."""
    wanted = {f"ksoftirqd/{cpu}" for cpu in cpus}
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{entry.name}/comm").read_text().strip()
                if name in wanted:
                    found[name] = int(entry.name)
                    if len(found) == len(wanted):
                        break
    return found


def _write_record(record: dict[str, Any]) -> None:
    draft = _RECORD.with_suffix(".new")
    draft.write_text(json.dumps(record))
    draft.rename(_RECORD)


def _take_lock(waiting: Callable[[], None]) -> int:
    """Return the machine's lock, held; wait for another run."""
    _STATE_DIR.mkdir(parents=True, exist_ok=True)
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
    except BaseException:
        os.close(lock)
        raise
    return lock


@contextlib.contextmanager
def tuned_host(cpus: Sequence[int], waiting: Callable[[], None] = lambda: None) -> Iterator[list[str]]:
    """Have the machine for the block, and give the softirqs of these CPUs priority and room.

    Args:
        cpus: The CPUs of the fabric's ports.
        waiting: Called when another run has the machine.

    Yields:
        Warnings about what was refused.
    """
    warnings: list[str] = []
    lock = _take_lock(waiting)
    try:
        record: dict[str, Any] = json.loads(_RECORD.read_text()) if _RECORD.exists() else {"threads": {}}
        threads = _find_threads(cpus)
        for name, pid in threads.items():
            if name not in record["threads"]:
                old = [pid, os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority]
                record["threads"][name] = old
        with contextlib.suppress(OSError):
            record.setdefault("netdev_max_backlog", int(_BACKLOG.read_text()))
        _write_record(record)
        for name, pid in threads.items():
            try:
                os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(ENGINE_FIFO_PRIORITY - 1))
            except PermissionError:
                warnings.append(f"{name} keeps its priority (CAP_SYS_NICE): frames may wait behind other processes")
        if not threads:
            warnings.append("ksoftirqd is not visible here: frames may wait behind other processes")
        # Refused in a container without its own /proc/sys: the engine then keeps less under way.
        with contextlib.suppress(OSError):
            if int(_BACKLOG.read_text()) < _BACKLOG_FRAMES:
                _BACKLOG.write_text(str(_BACKLOG_FRAMES))
        yield warnings
    finally:
        try:
            _restore()
        except BaseException:  # a signal ended it before its end
            _restore()
            raise
        finally:
            os.close(lock)


def _restore() -> None:
    """Put the recorded values back; the machine's lock must be held."""
    if not _RECORD.exists():
        return
    record = json.loads(_RECORD.read_text())
    for name, (pid, policy, priority) in record["threads"].items():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                os.sched_setscheduler(pid, policy, os.sched_param(priority))
    if "netdev_max_backlog" in record:
        with contextlib.suppress(OSError):
            _BACKLOG.write_text(str(record["netdev_max_backlog"]))
    _RECORD.unlink(missing_ok=True)


def restore_host() -> None:
    """Put back what a killed run left raised, unless another run has the machine."""
    if not _RECORD.exists():
        return
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _restore()
    finally:
        os.close(lock)
