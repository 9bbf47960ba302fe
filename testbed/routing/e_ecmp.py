"""Enhanced ECMP: the hash reads the destination queue pair too."""

from __future__ import annotations

from testbed.routing.ecmp import hashed_tables
from testbed.routing.protocol import NO_SETTINGS, RoutingSettings
from testbed.routing.tables import ForwardingTables, HashField
from testbed.topology import Topology


class EnhancedEcmp:
    """Hashes the five-tuple and the destination QP of RoCEv2 over all uplinks of the leaf.

    The queue pairs of one connection then take paths of their own, even with one UDP source port for all of them: it gains
    what ``transport.qps_per_connection`` gives it, and nothing with one queue pair.

    Source:
        Gangidi et al., SIGCOMM 2024 ("E-ECMP": a user-defined field of the switch's hash over bytes 5 to 7 of the BTH).
    """

    name = "e-ecmp"
    summary = "hashes the five-tuple and the destination QP"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        """Return the tables: one group of all uplinks per leaf for everything outside its rack."""
        return hashed_tables(topology, HashField.FIVE_TUPLE | HashField.DST_QP, hash_seed, settings)


SCHEME = EnhancedEcmp()
