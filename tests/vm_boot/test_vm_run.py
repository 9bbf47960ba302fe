"""``testbed vm run`` as seen from the host: streams, exit codes, files, and machines that die."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.virtual_time import busy_neighbours

TESTBED = [sys.executable, "-m", "testbed"]
INFRASTRUCTURE_EXIT = 125
SCENARIO = Path(__file__).parents[2] / "scenarios" / "virtual-time.yaml"
# The bar of virtual time; docs/virtual-machine.md.
REPEAT_FRACTION = 0.005

pytestmark = pytest.mark.root


def vm_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TESTBED, "vm", "run", *arguments], capture_output=True, text=True, check=False, timeout=550)


def test_streams_exit_code_and_files_come_back_and_nothing_else_is_written(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "my output", tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = f"pwd; echo words; echo complaint >&2; echo kept >'{output}/file'; echo lost >'{elsewhere}/file'; exit 7"
    done = vm_run("--output", str(output), "--", "sh", "-c", script)
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"{Path.cwd()}\nwords\n"
    assert "complaint\n" in done.stderr
    assert (output / "file").read_text() == "kept\n"
    assert not (elsewhere / "file").exists()


def test_machine_that_dies_is_booted_once_more_and_then_an_error() -> None:
    done = vm_run("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100")
    assert done.returncode == INFRASTRUCTURE_EXIT
    assert "booted once more: " in done.stderr
    assert "error: the virtual machine died 2 times" in done.stderr
    assert "Kernel panic - not syncing: sysrq triggered crash" in done.stderr


def test_command_that_takes_too_long_is_ended() -> None:
    done = vm_run("--timeout", "2", "--", "sleep", "1000")
    assert done.returncode == INFRASTRUCTURE_EXIT
    assert "error: `sleep 1000` did not end within 2 s" in done.stderr
    assert "once more" not in done.stderr


def test_run_in_virtual_time_repeats_beside_busy_neighbours(tmp_path: Path) -> None:
    times = []
    for neighbours in (0, 4):
        folder = tmp_path / str(neighbours)
        with busy_neighbours(neighbours):
            done = subprocess.run(
                [
                    *TESTBED,
                    "run",
                    "--virtual-time",
                    str(SCENARIO),
                    "--iters",
                    "1",
                    "--no-series",
                    "--output",
                    str(folder),
                ],
                capture_output=True,
                text=True,
                check=False,
                timeout=550,
            )
        assert done.returncode == 0, done.stderr + done.stdout
        assert ", in virtual time\n" in done.stdout
        result = json.loads((folder / "result.json").read_text())
        assert result["fidelity"]["verdict"] == "trusted"
        times.append(result["results"][0]["cct_ns"][0])
    assert max(times) / min(times) - 1.0 <= REPEAT_FRACTION, times
