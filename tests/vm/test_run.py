"""Whole runs in the guest: engine and fabric share its one CPU, and are right all the same.

Most run in this process, for a Python with all its packages takes a guest half a minute to start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testbed import api

SCENARIOS = Path(__file__).parents[2] / "scenarios"
# Long enough for a tick to be short beside a step of the ring.
SIZE = "4 MiB"

pytestmark = pytest.mark.root


def run_scenario(name: str, *overrides: str, size: str = SIZE, iters: int = 1) -> dict[str, Any]:
    """Return the result of a scenario at one size as its file would have it."""
    settings = [f"workload.0.size={size}", f"workload.0.iters={iters}", *overrides]
    return api.run(api.load(SCENARIOS / name, settings)).to_json_dict()


def test_star_is_trusted_and_ideal_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "testbed", "run", str(SCENARIOS / "star.yaml"), "-b", "4MiB", "--iters", "1"]
    done = subprocess.run(
        [*command, "--no-series", "--output", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert ", in virtual time\n" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["fidelity"]["verdict"] == "trusted"
    assert result["results"][0]["cct_ratio"] <= 1.01
    assert result["host"]["virtual_machine"]
    assert result["host"]["virtual_time"]


def test_collision_costs_what_the_paths_predict() -> None:
    """The negative control: hashed onto one uplink, the same ring takes twice its time."""
    row = run_scenario("virtual-time.yaml", "routing.scheme=ecmp", "expect=[]")["results"][0]
    assert row["predicted_cct_ratio"] == 2.0
    # The prediction is one of bandwidth alone; buckets that are full at the start and latency, paid once, make it less.
    assert row["cct_ratio"] == pytest.approx(row["predicted_cct_ratio"], rel=0.05)
