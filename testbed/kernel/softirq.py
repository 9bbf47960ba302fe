"""The priority of ksoftirqd while a run lasts: frames must not wait behind an ordinary process on the fabric's CPU.

When the fabric's CPU has more to do than fits into one softirq, the kernel hands the rest to ``ksoftirqd/N``, an ordinary
process that shares the CPU with any hog. Its priority is the one thing we change outside our namespaces: the old value is
recorded before, put back by the last run that ends, and by ``testbed gc`` after a SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from testbed.kernel.scheduling import ENGINE_FIFO_PRIORITY

_STATE_DIR = Path("/run/testbed")
_RECORD = _STATE_DIR / "ksoftirqd.json"
_LOCK = _STATE_DIR / "ksoftirqd.lock"


def _find_threads(cpus: Sequence[int]) -> dict[int, str]:
    """Return process id and name of the ksoftirqd threads of these CPUs; none where a container hides them."""
    wanted = {f"ksoftirqd/{cpu}" for cpu in cpus}
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{entry.name}/comm").read_text().strip()
                if name in wanted:
                    found[int(entry.name)] = name
                    if len(found) == len(wanted):
                        break
    return found


@contextlib.contextmanager
def raised_softirq_priority(cpus: Sequence[int]) -> Iterator[list[str]]:
    """Run ``ksoftirqd`` of these CPUs just below the engine's priority for the block.

    Yields:
        Warnings about what was refused.
    """
    _STATE_DIR.mkdir(parents=True, exist_ok=True)
    warnings: list[str] = []
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads(_RECORD.read_text()) if _RECORD.exists() else {}
        threads = _find_threads(cpus)
        for pid, name in threads.items():
            if name not in record:
                parameter = os.sched_getparam(pid).sched_priority
                record[name] = {"pid": pid, "policy": os.sched_getscheduler(pid), "priority": parameter}
        _RECORD.write_text(json.dumps(record))
        for pid, name in threads.items():
            try:
                os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(ENGINE_FIFO_PRIORITY - 1))
            except PermissionError:
                warnings.append(f"{name} keeps its priority (CAP_SYS_NICE): frames may wait behind other processes")
        if not threads:
            warnings.append("ksoftirqd is not visible here: frames may wait behind other processes")
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield warnings
    finally:
        os.close(lock)
        restore_softirq_priority()


def restore_softirq_priority() -> bool:
    """Put the recorded priorities back unless another run still needs them; return whether anything was put back."""
    if not _RECORD.exists():
        return False
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        for name, old in json.loads(_RECORD.read_text()).items():
            with contextlib.suppress(OSError, ValueError):
                if Path(f"/proc/{old['pid']}/comm").read_text().strip() == name:
                    os.sched_setscheduler(old["pid"], old["policy"], os.sched_param(old["priority"]))
        _RECORD.unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)
