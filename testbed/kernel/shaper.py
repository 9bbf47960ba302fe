"""The rates of ports' shapers, changed while frames stand in their queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from testbed.kernel import tc
from testbed.kernel.namespaces import entered
from testbed.kernel.netlink import Message, RouteSocket


@dataclass(frozen=True, slots=True)
class ShapedPort:
    """A port whose rate may change.

    Attributes:
        port: Port id.
        index: Interface index.
        ifname: Interface.
        netns: Descriptor of its namespace.
        burst_bytes: Its bucket.
        overhead_bytes: Charged per frame beside its length.
    """

    port: int
    index: int
    ifname: str
    netns: int
    burst_bytes: int
    overhead_bytes: int


class ShaperRates:
    """Changes the rates of shapers; close it to let go of its sockets.

    Args:
        ports: The ports.
    """

    def __init__(self, ports: Sequence[ShapedPort]) -> None:
        self._ports = {port.port: port for port in ports}
        self._sockets: dict[int, RouteSocket] = {}
        for port in ports:
            if port.netns not in self._sockets:
                with entered(port.netns):
                    self._sockets[port.netns] = RouteSocket()

    def close(self) -> None:
        """Close the sockets; rates stay as they are."""
        for opened in self._sockets.values():
            opened.close()

    def change(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Give ports another rate, by port id.

        Raises:
            KernelError: The kernel refused.
        """
        requests: dict[int, list[Message]] = {}
        for port_id, rate in wall_rates_bytes_per_s.items():
            port = self._ports[port_id]
            requests.setdefault(port.netns, []).append(
                tc.create_tbf(
                    port.index,
                    port.ifname,
                    tc.ROOT_HANDLE + 1,
                    tc.DATA_HANDLE,
                    rate_bytes_per_s=rate,
                    burst_bytes=port.burst_bytes,
                    overhead_bytes=port.overhead_bytes,
                )
            )
        for netns, messages in requests.items():
            self._sockets[netns].request(messages)
