"""The QPs of a run: numbers, ports, addresses and initial PSNs of every connection's two ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.roce.wire import source_port

REQUESTER, RESPONDER = 0, 1
# QPN of row 0 of the QP table; 0 and 1 are management QPs in InfiniBand.
QPN_BASE = 0x100


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One NIC port of a host, as the frames name it."""

    rank: int
    address: int
    mac: str
    next_hop_mac: str


@dataclass(frozen=True, slots=True)
class QueuePair:
    """One end of a connection.

    Attributes:
        qpn: Its queue pair number.
        peer_qpn: The other end's.
        local: The NIC it lives on.
        remote: The NIC it talks to.
        udp_source_port: Source port of the frames it sends.
    """

    qpn: int
    peer_qpn: int
    local: Endpoint
    remote: Endpoint
    udp_source_port: int


@dataclass(frozen=True, slots=True)
class Connection:
    """A reliable connection: requester and responder, and the PSN at which its data begins."""

    requester: QueuePair
    responder: QueuePair
    initial_psn: int


def qp_index(connection: int, role: int) -> int:
    """Return the row of ``qps`` of one end of a connection."""
    return 2 * connection + role


def qpn_of(connection: int, role: int) -> int:
    """Return the QPN of one end of a connection."""
    return QPN_BASE + qp_index(connection, role)


def build_connections(
    pairs: list[tuple[int, int]],
    endpoints: list[Endpoint],
    *,
    source_port_per_qp: bool,
    rng: np.random.Generator,
) -> list[Connection]:
    """Return a connection per ``(source rank, destination rank)`` pair.

    Args:
        pairs: Ranks at both ends, one pair per QP pair.
        endpoints: The NIC of each rank.
        source_port_per_qp: Derive the UDP source port from the QPNs as Linux does; otherwise all QPs between two ranks
            share the one of their first QP.
        rng: Draws the initial PSNs.

    Source:
        Linux drivers/infiniband/core, ``rdma_calc_flow_label()`` and ``rdma_flow_label_to_udp_sport()``.
    """
    psns = rng.integers(0, 1 << 24, size=len(pairs))
    first_port: dict[tuple[int, int], tuple[int, int]] = {}
    connections = []
    for index, (source, destination) in enumerate(pairs):
        requester_qpn, responder_qpn = qpn_of(index, REQUESTER), qpn_of(index, RESPONDER)
        ports = (
            int(source_port(requester_qpn, responder_qpn)),
            int(source_port(responder_qpn, requester_qpn)),
        )
        if not source_port_per_qp:
            ports = first_port.setdefault((source, destination), ports)
        local, remote = endpoints[source], endpoints[destination]
        connections.append(
            Connection(
                QueuePair(requester_qpn, responder_qpn, local, remote, ports[0]),
                QueuePair(responder_qpn, requester_qpn, remote, local, ports[1]),
                int(psns[index]),
            )
        )
    return connections


def ranks_of(connections: list[Connection]) -> npt.NDArray[np.int64]:
    """Return the requester's rank of each connection."""
    return np.array([connection.requester.local.rank for connection in connections], np.int64)
