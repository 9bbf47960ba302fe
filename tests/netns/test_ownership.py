"""What is ours is removed, what is not is left alone, whatever ends a process and whenever."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

from testbed.carriers.engine import engine_carrier
from testbed.engine.loop import TickLoop
from testbed.errors import LabError, MachineError
from testbed.fabric import Fabric
from testbed.kernel import bpf, host_tuning, links, namespaces, registry
from testbed.kernel.namespaces import NETNS_DIR
from testbed.kernel.registry import REGISTRY_DIR
from testbed.kernel.rxe import create_rxe, delete_rxe, load_connection_manager
from testbed.kernel.scheduling import MonotonicClock
from testbed.roce.queue_pairs import RESPONDER, qp_index
from tests.conftest import list_test_labs, list_test_namespaces
from tests.netns.labs import (
    PATIENCE_S,
    Quiet,
    assert_drained,
    lab_name,
    plain_carrier,
    small_fabric,
    small_plan,
    wait_until,
)

pytestmark = pytest.mark.root

KILLS = 6
INTERRUPTED = 42
QUICK = ("workload.0.size=32 KiB", "workload.0.iters=2")


@contextlib.contextmanager
def foreign_namespace(name: str) -> Iterator[Path]:
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield NETNS_DIR / name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        gc.disable()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def live_for(child: int, seconds: float) -> None:
    """Let a child live for a time, or until it ends: the moment itself is what is tried."""
    descriptor = os.pidfd_open(child)
    try:
        select.select([descriptor], [], [], seconds)
    finally:
        os.close(descriptor)


def assert_host_restored() -> None:
    """Check that what a run raises outside its namespaces is put back, unless another run has the machine."""
    with open(REGISTRY_DIR / "host.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        assert not (REGISTRY_DIR / "host.json").exists()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if (entry / "comm").read_text().startswith("ksoftirqd/"):
                        assert os.sched_getscheduler(int(entry.name)) == os.SCHED_OTHER


# --- names -------------------------------------------------------------------------------------------------------------


def test_namespace_of_another_with_a_name_of_ours_is_refused_and_untouched() -> None:
    name = lab_name("taken")
    with foreign_namespace(f"{name}-leaf1") as foreign:
        before = identity(foreign)
        subprocess.run(["ip", "-n", foreign.name, "link", "set", "lo", "alias", "mine"], check=True)
        with pytest.raises(LabError, match="exists already"), Fabric.build(small_plan(), name):
            pytest.fail("was built over a foreign namespace")
        assert list_test_namespaces() == [foreign.name]  # what was built before it was met is gone
        assert name not in registry.list_labs()
        registry.collect_garbage()
        assert identity(foreign) == before
        shown = json.loads(subprocess.check_output(["ip", "-n", foreign.name, "-j", "link", "show", "lo"]))
        assert shown[0]["ifalias"] == "mine"


def test_namespace_that_replaced_one_of_ours_is_left_alone() -> None:
    fabric = Fabric.deploy(small_plan(), lab_name("replaced"))
    stolen = fabric.namespace_of("leaf0")
    subprocess.run(["ip", "netns", "delete", stolen], check=True)
    with foreign_namespace(stolen) as foreign:
        before = identity(foreign)
        assert fabric.destroy() == [stolen]
        assert identity(foreign) == before
        assert list_test_namespaces() == [stolen]


def test_second_lab_of_a_name_is_refused_and_the_first_goes_on() -> None:
    with small_fabric(*QUICK, name="one") as fabric:
        with pytest.raises(LabError, match="exists already"), Fabric.build(small_plan(), fabric.name):
            pytest.fail("was built twice")
        with plain_carrier(fabric) as carrier:
            assert carrier.run(0, Quiet()).retransmitted_packets == 0


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "a b", "-a", "x" * 41])
def test_name_that_could_not_be_a_folder_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="cannot name a lab"), Fabric.build(small_plan(), name):
        pytest.fail("was built")


# --- several labs ------------------------------------------------------------------------------------------------------


def test_gc_touches_neither_a_running_nor_a_deployed_lab() -> None:
    plan = small_plan(*QUICK)
    with Fabric.deploy(plan, lab_name("deployed")) as deployed:
        pass
    try:
        with small_fabric(*QUICK, name="live") as live:
            before = list_test_namespaces()
            removed, foreign = registry.collect_garbage()
            assert not {deployed.name, live.name} & set(removed)
            assert not [name for name in foreign if name in before]
            assert list_test_namespaces() == before
            with Fabric.attach(plan, deployed.name) as attached:
                registry.collect_garbage()
                # Both carry traffic, neither the other's.
                for fabric in (live, attached):
                    others = [live, attached]
                    others.remove(fabric)
                    counted = others[0].arrays.queues.copy()
                    with plain_carrier(fabric) as carrier:
                        assert carrier.run(0, Quiet()).retransmitted_packets == 0
                    assert (others[0].arrays.queues == counted).all()
                    assert_drained(fabric)
    finally:
        deployed.destroy()


def test_gc_beside_labs_that_come_and_go_harms_none() -> None:
    # Every look of the collector meets a lab in another state.
    name = lab_name("comes")

    def come_and_go() -> None:
        for round_ in range(12):
            with Fabric.build(small_plan(), f"{name}-{round_}") as fabric:
                assert (fabric.arrays.ports["peer"][1:] > 0).all()

    child = in_child(come_and_go)
    looks = 0
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        _, foreign = registry.collect_garbage()
        assert not foreign
        looks += 1
    assert end_of(child) == 0
    assert looks > 12


# --- a run that is ended wherever it is ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A moment of a run: a call that it makes.

    Attributes:
        owner: The module or class that has it.
        attribute: Its name there.
        number: Which of the calls, from 0.
    """

    owner: object
    attribute: str
    number: int = 0

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.attribute} number {self.number}"


