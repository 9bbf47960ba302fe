"""What is broken by hand in a deployed lab: recorded with the lab, in the words of the scenario, before it is done."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from testbed.errors import LabError
from testbed.fabric.fabric import Fabric
from testbed.fabric.faults import state_writer
from testbed.kernel import registry
from testbed.plan.faults import FabricState, build_changes, describe_fault
from testbed.plan.model import Plan
from testbed.routing import Knowledge
from testbed.scenario import Fault, Scenario
from testbed.topology import Topology

_BROKEN, _DISTURBED = "broken", "disturbed_ports"


def read_broken(state: registry.LabState) -> tuple[Fault, ...]:
    """Return what is broken in a lab, as faults that stand from the beginning."""
    return tuple(Fault.model_validate(item) for item in state.details.get(_BROKEN, ()))


def broken_state(scenario: Scenario, topology: Topology, broken: Sequence[Fault]) -> FabricState:
    """Return the state of a fabric in which some faults stand.

    Raises:
        PlanError: One names something that the fabric lacks.
    """
    changes, _ = build_changes(scenario.model_copy(update={"faults": tuple(broken)}), topology)
    return changes[0][1]


def note_disturbed(fabric: Fabric, ports: Sequence[int]) -> None:
    """Record, before it is done, that a run breaks things in a deployed lab, and which ports' rates it changes."""
    if not fabric.state.ephemeral:
        fabric.state.details[_DISTURBED] = list(ports)
        registry.write_state(fabric.state)


def note_undisturbed(fabric: Fabric) -> None:
    """Record that all is as it was."""
    if fabric.state.details.pop(_DISTURBED, None) is not None:
        registry.write_state(fabric.state)


def repair(fabric: Fabric) -> None:
    """Let a deployed lab be as its record says if a run that broke things in it was killed.

    Raises:
        KernelError: The kernel refused a rate.
    """
    disturbed = fabric.state.details.get(_DISTURBED)
    if disturbed is None:
        return
    plan = fabric.plan
    own = broken_state(plan.scenario, plan.topology, read_broken(fabric.state))
    everything = FabricState(
        dead_ports=frozenset(port.id for port in plan.topology.ports),
        rates_bits_per_s=tuple((port, 1) for port in sorted(disturbed)),
        losses=tuple((port.id, Fraction(1)) for port in plan.topology.ports),
    )
    ports = {*disturbed, *(port for port, _ in own.rates_bits_per_s)}
    with state_writer(fabric, everything, sorted(ports)) as writer:
        writer.write(own, plan.faults.tables_for(Knowledge.of(own.links)))
    note_undisturbed(fabric)


def set_broken(fabric: Fabric, broken: Sequence[Fault]) -> None:
    """Let exactly these faults stand in a deployed lab; its switches forward by what is left.

    They are recorded first: whatever comes between, what is recorded can be healed.

    Args:
        fabric: The lab, held by this process.
        broken: The faults.

    Raises:
        PlanError: One names something that the fabric lacks.
        KernelError: The kernel refused a rate.
    """
    repair(fabric)
    plan, state = fabric.plan, fabric.state
    before = broken_state(plan.scenario, plan.topology, read_broken(state))
    after = broken_state(plan.scenario, plan.topology, broken)
    ports = {port for one in (before, after) for port, _ in one.rates_bits_per_s}
    state.details[_BROKEN] = [_plain(fault) for fault in broken]
    registry.write_state(state)
    with state_writer(fabric, before, sorted(ports)) as writer:
        writer.write(after, plan.faults.tables_for(Knowledge.of(after.links)))


def _plain(fault: Fault) -> dict[str, Any]:
    dumped: dict[str, Any] = fault.model_dump(by_alias=True, exclude_none=True)
    return dumped


def heal(broken: Sequence[Fault], target: str | None) -> tuple[Fault, ...]:
    """Return what is left broken when a link, switch or host is healed; None heals all.

    Raises:
        LabError: Nothing is broken there.
    """
    left = tuple(fault for fault in broken if target is not None and fault.target != target)
    if target is not None and len(left) == len(broken):
        known = ", ".join(describe_fault(fault) for fault in broken) or "nothing"
        raise LabError(f"nothing is broken at {target!r} (broken: {known})")
    return left


def standing_faults(plan: Plan) -> tuple[Fault, ...]:
    """Return the faults of a plan that stand from the beginning to the end."""
    faults = plan.scenario.faults
    return tuple(
        faults[one.fault]
        for one in plan.faults.incidents
        if not one.mends and one.begin_ns == 0 and one.end_ns is None and faults[one.fault].for_ns is None
    )
