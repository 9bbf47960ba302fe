"""A connection as switches see it: the fields that they hash, and the ways that its packets take."""

from __future__ import annotations

from testbed.roce.queue_pairs import Connection
from testbed.roce.wire import IP_PROTOCOL_TCP, IP_PROTOCOL_UDP, ROCE_UDP_PORT
from testbed.routing import FlowKey, ForwardingTables, Path, Route, trace_path, trace_routes
from testbed.scenario import Carrier
from testbed.topology import Topology


def flow_of(connection: Connection, carrier: Carrier = Carrier.ENGINE) -> FlowKey:
    """Return the header fields that switches hash of a connection's data."""
    requester = connection.requester
    tcp = carrier is Carrier.TCP
    return FlowKey(
        src_address=requester.local.address,
        dst_address=requester.remote.address,
        src_port=requester.udp_source_port,
        dst_port=ROCE_UDP_PORT,
        protocol=IP_PROTOCOL_TCP if tcp else IP_PROTOCOL_UDP,
        dst_qp=0 if tcp else requester.peer_qpn,
    )


def answers_of(connection: Connection) -> FlowKey:
    """Return the header fields that switches hash of what the responder sends back."""
    responder = connection.responder
    return FlowKey(
        src_address=responder.local.address,
        dst_address=responder.remote.address,
        src_port=responder.udp_source_port,
        dst_port=ROCE_UDP_PORT,
        protocol=IP_PROTOCOL_UDP,
        dst_qp=responder.peer_qpn,
    )


def trace_connection(connection: Connection, topology: Topology, tables: ForwardingTables, carrier: Carrier) -> Path:
    """Return the path of a connection's data."""
    nic = topology.nics[connection.requester.local.nic]
    return trace_path(topology, tables, nic.id, flow_of(connection, carrier))


def trace_connection_routes(
    connection: Connection,
    topology: Topology,
    tables: ForwardingTables,
    carrier: Carrier,
    *,
    over_time: bool = False,
) -> tuple[Route, ...]:
    """Return all ways of a connection's packets; ``over_time`` as for `testbed.routing.trace_routes`."""
    nic = topology.nics[connection.requester.local.nic]
    return trace_routes(topology, tables, nic.id, flow_of(connection, carrier), over_time=over_time)