# Every stage of a run, from what it writes down first to what it removes last. The second mount of a namespace is its name.
STAGES = (
    Place(registry, "write_state", 0),  # recorded
    Place(registry.os, "fsync", 0),
    Place(bpf, "load_object", 0),
    Place(namespaces, "set_alias", 2),
    Place(namespaces, "write_sysctl", 4),
    Place(namespaces.os, "write", 0),
    Place(namespaces, "_mount", 5),
    Place(links, "disable_offloads", 1),  # links, and nothing on them
    Place(registry, "write_state", 1),  # ready
    Place(host_tuning, "_write_record", 0),
    Place(host_tuning.os, "sched_setscheduler", 0),  # the host is changed
    Place(MonotonicClock, "sleep_until_ns", 8),  # frames are under way
    Place(host_tuning, "_restore", 0),
    Place(registry, "delete_namespace", 3),
    Place(registry.shutil, "rmtree", 0),
)


def signal_itself(place: Place, number: signal.Signals, *, before: bool) -> None:
    """Have this process send itself a signal before or after a call."""
    original, calls = getattr(place.owner, place.attribute), itertools.count()

    def called(*arguments: object, **options: object) -> object:
        here = next(calls) == place.number
        if here and before:
            os.kill(os.getpid(), number)
        result = original(*arguments, **options)
        if here and not before:
            os.kill(os.getpid(), number)
        return result

    setattr(place.owner, place.attribute, called)


def build_run_destroy(name: str) -> None:
    with Fabric.build(small_plan(*QUICK), name) as fabric, engine_carrier(fabric) as (carrier, _):
        carrier.run(0, Quiet())


def time_of_whole_run() -> float:
    name, begin = lab_name("whole"), time.monotonic()
    assert end_of(in_child(lambda: build_run_destroy(name))) == 0
    return time.monotonic() - begin


# --- SIGKILL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_gc_restores_the_host_at_whatever_stage_a_run_was_killed(before: bool) -> None:
    for stage in STAGES:
        name = lab_name("stage")

        def killed(stage: Place = stage, name: str = name) -> None:
            signal_itself(stage, signal.SIGKILL, before=before)
            build_run_destroy(name)

        assert end_of(in_child(killed)) == -signal.SIGKILL, f"{stage} was never called"
        _, foreign = registry.collect_garbage()
        assert not foreign, stage
        assert not list_test_namespaces(), stage
        assert name not in registry.list_labs(), stage
        assert_host_restored()  # at once: the next run would do it too


