"""The plan that a run or a lab goes by: of a scenario, on this machine, or in a lab that stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.api.listener import RunListener
from testbed.errors import LabError

if TYPE_CHECKING:
    from testbed.kernel.probe import Finding
    from testbed.plan.model import Plan
    from testbed.plan.operations import BackEnds
    from testbed.scenario import Scenario


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Return the scenario in a file.

    Args:
        path: The YAML file.
        overrides: Changes such as ``"fabric.spines=8"``, applied in order.

    Raises:
        ScenarioError: With every mistake in the file.
    """
    from testbed.scenario import load_scenario

    return load_scenario(Path(path), overrides)


def build_plan(scenario: Scenario, *, measure: bool = True) -> Plan:
    """Return the plan of a scenario; nothing is built, nothing is measured, no root is needed.

    Args:
        scenario: The scenario.
        measure: Take this machine's capacity from the cache, if it was ever measured. False gives the plan of a machine
            whose capacity is not known: the same everywhere.

    Raises:
        PlanError: No fabric can be planned from it.
    """
    from testbed.plan.compile import compile_plan

    if not measure:
        return compile_plan(scenario, capacity_packets_per_s=None)
    from testbed.carriers.capacity import known_capacity, known_tick_lateness_ns, wall_tick_ns

    return compile_plan(
        scenario,
        capacity_packets_per_s=known_capacity(),
        wall_tick_lateness_ns=known_tick_lateness_ns(),
        wall_tick_ns=wall_tick_ns(),
    )


def find_back_ends(plan: Plan) -> BackEnds | None:
    """Return which of this kernel's means a fabric of the plan would be made with; None without root, which trying them needs."""
    import os

    if os.geteuid() != 0:
        return None
    from testbed.fabric.back_ends import choose_back_ends

    return choose_back_ends(plan)


def probe_machine() -> tuple[Finding, ...]:
    """Try everything that runs need on this machine and say what was found; nothing is left behind."""
    from testbed.kernel.probe import probe_capacity, probe_machine

    return (*probe_machine(), probe_capacity(_known_capacity_or_none()))


def _known_capacity_or_none() -> float | None:
    from testbed.carriers.capacity import known_capacity

    return known_capacity()


def plan_with_capacity(scenario: Scenario, listener: RunListener) -> Plan:
    """Return the plan, after measuring this machine's capacity where that decides and was never done."""
    if scenario.time_dilation is None and _known_capacity_or_none() is None:
        from testbed.carriers.capacity import measure_capacity

        build_plan(scenario, measure=False)  # what cannot be planned needs no measurement
        listener.note("measuring what this machine can carry (once; the figure is cached)")
        measure_capacity(listener.note)
    return build_plan(scenario)


def plan_for_lab(scenario: Scenario, name: str) -> Plan:
    """Return the plan of a scenario at the time dilation of a deployed lab, with what is broken there.

    Raises:
        LabError: There is no such lab, it was never finished, or the scenario asks for another dilation.
    """
    from testbed.fabric.broken import read_broken
    from testbed.kernel.registry import read_state

    known = scenario.faults
    broken = tuple(fault for fault in read_broken(read_state(name)) if fault not in known)
    return plan_at_dilation(scenario.model_copy(update={"faults": (*broken, *known)}), name)


def plan_at_dilation(scenario: Scenario, name: str) -> Plan:
    """Return the plan of a scenario at the time dilation of a deployed lab, as `plan_for_lab` does."""
    from testbed.kernel.registry import read_state

    dilation = read_state(name).details.get("time_dilation")
    if dilation is None:
        raise LabError(f"lab {name!r} was never finished", hint="`testbed gc` removes it")
    if scenario.time_dilation is None:
        scenario = scenario.model_copy(update={"time_dilation": float(dilation)})
    return build_plan(scenario)


def describe_building(plan: Plan) -> str:
    """Return the line that says what is being built."""
    topology, dilation = plan.topology, plan.dilation
    return (
        f"building {len(topology.nodes)} nodes and {len(topology.links)} link{'s' * (len(topology.links) != 1)} "
        f"at time dilation {dilation.value:g} ({dilation.bound})"
    )
