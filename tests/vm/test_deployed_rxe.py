"""A deployed lab with the carrier rxe: a device per NIC that programs find, that a run uses, and that goes with the lab."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import api
from testbed.errors import LabError
from testbed.fabric import rxe_devices
from testbed.kernel.registry import read_state
from tests.netns.labs import lab_name, wait_until

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


@contextlib.contextmanager
def lab_with_a_killed_runs_devices(folder: Path) -> Iterator[tuple[str, set[str]]]:
    """Deploy a lab of carrier engine, which has no devices, and kill a run over rxe there; tell the lab and what is left."""
    before, name = present(), lab_name("killed")
    with api.deploy(api.load(SCENARIO, ["transport.carrier=engine", "expect=[]"]), name=name):
        pass
    try:
        assert present() == before
        settings = ("--set", "workload.0.iters=10000", "--set", "expect=[]")
        arguments = ["run", str(SCENARIO), "--name", name, *settings, "--output", str(folder)]
        child = subprocess.Popen([sys.executable, "-m", "testbed", *arguments])
        try:
            wait_until(lambda: len(present() - before) == 4, "the run's devices")
        finally:
            child.kill()
            child.wait()
        left = present() - before
        assert set(read_state(name).run_devices) == left
        assert len(left) == 4  # what this is about: nobody has removed them
        yield name, left
    finally:
        api.destroy(name)
    assert present() == before


def test_devices_of_a_killed_run_are_garbage_on_a_lab_that_stays(tmp_path: Path) -> None:
    with lab_with_a_killed_runs_devices(tmp_path) as (name, left):
        assert name not in api.collect_garbage()[0]
        assert not present() & left
        assert read_state(name).run_devices == []


def test_next_run_makes_its_own_devices_where_a_killed_one_has_left_some(tmp_path: Path) -> None:
    with lab_with_a_killed_runs_devices(tmp_path) as (name, left):
        scenario = api.load(SCENARIO, ["workload.0.size=256 KiB", "workload.0.iters=1", "expect=[]"])
        assert api.run(scenario, name=name).results[0].wrong_elements == 0  # an interface bears one device
        assert not present() & left
        assert read_state(name).run_devices == []


def test_devices_of_a_killed_run_go_with_the_lab(tmp_path: Path) -> None:
    with lab_with_a_killed_runs_devices(tmp_path):
        pass  # the lab is removed, and all devices with it


def test_a_lab_is_not_built_over_somebody_elses_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = present()
    monkeypatch.setattr(rxe_devices, "has_device", lambda name: name.endswith("host2"))
    name = lab_name("taken")
    with pytest.raises(LabError, match=f"{name}-host2"), api.deploy(api.load(SCENARIO), name=name):
        pass
    assert present() == before
    assert name not in api.labs()
