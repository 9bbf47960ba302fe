"""The egress of a port: mq, a shaper or classes for data, and below them the gates and markers that a kernel has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from testbed.kernel import tc
from testbed.kernel.gate import DataQueue, GateBackEnd
from testbed.kernel.gate_plug import PlugGate
from testbed.kernel.gate_tbf import TbfGate, create_shaper, shaper_handle
from testbed.kernel.netlink import Message
from testbed.kernel.red import create_red, red_handle

# Control frames are few and never shaped; this only bounds memory.
_CONTROL_QUEUE_PACKETS = 10_000
_FIRST_CLASS = 1

GATES: Mapping[str, GateBackEnd] = {gate.name: gate for gate in (TbfGate(), PlugGate())}
"""The gates by name."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a marker that is a qdisc marks: bytes and share."""

    kmin_bytes: int
    kmax_bytes: int
    pmax: float


@dataclass(frozen=True, slots=True)
class Egress:
    """The egress of a port.

    Attributes:
        index: Interface index.
        ifname: Interface.
        wall_rate_bytes_per_s: Of the link.
        burst_bytes: Its bucket.
        frame_wire_bytes: The largest frame with what the shaper charges beside.
        overhead_bytes: Charged per frame beside its length.
        weights: Weight of each data priority; the first takes what has a priority that is not among them.
        gate: Name of the gates; None where nothing is paused.
        marking: Thresholds where a qdisc marks; None where none does.
    """

    index: int
    ifname: str
    wall_rate_bytes_per_s: int
    burst_bytes: int
    frame_wire_bytes: int
    overhead_bytes: int
    weights: Sequence[tuple[int, int]]
    gate: str | None = None
    marking: Thresholds | None = None

    def queue(self, priority: int) -> DataQueue:
        """Return the queue of a priority."""
        is_class = len(self.weights) > 1
        return DataQueue(
            self.index,
            self.ifname,
            priority,
            tc.class_of(priority) if is_class else tc.ROOT_HANDLE + 1,
            is_class,
            self.wall_rate_bytes_per_s,
            self.burst_bytes,
            self.frame_wire_bytes,
            self.overhead_bytes,
        )


def create_egress(egress: Egress) -> list[Message]:
    """Return what makes a port's egress."""
    index, ifname = egress.index, egress.ifname
    messages = [tc.create_mq(index, ifname)]
    if len(egress.weights) > 1:
        messages += _create_classes(egress)
    for priority, _ in egress.weights:
        messages += _create_queue(egress, egress.queue(priority))
    messages.append(tc.create_pfifo(index, ifname, tc.ROOT_HANDLE + 2, tc.CONTROL_HANDLE, _CONTROL_QUEUE_PACKETS))
    return messages


def change_rate(egress: Egress) -> list[Message]:
    """Return what gives a port that was made before the rate that it has here; single queues open by it."""
    if len(egress.weights) > 1:
        return _create_classes(egress)[1:]
    return [create_shaper(egress.queue(egress.weights[0][0]))]


def _create_classes(egress: Egress) -> list[Message]:
    """Return an HTB: one class at the link's rate, a class per priority that may borrow all of it."""
    index, ifname, rate = egress.index, egress.ifname, egress.wall_rate_bytes_per_s
    total = sum(weight for _, weight in egress.weights)
    lightest = min(weight for _, weight in egress.weights)
    trunk = tc.DATA_HANDLE + _FIRST_CLASS
    messages = [tc.create_htb(index, ifname, tc.ROOT_HANDLE + 1, tc.DATA_HANDLE, tc.class_of(egress.weights[0][0]))]
    for parent, classid, share, quantum in (
        (tc.DATA_HANDLE, trunk, 1.0, egress.frame_wire_bytes),
        *(
            (trunk, tc.class_of(priority), weight / total, round(egress.frame_wire_bytes * weight / lightest))
            for priority, weight in egress.weights
        ),
    ):
        messages.append(
            tc.create_htb_class(
                index,
                ifname,
                parent,
                classid,
                rate_bytes_per_s=max(1, round(rate * share)),
                ceil_bytes_per_s=rate,
                burst_bytes=egress.burst_bytes,
                quantum_bytes=quantum,
                overhead_bytes=egress.overhead_bytes,
            )
        )
    return messages


def _create_queue(egress: Egress, queue: DataQueue) -> list[Message]:
    """Return what hangs under a priority's class: its shaper where it needs one, its marker, its gate."""
    gate = GATES[egress.gate] if egress.gate is not None else None
    messages, parent = [], queue.parent
    if not queue.is_class or (gate is not None and gate.is_shaper):
        messages.append(create_shaper(queue))
        parent = shaper_handle(queue) + 1
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
    elif queue.is_class and egress.marking is None:
        messages.append(tc.create_pfifo(queue.index, queue.ifname, parent, shaper_handle(queue), tc.MOST_PACKETS))
    return messages
