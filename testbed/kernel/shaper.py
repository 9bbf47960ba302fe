"""The rates of ports' shapers, changed while frames stand in their queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from testbed.kernel.namespaces import RouteSockets
from testbed.kernel.netlink import Message
from testbed.kernel.queues import Egress, change_rate


@dataclass(frozen=True, slots=True)
class ShapedPort:
    """A port whose rate may change.

    Attributes:
        port: Port id.
        netns: Descriptor of its namespace.
        egress: How its egress was made.
    """

    port: int
    netns: int
    egress: Egress


class ShaperRates:
    """Changes the rates of shapers; close it to let go of its sockets.

    Args:
        ports: The ports.
    """

    def __init__(self, ports: Sequence[ShapedPort]) -> None:
        self._ports = {port.port: port for port in ports}
        self._sockets = RouteSockets(port.netns for port in ports)

    def close(self) -> None:
        """Close the sockets; rates stay as they are."""
        self._sockets.close()

    def change(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Give ports another rate, by port id.

        Raises:
            KernelError: The kernel refused.
        """
        requests: dict[int, list[Message]] = {}
        for port_id, rate in wall_rates_bytes_per_s.items():
            port = self._ports[port_id]
            messages = change_rate(replace(port.egress, wall_rate_bytes_per_s=rate))
            requests.setdefault(port.netns, []).extend(messages)
        for netns, messages in requests.items():
            self._sockets[netns].request(messages)
