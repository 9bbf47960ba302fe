"""The QPs of a run: numbers, ports, addresses and initial PSNs of every connection's two ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from testbed.roce.wire import DATA_PRIORITY, source_port

REQUESTER, RESPONDER = 0, 1
# QPN of row 0 of the QP table; 0 and 1 are management QPs in InfiniBand.
QPN_BASE = 0x100

# Frames in a host's queue beyond which its NIC waits, at most: a paused or starved host then stops by itself.
NIC_QUEUE_FRAMES = 48


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A rank and the NIC that it uses, as the frames name it.

    Attributes:
        rank: The rank.
        address: IPv4 address of the NIC.
        mac: MAC address of the NIC.
        next_hop_mac: MAC address of the leaf's port.
        nic: Number of the NIC, counted over the fabric; several ranks may share one.
        host: Number of its host.
    """

    rank: int
    address: int
    mac: str
    next_hop_mac: str
    nic: int
    host: int


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
    """A reliable connection: requester and responder, the PSN at which its data begins, and the priority of its data."""

    requester: QueuePair
    responder: QueuePair
    initial_psn: int
    priority: int = DATA_PRIORITY


@overload
def qp_index(connection: int, role: int) -> int: ...


@overload
def qp_index(connection: npt.NDArray[np.int64], role: int) -> npt.NDArray[np.int64]: ...


def qp_index(connection: int | npt.NDArray[np.int64], role: int) -> int | npt.NDArray[np.int64]:
    """Return the row of ``qps`` of one end of a connection, or of several."""
    return 2 * connection + role


@overload
def qpn_of(connection: int, role: int) -> int: ...


@overload
def qpn_of(connection: npt.NDArray[np.int64], role: int) -> npt.NDArray[np.int64]: ...


def qpn_of(connection: int | npt.NDArray[np.int64], role: int) -> int | npt.NDArray[np.int64]:
    """Return the QPN of one end of a connection, or of several."""
    return QPN_BASE + qp_index(connection, role)


def build_connections(
    pairs: list[tuple[int, int]],
    endpoints: list[Endpoint],
    *,
    source_port_per_qp: bool,
    rng: np.random.Generator,
    priorities: Sequence[int] | None = None,
) -> list[Connection]:
    """Return a connection per ``(source rank, destination rank)`` pair.

    Args:
        pairs: Ranks at both ends, one pair per QP pair.
        endpoints: The NIC of each rank.
        source_port_per_qp: Derive the UDP source port from the QPNs as Linux does; otherwise all QPs between two ranks
            share the one of their first QP.
        rng: Draws the initial PSNs.
        priorities: Of the data of each pair; the customary one without.

    Raises:
        ValueError: If both ends of a pair are on one host: that is no way over the network.

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
        if local.host == remote.host:
            raise ValueError(f"ranks {source} and {destination} are both on host{local.host}: QPs join hosts")
        connections.append(
            Connection(
                QueuePair(requester_qpn, responder_qpn, local, remote, ports[0]),
                QueuePair(responder_qpn, requester_qpn, remote, local, ports[1]),
                int(psns[index]),
                DATA_PRIORITY if priorities is None else priorities[index],
            )
        )
    return connections


def nics_of(connections: list[Connection]) -> npt.NDArray[np.int64]:
    """Return the number of the NIC that each connection sends from."""
    return np.array([connection.requester.local.nic for connection in connections], np.int64)
