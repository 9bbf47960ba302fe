"""What the bars share: plans, runs that may be judged, and someone who sends pause frames."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

import testbed
from testbed.carriers.protocol import WorkloadSamples
from testbed.fabric import Fabric
from testbed.host import MachineCounters
from testbed.kernel.gate import PauseSender, open_bypass_socket
from testbed.kernel.links import mac_bytes
from testbed.measure.verdict import judge
from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.results import FidelityVerdict, Result
from testbed.scenario import load_scenario
from tests.netns.labs import in_node

T = TypeVar("T")

TWO_LEAVES = Path("tests/netns/pfc.yaml").read_text()
CAPACITY_PACKETS_PER_S = 150_000.0
ATTEMPTS = 4


def plan_of(text: str, *settings: str) -> Plan:
    return compile_plan(load_scenario(text, settings), capacity_packets_per_s=CAPACITY_PACKETS_PER_S)


def doubts_of(plan: Plan, samples: WorkloadSamples, tolerance: float, steal_fraction: float) -> str:
    """Return why a run cannot be judged; nothing where the machine's share is below what a bar tolerates."""
    verdict = judge(
        samples.machine,
        wall_tick_ns=plan.dilation.wall_tick_ns,
        softnet_drops=0,
        steal_fraction=steal_fraction,
        wall_gate_allowance_ns=plan.wall_gate_allowance_ns,
    )
    error = verdict.estimated_error_fraction
    print(f"{verdict.verdict}: the machine's share may be {error}, the bar tolerates {tolerance}")
    # No pause was obeyed late, and nothing was stolen.
    share_alone = all(reason.startswith("the machine's share") for reason in verdict.reasons)
    if verdict.verdict is not FidelityVerdict.INVALID and share_alone and error is not None and error < tolerance:
        return ""
    return "; ".join(verdict.reasons)


def judged(plan: Plan, run: Callable[[], tuple[T, Sequence[WorkloadSamples]]], tolerance: float) -> T:
    """Run until a run can be judged and return what it showed; skip the test when none can.

    Args:
        plan: What is run.
        run: Runs it once; returns what it showed, and the samples of the machine.
        tolerance: Of the bar: the machine's own share in the completion time must be below it.
    """
    heard: list[str] = []
    for _ in range(ATTEMPTS):
        before = MachineCounters.read()
        seen, samples = run()
        steal = MachineCounters.read().steal_fraction_since(before)
        doubts = [doubt for one in samples if (doubt := doubts_of(plan, one, tolerance, steal))]
        if not doubts:
            return seen
        heard.append(doubts[0])
    pytest.skip(f"not judged: none of {ATTEMPTS} runs could be: {' / '.join(heard)}")


def trusted_run(file: Path, *settings: str, tolerance: float = 0.0) -> Result:
    """Return a run that this machine could be trusted with; skip as not judged when there is none in a few.

    Args:
        file: The scenario.
        settings: Changes to it.
        tolerance: A run that is degraded for nothing but the machine's own share in the completion time will do where that is
            below this part of it.
    """
    scenario = testbed.load(file, settings)
    for _ in range(ATTEMPTS):
        result = testbed.run(scenario, series=False)
        fidelity = result.fidelity
        if fidelity is None or fidelity.verdict is FidelityVerdict.INVALID:
            continue
        error = fidelity.estimated_error_fraction
        share_alone = all(reason.startswith("the machine's share") for reason in fidelity.reasons)
        if fidelity.verdict is FidelityVerdict.TRUSTED or (error is not None and error < tolerance and share_alone):
            return result
    pytest.skip(f"not judged: none of {ATTEMPTS} runs could be trusted")


@contextlib.contextmanager
def spine_pauser(fabric: Fabric) -> Iterator[Callable[[int, int], None]]:
    """Yield what sends a PFC frame about a priority, with its quanta, from the spine to leaf0."""
    topology = fabric.plan.topology
    (spine,) = (node for node in topology.nodes if node.name == "spine0")
    port = topology.port(spine.ports[0])
    with in_node(fabric, "spine0"):
        opened = open_bypass_socket(port.ifname)
    sender = PauseSender({port.id: opened}, {port.id: mac_bytes(port.mac)})
    with opened:
        yield lambda priority, quanta: sender.send(port.id, priority, quanta)
