"""The egress of a port: mq, a shaper or classes for data, and below them the delays, markers and gates that a kernel has."""

from __future__ import annotations

from collections.abc import Mapping

from testbed.kernel import tc
from testbed.kernel.delay_netem import create_netem, netem_handle
from testbed.kernel.egress import Egress, Scheduler, Thresholds
from testbed.kernel.gate import DataQueue, GateBackEnd
from testbed.kernel.gate_plug import PlugGate
from testbed.kernel.gate_tbf import TbfGate, create_shaper, shaper_handle
from testbed.kernel.netlink import Message
from testbed.kernel.red import create_red, red_handle
from testbed.kernel.scheduler_ets import EtsScheduler
from testbed.kernel.scheduler_htb import HtbScheduler
from testbed.kernel.scheduler_prio import PrioScheduler

__all__ = ["GATES", "SCHEDULERS", "Egress", "Thresholds", "change_rate", "create_egress"]

# Control frames are few and never shaped; this only bounds memory.
_CONTROL_QUEUE_PACKETS = 10_000

GATES: Mapping[str, GateBackEnd] = {gate.name: gate for gate in (TbfGate(), PlugGate())}
"""The gates by name."""

SCHEDULERS: Mapping[str, Scheduler] = {one.name: one for one in (HtbScheduler(), EtsScheduler(), PrioScheduler())}
"""The schedulers by name."""


def create_egress(egress: Egress) -> list[Message]:
    """Return what makes a port's egress."""
    index, ifname = egress.index, egress.ifname
    messages = [tc.create_mq(index, ifname)]
    if len(egress.weights) > 1:
        messages += SCHEDULERS[egress.scheduler].create(egress)
    for priority, _ in egress.weights:
        messages += _create_queue(egress, egress.queue(priority))
    control = tc.ROOT_HANDLE + 2, tc.CONTROL_HANDLE
    if egress.wall_delay_ns:
        messages.append(create_netem(index, ifname, *control, egress.wall_delay_ns))
    else:
        messages.append(tc.create_pfifo(index, ifname, *control, _CONTROL_QUEUE_PACKETS))
    return messages


def change_rate(egress: Egress) -> list[Message]:
    """Return what gives a port that was made before the rate that it has here; single queues open by it."""
    if len(egress.weights) > 1:
        return SCHEDULERS[egress.scheduler].change_rate(egress)
    return [create_shaper(egress.queue(egress.weights[0][0]))]


def _create_queue(egress: Egress, queue: DataQueue) -> list[Message]:
    """Return what hangs under a priority's class: its shaper where it needs one, its delay, its marker, its gate."""
    gate = GATES[egress.gate] if egress.gate is not None else None
    delayed = egress.wall_delay_ns and not (queue.is_class and SCHEDULERS[egress.scheduler].delays_above)
    messages, parent = [], queue.parent
    if not queue.is_class or (gate is not None and gate.is_shaper):
        messages.append(create_shaper(queue))
        parent = shaper_handle(queue) + 1
    if delayed:
        handle = netem_handle(queue.priority)
        messages.append(create_netem(queue.index, queue.ifname, parent, handle, egress.wall_delay_ns))
        parent = handle + 1
    if egress.marking is not None:
        marks = egress.marking
        messages.append(
            create_red(
                queue.index,
                queue.ifname,
                queue.priority,
                parent,
                kmin_bytes=marks.kmin_bytes,
                kmax_bytes=marks.kmax_bytes,
                pmax=marks.pmax,
            )
        )
        parent = red_handle(queue.priority) + 1
    if gate is not None:
        messages += gate.create(queue, parent)
    elif queue.is_class and egress.marking is None and not delayed:
        # A handle that no shaper has: the one above the scheduler bears the first of those.
        handle = tc.SHAPER_HANDLE + (queue.priority + 1 << 16)
        messages.append(tc.create_pfifo(queue.index, queue.ifname, parent, handle, tc.MOST_PACKETS))
    return messages
