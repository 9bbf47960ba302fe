"""What is done to build a fabric, as values: ``testbed plan`` describes the very operations that ``fabric`` executes."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

MAIN_TABLE = 254
"""The kernel's usual routing table (RT_TABLE_MAIN)."""


@dataclass(frozen=True, slots=True)
class CreateNamespace:
    """A network namespace for one node; ``forwards`` for a switch."""

    node: int
    name: str
    forwards: bool

    def describe(self) -> str:
        """Return the equal shell command."""
        return f"ip netns add {self.name}" + ("; sysctl net.ipv4.ip_forward=1" if self.forwards else "")


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One end of a veth pair."""

    node: int
    port: int
    ifname: str
    mac: str


@dataclass(frozen=True, slots=True)
class CreateLink:
    """A veth pair, made straight in its two namespaces."""

    a: LinkEnd
    b: LinkEnd
    mtu: int

    def describe(self) -> str:
        """Return the equal shell command."""
        return f"ip link add {self.a.ifname} type veth peer {self.b.ifname} mtu {self.mtu} numtxqueues 2"


@dataclass(frozen=True, slots=True)
class ShapePort:
    """The egress of a port: mq, a TBF for data, a FIFO for control.

    Attributes:
        node: Node index.
        port: Port id.
        ifname: Interface.
        wall_rate_bytes_per_s: Of the shaper, wire bytes.
        burst_bytes: Its bucket.
        overhead_bytes: Charged per frame beside its length.
    """

    node: int
    port: int
    ifname: str
    wall_rate_bytes_per_s: int
    burst_bytes: int
    overhead_bytes: int

    def describe(self) -> str:
        """Return the equal shell commands."""
        return (
            f"tc qdisc add dev {self.ifname} root handle 1: mq; "
            f"tc qdisc add dev {self.ifname} parent 1:1 tbf rate {self.wall_rate_bytes_per_s * 8}bit "
            f"burst {self.burst_bytes} overhead {self.overhead_bytes}; "
            f"tc qdisc add dev {self.ifname} parent 1:2 pfifo"
        )


@dataclass(frozen=True, slots=True)
class AddAddress:
    """An interface's address and its only neighbour."""

    node: int
    port: int
    ifname: str
    address: int
    prefix_len: int
    peer_address: int
    peer_mac: str

    def describe(self) -> str:
        """Return the equal shell commands."""
        return (
            f"ip addr add {IPv4Address(self.address)}/{self.prefix_len} dev {self.ifname}; "
            f"ip neigh add {IPv4Address(self.peer_address)} lladdr {self.peer_mac} dev {self.ifname} nud permanent"
        )


@dataclass(frozen=True, slots=True)
class AddRoute:
    """A route of the kernel that mirrors the tables; ``next_hops`` are (gateway address, port id), none: unreachable."""

    node: int
    prefix: int
    prefix_len: int
    next_hops: tuple[tuple[int, int], ...]
    table: int = MAIN_TABLE

    def describe(self) -> str:
        """Return the equal shell command."""
        prefix = f"{IPv4Address(self.prefix)}/{self.prefix_len}"
        table = "" if self.table == MAIN_TABLE else f" table {self.table}"
        if not self.next_hops:
            return f"ip route add unreachable {prefix}{table}"
        hops = " ".join(f"nexthop via {IPv4Address(gateway)}" for gateway, _ in self.next_hops)
        return f"ip route add {prefix}{table} {hops}"


@dataclass(frozen=True, slots=True)
class AddRule:
    """Packets from an address of the node look into a routing table of their own."""

    node: int
    source: int
    table: int

    def describe(self) -> str:
        """Return the equal shell command."""
        return f"ip rule add from {IPv4Address(self.source)} table {self.table}"


@dataclass(frozen=True, slots=True)
class AttachPrograms:
    """The eBPF programs of a port, and the port brought up."""

    node: int
    port: int
    ifname: str
    host: bool

    def describe(self) -> str:
        """Return the equal shell commands."""
        if self.host:
            programs = "ingress bpf da host_ingress; tc filter add dev {0} egress bpf da host_egress"
        else:
            programs = "ingress bpf da switch_ingress"
        programs = programs.format(self.ifname)
        return f"tc qdisc add dev {self.ifname} clsact; tc filter add dev {self.ifname} {programs}; ip link set {self.ifname} up"


Operation = CreateNamespace | CreateLink | ShapePort | AddAddress | AddRoute | AddRule | AttachPrograms
