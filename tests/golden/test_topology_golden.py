"""Golden renderings of small fabrics: nodes, ports, addresses, kernel routes and forwarding tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.routing import ForwardingTables, routing_scheme
from testbed.topology import LinkSpec, Topology, build_clos, build_star, format_address

GOLDEN = Path(__file__).parent / "topology"
HOST_LINK = LinkSpec(400_000_000_000, 600)
UPLINK = LinkSpec(800_000_000_000, 1000)


def clos(*hosts_per_leaf: int, spines: int) -> Topology:
    return build_clos(hosts_per_leaf=hosts_per_leaf, spines=spines, host_link=HOST_LINK, uplink=UPLINK)


FABRICS = {
    "star-3": build_star(hosts=3, host_link=HOST_LINK),
    "clos-1-leaf": clos(2, spines=0),
    "clos-2x2x2": clos(2, 2, spines=2),
    "clos-uneven-3-1-2x3": clos(3, 1, 2, spines=3),
}


def render(topology: Topology, tables: dict[str, ForwardingTables]) -> Iterator[str]:
    """Yield the lines of a fabric's text rendering."""
    yield f"slots {topology.slots}, {topology.slot_stride} per leaf"
    for node in topology.nodes:
        yield ""
        yield f"{node.index} {node.name} ({node.kind})"
        for port in map(topology.port, node.ports):
            yield (
                f"  {port.id} {port.ifname} {port.mac} {format_address(port.address)}/31"
                f" -> {topology.port_name(port.peer)} ({port.peer})"
                f" {port.rate_bits_per_s} bit/s {port.delay_ns} ns"
            )
        for route in topology.kernel_routes(node):
            hops = ", ".join(
                f"{format_address(hop.address)} dev {topology.port(hop.port).ifname}" for hop in route.next_hops
            )
            where = f"via {hops}" if hops else "unreachable"
            yield f"  route {format_address(route.prefix)}/{route.prefix_length} {where}"
    yield ""
    for link in topology.links:
        yield f"link {link.index} {link.name} {link.a} {link.b}"
    for name, table in tables.items():
        yield ""
        yield f"tables {name}"
        for index, group in enumerate(table.groups):
            members = " ".join(topology.port_name(port_id) for port_id in group.members)
            yield f"  group {index} {group.selector} fields={int(group.hash_fields)} seed={group.seed}: {members}"
        for node in topology.nodes:
            row = " ".join(f"{group:>2}" for group in table.fib[node.index].tolist())
            yield f"  fib {node.name}: {row}"


@pytest.mark.parametrize("name", sorted(FABRICS))
def test_fabric_is_as_recorded(name: str, request: pytest.FixtureRequest) -> None:
    topology = FABRICS[name]
    tables = {scheme: routing_scheme(scheme).build_tables(topology, hash_seed=1) for scheme in ("ecmp", "pinning")}
    observed = "".join(f"{line}\n" for line in render(topology, tables))
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden", default=False):
        file.write_text(observed)
    assert file.is_file(), f"{file} is missing: run pytest --update-golden"
    assert observed == file.read_text()


def test_every_recording_has_its_fabric() -> None:
    assert sorted(file.stem for file in GOLDEN.iterdir()) == sorted(FABRICS)
