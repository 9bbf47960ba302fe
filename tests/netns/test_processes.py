"""Ending programs: those that have ended are not signalled again, those that hide are found, those that stay are named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.kernel import processes
from testbed.kernel.processes import end_programs, find_programs, start_program
from tests.conftest import skip_or_fail
from tests.netns.labs import wait_until

pytestmark = pytest.mark.root

MARK = f"test-{os.getpid()}"


@contextlib.contextmanager
def started(folder: Path, line: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a shell's line until it writes something; kill its group at the end, whatever happens."""
    out = folder / "out"
    child = start_program(
        ["/bin/sh", "-c", line],
        folder=folder,
        environment=dict(os.environ),
        mark=MARK,
        stdout=out,
        stderr=folder / "err",
        cpus=sorted(os.sched_getaffinity(0)),
    )
    try:
        wait_until(lambda: out.read_text().endswith("\n"), "it writes")
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_program_that_was_waited_for_is_not_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    with started(tmp_path, "echo up") as child:
        child.wait()
        monkeypatch.setattr(os, "killpg", lambda pid, number: sent.append((pid, number)))
        assert end_programs([child], MARK) == []
        assert sent == []
        monkeypatch.undo()


@pytest.mark.parametrize(
    "line", ["sleep 1000 & echo $!; wait", "setsid sleep 1000 & echo $!", "setsid env -i sleep 1000 & echo $!; wait"]
)
def test_all_that_a_program_has_started_is_ended(line: str, tmp_path: Path) -> None:
    with started(tmp_path, line) as child:
        pid = int((tmp_path / "out").read_text())
        try:
            assert not has_ended(pid)
            assert end_programs([child], MARK) == []
            assert has_ended(pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert find_programs(MARK) == []


# Two forks, each of whose parents ends before the next look, and no environment.
HIDDEN = "(setsid env -i /bin/sh -c 'sleep 1000 & echo $!' &)"


def require_groups() -> None:
    group = processes._create_group(MARK)
    if group is None:
        skip_or_fail("no control group (cgroup2) can be made here")
    processes._delete_groups(MARK)


@pytest.mark.parametrize("others", [True, False], ids=["run-goes-on", "run-was-killed"])
def test_orphan_without_its_environment_is_found_by_its_control_group(others: bool, tmp_path: Path) -> None:
    require_groups()
    with started(tmp_path, f"{HIDDEN}; wait") as child:
        pid = int((tmp_path / "out").read_text())
        try:
            child.wait()
            assert not has_ended(pid)
            assert find_programs(MARK) == [pid]
            assert end_programs([child] if others else [], MARK) == []
            assert has_ended(pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert processes._find_groups(MARK) == []


def test_without_control_groups_programs_are_ended_by_their_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the orphan stays, which is what the group is for."""
    monkeypatch.setattr(processes, "_find_hierarchy", lambda: None)
    with started(tmp_path, f"{HIDDEN}; sleep 1000") as child:
        pid = int((tmp_path / "out").read_text())
        try:
            assert child.pid in find_programs(MARK)
            assert end_programs([], MARK) == []
            assert has_ended(child.pid)
            assert not has_ended(pid)
        finally:
            os.kill(pid, signal.SIGKILL)


def test_program_that_does_not_end_is_named_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.05)
    with started(tmp_path, "echo up; exec sleep 1000") as child:
        monkeypatch.setattr(os, "killpg", lambda pid, number: None)  # as one in the kernel's hands takes no signal
        monkeypatch.setattr(os, "kill", lambda pid, number: None)
        assert end_programs([child], MARK) == [child.pid]
        monkeypatch.undo()


def test_something_is_done_while_programs_are_ended(tmp_path: Path) -> None:
    passed = []

    def pause() -> None:
        passed.append(1)
        time.sleep(0.005)

    with started(tmp_path, "trap 'sleep 0.1; exit 0' TERM; echo up; while :; do sleep 0.01; done") as child:
        end_programs([child], MARK, pause)
        assert child.returncode == 0
    assert len(passed) >= 3
