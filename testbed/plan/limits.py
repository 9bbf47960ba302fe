"""What is too large to be emulated. A prediction has no such limit."""

from __future__ import annotations

from testbed.errors import PlanError
from testbed.scenario import Scenario
from testbed.topology import NodeKind, Topology

MAX_EMULATED_HOSTS = 1024
"""Hosts, and ranks: beyond that a machine would take hours for a second, and bring-up minutes."""

MAX_EMULATED_SWITCHES = 256
"""Switches of each tier."""

MAX_EMULATED_LINKS = 32_767
"""A port's number has 16 bits in its MAC address, and every link has two ports."""

_HINT = "`testbed predict` computes fabrics of any size; to emulate this one, make it smaller"


def check_emulation_limits(scenario: Scenario, topology: Topology) -> None:
    """Raise PlanError if a fabric is too large to be emulated."""
    counts = [
        ("fabric.hosts_per_leaf", "hosts", len(topology.hosts), MAX_EMULATED_HOSTS),
        ("fabric.gpus_per_host", "ranks", scenario.fabric.nranks, MAX_EMULATED_HOSTS),
    ]
    for kind, name, key in (
        (NodeKind.LEAF, "leaves", "fabric.leaves"),
        (NodeKind.SPINE, "spines", "fabric.spines"),
        (NodeKind.SUPERSPINE, "superspines", "fabric.superspines"),
    ):
        counts.append((key, name, sum(node.kind is kind for node in topology.nodes), MAX_EMULATED_SWITCHES))
    counts.append(("fabric.spines", "links", len(topology.links), MAX_EMULATED_LINKS))
    for key, what, count, most in counts:
        if count > most:
            raise PlanError(f"{key}: {count} {what} are too many to emulate: at most {most}", hint=_HINT)
