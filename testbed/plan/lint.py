"""What to check before trusting a figure: warnings that a plan carries into its result."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from testbed.plan.dilation import DilationBound

if TYPE_CHECKING:
    from testbed.plan.model import Plan

# A flow that slows to half its rate piles up about a chunk per rank that can run ahead; below three chunks a collision drops.
_BUFFER_CHUNKS = 3


def find_warnings(plan: Plan) -> tuple[str, ...]:
    """Return what the lint found, a sentence each."""
    warnings = []
    dilation = plan.dilation
    if dilation.bound is DilationBound.FIXED:
        if dilation.value < dilation.fidelity_value:
            warnings.append(
                f"time_dilation {dilation.value:g} is below {dilation.fidelity_value:.0f}: a tick is longer than a quarter "
                f"of the {dilation.smallest_time_name} ({dilation.smallest_time_ns} ns)"
            )
        if dilation.capacity_value is not None and dilation.value < dilation.capacity_value:
            warnings.append(
                f"time_dilation {dilation.value:g} is below {dilation.capacity_value:.0f}, "
                "what this machine's measured capacity asks for"
            )
    for planned in plan.workloads:
        sharing = Counter(port for path in planned.paths for port in path.ports)
        worst = max(sharing.values(), default=1)
        chunk = planned.workload.size_bytes // max(1, len(planned.order))
        if worst > 1 and plan.buffer_bytes < _BUFFER_CHUNKS * chunk:
            warnings.append(
                f"{worst} flows share a link and a switch buffers {plan.buffer_bytes} bytes, less than {_BUFFER_CHUNKS} "
                f"chunks of {chunk}: without PFC this can drop"
            )
    return tuple(warnings)
