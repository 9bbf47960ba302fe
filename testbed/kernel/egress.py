"""The egress of a port as values, and what shares its rate among several priorities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from testbed.kernel import tc
from testbed.kernel.gate import DataQueue
from testbed.kernel.netlink import Message


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
        weights: Weight of each data priority, in the order of their classes: strict ones, which have None, before all others,
            the first before the second.
        rest: The priority that takes what names no class.
        gate: Name of the gates; None where nothing is paused.
        marking: Thresholds where a qdisc marks; None where none does.
        scheduler: Name of what shares the rate among several priorities.
        wall_delay_ns: Propagation that a qdisc adds; 0 where none does.
    """

    index: int
    ifname: str
    wall_rate_bytes_per_s: int
    burst_bytes: int
    frame_wire_bytes: int
    overhead_bytes: int
    weights: Sequence[tuple[int, int | None]]
    rest: int
    gate: str | None = None
    marking: Thresholds | None = None
    scheduler: str = "htb"
    wall_delay_ns: int = 0

    @property
    def strict_classes(self) -> int:
        """Return how many of the classes are strict: the first ones."""
        return sum(weight is None for _, weight in self.weights)

    @property
    def shares(self) -> list[tuple[int, int]]:
        """Return the priorities that have a weight, and it."""
        return [(priority, weight) for priority, weight in self.weights if weight is not None]

    def class_of(self, priority: int) -> int:
        """Return the class of a data priority."""
        return tc.class_of([one for one, _ in self.weights].index(priority))

    def queue(self, priority: int) -> DataQueue:
        """Return the queue of a priority."""
        is_class = len(self.weights) > 1
        return DataQueue(
            self.index,
            self.ifname,
            priority,
            self.class_of(priority) if is_class else tc.ROOT_HANDLE + 1,
            is_class,
            self.wall_rate_bytes_per_s,
            self.burst_bytes,
            self.frame_wire_bytes,
            self.overhead_bytes,
        )


class Scheduler(Protocol):
    """Shares a port's rate among priorities, strict ones first, the others by weight: a class for each (`Egress.class_of`).

    Attributes:
        name: How the scenario names it.
        delays_above: Whether a qdisc that delays hangs above the classes, made with them; else in each of them.
    """

    name: str
    delays_above: bool

    def create(self, egress: Egress) -> list[Message]:
        """Return what hangs it under the port's data queue."""

    def change_rate(self, egress: Egress) -> list[Message]:
        """Return what gives it the rate that the port has here."""
