"""Each row of a result: what ran is counted and judged by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from testbed.api.listener import RunListener

if TYPE_CHECKING:
    from testbed.fabric import Fabric
    from testbed.measure.counters import FabricCounters
    from testbed.measure.samples import MachineSamples
    from testbed.results import Fidelity


class BaselineListener:
    """Passes progress on, and takes the baseline of the counters when the first measured iteration begins."""

    def __init__(self, fabric: Fabric, listener: RunListener) -> None:
        from testbed.measure.counters import Snapshot

        self._fabric = fabric
        self._listener = listener
        self.baseline = Snapshot.of(fabric.arrays.queues, fabric.arrays.qps, fabric.arrays.ingress)

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """Take the baseline if this is the first that counts; pass it on."""
        from testbed.measure.counters import Snapshot

        if number == 0 and not warmup:
            self._fabric.read_kernel_marks()
            self._fabric.arrays.queues["peak_bytes"] = 0
            self.baseline = Snapshot.of(
                self._fabric.arrays.queues, self._fabric.arrays.qps, self._fabric.arrays.ingress
            )
        self._listener.iteration(number, of, warmup=warmup)


class _Sampled(Protocol):
    """Raw figures of something that ran."""

    @property
    def machine(self) -> Sequence[MachineSamples]:
        """What was noted about the machine in each measured iteration."""


_S = TypeVar("_S", bound=_Sampled)


class Rows:
    """Counts and judges what runs over a fabric, row by row: a bad one must not hide behind good ones, nor spoil them."""

    def __init__(self, fabric: Fabric, listener: RunListener) -> None:
        from testbed.host import MachineCounters

        self._fabric = fabric
        self._listener = listener
        self._before = MachineCounters.read()
        self.counters: list[FabricCounters] = []
        self.fidelities: list[Fidelity] = []

    def run(self, title: str, run: Callable[[BaselineListener], _S]) -> _S:
        """Run one row and return its samples."""
        from testbed.host import MachineCounters
        from testbed.measure.counters import FabricCounters, Snapshot
        from testbed.measure.verdict import judge

        fabric, plan = self._fabric, self._fabric.plan
        self._listener.note(title)
        heard = BaselineListener(fabric, self._listener)
        sampled = run(heard)
        fabric.read_kernel_marks()
        self.counters.append(
            FabricCounters.between(
                heard.baseline,
                Snapshot.of(fabric.arrays.queues, fabric.arrays.qps, fabric.arrays.ingress),
                wall_duration_ns=sum(one.wall_duration_ns for one in sampled.machine),
            )
        )
        after = MachineCounters.read()
        self.fidelities.append(
            judge(
                sampled.machine,
                wall_tick_ns=plan.dilation.wall_tick_ns,
                softnet_drops=after.drops_since(self._before),
                steal_fraction=after.steal_fraction_since(self._before),
                wall_gate_allowance_ns=plan.wall_gate_allowance_ns,
                lossless_drops=int(self.counters[-1].headroom_drops_packets.sum()),
            )
        )
        self._before = after
        return sampled