def test_gc_restores_the_host_whenever_a_run_was_killed() -> None:
    """Between the stages too: at moments that nobody has chosen."""
    whole_s = time_of_whole_run()
    assert not list_test_namespaces()
    left_behind = 0
    for kill in range(KILLS):
        name = lab_name(f"kill{kill}")
        child = in_child(lambda name=name: build_run_destroy(name))
        live_for(child, whole_s * (kill + 0.5) / KILLS)
        os.kill(child, signal.SIGKILL)
        end_of(child)
        left_behind += bool(list_test_labs())
        removed, foreign = registry.collect_garbage()
        assert not foreign, kill
        assert not list_test_namespaces(), kill
        assert not list_test_labs(), kill
        assert name in removed or name not in registry.list_labs()
        assert_host_restored()
    # Precondition: the kills did not all come too early or too late.
    assert left_behind > KILLS // 3


def test_killed_destroy_of_a_deployed_lab_can_be_collected() -> None:
    for occurrence in (0, 1, 3):
        fabric = Fabric.deploy(small_plan(), lab_name("half"))

        def killed(fabric: Fabric = fabric, occurrence: int = occurrence) -> None:
            signal_itself(Place(registry, "delete_namespace", occurrence), signal.SIGKILL, before=True)
            fabric.destroy()

        child = in_child(killed)
        fabric.close()
        assert end_of(child) == -signal.SIGKILL
        removed, foreign = registry.collect_garbage()
        assert fabric.name in removed
        assert not foreign
        assert not list_test_namespaces()


def test_lab_with_rdma_devices_is_removed_where_the_programs_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = Fabric.deploy(small_plan(), lab_name("programless"))
    asked: list[str] = []

    def present(name: str) -> bool:
        asked.append(name)
        return True

    try:
        fabric.state.rxe_devices = {"1": "programless-host0"}
        with monkeypatch.context() as patched:
            patched.setattr(registry, "has_device", present)
            patched.setenv("PATH", "/nonexistent")
            load_connection_manager()  # may be built in, so nothing is missing yet
            with pytest.raises(MachineError, match="no program 'rdma'") as found:
                delete_rxe("programless-host0")
            assert found.value.hint == "apt-get install iproute2"
            here = os.open("/proc/self/ns/net", os.O_RDONLY)
            try:
                with pytest.raises(MachineError, match="no program 'rdma'"):
                    create_rxe("programless-host0", "lo", here)
            finally:
                os.close(here)
            assert fabric.destroy() == []
        assert asked == ["programless-host0"]
        assert fabric.name not in list_test_labs()
        assert not set(fabric.state.namespaces.values()) & set(list_test_namespaces())
    finally:
        registry.delete_lab(fabric.state)  # does nothing where it is gone


def test_killed_run_leaves_a_deployed_lab_usable() -> None:
    plan = small_plan("workload.0.size=64 KiB", "workload.0.iters=3")
    name = lab_name("usable")
    with Fabric.deploy(plan, name):
        pass

    def run(stage: Place, before: bool) -> None:
        signal_itself(stage, signal.SIGKILL, before=before)
        with Fabric.attach(plan, name) as fabric, engine_carrier(fabric) as (carrier, _):
            carrier.run(0, Quiet())

    stages = [
        (Place(host_tuning, "_write_record"), False),
        (Place(MonotonicClock, "sleep_until_ns", 2), True),  # frames are under way, more and more
        (Place(MonotonicClock, "sleep_until_ns", 12), True),
        (Place(TickLoop, "run_iteration", 1), True),  # all are out of the first iteration
        (Place(TickLoop, "run_iteration", 2), False),
        (Place(host_tuning, "_restore"), True),
    ]
    try:
        for stage, before in stages:
            assert end_of(in_child(lambda: run(stage, before))) == -signal.SIGKILL, f"{stage} was never called"  # noqa: B023
            assert name not in registry.collect_garbage()[0]
            with Fabric.attach(plan, name) as fabric, engine_carrier(fabric) as (carrier, _):
                samples = carrier.run(0, Quiet())
                expect_sound(fabric, samples.cct_ns, samples.retransmitted_packets)
    finally:
        with Fabric.attach(plan, name) as fabric:
            fabric.destroy()


def expect_sound(fabric: Fabric, cct_ns: tuple[float, ...], retransmitted_packets: int) -> None:
    """Check that a run saw its own arrivals, all of them, and none of an earlier run's."""
    planned = fabric.plan.workloads[0]
    assert retransmitted_packets == 0
    transfers = len(planned.schedule) // len(planned.connections)
    for connection in range(len(planned.connections)):
        row = fabric.arrays.qps[qp_index(connection, RESPONDER)]
        assert row["rx_messages"] == transfers * len(cct_ns)
        assert (row["out_of_order_packets"], row["duplicate_packets"]) == (0, 0)
    assert_drained(fabric)
    ratio = statistics.median(cct_ns) / planned.ideal_cct_ns
    # Frames of an earlier run would make it quicker than possible; slower than the tables predict is slower than it can be.
    assert 0.98 < ratio < 1.25 * planned.predicted_cct_ratio


