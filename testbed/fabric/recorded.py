"""What a lab's record says of its fabric, for those who work in a lab without taking it."""

from __future__ import annotations

from testbed.errors import LabError
from testbed.kernel.registry import LabState, read_state
from testbed.plan.fabric import build_topology
from testbed.scenario import Scenario
from testbed.topology import Topology


def read_recorded(name: str) -> tuple[LabState, Topology]:
    """Return the record of a lab that was finished, and its topology.

    Raises:
        LabError: There is no such lab, or it was never finished.
    """
    state = read_state(name)
    if not state.ready:
        raise LabError(f"lab {name!r} was never finished", hint="`testbed gc` removes it")
    return state, build_topology(Scenario.model_validate(state.scenario))
