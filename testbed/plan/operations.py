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
class BackEnds:
    """Which of the kernel's means do the work, by name.

    Attributes:
        gate: Holds paused queues back: ``tbf`` or ``plug``.
        marker: Marks CE: ``bpf`` or ``red``.
        scheduler: Shares a port among several data priorities: ``htb``, ``ets`` or ``prio``.
        link_delay: Delays what crosses a link: ``netem``, or ``carrier``: whoever sends acts as if it were delayed.
        rxe: Where soft-RoCE devices stand: ``namespace``, on the NICs, or ``attachment``, outside, where rxe knows no namespaces;
            None until there are any.
    """

    gate: str = "tbf"
    marker: str = "bpf"
    scheduler: str = "htb"
    link_delay: str = "carrier"
    rxe: str | None = None


@dataclass(frozen=True, slots=True)
class QueueClass:
    """A data priority's queue at a port, and the weight of its share of the rate; None: it is strict."""

    priority: int
    weight: int | None


@dataclass(frozen=True, slots=True)
class KernelMarking:
    """Thresholds for a marker that is a qdisc."""

    kmin_bytes: int
    kmax_bytes: int
    pmax: float


@dataclass(frozen=True, slots=True)
class ShapePort:
    """The egress of a port: mq, what carries data, a FIFO for control.

    Data has a TBF; with several data priorities a scheduler with a class for each.

    Attributes:
        node: Node index.
        port: Port id.
        ifname: Interface.
        wall_rate_bytes_per_s: Of the shaper, wire bytes.
        burst_bytes: Its bucket.
        overhead_bytes: Charged per frame beside its length.
        frame_wire_bytes: The largest frame with that.
        classes: The data priorities' queues, in the order of their classes, the strict ones first; one of them: no scheduler.
        rest: The priority that takes what has none of these.
        gate: What holds a paused queue back: ``tbf`` or ``plug``; None where nothing is paused.
        marking: Thresholds where a qdisc marks; None where none does.
        scheduler: What shares the rate among several classes: ``htb``, ``ets`` or ``prio``.
        wall_delay_ns: Propagation that a qdisc adds; 0 where none does.
    """

    node: int
    port: int
    ifname: str
    wall_rate_bytes_per_s: int
    burst_bytes: int
    overhead_bytes: int
    frame_wire_bytes: int
    classes: tuple[QueueClass, ...]
    rest: int
    gate: str | None = None
    marking: KernelMarking | None = None
    scheduler: str = "htb"
    wall_delay_ns: int = 0

    def describe(self) -> str:
        """Return the equal shell commands."""
        add = f"tc qdisc add dev {self.ifname}"
        rate = f"{self.wall_rate_bytes_per_s * 8}bit"
        commands = [f"{add} root handle 1: mq"]
        if len(self.classes) == 1:
            shaper = f"tbf rate {rate} burst {self.burst_bytes} overhead {self.overhead_bytes}"
            commands += [f"{add} parent 1:1 {shaper}", *self._below("10:", add)]
        elif self.scheduler == "htb":
            commands += self._htb(add, rate)
        else:
            shaper = f"tbf rate {rate} burst {self.burst_bytes} overhead {self.overhead_bytes}"
            commands.append(f"{add} parent 1:1 handle 30: {shaper}")
            commands += [f"{add} below 30: {self._delay()}"] if self.wall_delay_ns else []
            commands.append(f"{add} below 30: handle 10: {self.scheduler} bands {len(self.classes)}{self._bands()}")
            for place in range(len(self.classes)):
                commands += self._below(f"10:{1 + place:x}", add, delayed=False)
        return "; ".join([*commands, f"{add} parent 1:2 {self._delay() or 'pfifo'}"])

    def _htb(self, add: str, rate: str) -> list[str]:
        """Return the commands of an HTB: with a strict class nothing is guaranteed to any, and they borrow in their order."""
        shares = [one.weight for one in self.classes if one.weight is not None]
        strict = len(self.classes) - len(shares)
        line = f"tc class add dev {self.ifname} parent 10:"
        tail = f"ceil {rate} burst {self.burst_bytes} overhead {self.overhead_bytes}"
        commands = [
            f"{add} parent 1:1 handle 10: htb default {1 + self._place(self.rest):x}",
            f"{line} classid 10:10 htb rate {rate} {tail}",
        ]
        for place, one in enumerate(self.classes):
            share = (
                8 if strict or one.weight is None else round(self.wall_rate_bytes_per_s * one.weight / sum(shares)) * 8
            )
            minor = f"10:{1 + place:x}"
            quanta = 1.0 if one.weight is None else one.weight / min(shares)
            quantum = round(self.frame_wire_bytes * quanta)
            order = f"prio {min(place, strict)} quantum {quantum}"
            commands.append(f"{line}10 classid {minor} htb rate {share}bit {order} {tail}")
            if self.gate == "tbf":
                commands.append(f"{add} parent {minor} tbf rate {self.wall_rate_bytes_per_s * 128}bit")
            commands += self._below(minor, add)
        return commands

    def _bands(self) -> str:
        """Return how an ETS shares among its bands, and where both qdiscs send what names none."""
        rest = f" priomap {' '.join([str(self._place(self.rest))] * 16)}"
        if self.scheduler == "prio":
            return rest
        shares = [one.weight for one in self.classes if one.weight is not None]
        quanta = " ".join(str(round(self.frame_wire_bytes * weight / min(shares))) for weight in shares)
        return f" strict {len(self.classes) - len(shares)}{' quanta ' * bool(quanta)}{quanta}{rest}"

    def _place(self, priority: int) -> int:
        return [one.priority for one in self.classes].index(priority)

    def _delay(self) -> str:
        return f"netem delay {self.wall_delay_ns}ns" if self.wall_delay_ns else ""

    def _below(self, parent: str, add: str, *, delayed: bool = True) -> list[str]:
        commands = []
        if self.wall_delay_ns and delayed:
            commands.append(f"{add} below {parent} {self._delay()}")
        if self.marking is not None:
            low, high, pmax = self.marking.kmin_bytes, self.marking.kmax_bytes, self.marking.pmax
            commands.append(f"{add} below {parent} red min {low} max {high} probability {pmax:g} ecn nodrop")
        if self.gate == "plug":
            commands.append(f"{add} below {parent} plug")
        return commands


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
