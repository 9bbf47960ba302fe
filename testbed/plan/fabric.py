"""What a scenario's fabric is made of: nodes and links, ranks and their NICs, and what joins the ranks of a host."""

from __future__ import annotations

import numpy as np

from testbed.collectives import IntraHostLinks
from testbed.roce.queue_pairs import Endpoint
from testbed.scenario import Scenario, StarFabric, ZonesFabric
from testbed.topology import LinkSpec, RankMap, Topology, build_clos, build_star, build_zones


def build_topology(scenario: Scenario) -> Topology:
    """Return the nodes, ports and links of a scenario."""
    fabric = scenario.fabric
    host_link = LinkSpec(fabric.host_link.rate_bits_per_s, fabric.host_link.delay_ns)
    if isinstance(fabric, StarFabric):
        return build_star(hosts=fabric.nhosts, host_link=host_link, nics_per_host=fabric.nics_per_host)
    uplink = LinkSpec(fabric.uplink.rate_bits_per_s, fabric.uplink.delay_ns)
    if isinstance(fabric, ZonesFabric):
        between = fabric.superspine_link
        return build_zones(
            zones=fabric.zones,
            hosts_per_leaf=fabric.host_counts,
            spines=fabric.spines,
            superspines=fabric.superspines,
            host_link=host_link,
            uplink=uplink,
            superspine_link=LinkSpec(between.rate_bits_per_s, between.delay_ns),
            nics_per_host=fabric.nics_per_host,
        )
    return build_clos(
        hosts_per_leaf=fabric.host_counts,
        spines=fabric.spines,
        host_link=host_link,
        uplink=uplink,
        nics_per_host=fabric.nics_per_host,
    )


def build_rank_map(scenario: Scenario) -> RankMap:
    """Return which host, GPU and NIC each rank has."""
    fabric = scenario.fabric
    return RankMap(fabric.nhosts, fabric.gpus_per_host, fabric.nics_per_host)


def build_endpoints(topology: Topology, ranks: RankMap) -> list[Endpoint]:
    """Return the NIC of every rank as frames name it."""
    endpoints = []
    for rank in range(ranks.nranks):
        port = topology.nics[ranks.nic(rank)]
        next_hop = topology.port(port.peer)
        endpoints.append(Endpoint(rank, port.address, port.mac, next_hop.mac, ranks.nic(rank), ranks.host(rank)))
    return endpoints


def build_intra_host_links(scenario: Scenario) -> IntraHostLinks:
    """Return what joins the ranks of a host."""
    ranks, nvlink = build_rank_map(scenario), scenario.fabric.nvlink
    hosts = np.array([ranks.host(rank) for rank in range(ranks.nranks)], np.int64)
    return IntraHostLinks(hosts, nvlink.rate_bits_per_s, nvlink.delay_ns)
