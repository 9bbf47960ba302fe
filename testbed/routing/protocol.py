"""What a routing scheme is: a pure function from a topology to forwarding tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from testbed.routing.hashing import FlowKey, tier_seed
from testbed.routing.links import ALL_UP, LinkState
from testbed.routing.tables import ForwardingTables, HashFunction
from testbed.topology import Node, Topology


class Demand(NamedTuple):
    """What one flow will carry: an entry of the traffic matrix.

    Attributes:
        src_port: Port id of the NIC that sends.
        flow: Header fields of its packets.
        nbytes: Payload bytes.
    """

    src_port: int
    flow: FlowKey
    nbytes: int


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """What else a scheme may go by, beside topology and seed.

    Attributes:
        flowlet_gap_ns: Pause after which a flow may change its path, emulated; 0 where the scenario gives none.
        spray_order: ``round_robin`` or ``random``: which uplink a sprayed packet takes.
        adaptive_scope: What adaptive routing goes by: ``local`` for queues alone, ``capacity`` for queues over what their
            paths can carry.
        traffic: The traffic matrix of every item of the workload; items run one after the other.
        hash_seed_per_tier: Whether leaves, spines and superspines hash with seeds of their own, see `seed_at`.
        hash_functions: What leaves, spines and superspines hash with, in this order; see `function_at`.
        resilient_hashing: Whether only the flows of a dead link's move when others remain; not the schemes' own work either.
        links: What state links are in, as far as a scheme that looks at it beyond what every switch does has been told.
            Rerouting around dead links is not the schemes' own work: see `testbed.routing.failures`.
    """

    flowlet_gap_ns: int = 0
    spray_order: str = "round_robin"
    adaptive_scope: str = "local"
    traffic: tuple[tuple[Demand, ...], ...] = ()
    hash_seed_per_tier: bool = True
    hash_functions: tuple[HashFunction, HashFunction, HashFunction] = (HashFunction.MURMUR3,) * 3
    resilient_hashing: bool = False
    links: LinkState = ALL_UP

    def seed_at(self, switch: Node, hash_seed: int) -> int:
        """Return the seed of a switch's hash, given the leaves'; that of the tier above differs unless the settings say no."""
        return tier_seed(hash_seed, switch.kind.tier) if self.hash_seed_per_tier else hash_seed

    def function_at(self, switch: Node) -> HashFunction:
        """Return what a switch hashes with: all of its tier alike."""
        return self.hash_functions[switch.kind.tier]


NO_SETTINGS = RoutingSettings()


class RoutingScheme(Protocol):
    """Fills the forwarding tables of every switch.

    A new scheme is one file in this package with one class and ``SCHEME``, an instance of it, beside a test and a row in
    docs/routing.md. All it decides stands in the tables, which the eBPF program, ``trace_path`` and the predictor read alike.
    """

    @property
    def name(self) -> str:
        """The name scenarios choose it by."""

    @property
    def summary(self) -> str:
        """What it does, in words that follow its name: "hashes the five-tuple"."""

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return the forwarding tables of the whole fabric.

        Args:
            topology: The fabric.
            hash_seed: Seed of the leaf tier's hash, 0 to 2**32 - 1. All switches of a tier share a seed, as
                real fleets configure them; a scheme that hashes at another tier must derive another seed for
                it (``settings.seed_at``), or the second choice repeats the first (polarisation).
            settings: What else it may go by; most schemes need none of it.
        """
