"""What a run changes outside its namespaces, and how it is put back: the priority of ksoftirqd and the length of CPU backlogs.

When the fabric's CPU has more to do than fits into one softirq, the kernel hands the rest to ``ksoftirqd/N``, an ordinary
process that shares the CPU with any hog; and while it waits, a backlog of 1000 frames (``net.core.netdev_max_backlog``) fills
in ten milliseconds and drops. Both are raised while a run lasts. The old values are recorded before, put back by the last run
that ends, and by ``testbed gc`` after a SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def tuned_host(cpus: Sequence[int]) -> Iterator[list[str]]:
    """Give the softirqs of these CPUs priority and room for the block.

    Yields:
        Warnings about what was refused.
    """
    _STATE_DIR.mkdir(parents=True, exist_ok=True)
    warnings: list[str] = []
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
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
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield warnings
    finally:
        os.close(lock)
        restore_host()


def restore_host() -> bool:
    """Put the recorded values back unless another run still needs them; return whether anything was put back."""
    if not _RECORD.exists():
        return False
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        record = json.loads(_RECORD.read_text())
        for name, (pid, policy, priority) in record["threads"].items():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    os.sched_setscheduler(pid, policy, os.sched_param(priority))
        if "netdev_max_backlog" in record:
            with contextlib.suppress(OSError):
                _BACKLOG.write_text(str(record["netdev_max_backlog"]))
        _RECORD.unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)
