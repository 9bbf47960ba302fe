"""What a routing scheme is: a pure function from a topology to forwarding tables."""

from __future__ import annotations

from typing import Protocol

from testbed.routing.tables import ForwardingTables
from testbed.topology import Topology


class RoutingScheme(Protocol):
    """Fills the forwarding tables of every switch.

    A new scheme is one file with one class, its entry in ``ROUTING_SCHEMES``, a test and a docs page. All it
    decides stands in the tables, which the eBPF program, ``trace_path`` and the predictor read alike.
    """

    @property
    def name(self) -> str:
        """The name scenarios choose it by."""

    def build_tables(self, topology: Topology, *, hash_seed: int) -> ForwardingTables:
        """Return the forwarding tables of the whole fabric.

        Args:
            topology: The fabric.
            hash_seed: Seed of the leaf tier's hash, 0 to 2**32 - 1. All switches of a tier share a seed, as
                real fleets configure them; a scheme that hashes at another tier must derive another seed for
                it, or the second choice repeats the first (polarisation).
        """
