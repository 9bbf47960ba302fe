"""A deployed lab with the carrier rxe: a device per NIC that programs find, that a run uses, and that goes with the lab."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from testbed import api
from testbed.errors import LabError
from testbed.fabric import rxe_devices
from tests.netns.labs import lab_name

pytestmark = pytest.mark.root

SCENARIO = Path(__file__).parents[2] / "scenarios" / "rxe.yaml"
DEVICES = Path("/sys/class/infiniband")


def present() -> set[str]:
    return {entry.name for entry in DEVICES.iterdir()} if DEVICES.exists() else set()


def test_devices_come_and_go_with_the_lab_and_carry_a_run() -> None:
    before = present()
    scenario = api.load(SCENARIO, ["workload.0.size=256 KiB", "workload.0.iters=1", "expect=[]"])
    name = lab_name("rxe")
    wanted = {f"{name}-host{number}" for number in range(4)}
    with api.deploy(scenario, name=name):
        pass
    try:
        assert present() - before == wanted
        command = [sys.executable, "-m", "testbed", "exec", "--lab", name, "host0", "--", "ibv_devices"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert listed.returncode == 0, listed.stderr
        assert all(device in listed.stdout for device in wanted), listed.stdout
        row = api.run(scenario, name=name).results[0]
        assert row.wrong_elements == 0
        assert present() - before == wanted, "the run left the lab's devices and none of its own"
    finally:
        api.destroy(name)
    assert present() == before


def test_a_lab_is_not_built_over_somebody_elses_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = present()
    monkeypatch.setattr(rxe_devices, "has_device", lambda name: name.endswith("host2"))
    name = lab_name("taken")
    with pytest.raises(LabError, match=f"{name}-host2"), api.deploy(api.load(SCENARIO), name=name):
        pass
    assert present() == before
    assert name not in api.labs()
