"""A made-up routing scheme in one file runs on the wire like those that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.new_scheme import SOURCE, copy_package, run_copy

pytestmark = pytest.mark.root

AI_ZONE = str(Path(__file__).parents[2] / "scenarios" / "ai-zone.yaml")
ONE_FLOW = "workload[0]={pattern: flows, flows: [{src: 0, dst: 4, size: 1 MiB}], iters: 1, warmup_iters: 0}"


def test_a_scheme_that_is_one_new_file_runs_on_the_wire(tmp_path: Path) -> None:
    package = copy_package(tmp_path, mirror=SOURCE)
    settings = ("routing.scheme=mirror", "fabric.leaves=2", "time_dilation=4000", "expect=[]", ONE_FLOW)
    overrides = [part for one in settings for part in ("--set", one)]
    done = run_copy(package, "run", AI_ZONE, *overrides, "--format", "json")
    assert done.returncode in (0, 4), done.stderr  # 4: this machine is too busy for the figure
    fabric = json.loads(done.stdout)["fabric"]
    ways = {way["src"]: way["packets"] for link in fabric["links"] for way in link["directions"]}
    sent = {port: packets for port, packets in ways.items() if port.startswith("leaf0/up") and packets}
    # Host 4's place in its rack is the first; 256 packets, more where this machine lost time and some were sent again.
    assert list(sent) == ["leaf0/up3"]
    assert sent["leaf0/up3"] >= 256
