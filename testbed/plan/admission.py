"""What receiver-driven admission should lead to: its loop time, the queue it bounds, the throughput it allows.

N connections send to one NIC of rate C, each with a window W in G grants. A piece of W/G is granted, its CTS frame travels, its
data travels; when all of it is received it is granted anew. Where the pieces of all senders arrive *together* each takes
N W/(G C) to be received, so throughput = min(C, N W / (RTT + N W/(G C))): half of the link for W = BDP/N and G = 1. Where they
arrive *in turn* each takes W/(G C), so throughput = min(C, N W / (RTT + W/(G C))): 1/(1 + 1/N) of the link then. Windows that
begin together do not stay so: who is ahead by d sends d C alone, so that N - 1 others stand behind it, and is ahead by (N - 1) d
a loop later. For more than two senders a transfer begins as the first and comes to the second.

What is sent and not arrived is N W at most. It stands in the queue before that NIC but for what has left it meanwhile: while the
windows come in, each at line rate, min(W, BDP) of them leave. All senders may hand over a tick's frames at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from testbed.collectives import Schedule
from testbed.roce.queue_pairs import Connection
from testbed.roce.wire import CONTROL_PRIORITIES, CTS_FRAME_BYTES, LINK_OVERHEAD_BYTES, Opcode, frame_bytes
from testbed.routing import Path
from testbed.scenario import AdmissionScheme, Scenario
from testbed.topology import Topology

if TYPE_CHECKING:
    from testbed.plan.model import Plan, PlannedWorkload


@dataclass(frozen=True, slots=True)
class AdmissionForecast:
    """What admission should lead to at the NIC that receives from most connections at once.

    Attributes:
        window_bytes: W of each connection, payload.
        grants: Pieces of W.
        priority: Priority of the CTS frames.
        shares_queue: Whether they wait in the data's queue.
        senders: N, connections into that NIC that may send from the beginning; 1 where there are none.
        loop_ns: RTT: from a grant to the arrival of its first packet, without queues, the longest of them.
        bdp_bytes: C times the loop time, wire bytes.
        throughput_fraction: Predicted throughput over C with pieces that arrive in turn.
        together_throughput_fraction: The same with pieces that arrive together, as those of the first window do.
        grant_ns: What of the loop is the CTS frame's: the first data waits for it.
        busy_ns: Time at rate C of all that this NIC receives.
    """

    window_bytes: int
    grants: int
    priority: int
    shares_queue: bool
    senders: int
    loop_ns: int
    bdp_bytes: int
    throughput_fraction: float
    together_throughput_fraction: float
    grant_ns: int
    busy_ns: float

    def stretched_ns(self, ideal_cct_ns: float) -> float:
        """Return the completion time when the NIC receives at the predicted throughput and nothing else slows down."""
        return ideal_cct_ns + self.grant_ns + self.busy_ns * (1.0 / self.throughput_fraction - 1.0)


def grant_priority(scenario: Scenario) -> int:
    """Return the priority of CTS frames."""
    given = scenario.transport.admission.priority
    return scenario.qos.lossless_priority if given is None else given


def grants_share_queue(scenario: Scenario) -> bool:
    """Return whether CTS frames wait in the data's queue."""
    return scenario.transport.admission.scheme is AdmissionScheme.CTS and not (
        CONTROL_PRIORITIES >> grant_priority(scenario) & 1
    )


def grant_one_way_ns(paths: tuple[Path, ...], topology: Topology) -> npt.NDArray[np.int64]:
    """Return the time of a CTS frame to the sender of each path's data, without queues; links are alike both ways."""
    bits = 8e9 * (CTS_FRAME_BYTES + LINK_OVERHEAD_BYTES)
    return np.array(
        [
            round(path.delay_ns + sum(bits / topology.port(port).rate_bits_per_s for port in path.ports))
            for path in paths
        ],
        np.int64,
    )


