"""Whole runs in the guest, as a user starts them: engine and fabric share its one CPU, and are right all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = Path(__file__).parents[2] / "scenarios"
# What the bar of virtual time allows between runs; see docs/virtual-machine.md.
REPEAT_FRACTION = 0.005

pytestmark = pytest.mark.root


def run_scenario(name: str, folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "testbed", "run", str(SCENARIOS / name), "--no-series", "--output", str(folder)]
    done = subprocess.run([*command, "--format", "json", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_star_is_trusted_and_ideal(tmp_path: Path) -> None:
    result = run_scenario("star.yaml", tmp_path / "star", "-b", "1MiB", "--iters", "1")
    assert result["fidelity"]["verdict"] == "trusted"
    assert result["results"][0]["cct_ratio"] <= 1.01
    assert result["host"]["virtual_machine"]
    assert result["host"]["virtual_time"]


def test_runs_repeat(tmp_path: Path) -> None:
    times = [
        run_scenario("virtual-time.yaml", tmp_path / str(number), "-b", "1MiB", "--iters", "1")["results"][0]["cct_ns"][
            0
        ]
        for number in range(3)
    ]
    assert max(times) / min(times) - 1.0 <= REPEAT_FRACTION, times


def test_collision_costs_what_the_paths_predict(tmp_path: Path) -> None:
    """The negative control: hashed onto one uplink, the same ring takes twice its time."""
    result = run_scenario(
        "virtual-time.yaml", tmp_path / "ecmp", "-b", "1MiB", "--iters", "1", "--set", "routing.scheme=ecmp",
        "--set", "routing.hash_seed=1", "--set", "expect=[]",
    )  # fmt: skip
    row = result["results"][0]
    assert row["predicted_cct_ratio"] >= 1.5
    assert row["cct_ratio"] == pytest.approx(row["predicted_cct_ratio"], rel=0.1)
