"""Our RoCEv2 against the kernel's, across a fabric of a leaf, a spine and a leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from testbed.api.listener import RunListener, SilentListener
from testbed.api.planning import build_plan
from testbed.api.runs import ephemeral_fabric

if TYPE_CHECKING:
    from testbed.carriers.interop_check import InteropRow

# 50 Mbit/s on this machine's clock: a guest carries that, with rxe, fabric and Python on one CPU.
_SCENARIO = """
name: interop
fabric: {kind: clos, leaves: 2, spines: 1, hosts_per_leaf: 1, host_link: {rate: 400 Gbit/s, delay: 0 ns}}
transport: {retransmit_timeout: 40 us}
workload: [{pattern: flows, flows: [{src: 0, dst: 1, size: 1 MiB}]}]
time_dilation: 8000
"""


def check_interop(
    size_bytes: int = 10 << 20, overrides: Sequence[str] = (), *, listener: RunListener | None = None
) -> tuple[InteropRow, ...]:
    """Write random bytes from the engine to rxe and from rxe to our responders; return what came of each. Needs root.

    Args:
        size_bytes: How many, in each direction.
        overrides: Changes to the fabric, such as ``"fabric.uplink.loss=1/100"``.
        listener: Told of the progress.

    Raises:
        ScenarioError: An override is mistaken.
        MachineError: The kernel has no rxe, or there is no pyverbs.
    """
    from testbed.carriers.interop_check import DIRECTIONS, check_direction
    from testbed.carriers.verbs import import_verbs
    from testbed.kernel.netlink import require_root
    from testbed.scenario import load_scenario

    require_root()
    import_verbs()
    plan = build_plan(load_scenario(_SCENARIO, overrides, file_name="interop"))
    rows = []
    for direction in DIRECTIONS:
        (listener or SilentListener()).note(direction)
        with ephemeral_fabric(plan, any_workload=True) as fabric:
            rows.append(check_direction(direction, fabric, size_bytes))
    return tuple(rows)