def throughput_fraction(senders: int, window_bytes: float, grants: int, bdp_bytes: float, *, together: bool) -> float:
    """Return the predicted throughput over the link's rate, with pieces that arrive together or in turn; bytes on the wire."""
    in_flight = senders * window_bytes
    received = in_flight if together else window_bytes
    return min(1.0, in_flight / (bdp_bytes + received / grants))


def peak_bound_bytes(senders: int, window_bytes: float, bdp_bytes: float, batch_bytes: float) -> float:
    """Return what the queue before the receiving NIC stays below."""
    return senders * window_bytes - min(window_bytes, bdp_bytes) + senders * batch_bytes


def forecast_admission(
    scenario: Scenario,
    topology: Topology,
    messages: Schedule,
    connections: tuple[Connection, ...],
    paths: tuple[Path, ...],
    one_way_ns: npt.NDArray[np.int64],
) -> AdmissionForecast | None:
    """Return the forecast of a workload item; None without admission, or without a connection over the network.

    Args:
        scenario: What is asked for.
        topology: Ports and links.
        messages: The item before it is spread over queue pairs.
        connections: Its queue pairs, ``qps_per_connection`` for each of the first connections of `messages`.
        paths: The path of each.
        one_way_ns: Propagation and frame times of each.
    """
    admission, mtu = scenario.transport.admission, scenario.transport.mtu_bytes
    if admission.scheme is not AdmissionScheme.CTS or not connections:
        return None
    qps = scenario.transport.qps_per_connection
    nic = np.array([connection.responder.local.nic for connection in connections[::qps]], np.int64)
    # A connection may send from the beginning if its first transfer waits for nothing.
    carried, first = np.unique(messages.connection, return_index=True)
    free = np.diff(messages.dep_offsets)[first] == 0
    at_once = carried[free & (carried < len(nic))]
    counts = np.bincount(nic[at_once] if len(at_once) else nic[:1])
    busiest = int(counts.argmax())
    grant_ns = grant_one_way_ns(paths, topology)
    loop_ns = (one_way_ns + grant_ns).reshape(-1, qps).max(axis=1)
    longest = int(loop_ns[nic == busiest].max())
    rate = topology.nics[busiest].rate_bits_per_s / 8e9
    wire_per_payload = (frame_bytes(Opcode.WRITE_MIDDLE, mtu) + LINK_OVERHEAD_BYTES) / mtu
    senders = int(counts[busiest])
    window = admission.window_bytes // mtu * mtu * wire_per_payload
    received = int(messages.nbytes[np.isin(messages.connection, np.flatnonzero(nic == busiest))].sum())
    fractions = [
        throughput_fraction(senders, window, admission.grants, rate * longest, together=together)
        for together in (False, True)
    ]
    return AdmissionForecast(
        window_bytes=admission.window_bytes,
        grants=admission.grants,
        priority=grant_priority(scenario),
        shares_queue=grants_share_queue(scenario),
        senders=senders,
        loop_ns=longest,
        bdp_bytes=round(rate * longest),
        throughput_fraction=fractions[0],
        together_throughput_fraction=fractions[1],
        grant_ns=int(grant_ns.reshape(-1, qps).max(axis=1)[nic == busiest].max()),
        busy_ns=received * wire_per_payload / rate,
    )


def forecast_peak_bytes(plan: Plan, planned: PlannedWorkload) -> int | None:
    """Return the bound of the queue before the busiest NIC, in frame bytes without FCS; None without admission."""
    found = planned.admission
    if found is None:
        return None
    mtu = plan.scenario.transport.mtu_bytes
    frame = frame_bytes(Opcode.WRITE_FIRST, mtu)  # the larger ones, with a RETH
    tick_ns = plan.dilation.wall_tick_ns / plan.dilation.value
    tick_bytes = found.bdp_bytes * tick_ns / found.loop_ns
    # A tick hands over the frames that begin in it, one more where it is a little late.
    batch = (math.ceil(tick_bytes / plan.frame_wire_bytes) + 1) * frame
    window = found.window_bytes // mtu * frame
    return round(peak_bound_bytes(found.senders, window, found.bdp_bytes * frame / plan.frame_wire_bytes, batch))