# --- signals that can be heard -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ready", ["", "true"], ids=["recorded", "built"])
def test_signal_before_a_run_leaves_nothing(number: signal.Signals, ready: str, tmp_path: Path) -> None:
    """While it runs: test_cli_root.py."""
    name = lab_name("signalled")
    file = tmp_path / "signalled.yaml"
    file.write_text(
        f"{{name: {name}, "
        "fabric: {kind: clos, leaves: 2, spines: 2, hosts_per_leaf: 2, "
        "host_link: {rate: 400 Gbit/s}}, time_dilation: 20000, "
        "workload: [{collective: send_recv, size: 64 KiB, iters: 1000}]}"
    )
    command = [sys.executable, "-m", "testbed", "run", str(file), "--output", str(tmp_path / "out")]
    labs = REGISTRY_DIR / "labs"

    def is_there() -> bool:
        assert child.poll() is None, child.communicate()
        return any(f'"ready": {ready}' in one.read_text() for one in labs.glob(f"{name}*/state.json"))

    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            wait_until(is_there, "the lab")
            child.send_signal(number)
            _, words = child.communicate(timeout=3 * PATIENCE_S)
        finally:
            child.kill()
    assert child.returncode == 128 + number, words
    assert "Traceback" not in words
    assert not list_test_labs()
    assert not list_test_namespaces()


def test_no_signal_can_get_lost_in_an_attribute_lookup_during_a_run() -> None:
    # numpy asks what it is given for attributes and takes any exception for a "no", also one that a signal's handler raised
    # meanwhile. Python code runs in such a lookup where there is a __getattr__: an enum's, until Python 3.12.
    lookups = []

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "__getattr__" and frame.f_back is not None:
            caller = frame.f_back.f_code.co_filename
            if Path(caller).parent.name in ("engine", "carriers"):
                lookups.append(f"{caller}:{frame.f_back.f_lineno}")

    with small_fabric("workload.0.iters=2", name="lookup") as fabric, plain_carrier(fabric) as carrier:
        sys.setprofile(profile)
        try:
            carrier.run(0, Quiet())
        finally:
            sys.setprofile(None)
    assert lookups == []


def run_until_interrupted(name: str) -> None:
    """Run as without the command line, where Ctrl-C is a KeyboardInterrupt wherever Python is; exit with 42 for one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        build_run_destroy(name)
        os._exit(0)
    os._exit(INTERRUPTED)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_signal_handled_in_python_at_whatever_stage_leaves_nothing(before: bool) -> None:
    name = lab_name("interrupted")
    for stage in STAGES:

        def interrupted(stage: Place = stage) -> None:
            signal_itself(stage, signal.SIGINT, before=before)
            run_until_interrupted(name)

        assert end_of(in_child(interrupted)) == INTERRUPTED, stage
        assert not list_test_namespaces(), stage
        assert not list_test_labs(), stage
        assert_host_restored()


def test_signal_handled_in_python_leaves_nothing_whenever_it_comes() -> None:
    """Between the stages too: at moments that nobody has chosen."""
    whole_s = time_of_whole_run()
    name = lab_name("interrupted")
    interrupted = 0
    for moment in range(KILLS):
        child = in_child(lambda: run_until_interrupted(name))
        live_for(child, whole_s * (moment + 0.5) / KILLS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGINT)
        code = end_of(child)
        assert code in (0, 1, INTERRUPTED), code
        interrupted += code == INTERRUPTED
        assert not list_test_namespaces(), moment
        assert not list_test_labs(), moment
    assert interrupted > KILLS // 3  # precondition


def test_lab_in_use_is_refused_until_it_is_let_go() -> None:
    plan = small_plan(*QUICK)
    with Fabric.deploy(plan, lab_name("busy")) as fabric:
        answer: list[str] = []

        def attach() -> None:
            try:
                Fabric.attach(plan, fabric.name).close()
            except LabError as error:
                answer.append(str(error))

        other = threading.Thread(target=attach)
        other.start()
        other.join()
        assert "in use" in answer[0]
    with Fabric.attach(plan, fabric.name) as again:
        again.destroy()
