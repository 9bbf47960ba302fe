"""What waits behind strict priorities: which one, at which port, and for how long at most."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from testbed.roce.wire import LINK_OVERHEAD_BYTES, Opcode, frame_bytes
from testbed.scenario import Scenario

if TYPE_CHECKING:
    from testbed.plan.model import PlannedWorkload
    from testbed.topology import Topology


@dataclass(frozen=True, slots=True)
class StrictWait:
    """The longest wait behind strict priorities that a workload can bring.

    Attributes:
        port: Port id.
        priority: That waits.
        ahead: The strict priorities that go before it there, in their order.
        wait_ns: The time of all that they send there in an iteration, emulated.
    """

    port: int
    priority: int
    ahead: tuple[int, ...]
    wait_ns: int


def find_strict_wait(scenario: Scenario, topology: Topology, planned: PlannedWorkload) -> StrictWait | None:
    """Return the longest wait of a workload, or None where nothing waits behind a strict priority."""
    served, mtu_bytes = scenario.qos.served_priorities, scenario.transport.mtu_bytes
    wire_share = (frame_bytes(Opcode.WRITE_MIDDLE, mtu_bytes) + LINK_OVERHEAD_BYTES) / mtu_bytes
    if not any(one.is_strict for one in served[:-1]):
        return None
    sent = np.bincount(planned.schedule.connection, planned.schedule.nbytes, minlength=len(planned.connections))
    carried: dict[int, Counter[int]] = {}
    for connection, routes, nbytes in zip(planned.connections, planned.routes, sent.tolist(), strict=False):
        for route in routes:
            for port in route.path.ports:
                carried.setdefault(port, Counter())[connection.priority] += nbytes * route.share
    longest: StrictWait | None = None
    for port, of_priority in sorted(carried.items()):
        ahead: list[int] = []
        for one in served:
            if not of_priority[one.priority]:
                continue
            ahead_bytes = sum(of_priority[priority] for priority in ahead) * wire_share
            wait_ns = round(8e9 * ahead_bytes / topology.port(port).rate_bits_per_s)
            if wait_ns > (longest.wait_ns if longest else 0):
                longest = StrictWait(port, one.priority, tuple(ahead), wait_ns)
            ahead += [one.priority] if one.is_strict else []
    return longest
