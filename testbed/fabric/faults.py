"""Makes a running fabric be in a state: links down, lossy or slow, and the tables that routing has made of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from testbed.fabric.apply import egress_of
from testbed.fabric.fabric import Fabric
from testbed.fabric.tables import TableWriter
from testbed.kernel import bpf, layout
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.shaper import ShapedPort, ShaperRates
from testbed.plan.faults import FabricState
from testbed.plan.operations import ShapePort
from testbed.routing import ForwardingTables


class StateWriter:
    """Writes states into a fabric, each in place of the one before.

    Args:
        fabric: The fabric.
        tables: Writes its tables.
        rates: Changes its shapers.
        shapers: How each port's egress was made, by port id.
        state: The state that it is in.

    Attributes:
        tables: Writes its tables.
        state: The state that it is in.
    """

    def __init__(
        self,
        fabric: Fabric,
        tables: TableWriter,
        rates: ShaperRates,
        shapers: Mapping[int, ShapePort],
        state: FabricState,
    ) -> None:
        self._fabric = fabric
        self.tables = tables
        self._rates = rates
        self._shapers = shapers
        self.state = state

    def prepare(self, tables: ForwardingTables) -> None:
        """Work out ahead of time what writing some tables will need."""
        self.tables.prepare(tables)

    def write(self, state: FabricState, tables: ForwardingTables | None) -> dict[int, int]:
        """Let the fabric be in a state from now on.

        A link that is down loses what is on it and in the queues before it; both ends know at once that it is down, and
        adaptive routing passes over it.

        Args:
            state: The state.
            tables: What the switches forward by; None leaves that as it is.

        Returns:
            Ports whose shaper has another rate now, with that rate, wall bytes per second.

        Raises:
            KernelError: The kernel refused a rate.
            LabError: The maps have no room for the tables.
        """
        before, self.state = self.state, state
        flags = self._fabric.arrays.ports["flags"]
        for port in sorted(state.dead_ports - before.dead_ports):
            flags[port] |= layout.PORT_DOWN
        if tables is not None:
            self.tables.write(tables)
        for port in sorted(before.dead_ports - state.dead_ports):
            flags[port] &= ~layout.PORT_DOWN & 0xFFFF
        self._write_losses(dict(before.losses), dict(state.losses))
        return self._write_rates(dict(before.rates_bits_per_s), dict(state.rates_bits_per_s))

    def _write_losses(self, before: Mapping[int, Fraction], after: Mapping[int, Fraction]) -> None:
        for port in sorted(before.keys() | after.keys()):
            if before.get(port) != after.get(port):
                own = self._fabric.plan.losses.get(port, Fraction(0))
                self._fabric.set_loss(port, 1 - (1 - own) * (1 - after.get(port, Fraction(0))))

    def _write_rates(self, before: Mapping[int, int], after: Mapping[int, int]) -> dict[int, int]:
        plan, changed = self._fabric.plan, {}
        for port in sorted(before.keys() | after.keys()):
            if before.get(port) != after.get(port):
                whole = plan.topology.port(port).rate_bits_per_s
                share = after.get(port, whole) / whole
                changed[port] = max(1, round(self._shapers[port].wall_rate_bytes_per_s * share))
        self._rates.change(changed)
        return changed


@contextlib.contextmanager
def state_writer(fabric: Fabric, state: FabricState, rate_ports: Sequence[int]) -> Iterator[StateWriter]:
    """Open what writes states into a fabric for the block.

    Args:
        fabric: The fabric.
        state: The state that it is in.
        rate_ports: Ports whose rate may change.
    """
    plan = fabric.plan
    topology = plan.topology
    shapers = {
        operation.port: operation
        for operation in plan.operations(
            [""] * len(topology.nodes), any_workload=fabric.any_workload, back_ends=fabric.back_ends
        )
        if isinstance(operation, ShapePort)
    }
    with contextlib.ExitStack() as stack:
        netns: dict[int, int] = {}
        for port in rate_ports:
            node = topology.port(port).node
            if node not in netns:
                netns[node] = open_namespace(fabric.namespace_of(topology.nodes[node].name))
                stack.callback(os.close, netns[node])
        shaped = [ShapedPort(port, netns[topology.port(port).node], egress_of(shapers[port])) for port in rate_ports]
        rates = stack.enter_context(contextlib.closing(ShaperRates(shaped)))
        overrides = bpf.open_map(fabric.state.details["maps"][layout.OVERRIDES])
        stack.callback(os.close, overrides)
        tables = TableWriter(topology, fabric.arrays, overrides, time_dilation=plan.dilation.value)
        yield StateWriter(fabric, tables, rates, shapers, state)
